"""The report of an experiment: what is shown, and what is not, after correction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.calibration import COLDEST, HOTTEST
from common.report.claims import (
    claims,
    counted,
    every_effect,
    p_text,
    secondary,
    sentences,
    shown_means,
    tested,
    too_many_arms,
)
from common.report.comparison import arms_table, comparison_teaching, peers_table
from common.report.comparison_figures import (
    before_after_figure,
    effects_figure,
    flips_figure,
    forest,
)
from common.report.effects import (
    SHORT_TARGETS,
    TARGET_NAMES,
    headline_words,
    interval_text,
    starred,
    summary_format,
)
from common.report.numbers import (
    MISSING,
    Row,
    as_float,
    difference_unit,
    epochs_of,
    is_finite,
    listed,
    number,
    series_of,
    with_unit,
)
from common.report.page import (
    Html,
    Panel,
    Section,
    Summary,
    bullets,
    data_table,
    figure_grid,
    figure_tag,
    folded,
    long_table,
    section,
    settings_section,
    tag,
    write_page,
)
from common.report.plots import (
    color_of,
    draw,
    draw_legend,
    epoch_axis,
    marker_of,
    name_axis,
    short_name,
    zero_line,
)
from common.report.style import AXIS, INK
from common.statistics import ENOUGH_SEEDS, PRIMARY, unit_of

Analysis = Mapping[str, Any]
WEIGHTS = {
    "chosen": "the {unit} that the held-out part chose for each peer",
    "last": "the last {unit}",
}
MANY_CLASSES = 30
MOST_COLOURS = 6
_MOST_CLAIMS = 12  # in full view
BAND = 0.13


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
    verdict, points = headline_words(summary)
    found = _summaries(analysis)
    first = Summary(
        kind="Experiment",
        verdict=[verdict, *secondary(found, analysis["together"]), counted(found)],
        points=points,
        facts={
            "Peers": len(summary["names"]),
            "Arms": len(summary["arms"]),
            "Seeds": len(summary["seeds"]),
            "Measured by": summary["metric"],
        },
        cautions=cautions(analysis),
        about=_about(analysis),
    )
    sections = [
        section(
            f"Gains over {summary['control']}",
            tag("p", f"Measured on the test set at {_weights(analysis, analysis['primary'])}."),
            *forest(summary),
            effects_table(summary, primary=not analysis["together"]),
            folded("p-values", p_table(summary, analysis["together"])),
        ),
        *_claims_section(analysis),
        *_pairs_section(summary),
        section("What was compared", arms_table(summary, analysis["about"])),
        section(
            "Before and after",
            figure_grid([before_after_figure(summary), *flips_figure(summary, analysis["flips"])]),
            peers_table(summary, analysis["flips"]),
        ),
        *_beside_section(analysis),
        *_others_sections(analysis),
        *_class_section(analysis),
        *_calibration_section(analysis),
        *_robustness_section(analysis),
        *_curves_section(analysis),
        *comparison_teaching(summary),
        section("Cost", _cost_table(analysis)),
        settings_section(analysis["settings"]),
        *_sources_section(analysis),
    ]
    return write_page(path, title, first, sections)


def _sources_section(analysis: Analysis) -> list[Section]:
    """Show the sums of what the runs rest on, and the versions, where they were kept."""
    rows = [*analysis.get("sources", {}).items(), *analysis.get("versions", {}).items()]
    if not rows:
        return []
    about = "As at each seed's start; where seeds or arms differ, all is told."
    table = data_table(about, ["What", "Which"], rows, words=True)
    return [section("Files and versions", folded("Sums and versions", table))]


def experiment_sentences(analysis: Analysis) -> list[str]:
    """Say what is shown; one sentence for each effect that survives its correction.

    Args:
        analysis: From ``common.experiment.results.analyse``.

    Returns:
        Sentences: what the primary family shows; how far what others show can be trusted, and each
        of that, called secondary; the last one counts what is not shown.
    """
    return sentences(_summaries(analysis), analysis["together"])


def _summaries(analysis: Analysis) -> list[Mapping[str, Any]]:
    """Return what claims may rest on: the test set's metric, calibration, and robustness."""
    robustness = analysis["robustness"]
    further = (
        analysis["calibration"],
        analysis["recalibrated"],
        *(robustness[x] for x in ("mean", "calibration", "recalibrated") if robustness),
    )
    return [analysis["test"], *(summary for summary in further if summary)]


