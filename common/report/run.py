"""The report of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.report.guard import guard_section, mark_events
from common.report.lessons import teaching_section
from common.report.numbers import (
    Row,
    Show,
    as_count,
    as_float,
    as_percent,
    difference_unit,
    epochs_of,
    has_values,
    is_finite,
    listed,
    number,
    number_format,
    series_of,
    with_unit,
)
from common.report.page import (
    Html,
    Panel,
    Summary,
    data_table,
    figure_grid,
    figure_tag,
    picture_section,
    section,
    settings_section,
    write_page,
)
from common.report.plots import draw, draw_legend, draw_lines, epoch_axis, zero_line
from common.report.soup import soup_section
from common.report.style import AXIS, INK
from common.statistics import unit_of

RUN_CAUTION = (
    "One run proves nothing about who should teach whom: part of any change comes from training "
    "longer, part from chance. Evidence needs the control, which is the same run without transfer "
    "(--rule none, same seed), and several seeds of both. Each best checkpoint was chosen on the "
    "same data it is measured on, so its number is optimistic; the last was not chosen."
)


def write_run_report(
    path: Path | str,
    *,
    names: Sequence[str],
    history: Sequence[Row],
    lessons: Sequence[Row],
    metric: str,
    settings: Mapping[str, Any],
    lower_is_better: bool = False,
    notes: Sequence[str] = (),
    events: Sequence[Row] = (),
    soups: Sequence[Row] = (),
    pictures: Sequence[tuple[bytes, str]] = (),
) -> Path:
    """Write the report of one run.

    Args:
        path: The HTML file; written whole or not at all.
        names: The peers'.
        history: One row an evaluation, the first of them the start (``Progress.history``):
            ``epoch`` or ``iteration``, and ``PEER/METRIC``; other metrics are shown too.
        lessons: One row a stretch of training (``Progress.lessons``); may be empty.
        metric: Which metric of a peer counts.
        settings: Plain values, shown as they are.
        lower_is_better: Of the metric.
        notes: Sentences to add.
        events: What the guard did (``common.guard.Guard.events``).
        soups: Averages of start and best (``common.soup.Soup``), as rows.
        pictures: PNGs and their captions.

    Returns:
        Where it lies.

    Raises:
        ValueError: No peer, no evaluation, or a peer without the metric.
    """
    outcomes = _outcomes(names, history, metric, lower_is_better)
    show = number_format(row.get(f"{name}/{metric}") for row in history for name in names)
    summary = Summary(
        kind="Run",
        verdict=_verdict(outcomes, history, metric, lower_is_better, show),
        facts=_facts(outcomes, history, lessons, metric),
        cautions=[RUN_CAUTION, *notes],
        about=_about(outcomes, history, lessons, metric, lower_is_better),
    )
    sections = [
        section("Peers", _outcome_table(outcomes, metric, show)),
        section("Over the run", figure_grid(_run_figures(names, history, lessons, metric, events))),
        *guard_section(events, unit_of(history)),
        *soup_section(soups, show),
        *teaching_section(names, lessons),
        *picture_section(pictures),
        settings_section(settings),
    ]
    title = listed(names)
    return write_page(path, title if len(title) < 60 else f"{len(names)} peers", summary, sections)


@dataclass(frozen=True)
class _Outcome:
    """A peer's way through a run; ``gain`` is the last minus the start, positive for better."""

    name: str
    before: float
    best: float
    best_epoch: int
    last: float
    change: float
    gain: float
    fixed: int | None
    broken: int | None


def _outcomes(
    names: Sequence[str], history: Sequence[Row], metric: str, lower_is_better: bool
) -> list[_Outcome]:
    if not names:
        raise ValueError("names is empty; a report needs at least one peer")
    if not history:
        raise ValueError("history is empty; a report needs at least the evaluation of the start")
    return [_outcome(name, history, metric, lower_is_better) for name in names]


def _outcome(name: str, history: Sequence[Row], metric: str, lower_is_better: bool) -> _Outcome:
    key = f"{name}/{metric}"
    rows = [row for row in history if is_finite(row.get(key))]
    if not rows:
        raise ValueError(f"history has no finite {key!r}; it has {listed(sorted(history[0]))}")
    sign = -1 if lower_is_better else 1
    best = max(rows, key=lambda row: sign * row[key])
    before, last = as_float(history[0].get(key)), as_float(history[-1].get(key))
    return _Outcome(
        name=name,
        before=before,
        best=float(best[key]),
        best_epoch=int(best[unit_of(history)]),
        last=last,
        change=last - before,
        gain=sign * (last - before),
        fixed=history[-1].get(f"{name}/fixed"),
        broken=history[-1].get(f"{name}/broken"),
    )


