"""What corrected summaries show, in words: first what counts, then what is secondary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.report.effects import TARGET_NAMES, interval_text
from common.report.numbers import MISSING, Row, number
from common.statistics import ENOUGH_SEEDS, PRIMARY, distinct_targets

Summaries = Sequence[Mapping[str, Any]]
_CALIBRATED = {
    "ece": "calibrated",
    "ece_calibrated": "calibrated, each at a temperature fitted on the held-out part,",
}


def every_effect(summary: Mapping[str, Any]) -> dict[str, dict[str, Row | None]]:
    """Return each arm's effects on targets and peers."""
    return {
        arm: {**effects, **summary["peer_gains"][arm]} for arm, effects in summary["gains"].items()
    }


def tested(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Row]]:
    """Yield arm, what it is compared with, target and effect; each thing once.

    Args:
        summary: From ``common.statistics.corrected``.
    """
    compared = [
        *((arm, summary["control"], effects) for arm, effects in every_effect(summary).items()),
        *((pair["first"], pair["second"], pair["effects"]) for pair in summary["pairs"]),
    ]
    for arm, against, effects in compared:
        for what in distinct_targets(summary):
            effect = effects[what]
            if effect is not None:
                yield arm, against, what, effect


def claims(summaries: Summaries, *, primary: bool) -> list[str]:
    """Say in a sentence each what is shown, of the primary family or of all others."""
    return [
        _claim(*one, summary)
        for summary in summaries
        for one in tested(summary)
        if one[3]["shown"] and one[3]["primary"] == primary
    ]


def _claim(arm: str, against: str, what: str, effect: Row, summary: Mapping[str, Any]) -> str:
    verdict = "better" if effect["mean"] > 0 else "worse"
    clean, _, corruption = summary["metric"].partition("@")
    measure = f"in {in_words(summary['metric'])}"
    if clean in _CALIBRATED:
        measure = _CALIBRATED[clean] + " on the corrupted test set" * bool(corruption)
    return (
        f"{arm} is {verdict} {measure} than {against} for {TARGET_NAMES.get(what, what)}: "
        f"{interval_text(effect, summary)} (p {p_text(effect['p'])}, corrected "
        f"{p_text(effect['p_holm'])}; {effect['count']} seeds)."
    )


def secondary(summaries: Summaries, together: bool = False) -> list[str]:
    """Count what is shown beside the primary family, and say how often chance alone does that."""
    effects = [effect for summary in summaries for *_, effect in tested(summary)]
    shown = [effect["shown"] for effect in effects if not effect["primary"]]
    if not shown:
        return []
    over = "measure by itself" if together else "target over its arms alone"
    return [
        f"Secondary: {sum(shown)} of {len(shown)} other comparisons are shown, corrected for "
        f"each {over}. {_by_chance(summaries)}"
    ]


def _by_chance(summaries: Summaries) -> str:
    """Bound how often the families that are not primary show something where nothing is true."""
    families = [family for summary in summaries for family in summary["families"]]
    count = sum(not family["primary"] for family in families)
    alpha = 1 - summaries[0]["level"]
    product = f"{count} such correction{'s' * (count != 1)}, {100 * alpha:.2g} % each"
    if count * alpha < 1:
        return (
            f"Where nothing is true, up to {100 * count * alpha:.0f} in 100 experiments of this "
            f"size show at least one ({product})."
        )
    return (
        f"Where nothing is true, chance alone is to be expected to show some ({product}: up to "
        f"{count * alpha:.1f} of them)."
    )


def counted(summaries: Summaries) -> str:
    """Count what is not shown, of everything that was tested."""
    effects = [effect for summary in summaries for *_, effect in tested(summary)]
    rest = sum(not effect["shown"] for effect in effects)
    return (
        f"{rest} of {len(effects)} comparisons are not shown to differ from zero; that is no "
        "proof that they do not."
    )


def sentences(summaries: Summaries, together: bool = False) -> list[str]:
    """Say what is shown; one sentence for each effect that survives its correction.

    Args:
        summaries: From ``common.statistics.corrected``, with the same ``together``.
        together: One family over all targets.

    Returns:
        Sentences: what the primary family shows; how far what others show can be trusted, and each
        of that, called secondary; the last one counts what is not shown.
    """
    return [
        *claims(summaries, primary=True),
        *secondary(summaries, together),
        *(f"Secondary: {claim}" for claim in claims(summaries, primary=False)),
        counted(summaries),
    ]


def shown_means(summary: Mapping[str, Any], together: bool = False) -> str:
    """Say what is called shown, and which family the headline rests on."""
    alpha = 1 - summary["level"]
    named, over = f"is {TARGET_NAMES[PRIMARY]}", "all arms"
    if together:
        named, over = "are the mean, each peer and the ensemble", "all arms and targets together"
    return (
        f"An effect is called shown where at least {ENOUGH_SEEDS} seeds tell, its interval leaves "
        f"zero out, and its p-value, corrected by Holm's method, is at most {alpha:.2g}. "
        f"The primary target{'s' * together}, named in advance, {named}, in "
        f"{in_words(summary['metric'])} against {summary['control']}: what stands first comes "
        f"from there alone, corrected over {over}, and where nothing is true, at most "
        f"{100 * alpha:.2g} in 100 experiments show anything there. All other claims are secondary."
    )


def too_many_arms(summary: Mapping[str, Any]) -> list[str]:
    """Say in how many families so few seeds could show nothing at all."""
    seeds = len(summary["seeds"])
    weak = [family for family in summary["families"] if family["least_seeds"] > seeds]
    if not weak:
        return []
    least = max(family["least_seeds"] for family in weak)
    told = f"{len(weak)} of {len(summary['families'])} families"
    return [
        f"With {seeds} seed{'s' * (seeds != 1)} the test's smallest p-value is too large to "
        f"survive the correction in {told}: nothing can be shown there. Take at least {least} "
        "seeds, or fewer arms."
    ]


def in_words(metric: str) -> str:
    """Say what a metric is measured on, where that is not the clean test set."""
    clean, _, corruption = metric.partition("@")
    return f"{clean} on the corrupted test set" if corruption else clean


def p_text(p: float | None) -> str:
    """Write a p-value."""
    if p is None:
        return MISSING
    return "< 0.0001" if p < 1e-4 else number(p, 4)