def cautions(analysis: Analysis) -> list[str]:
    """Say what keeps the experiment from showing anything."""
    summary = analysis["test"]
    found = []
    if analysis["missing"]:
        count = len(analysis["missing"])
        found.append(
            f"{count} job{'s are' if count > 1 else ' is'} not finished "
            f"({listed(analysis['missing'][:6])}{', ...' if count > 6 else ''}): each difference "
            "is over the seeds that both its arms have."
        )
    seeds = len(summary["seeds"])
    if seeds < ENOUGH_SEEDS:
        prove = "seed proves" if seeds == 1 else "seeds prove"
        found.append(f"{seeds} {prove} nothing; take at least {ENOUGH_SEEDS}.")
    return [*found, *too_many_arms(summary)]


def _unit(analysis: Analysis) -> str:
    """Say in what the runs count: epochs, or iterations."""
    return unit_of([row for rows in analysis["curves"].values() for row in rows])


def _weights(analysis: Analysis, which: str) -> str:
    return WEIGHTS[which].format(unit=_unit(analysis))


def _about(analysis: Analysis) -> str:
    summary = analysis["test"]
    seeds = len(summary["seeds"])
    unit = _unit(analysis)
    epoch = {
        "chosen": f"{unit.capitalize()}s and settings were chosen on a held-out part of the "
        "training data",
        "last": f"The last {unit} is tested, which nothing chose",
    }[analysis["primary"]]
    return (
        f"{listed(summary['names'])}: {len(summary['arms'])} arms from the same starts, over "
        f"{seeds} seed{'s' * (seeds != 1)}. {epoch}; the test set was measured at the start "
        "and at the end, and chose nothing. "
        f"{shown_means(summary, analysis['together'])}"
    )


def _columns(summary: Mapping[str, Any]) -> list[str]:
    return [*summary["targets"], *(summary["names"] if len(summary["names"]) > 1 else ())]


def _heads(columns: Sequence[str]) -> list[str]:
    return [SHORT_TARGETS.get(what, what) for what in columns]


def effects_table(summary: Mapping[str, Any], primary: bool = False) -> Html:
    """Show every arm's gains with their intervals; ``primary``: say which column counts."""
    turned = "; positive is better" if summary["lower_is_better"] else ""
    caption = (
        f"Gain in {summary['metric']} over {summary['control']} with the same seed{turned}: mean "
        f"over seeds and {100 * summary['level']:g} % interval (Student's t, uncorrected). A star: "
        "shown, after correction. Strongest and weakest: at the start of each seed."
    )
    if primary:
        caption += f" The primary target is {TARGET_NAMES[PRIMARY]}; the others are secondary."
    return _cells_table(caption, "Arm", every_effect(summary), summary, partial(starred, summary))


def p_table(summary: Mapping[str, Any], together: bool) -> Html:
    """Show every arm's p-values, and what correction makes of them."""
    over = "all cells of this table" if together else "the arms of each column"
    caption = (
        "p-values of the paired sign-flip test over seeds, two-sided; behind the arrow corrected "
        f"by Holm's method over {over}. {_exactness(summary)}"
    )
    return _cells_table(caption, "Arm", every_effect(summary), summary, _p_cell)


def _p_cell(effect: Row | None) -> str:
    if effect is None:
        return MISSING
    return f"{p_text(effect['p'])} → {p_text(effect['p_holm'])}"


def _exactness(summary: Mapping[str, Any]) -> str:
    error = max((effect["p_error"] for *_, effect in tested(summary)), default=0.0)
    if not error:
        return "All are exact: every sign pattern was looked at."
    return f"Sign patterns were drawn; the p-values' standard error is at most {error:.4f}."