def _verdict(
    outcomes: Sequence[_Outcome],
    history: Sequence[Row],
    metric: str,
    lower_is_better: bool,
    show: Show,
) -> list[str]:
    """Say the outcome in plain words, from the numbers alone."""
    if len(history) == 1:
        return ["Only the start was measured."]
    return [
        *_headline(outcomes),
        *_who_gained(outcomes, show),
        *_strongest(outcomes, lower_is_better, show),
        *_group(outcomes, history, metric, lower_is_better, show),
    ]


def _facts(
    outcomes: Sequence[_Outcome], history: Sequence[Row], lessons: Sequence[Row], metric: str
) -> dict[str, object]:
    unit = unit_of(history)
    facts: dict[str, object] = {
        "Peers": len(outcomes),
        f"{unit.capitalize()}s": history[-1][unit],
        "Measured by": metric,
    }
    shares = [share for share in series_of(lessons, "transfer/taught") if is_finite(share)]
    if len(outcomes) > 1 and shares:
        facts["Samples taught"] = as_percent(float(np.mean(shares)))
    return facts


def _about(
    outcomes: Sequence[_Outcome],
    history: Sequence[Row],
    lessons: Sequence[Row],
    metric: str,
    lower_is_better: bool,
) -> str:
    names = listed([outcome.name for outcome in outcomes])
    direction = "lower" if lower_is_better else "higher"
    unit = unit_of(history)
    epochs = int(history[-1][unit])
    together = "were trained together" if len(outcomes) > 1 else "was trained alone"
    length = f"for {epochs} {unit}{'s' * (epochs != 1)}"
    told = f"{names} {together} {length}; measured by {metric} ({direction} is better)."
    return " ".join([told, *(_taught(lessons) if len(outcomes) > 1 else [])])


def _headline(outcomes: Sequence[_Outcome]) -> list[str]:
    """Count the winners, where they are too many to be seen at a glance."""
    if len(outcomes) < 2:
        return []
    better = sum(outcome.gain > 0 for outcome in outcomes)
    return [f"{better} of {len(outcomes)} peers ended better than they started."]


def _who_gained(outcomes: Sequence[_Outcome], show: Show) -> list[str]:
    groups = {
        "Better at the end than at the start": [o for o in outcomes if o.gain > 0],
        "Worse": [o for o in outcomes if o.gain < 0],
        "Unchanged": [o for o in outcomes if o.gain == 0],
    }
    return [
        f"{title}: {listed([f'{o.name} ({show(o.change, sign=True)})' for o in group])}."
        for title, group in groups.items()
        if group
    ]


def _strongest(outcomes: Sequence[_Outcome], lower_is_better: bool, show: Show) -> list[str]:
    known = [o for o in outcomes if is_finite(o.before) and is_finite(o.last)]
    if len(outcomes) < 2 or not known:
        return []
    sign = -1 if lower_is_better else 1
    first = max(known, key=lambda o: sign * o.before)
    last = max(known, key=lambda o: sign * o.last)
    if first is last:
        return [
            f"The strongest peer was and is {last.name}, {show(first.before)} before and "
            f"{show(last.last)} now."
        ]
    return [
        f"The strongest peer was {first.name} with {show(first.before)} and is {last.name} with "
        f"{show(last.last)}."
    ]


def _group(
    outcomes: Sequence[_Outcome],
    history: Sequence[Row],
    metric: str,
    lower_is_better: bool,
    show: Show,
) -> list[str]:
    before, last = (as_float(history[i].get(f"ensemble/{metric}")) for i in (0, -1))
    if len(outcomes) < 2 or not (is_finite(before) and is_finite(last)):
        return []
    told = f"The ensemble of all peers went from {show(before)} to {show(last)}"
    known = [o.last for o in outcomes if is_finite(o.last)]
    if not known:
        return [f"{told}."]
    strongest = min(known) if lower_is_better else max(known)
    gain = (strongest - last) if lower_is_better else (last - strongest)
    than = "better" if gain >= 0 else "worse"
    return [f"{told}, {show(abs(gain))} {than} than the strongest single peer."]


def _taught(lessons: Sequence[Row]) -> list[str]:
    shares = [share for share in series_of(lessons, "transfer/taught") if is_finite(share)]
    if not shares:
        return []
    if not any(shares):
        return ["Nobody taught anybody in this run."]
    return [f"Somebody taught on {as_percent(float(np.mean(shares)))} of the samples seen."]


