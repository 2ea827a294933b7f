"""The report of an experiment: what is shown, and what is not, after correction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.report.comparison import arms_table, comparison_teaching, peers_table
from common.report.comparison_figures import before_after_figure, flips_figure, forest, panels_of
from common.report.effects import SHORT_TARGETS, TARGET_NAMES, interval_text, summary_format
from common.report.numbers import MISSING, Row, epochs_of, is_finite, listed, number, series_of
from common.report.page import (
    Html,
    bullets,
    data_table,
    figure_grid,
    figure_tag,
    section,
    settings_table,
    tag,
    write_page,
)
from common.report.plots import color_of, draw, draw_legend, epoch_axis, short_name
from common.statistics import ENOUGH_SEEDS

Analysis = Mapping[str, Any]
WEIGHTS = {
    "chosen": "the epoch that the held-out part chose for each peer",
    "last": "the last epoch",
}
MANY_CLASSES = 30


def write_experiment(path: Path | str, title: str, analysis: Analysis) -> Path:
    """Write the report of an experiment.

    Args:
        path: The HTML file; written whole or not at all.
        title: Of the page.
        analysis: From ``common.experiment.results.analyse``.

    Returns:
        Where it lies.
    """
    summary = analysis["test"]
    body = [
        section("In short", *_words(analysis)),
        section("What was compared", arms_table(summary, analysis["about"])),
        section(
            f"Gains over {summary['control']}",
            tag("p", f"Measured on the test set at {WEIGHTS[analysis['primary']]}."),
            effects_table(summary),
            p_table(summary, analysis["together"]),
            figure_grid(forest(summary)),
        ),
        *_pairs_section(summary),
        section(
            "Before and after",
            peers_table(summary, analysis["flips"]),
            figure_grid([before_after_figure(summary), *flips_figure(summary, analysis["flips"])]),
        ),
        *_beside_section(analysis),
        *_others_sections(analysis),
        *_class_section(analysis),
        *_calibration_section(analysis),
        *_curves_section(analysis),
        *comparison_teaching(summary),
        section("Cost", _cost_table(analysis)),
        section("Settings", settings_table(analysis["settings"])),
    ]
    return write_page(path, title, body)


def experiment_sentences(analysis: Analysis) -> list[str]:
    """Say what is shown; one sentence for each effect that survives its correction.

    Args:
        analysis: From ``common.experiment.results.analyse``.

    Returns:
        Sentences; the last one counts what is not shown.
    """
    summary = analysis["test"]
    tested = list(_tested(summary))
    told = [_claim(*one, summary) for one in tested if one[3]["shown"]]
    if analysis["calibration"]:
        calibration = analysis["calibration"]
        kept = [one for one in _tested(calibration) if one[3]["shown"]]
        told += [_claim(*one, calibration) for one in kept]
        tested += _tested(calibration)
    rest = len(tested) - len(told)
    told.append(
        f"{rest} of {len(tested)} comparisons are not shown to differ from zero; that is no "
        "proof that they do not."
    )
    return told


def _tested(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Row]]:
    """Yield arm, what it is compared with, target and effect."""
    for arm, effects in summary["gains"].items():
        for what, effect in {**effects, **summary["peer_gains"][arm]}.items():
            if effect is not None:
                yield arm, summary["control"], what, effect
    for pair in summary["pairs"]:
        for what, effect in pair["effects"].items():
            if effect is not None:
                yield pair["first"], pair["second"], what, effect


def _claim(arm: str, against: str, what: str, effect: Row, summary: Mapping[str, Any]) -> str:
    verdict = "better" if effect["mean"] > 0 else "worse"
    measure = "calibrated" if summary["metric"] == "ece" else f"in {summary['metric']}"
    return (
        f"{arm} is {verdict} {measure} than {against} for {TARGET_NAMES.get(what, what)}: "
        f"{interval_text(effect, summary)} (p {p_text(effect['p'])}, corrected "
        f"{p_text(effect['p_holm'])}; {effect['count']} seeds)."
    )


def p_text(p: float | None) -> str:
    """Write a p-value."""
    if p is None:
        return MISSING
    return "< 0.0001" if p < 1e-4 else number(p, 4)


def cautions(analysis: Analysis) -> list[str]:
    """Say what keeps the experiment from showing anything."""
    summary = analysis["test"]
    found = []
    if analysis["missing"]:
        found.append(
            f"{len(analysis['missing'])} jobs are not finished ({listed(analysis['missing'][:6])}"
            f"{', ...' if len(analysis['missing']) > 6 else ''}); their seeds are left out."
        )
    seeds = len(summary["seeds"])
    if seeds < ENOUGH_SEEDS:
        found.append(f"{seeds} seeds prove nothing; take at least {ENOUGH_SEEDS}.")
    weak = [family for family in summary["families"] if family["least_seeds"] > seeds]
    if weak:
        least = max(family["least_seeds"] for family in weak)
        found.append(
            f"With {seeds} seeds the test's smallest p-value is too large to survive the "
            f"correction in {len(weak)} of {len(summary['families'])} families: nothing can be "
            f"shown there. Take at least {least} seeds, or fewer arms."
        )
    return found


def _words(analysis: Analysis) -> list[Html]:
    summary = analysis["test"]
    seeds = len(summary["seeds"])
    families = (
        "all arms and targets together"
        if analysis["together"]
        else "all arms, for each target by itself"
    )
    lead = (
        f"{listed(summary['names'])}: {len(summary['arms'])} arms from the same starts, over "
        f"{seeds} seed{'s' * (seeds != 1)}. Epochs and settings were chosen on a held-out part of "
        "the training data; the test set was measured at the end alone. An effect is called shown "
        f"where at least {ENOUGH_SEEDS} seeds tell and its p-value, corrected by Holm's method "
        f"over {families}, is at most {1 - summary['level']:.2g}."
    )
    shown = [tag("p", sentence, class_="caution") for sentence in cautions(analysis)]
    return [tag("p", lead, class_="lead"), *shown, bullets(experiment_sentences(analysis))]


def _columns(summary: Mapping[str, Any]) -> list[str]:
    return [*summary["targets"], *(summary["names"] if len(summary["names"]) > 1 else ())]


def _heads(columns: Sequence[str]) -> list[str]:
    return [SHORT_TARGETS.get(what, what) for what in columns]


def _starred(effect: Row | None, summary: Mapping[str, Any]) -> str:
    star = " *" if effect is not None and effect["shown"] else ""
    return interval_text(effect, summary) + star


def effects_table(summary: Mapping[str, Any]) -> Html:
    """Show every arm's gains with their intervals."""
    columns = _columns(summary)
    rows = []
    for arm, effects in summary["gains"].items():
        every = {**effects, **summary["peer_gains"][arm]}
        rows.append([arm, *(_starred(every.get(what), summary) for what in columns)])
    turned = "; positive is better" if summary["lower_is_better"] else ""
    caption = (
        f"Gain in {summary['metric']} over {summary['control']} with the same seed{turned}: mean "
        f"over seeds and {100 * summary['level']:g} % interval (Student's t, uncorrected). A star: "
        "shown, after correction. Strongest and weakest: at the start of each seed."
    )
    return data_table(caption, ["Arm", *_heads(columns)], rows)