def _claims_section(analysis: Analysis) -> list[Section]:
    found = _summaries(analysis)
    first, others = (claims(found, primary=which) for which in (True, False))
    parts = [bullets(first)] if first else []
    if others:
        told = bullets(others)
        if len(others) > _MOST_CLAIMS:
            told = folded(f"{len(others)} secondary claims, in words", told)
        about = secondary(found, analysis["together"])
        parts += [*(tag("p", sentence) for sentence in about), told]
    return [section("Shown, one by one", *parts)] if parts else []


def _pairs_section(summary: Mapping[str, Any]) -> list[Section]:
    if not summary["pairs"]:
        return []
    found = {f"{pair['first']} - {pair['second']}": pair["effects"] for pair in summary["pairs"]}
    label = f"difference in {summary['metric']}"
    gains = (
        "Differences between arms with the same seed: mean over seeds and interval. A star: shown, "
        "after correction; all of them are secondary."
    )
    chances = "p-values of the differences; behind the arrow corrected over these comparisons."
    return [
        section(
            "Direct comparisons",
            *effects_figure(found, summary["targets"], label, summary),
            _cells_table(gains, "Difference", found, summary, partial(starred, summary)),
            folded("p-values", _cells_table(chances, "Difference", found, summary, _p_cell)),
        )
    ]


def _cells_table(
    caption: str,
    named: str,
    found: Mapping[str, Mapping[str, Row | None]],
    summary: Mapping[str, Any],
    cell: Callable[[Row | None], str],
) -> Html:
    """Lay out effects, a row for each of ``found`` and a column for each target and peer."""
    columns = _columns(summary)
    rows = [
        [name, *(cell(effects.get(what)) for what in columns)] for name, effects in found.items()
    ]
    return data_table(caption, [named, *_heads(columns)], rows)


def _others_sections(analysis: Analysis) -> list[Section]:
    found = []
    for which, summary in analysis["other"].items():
        weights = _weights(analysis, which)
        about = f"The same runs at {weights}. No claim above rests on this table."
        parts = [tag("p", about), effects_table(summary)]
        if which == "last":
            epochs = [
                [arm, *(number(analysis["epochs"][arm][name], 1) for name in analysis["names"])]
                for arm in analysis["epochs"]
            ]
            unit = _unit(analysis).capitalize()
            caption = f"{unit} that the held-out part chose, mean over seeds."
            parts.append(data_table(caption, ["Arm", *analysis["names"]], epochs))
        found.append(section(f"At {weights}", *parts))
    return found


def _beside_section(analysis: Analysis) -> list[Section]:
    summaries = analysis["beside"].values()
    if not summaries:
        return []
    about = "The same weights by other metrics. No claim above rests on these tables."
    return [section("Other metrics", tag("p", about), *map(effects_table, summaries))]


def _class_section(analysis: Analysis) -> list[Section]:
    arm = analysis["test"]["chosen"] or next(iter(analysis["classes"]), None)
    gains = analysis["classes"].get(arm)
    if not gains:
        return []
    kinds = list(dict.fromkeys(kind for of_peer in gains.values() for kind in of_peer))
    mean = {k: float(np.mean([g[k]["mean"] for g in gains.values() if k in g])) for k in kinds}
    caption = (
        f"Gain of {arm} over {analysis['test']['control']} in each class, mean over seeds; bars "
        "are 95 % intervals of the differences with the same seed (Student's t), uncorrected: of "
        "many classes some leave zero out by chance. Nothing here is tested; look for a pattern, "
        "and test it on new seeds."
    )
    if len(kinds) > MANY_CLASSES:
        kinds = sorted(kinds, key=lambda kind: mean[kind])
        half = MANY_CLASSES // 2
        kinds = [*kinds[:half], *kinds[-half:]]
        caption += f" The {half} smallest and the {half} largest; all are in analysis.json."
    plot = _class_plot(analysis, {name: gains[name] for name in analysis["names"]}, kinds)
    alt = "; ".join(f"class {kind}: {mean[kind]:+.2f}" for kind in kinds)
    return [section("Every class", figure_grid([figure_tag([Panel(plot, alt)], caption)]))]