def _outcome_table(outcomes: Sequence[_Outcome], metric: str, show: Show) -> Html:
    flips = any(o.fixed is not None or o.broken is not None for o in outcomes)
    head = ["Peer", "Before", "Best", "Best at", "Last", "Change"]
    rows = [
        [
            o.name,
            show(o.before),
            show(o.best),
            o.best_epoch,
            show(o.last),
            show(o.change, sign=True),
        ]
        + ([as_count(o.fixed), as_count(o.broken)] if flips else [])
        for o in outcomes
    ]
    caption = f"{metric} of every peer. Change: last minus before."
    if flips:
        head += ["Fixed", "Broken"]
        caption += (
            " Fixed and broken: samples that were wrong before and right at the end, and "
            "the other way round."
        )
    return data_table(caption, head, rows)


def _run_figures(
    names: Sequence[str],
    history: Sequence[Row],
    lessons: Sequence[Row],
    metric: str,
    events: Sequence[Row],
) -> list[Html]:
    figures = [
        _metric_figure(names, history, metric, events),
        _change_figure(names, history, metric),
    ]
    if any(has_values(history, f"{name}/score_temperature") for name in names):
        figures.append(_temperature_figure(names, history))
    for what, title, scale in (
        ("task_loss", "Task loss", "own scale"),
        ("transfer_loss", "Transfer loss", "nats"),
    ):
        values = [value for name in names for value in series_of(lessons, f"{name}/{what}")]
        if any(is_finite(value) and value != 0 for value in values):
            figures.append(_loss_figure(names, lessons, what, title, scale))
    return figures


def _metric_figure(
    names: Sequence[str], history: Sequence[Row], metric: str, events: Sequence[Row]
) -> Html:
    group = [who for who in ("ensemble", "oracle") if has_values(history, f"{who}/{metric}")]
    group = group if len(names) > 1 else []

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        draw_lines(axes, names, history, metric)
        for who, style, color in (("ensemble", "-", INK), ("oracle", "--", AXIS)):
            if who in group:
                values = series_of(history, f"{who}/{metric}")
                axes.plot(epochs_of(history), values, style, color=color, label=who)
        mark_events(axes, names, events, unit_of(history))
        epoch_axis(axes, with_unit(metric), unit_of(history))
        draw_legend(figure, axes)

    caption = f"{metric} at each evaluation; 0 is the start."
    if events:
        caption += " A dotted line: the guard warned of a peer or rolled it back."
    if "oracle" in group:
        caption += " Oracle: right where at least one peer is right."
    alt = f"{metric} of {listed([*names, *group])} over the run"
    return figure_tag([Panel(draw(paint, 2.5), alt)], caption)


def _change_figure(names: Sequence[str], history: Sequence[Row], metric: str) -> Html:
    unit = unit_of(history)
    keys = [f"{name}/{metric}" for name in names]
    start = {key: as_float(history[0].get(key)) for key in keys}
    rows = [
        {unit: row[unit], **{key: as_float(row.get(key)) - start[key] for key in keys}}
        for row in history
    ]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        zero_line(axes)
        draw_lines(axes, names, rows, metric)
        epoch_axis(axes, f"change of {metric} ({difference_unit(metric)})", unit)
        draw_legend(figure, axes)

    alt = f"Change of {metric} since the start of {listed(names)}"
    return figure_tag([Panel(draw(paint, 2.5), alt)], "The same as change since the start.")


def _temperature_figure(names: Sequence[str], history: Sequence[Row]) -> Html:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(1, color=AXIS, linewidth=1, linestyle="--")
        draw_lines(axes, names, history, "score_temperature")
        epoch_axis(axes, "temperature (no unit)", unit_of(history))
        draw_legend(figure, axes)

    last = ", ".join(
        f"{name} {number(history[-1].get(f'{name}/score_temperature'), 2)}" for name in names
    )
    caption = (
        "What each peer's logits are divided by before the peers are compared, fitted on the data "
        f"that the run is evaluated on; above 1: the peer is too sure of itself. Last: {last}."
    )
    alt = f"Temperature of the score of {listed(names)}"
    return figure_tag([Panel(draw(paint, 2.5), alt)], caption)


def _loss_figure(
    names: Sequence[str], lessons: Sequence[Row], what: str, title: str, scale: str
) -> Html:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        draw_lines(axes, names, lessons, what)
        epoch_axis(axes, f"{title.lower()} ({scale})", unit_of(lessons))
        if axes.dataLim.y0 >= 0:
            axes.set_ylim(0, 1.08 * max(axes.dataLim.y1, 1e-6))
        draw_legend(figure, axes)

    caption = f"{title}, mean over the training batches up to each point."
    alt = f"{title} of {listed(names)} per {unit_of(lessons)}"
    return figure_tag([Panel(draw(paint, 2.5), alt)], caption)
