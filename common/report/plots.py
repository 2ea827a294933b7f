"""Figures: the small parts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.report.numbers import Row, epochs_of, series_of
from common.report.style import AXIS, GRID, INK, SERIES, VARIABLES

COLORS = tuple(SERIES)
MARKERS = "osD^vP*X"
# inches; so narrow that the letters can still be read where a telephone shows all of it
WIDTH = 4.1
LINE = 100
HEAT = "cividis"
_TURN = 0.47  # of the largest: darker cells have white letters, lighter ones black
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}
_DIGITS = re.compile(r"\d+\.\d{3,}")
_SMALLEST, _LARGEST = 1.08, 1.5  # pixels of the page to a point of the figure

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "figure.constrained_layout.hspace": 0.08,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": AXIS,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "text.usetex": False,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
}


def draw(paint: Callable[[Figure], None], height: float, width: float = WIDTH) -> str:
    """Return a figure as SVG to stand in a page, without touching pyplot's state.

    It is laid out with the widest of the usual fonts and shown in the page's. Colours of
    ``common.report.style`` follow the page's scheme. It is never shown so small that it cannot be
    read: a wide one scrolls in its own box.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _placed(file.getvalue(), 72 * width)


def _placed(svg: str, points: float) -> str:
    """Make a file of its own a part of a page: no head, no ids without use, variable colours."""
    inside = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    inside = re.sub(r"<(metadata|style).*?</\1>|<!--.*?-->", "", inside, flags=re.DOTALL)
    inside = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", inside)
    # in tags alone: a number between them is a label
    inside = re.sub(r"<[^>]*>", lambda found: _DIGITS.sub(_rounded, found[0]), inside)
    for color, variable in VARIABLES.items():
        inside = inside.replace(color, variable)
    used = set(re.findall(r"(?:url\(|href=\")#([^\")]+)", inside))
    inside = re.sub(r' id="([^"]*)"', lambda f: f[0] if f[1] in used else "", inside)
    box = re.search(r'viewBox="([^"]*)"', svg)
    size = f"min-width: {_SMALLEST * points:.0f}px; max-width: {_LARGEST * points:.0f}px"
    return f'<svg viewBox="{box[1] if box else ""}" style="{size}">{inside}</svg>'


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}"


def draw_lines(axes: Axes, names: Sequence[str], rows: Sequence[Row], what: str) -> None:
    """Draw one metric of every peer over the epochs."""
    for i, name in enumerate(names):
        values = series_of(rows, f"{name}/{what}")
        label = short_name(name, names)
        marker = marker_of(i) if len(rows) <= 40 else ""
        axes.plot(epochs_of(rows), values, f"-{marker}", color=color_of(i), label=label)


def epoch_axis(axes: Axes, label: str, unit: str) -> None:
    """Label an axis of whole epochs or iterations."""
    axes.set_xlabel(unit)
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left, right = axes.get_xlim()
    if right - left < 1:
        axes.set_xlim(left - 0.5, right + 0.5)


def draw_legend(figure: Figure, axes: Axes) -> None:
    """Put the legend below the plot."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 44 // (max(map(len, labels)) + 7)))
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def zero_line(axes: Axes, upright: bool = False) -> None:
    """Draw where nothing has changed."""
    (axes.axvline if upright else axes.axhline)(0, color=AXIS, linewidth=1, linestyle="--")


def name_axis(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a plot, the first at the top."""
    axes.set_yticks(range(len(names)), row_labels(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def row_labels(names: Sequence[str], most: int = 20) -> list[str]:
    """Shorten the names of rows; a long difference, ``one - other``, takes two lines."""
    if max(map(len, names), default=0) <= most:
        return list(names)
    pairs = [name.split(" - ", 1) for name in names]
    sides = list(dict.fromkeys(side for pair in pairs for side in pair))
    if all(len(pair) == 2 for pair in pairs):
        return ["\n- ".join(short_name(side, sides, most) for side in pair) for pair in pairs]
    return [short_name(name, names, most) for name in names]


def heat_cells(
    axes: Axes, values: np.ndarray, names: Sequence[str], form: str, largest: float | None = None
) -> None:
    """Draw a table of values of every two names, from 0 up, with each value in its cell.

    Args:
        axes: To draw on.
        values: [row, column]; NaN is left empty.
        names: Of rows and columns.
        form: Of a value; empty writes none.
        largest: Of the colours; None: the largest value.
    """
    top = max(float(np.nanmax(values)), 1e-9) if largest is None else largest
    colors = matplotlib.colormaps[HEAT]
    axes.pcolormesh(values, cmap=colors, vmin=0, vmax=top, edgecolor="none")
    for (row, column), value in np.ndenumerate(values):
        if form and np.isfinite(value):
            dark = value < _TURN * top
            color = "#ffffff" if dark else "#000000"
            axes.text(column + 0.5, row + 0.5, form.format(value), **_CENTRED, color=color)
    labels = [short_name(name, names, 18) for name in names]
    upright = max(map(len, labels)) * len(names) > 30
    ticks = np.arange(len(names)) + 0.5
    axes.set_xticks(ticks, labels, rotation=90 if upright else 0)
    axes.set_yticks(ticks, labels)
    axes.set(xlim=(0, len(names)), ylim=(len(names), 0))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def color_of(i: int) -> str:
    """Return the colour of the i-th peer."""
    return COLORS[i % len(COLORS)]


def marker_of(i: int) -> str:
    """Return the marker of the i-th peer."""
    return MARKERS[i % len(MARKERS)]


def short_name(name: str, names: Sequence[str], most: int = 26) -> str:
    """Cut a long name for a figure, so that it stays unlike the others; the tables have it whole.

    The end goes first; where two would then be the same, the middle.
    """
    for cut in (_without_end, _without_middle):
        label = cut(name, most)
        if [cut(other, most) for other in names].count(label) == 1:
            break
    else:
        label = f"{_without_end(name, most - 4)} {1 + list(names).index(name)}"
    # matplotlib leaves labels that start with an underscore out of legends
    return f" {label}" if label.startswith("_") else label


def _without_end(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _without_middle(name: str, most: int) -> str:
    if len(name) <= most:
        return name
    half = (most - 1) // 2
    return f"{name[: most - 1 - half]}…{name[-half:]}"