def _class_plot(
    analysis: Analysis, gains: Mapping[str, Mapping[str, Row]], kinds: Sequence[str]
) -> str:
    summary = analysis["test"]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        zero_line(axes, upright=True)
        for i, (name, of_peer) in enumerate(gains.items()):
            there = [k for k, kind in enumerate(kinds) if kind in of_peer]
            found = [of_peer[kinds[k]] for k in there]
            aside = 0.5 * ((i + 0.5) / len(gains) - 0.5)  # so that bars do not hide one another
            places = [k + aside for k in there]
            low, high = ([as_float(one[end]) for one in found] for end in ("low", "high"))
            axes.hlines(places, low, high, color=color_of(i), linewidth=1)
            label = short_name(name, list(gains))
            values = [one["mean"] for one in found]
            axes.plot(values, places, marker_of(i), color=color_of(i), label=label)
        name_axis(axes, kinds)
        axes.grid(True, axis="y")
        axes.set_ylabel("class")
        unit = difference_unit(summary["metric"])
        axes.set_xlabel(f"gain in {summary['metric']} over {summary['control']} ({unit})")
        draw_legend(figure, axes)

    return draw(paint, 0.7 + 0.2 * len(kinds))


def _calibration_section(analysis: Analysis) -> list[Section]:
    summary, mended = analysis["calibration"], analysis["recalibrated"]
    if summary is None:
        return []
    caption = (
        "Expected calibration error in percent, on the test set, 15 bins; mean over seeds. Less "
        f"is better. Gain over {summary['control']}: positive is better calibrated."
    )
    parts = [
        *forest(summary, by_peer=True),
        _calibration_table("Every arm and peer", caption, summary),
    ]
    if mended is not None:
        about = (
            "What one temperature mends: each peer's logits, of the start and of every run, are "
            "divided by a temperature fitted on the held-out part of the training data, never on "
            "the test set. Its answers stay as they are."
        )
        caption += (
            f" Temperature: mean over seeds, and the least and the largest; {COLDEST:g} and "
            f"{HOTTEST:g} are the fit's limits, met where a peer is right on every held-out sample "
            "or guesses."
        )
        title = "Every arm and peer, at a fitted temperature"
        table = _calibration_table(title, caption, mended, analysis["temperatures"])
        parts += [tag("p", about), *forest(mended, by_peer=True), table]
    return [section("Calibration", *parts)]


def _calibration_table(
    title: str,
    caption: str,
    summary: Mapping[str, Any],
    temperatures: Mapping[str, Mapping[str, Row]] | None = None,
) -> Html:
    show = summary_format(summary)
    rows = []
    for arm, values in summary["arms"].items():
        for name, peer in values["peers"].items():
            gain = summary["peer_gains"].get(arm, {}).get(name)
            told = [show(peer[when]["mean"]) for when in ("before", "after")]
            if temperatures is not None:
                t = temperatures[arm][name]
                told.append(f"{number(t['mean'])} ({number(t['least'])} to {number(t['largest'])})")
            rows.append([arm, name, *told, starred(summary, gain), _p_cell(gain)])
    head = ["Arm", "Peer", "Before", "After", "Gain over control", "p"]
    if temperatures is not None:
        head.insert(4, "Temperature")
    return long_table(title, caption, head, rows, labels=2)


def _robustness_section(analysis: Analysis) -> list[Section]:
    robustness = analysis["robustness"]
    if robustness is None:
        return []
    mean, each = robustness["mean"], robustness["each"]
    what = "mean" if "mean" in mean["targets"] else mean["targets"][0]
    rows = [
        [arm, *(interval_text(one["gains"][arm][what], one) for one in each.values())]
        for arm in mean["gains"]
    ]
    about = (
        f"The same weights on the test set, corrupted: the mean over {listed(list(each))} (the "
        "number is the severity). Every model gets the same corrupted images, in its own view. "
        "Corrected by themselves, apart from the tests above."
    )
    caption = (
        f"Gain of {SHORT_TARGETS[what]} over {mean['control']} under each corruption, with its "
        "interval. Nothing here is corrected, and no claim rests on it."
    )
    return [
        section(
            "Robustness to corruptions",
            tag("p", about),
            *forest(mean),
            effects_table(mean),
            folded("p-values", p_table(mean, analysis["together"])),
            peers_table(mean),
            long_table("Every corruption", caption, ["Arm", *each], rows),
            *_spoilt_calibration(robustness),
        )
    ]


