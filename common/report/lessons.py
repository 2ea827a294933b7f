"""Who taught whom: tables and figures of the ledger."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from common.ledger import Pair
from common.report.numbers import (
    Row,
    as_percent,
    epochs_of,
    has_values,
    is_finite,
    listed,
    number,
    series_of,
)
from common.report.page import Html, Panel, Section, figure_grid, figure_tag, long_table, section
from common.report.plots import (
    color_of,
    draw,
    draw_legend,
    epoch_axis,
    heat_cells,
    marker_of,
    short_name,
)
from common.report.style import INK, SOFT
from common.statistics import unit_of


def pair_lessons(names: Sequence[str], lessons: Sequence[Row]) -> list[Pair]:
    """Gather each ordered pair over all epochs, weighted by what was taught; NaN for nothing."""
    return [
        _pair_lesson(teacher, student, lessons)
        for teacher in names
        for student in names
        if teacher != student and has_values(lessons, f"transfer/{teacher}->{student}/share")
    ]


def _pair_lesson(teacher: str, student: str, lessons: Sequence[Row]) -> Pair:
    prefix = f"transfer/{teacher}->{student}"
    share = np.array(series_of(lessons, f"{prefix}/share"))

    def mean(what: str) -> float:
        """Average over the taught samples of all epochs: an epoch counts by its share."""
        values = np.array(series_of(lessons, f"{prefix}/{what}"))
        known = np.isfinite(values) & (share > 0)
        return float(np.average(values[known], weights=share[known])) if known.any() else math.nan

    return Pair(
        teacher=teacher,
        student=student,
        share=float(np.nanmean(share)),
        gap=mean("gap"),
        kl=mean("kl"),
        teacher_right=mean("teacher_right"),
        student_right=mean("student_right"),
    )


def teaching_section(names: Sequence[str], lessons: Sequence[Row]) -> list[Section]:
    """Show who taught whom; nothing where nobody did."""
    pairs = pair_lessons(names, lessons)
    if not pairs:
        return []
    return [
        section(
            "Who taught whom",
            figure_grid([heat_map(names, pairs), *teaching_over_time(names, lessons)]),
            _pair_table(pairs),
        )
    ]


def _pair_table(pairs: Sequence[Pair]) -> Html:
    tells = any(is_finite(pair.teacher_right) for pair in pairs)
    head = ["Teacher to student", "Share", "Gap", "KL"]
    caption = (
        "Every pair, over the whole run. Share: of all samples, how many this teacher taught this "
        "student. Gap: the teacher's score minus the student's. KL: in nats."
    )
    if tells:
        head += ["Teacher right, student wrong", "Student right"]
        caption += " The last two: of the samples taught."
    rows = [
        [f"{p.teacher} → {p.student}", as_percent(p.share), number(p.gap, 3), number(p.kl, 3)]
        + ([as_percent(p.teacher_right), as_percent(p.student_right)] if tells else [])
        for p in pairs
    ]
    return long_table("Every pair", caption, head, rows)


def teaching_over_time(names: Sequence[str], lessons: Sequence[Row]) -> list[Html]:
    """Draw who taught over the epochs, and how evenly."""
    figures = []
    if anybody_taught(names, lessons):
        shares = {name: series_of(lessons, f"{name}/teaches") for name in names}
        figures.append(_teaches_figure(lessons, shares))
    keys = {"transfer/taught": "samples taught", "transfer/entropy": "evenness of teaching"}
    known = {
        title: series_of(lessons, key) for key, title in keys.items() if has_values(lessons, key)
    }
    if known:
        figures.append(_entropy_figure(lessons, known))
    return figures


def _teaches_figure(lessons: Sequence[Row], shares: Mapping[str, Sequence[float]]) -> Html:
    """Stack who taught in each epoch; over 100 % where a sample has several teachers."""
    epochs, unit = epochs_of(lessons), unit_of(lessons)
    # an epoch is a bar around its number, iterations reach from one row to the next
    first, half = (epochs[0] - 0.5, 0.5) if unit == "epoch" else (0, 0)
    edges = [first, *(epoch + half for epoch in epochs)]
    columns = {name: 100 * np.nan_to_num(np.array(column)) for name, column in shares.items()}
    whole = np.sum(list(columns.values()), axis=0)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        below = np.zeros(len(epochs))
        for i, (name, column) in enumerate(columns.items()):
            axes.stairs(
                below + column,
                edges,
                baseline=below,
                fill=True,
                color=color_of(i),
                alpha=0.85,
                label=short_name(name, list(columns)),
            )
            below = below + column
        epoch_axis(axes, "share of lessons (%)", unit)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, max(100.0, float(whole.max())))
        draw_legend(figure, axes)

    caption = "Who taught, as a share of the taught samples."
    if whole.max() > 102:
        caption += " More than 100 % in all: a sample can have several teachers."
    alt = f"Share taught by {listed(shares)} per {unit}"
    return figure_tag([Panel(draw(paint, 2.5), alt)], caption)


def _entropy_figure(lessons: Sequence[Row], known: Mapping[str, Sequence[float]]) -> Html:
    epochs = epochs_of(lessons)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (title, values) in enumerate(known.items()):
            style = ("-", "--")[i] + marker_of(i)
            percent = [100 * value for value in values]
            axes.plot(epochs, percent, style, color=(INK, SOFT)[i], label=title)
        epoch_axis(axes, "share, or evenness (%)", unit_of(lessons))
        axes.set_ylim(-3, 103)
        draw_legend(figure, axes)

    caption = (
        "Share of samples on which somebody taught, and how evenly all teach (the entropy of who "
        "teaches, of its largest): 100 % where all teach equally often, 0 where one peer always "
        "does."
    )
    alt = f"{listed(known)} per {unit_of(lessons)}"
    return figure_tag([Panel(draw(paint, 2.5), alt)], caption)


def heat_map(names: Sequence[str], pairs: Sequence[Pair]) -> Html:
    """Draw the share of samples each peer taught each other."""
    shares = np.full((len(names), len(names)), np.nan)
    for pair in pairs:
        shares[names.index(pair.teacher), names.index(pair.student)] = 100 * pair.share

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        heat_cells(axes, shares, names, "{:.1f} %" if len(names) < 5 else "{:.0f} %")
        axes.set_xlabel("student")
        axes.set_ylabel("teacher")

    alt = "; ".join(f"{p.teacher} taught {p.student} {as_percent(p.share)}" for p in pairs)
    caption = "Share of all samples that a teacher (row) taught a student (column)."
    return figure_tag([Panel(draw(paint, 1.5 + 0.36 * len(names)), alt)], caption)


def anybody_taught(names: Sequence[str], lessons: Sequence[Row]) -> bool:
    """Whether any lesson was given."""
    shares = [share for name in names for share in series_of(lessons, f"{name}/teaches")]
    return any(is_finite(share) and share > 0 for share in shares)
