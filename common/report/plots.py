"""Figures: the small parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.report.numbers import Row, epochs_of, series_of

# Okabe and Ito: told apart with colour blindness too
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5539", "#6c757d")


MARKERS = "osD^vP*X"


WIDTH = 5.8


LINE = 100


_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "figure.constrained_layout.hspace": 0.08,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a919a",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "text.usetex": False,
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "report",
}


def draw(paint: Callable[[Figure], None], height: float, width: float = WIDTH) -> bytes:
    """Return a figure as SVG, without touching pyplot's state."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        file = BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def draw_lines(axes: Axes, names: Sequence[str], rows: Sequence[Row], what: str) -> None:
    """Draw one metric of every peer over the epochs."""
    for i, name in enumerate(names):
        values = series_of(rows, f"{name}/{what}")
        label = short_name(name, names)
        marker = _marker(i) if len(rows) <= 40 else ""
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
    """Put the legend beside the plot."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 60 // (max(map(len, labels)) + 6)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def color_of(i: int) -> str:
    """Return the colour of the i-th peer."""
    return COLORS[i % len(COLORS)]


def _marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def short_name(name: str, names: Sequence[str], most: int = 28) -> str:
    """Cut a long name for a figure, if it stays unlike the others; the tables have it whole."""
    cut = [other if len(other) <= most else other[: most - 1] + "…" for other in names]
    short = name if len(name) <= most else name[: most - 1] + "…"
    label = short if cut.count(short) == 1 else name
    # matplotlib leaves labels that start with an underscore out of legends
    return f" {label}" if label.startswith("_") else label