def p_table(summary: Mapping[str, Any], together: bool) -> Html:
    """Show every arm's p-values, and what correction makes of them."""
    columns = _columns(summary)
    rows = []
    for arm, effects in summary["gains"].items():
        every = {**effects, **summary["peer_gains"][arm]}
        rows.append([arm, *(_p_cell(every.get(what)) for what in columns)])
    over = "all cells of this table" if together else "the arms of each column"
    caption = (
        "p-values of the paired sign-flip test over seeds, two-sided; behind the arrow corrected "
        f"by Holm's method over {over}. {_exactness(summary)}"
    )
    return data_table(caption, ["Arm", *_heads(columns)], rows)


def _p_cell(effect: Row | None) -> str:
    if effect is None:
        return MISSING
    return f"{p_text(effect['p'])} → {p_text(effect['p_holm'])}"


def _exactness(summary: Mapping[str, Any]) -> str:
    error = max((effect["p_error"] for *_, effect in _tested(summary)), default=0.0)
    if not error:
        return "All are exact: every sign pattern was looked at."
    return f"Sign patterns were drawn; the p-values' standard error is at most {error:.4f}."


def _pairs_section(summary: Mapping[str, Any]) -> list[Html]:
    if not summary["pairs"]:
        return []
    columns = _columns(summary)
    rows = []
    for pair in summary["pairs"]:
        effects = pair["effects"]
        cells = [
            f"{_starred(effects.get(what), summary)}; {_p_cell(effects.get(what))}"
            for what in columns
        ]
        rows.append([f"{pair['first']} minus {pair['second']}", *cells])
    caption = (
        "Differences between arms with the same seed, with interval, p-value and, behind the "
        "arrow, the p-value corrected over these comparisons."
    )
    table = data_table(caption, ["Difference", *_heads(columns)], rows)
    return [section("Direct comparisons", table)]


def _others_sections(analysis: Analysis) -> list[Html]:
    found = []
    for which, summary in analysis["other"].items():
        about = f"The same runs at {WEIGHTS[which]}. No claim above rests on this table."
        parts = [tag("p", about), effects_table(summary)]
        if which == "last":
            epochs = [
                [arm, *(number(analysis["epochs"][arm][name], 1) for name in analysis["names"])]
                for arm in analysis["epochs"]
            ]
            caption = "Epoch that the held-out part chose, mean over seeds."
            parts.append(data_table(caption, ["Arm", *analysis["names"]], epochs))
        found.append(section(f"At {WEIGHTS[which]}", *parts))
    return found


def _beside_section(analysis: Analysis) -> list[Html]:
    summaries = analysis["beside"].values()
    if not summaries:
        return []
    about = "The same weights by other metrics. No claim above rests on these tables."
    return [section("Other metrics", tag("p", about), *map(effects_table, summaries))]