def _spoilt_calibration(robustness: Mapping[str, Any]) -> list[Html]:
    """Show the calibration errors on the spoilt test set, as far as they are known."""
    caption = (
        "expected calibration error in percent, mean over the corruptions and over seeds. Less is "
        f"better. Gain over {robustness['mean']['control']}: positive is better calibrated."
    )
    fitted = (
        " Each peer at its temperature above, fitted on the held-out part, which nothing spoils."
    )
    titles = {
        "calibration": ("Calibration on the corrupted test set", ""),
        "recalibrated": ("Calibration on the corrupted test set, at a fitted temperature", fitted),
    }
    return [
        _calibration_table(title, f"{title}: {caption}{more}", robustness[which])
        for which, (title, more) in titles.items()
        if robustness[which]
    ]


def _curves_section(analysis: Analysis) -> list[Section]:
    curves, metric = analysis["curves"], analysis["test"]["metric"]
    arms = [arm for arm, rows in curves.items() if len(rows) > 1]
    if not arms:
        return []
    told = _told_apart(analysis["test"], arms)
    panels = [
        Panel(
            _curve_plot({arm: curves[arm] for arm in arms}, analysis["bands"], told, name, metric),
            f"Held-out {metric} of {name} over training, for {listed(arms)}",
            name,
        )
        for name in analysis["names"]
    ]
    rest = len(arms) - len(told)
    caption = (
        f"{metric} on the held-out part of the training data, mean over seeds; the bands are 95 % "
        "intervals of each mean (Student's t). Arms share their seeds: where bands overlap, the "
        "paired gains above may still differ."
    )
    if rest:
        caption += f" The {rest} other arm{'s' * (rest != 1)} in pale lines."
    return [section("Training", figure_tag(panels, caption))]


def _told_apart(summary: Mapping[str, Any], arms: Sequence[str]) -> list[str]:
    """Choose the arms that get a colour: all of a few, else the control and what is most asked."""
    if len(arms) <= MOST_COLOURS:
        return list(arms)
    asked = [summary["control"], summary["chosen"], summary["chance"]]
    asked += [arm for pair in summary["pairs"] for arm in (pair["first"], pair["second"])]
    return [arm for arm in dict.fromkeys([*asked, *arms]) if arm in arms][:MOST_COLOURS]


def _curve_plot(
    curves: Mapping[str, Sequence[Row]],
    bands: Mapping[str, Sequence[Row]],
    told: Sequence[str],
    name: str,
    metric: str,
) -> str:
    key = f"{name}/{metric}"

    def line(axes: Axes, arm: str, **how: Any) -> None:
        axes.plot(epochs_of(curves[arm]), series_of(curves[arm], key), **how)

    def band(axes: Axes, arm: str, color: str) -> None:
        known = [row for row in bands[arm] if row[key] is not None]
        low, high = ([as_float(row[key][end]) for row in known] for end in ("low", "high"))
        axes.fill_between(epochs_of(known), low, high, color=color, alpha=BAND, linewidth=0)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for arm in curves:
            if arm not in told:
                line(axes, arm, color=AXIS, alpha=0.4, linewidth=1)
        for i, arm in enumerate(told):
            color, style = (color_of(i - 1), "-") if i else (INK, "--")
            marks = {"marker": marker_of(i), "markevery": (i % 4, 4)} if i else {}
            label = short_name(arm, told)
            band(axes, arm, color)
            line(axes, arm, color=color, linestyle=style, label=label, **marks)
        epoch_axis(axes, f"held-out {with_unit(metric)}", unit_of(curves[told[0]]))
        draw_legend(figure, axes)

    return draw(paint, 2.5)


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
