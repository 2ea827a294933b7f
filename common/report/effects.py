"""Effects of arms over seeds, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.report.numbers import MISSING, Row, Show, listed, number_format
from common.statistics import FLIPS

TARGET_NAMES = {
    "mean": "the mean of the peers",
    "strongest": "the strongest peer",
    "weakest": "the weakest peer",
    "ensemble": "the ensemble",
}


SHORT_TARGETS = {
    "mean": "mean of peers",
    "strongest": "strongest peer",
    "weakest": "weakest peer",
    "ensemble": "ensemble",
}


def interval_text(effect: Row | None, summary: Mapping[str, Any]) -> str:
    """Write an effect as ``mean [low, high]``; a dash where there is none."""
    if effect is None:
        return MISSING
    show = summary_format(summary)
    mean = show(effect["mean"], sign=True)
    if effect["low"] is None:
        return mean
    return f"{mean} [{show(effect['low'], sign=True)}, {show(effect['high'], sign=True)}]"


def shown_words(summary: Mapping[str, Any]) -> list[str]:
    """Say in a sentence or two which arms are shown to be better or worse than the control.

    Args:
        summary: From ``common.statistics.summarise``, or ``corrected``.

    Returns:
        A sentence for the better and one for the worse arms, or one that nothing is shown.
    """
    told = []
    for verdict, sign in (("better", 1), ("worse", -1)):
        found = {
            arm: [
                SHORT_TARGETS.get(what, what)
                for what, effect in {**effects, **summary["peer_gains"][arm]}.items()
                if effect is not None and effect["shown"] and sign * effect["mean"] > 0
            ]
            for arm, effects in summary["gains"].items()
        }
        arms = [f"{arm} ({', '.join(targets)})" for arm, targets in found.items() if targets]
        if arms:
            told.append(f"Shown to be {verdict} than {summary['control']}: {listed(arms)}.")
    return told or [f"No arm is shown to be better or worse than {summary['control']}."]


def summary_format(summary: Mapping[str, Any]) -> Show:
    """Choose one number of decimals for all values of a summary."""
    arms = summary["arms"].values()
    return number_format(arm[when]["mean"]["mean"] for arm in arms for when in ("before", "after"))


def spread_text(spread: Row | None, show: Show) -> str:
    """Write ``mean ± standard deviation``."""
    if spread is None:
        return MISSING
    return show(spread["mean"]) + ("" if spread["sd"] is None else f" ± {show(spread['sd'])}")


def has_flips(summary: Mapping[str, Any]) -> bool:
    """Whether any arm tells of fixed and broken samples."""
    peers = [peer for arm in summary["arms"].values() for peer in arm["peers"].values()]
    return any(peer[what] is not None for peer in peers for what in FLIPS)
