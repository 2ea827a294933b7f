"""Effects of arms over seeds, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.report.numbers import MISSING, Row, Show, listed, number_format
from common.statistics import FLIPS, PRIMARY, headline

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


def starred(summary: Mapping[str, Any], effect: Row | None) -> str:
    """Write an effect with a star where it is shown."""
    star = " *" if effect is not None and effect["shown"] else ""
    return interval_text(effect, summary) + star


def headline_words(summary: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Say what the primary family shows, and nothing else: that is rarely wrong.

    Args:
        summary: From ``common.statistics.corrected``.

    Returns:
        A sentence that counts the arms, and a line for each arm that it counts, its mean first.
    """
    primary = {
        what
        for arm, effects in summary["gains"].items()
        for what, effect in {**effects, **summary["peer_gains"][arm]}.items()
        if effect is not None and effect["primary"]
    }
    of_what = TARGET_NAMES[PRIMARY] if primary <= {PRIMARY} else "any target"
    found, control = headline(summary), summary["control"]
    if not found:
        return f"No arm is shown to be better or worse than {control} for {of_what}.", []
    counts = []
    for verdict, sign in (("better", 1), ("worse", -1)):
        count = sum(any(sign * e["mean"] > 0 for e in arm.values()) for arm in found.values())
        if count:
            counts.append(f"{count} {'are' if count > 1 else 'is'} shown to be {verdict}")
    arms = len(summary["gains"])
    told = f"Of {arms} arm{'s' * (arms != 1)}, {listed(counts)} than {control} for {of_what}."
    return told, [_point(arm, effects, summary) for arm, effects in found.items()]


def _point(arm: str, effects: Mapping[str, Row], summary: Mapping[str, Any]) -> str:
    told = []
    for verdict, sign in (("better", 1), ("worse", -1)):
        names = [
            f"{SHORT_TARGETS.get(what, what)} {interval_text(effect, summary)}"
            for what, effect in effects.items()
            if sign * effect["mean"] > 0
        ]
        if names:
            told.append(f"{verdict}: {listed(names)}")
    return f"{arm} is {'; '.join(told)}"


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