def _class_section(analysis: Analysis) -> list[Html]:
    arm = analysis["test"]["chosen"] or next(iter(analysis["classes"]), None)
    gains = analysis["classes"].get(arm)
    if not gains:
        return []
    kinds = list(dict.fromkeys(kind for of_peer in gains.values() for kind in of_peer))
    mean = {k: float(np.mean([g[k] for g in gains.values() if k in g])) for k in kinds}
    caption = (
        f"Gain of {arm} over {analysis['test']['control']} in each class, mean over seeds. "
        "Nothing here is tested; look for a pattern, and test it on new seeds."
    )
    if len(kinds) > MANY_CLASSES:
        kinds = sorted(kinds, key=lambda kind: mean[kind])
        half = MANY_CLASSES // 2
        kinds = [*kinds[:half], *kinds[-half:]]
        caption += f" The {half} smallest and the {half} largest; all are in analysis.json."
    names = analysis["names"]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            at = np.arange(len(kinds)) + (i - (len(names) - 1) / 2) * width
            values = [gains[name].get(kind, math.nan) for kind in kinds]
            axes.bar(at, values, width, color=color_of(i), label=short_name(name, names))
        axes.axhline(0, color="#8a919a", linewidth=1)
        axes.set_xticks(range(len(kinds)), kinds, rotation=90 if len(kinds) > 12 else 0)
        axes.set_ylabel(f"gain in {analysis['test']['metric']}")
        draw_legend(figure, axes)

    alt = "; ".join(f"class {kind}: {mean[kind]:+.2f}" for kind in kinds)
    return [section("Every class", figure_grid([figure_tag(draw(paint, 2.8), alt, caption)]))]


def _calibration_section(analysis: Analysis) -> list[Html]:
    summary = analysis["calibration"]
    if summary is None:
        return []
    show = summary_format(summary)
    rows = []
    for arm, values in summary["arms"].items():
        for name, peer in values["peers"].items():
            gain = summary["peer_gains"].get(arm, {}).get(name)
            told = [show(peer[when]["mean"]) for when in ("before", "after")]
            rows.append([arm, name, *told, _starred(gain, summary), _p_cell(gain)])
    caption = (
        "Expected calibration error in percent, on the test set, 15 bins; mean over seeds. Less "
        f"is better. Gain over {summary['control']}: positive is better calibrated."
    )
    head = ["Arm", "Peer", "Before", "After", "Gain over control", "p"]
    return [section("Calibration", data_table(caption, head, rows, labels=2))]


def _curves_section(analysis: Analysis) -> list[Html]:
    curves, names, metric = analysis["curves"], analysis["names"], analysis["test"]["metric"]
    arms = [arm for arm, rows in curves.items() if len(rows) > 1]
    if not arms:
        return []

    def paint(figure: Figure) -> None:
        panels = panels_of(figure, len(names))
        for axes, name in zip(panels, names, strict=False):
            for i, arm in enumerate(arms):
                values = series_of(curves[arm], f"{name}/{metric}")
                label = short_name(arm, arms)
                style = ("-", "--", ":")[i // 8 % 3]
                axes.plot(epochs_of(curves[arm]), values, style, color=color_of(i), label=label)
            axes.set_title(short_name(name, names))
            unit = "epoch" if "epoch" in curves[arms[0]][0] else "iteration"
            epoch_axis(axes, f"held-out {metric}", unit)
        draw_legend(figure, panels[0])

    alt = f"Held-out {metric} of {listed(names)} over training, for {listed(arms)}"
    caption = f"{metric} on the held-out part of the training data, mean over seeds."
    rows = math.ceil(len(names) / 2)
    return [section("Training", figure_grid([figure_tag(draw(paint, 2.9 * rows), alt, caption)]))]


def _cost_table(analysis: Analysis) -> Html:
    rows = []
    control = analysis["cost"][analysis["test"]["control"]]
    for arm, cost in analysis["cost"].items():
        seconds, base = cost["cpu_seconds"], control["cpu_seconds"]
        step = seconds / cost["updates"] if seconds and cost["updates"] else None
        memory = cost["gpu_bytes"]
        rows.append(
            [
                arm,
                f"{cost['whole_runs']} of {cost['runs']}",
                number(cost["updates"], 0),
                number(seconds, 1),
                number(seconds / base if is_finite(seconds) and base else None, 2),
                number(1000 * step if step else None, 1),
                number(cost["wall_seconds"], 1),
                number(memory / 2**20 if memory else None, 0),
            ]
        )
    caption = (
        "Of one seed, mean over the runs that were not interrupted; held-out evaluations and all "
        "settings tried are counted, and all peers of solo. CPU time is that of the process and "
        "its workers. Wall time on a GPU is its time; on a busy machine it says little."
    )
    head = [
        "Arm",
        "Whole runs",
        "Steps",
        "CPU s",
        "To control",
        "CPU ms a step",
        "Wall s",
        "GPU MiB",
    ]
    return data_table(caption, head, rows)
