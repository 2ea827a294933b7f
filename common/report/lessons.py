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
from common.report.page import Html, data_table, figure_grid, figure_tag, section
from common.report.plots import MARKERS, color_of, draw, draw_legend, epoch_axis, short_name
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


def teaching_section(names: Sequence[str], lessons: Sequence[Row]) -> list[Html]:
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
    return data_table(caption, head, rows)


def teaching_over_time(names: Sequence[str], lessons: Sequence[Row]) -> list[Html]:
    """Draw who taught over the epochs, and how evenly."""
    figures = []
    if anybody_taught(names, lessons):
        shares = {name: series_of(lessons, f"{name}/teaches") for name in names}
        figures.append(_teaches_figure(lessons, shares))
    keys = {"transfer/taught": "samples taught", "transfer/entropy": "entropy of who teaches"}
    known = {
        title: series_of(lessons, key) for key, title in keys.items() if has_values(lessons, key)
    }
    if known:
        figures.append(_entropy_figure(lessons, known))
    return figures


def _teaches_figure(lessons: Sequence[Row], shares: Mapping[str, Sequence[float]]) -> Html:
    """Stack who taught in each epoch; more than 1 in all where a sample has several teachers."""
    epochs, unit = epochs_of(lessons), unit_of(lessons)
    # an epoch is a bar around its number, iterations reach from one row to the next
    first, half = (epochs[0] - 0.5, 0.5) if unit == "epoch" else (0, 0)
    edges = [first, *(epoch + half for epoch in epochs)]
    columns = {name: np.nan_to_num(np.array(column)) for name, column in shares.items()}
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
        epoch_axis(axes, "share of the taught samples", unit)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, max(1.0, float(whole.max())))
        draw_legend(figure, axes)

    caption = "Who taught, as a share of the taught samples."
    if whole.max() > 1.02:
        caption += " More than 1 in all: a sample can have several teachers."
    return figure_tag(draw(paint, 2.6), f"Share taught by {listed(shares)} per {unit}", caption)


def _entropy_figure(lessons: Sequence[Row], known: Mapping[str, Sequence[float]]) -> Html:
    epochs = epochs_of(lessons)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (title, values) in enumerate(known.items()):
            axes.plot(
                epochs, values, "-" + MARKERS[i], color=("#555555", "#b07c00")[i], label=title
            )
        epoch_axis(axes, "", unit_of(lessons))
        axes.set_ylim(-0.03, 1.03)
        draw_legend(figure, axes)

    caption = (
        "Share of samples on which somebody taught, and the entropy of who teaches: 1 where all "
        "teach equally often, 0 where one peer always does."
    )
    return figure_tag(draw(paint, 2.6), f"{listed(known)} per {unit_of(lessons)}", caption)


def heat_map(names: Sequence[str], pairs: Sequence[Pair]) -> Html:
    """Draw the share of samples each peer taught each other."""
    shares = np.full((len(names), len(names)), np.nan)
    for pair in pairs:
        shares[names.index(pair.teacher), names.index(pair.student)] = pair.share

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        top = max(float(np.nanmax(shares)), 1e-6)
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=top * 1.15, edgecolor="white", lw=2)
        for (t, s), share in np.ndenumerate(shares):
            text, color = as_percent(share), "white" if share > 0.6 * top else "#222222"
            axes.text(s + 0.5, t + 0.5, text, ha="center", va="center", color=color)
        labels = [short_name(name, names) for name in names]
        ticks = np.arange(len(names)) + 0.5
        tilt = 30 if max(map(len, labels)) * len(names) > 30 else 0
        axes.set_xticks(ticks, labels, rotation=tilt, ha="right" if tilt else "center")
        axes.set_yticks(ticks, labels)
        axes.invert_yaxis()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel("student")
        axes.set_ylabel("teacher")

    alt = "; ".join(f"{p.teacher} taught {p.student} {as_percent(p.share)}" for p in pairs)
    caption = "Share of all samples that a teacher (row) taught a student (column)."
    return figure_tag(draw(paint, 1.6 + 0.5 * len(names)), alt, caption)


def anybody_taught(names: Sequence[str], lessons: Sequence[Row]) -> bool:
    """Whether any lesson was given."""
    shares = [share for name in names for share in series_of(lessons, f"{name}/teaches")]
    return any(is_finite(share) and share > 0 for share in shares)
