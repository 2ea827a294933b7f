"""Figures of arms over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.report.effects import SHORT_TARGETS, has_flips, interval_text, summary_format
from common.report.numbers import Row, as_count
from common.report.page import Html, figure_tag
from common.report.plots import COLORS, draw, short_name

FLIPS_ARE = "samples that turned right, and wrong"


def forest(summary: Mapping[str, Any]) -> list[Html]:
    """Draw the gain of every arm over the control with its interval; filled where shown."""
    arms, targets = list(summary["gains"]), summary["targets"]
    if not arms:
        return []

    def paint(figure: Figure) -> None:
        panels = panels_of(figure, len(targets), sharex=True, sharey=True)
        for axes, what in zip(panels, targets, strict=False):
            axes.axvline(0, color="#8a919a", linewidth=1, linestyle="--")
            for y, arm in enumerate(arms):
                _whisker(axes, y, summary["gains"][arm][what])
            axes.set_title(SHORT_TARGETS[what])
            _arm_axis(axes, arms)
        figure.supxlabel(f"gain of {summary['metric']} over {summary['control']}", fontsize=9.5)

    alt = "; ".join(
        f"{arm}, {SHORT_TARGETS[what]}: {interval_text(effect, summary)}"
        for arm in arms
        for what, effect in summary["gains"][arm].items()
    )
    caption = (
        f"Gain over {summary['control']}, right is better; bars are {100 * summary['level']:g} % "
        "intervals. Filled: shown. Hollow: not shown."
    )
    rows = math.ceil(len(targets) / 2)
    return [figure_tag(draw(paint, 0.5 + rows * (0.5 + 0.26 * len(arms))), alt, caption)]


def _whisker(axes: Axes, y: int, effect: Row | None) -> None:
    if effect is None:
        return
    if effect["low"] is not None:
        axes.plot([effect["low"], effect["high"]], [y, y], color=COLORS[0], linewidth=1.6)
    face = COLORS[0] if effect["shown"] else "white"
    axes.plot(effect["mean"], y, "o", color=COLORS[0], markerfacecolor=face, markersize=6)


def before_after_figure(summary: Mapping[str, Any]) -> Html:
    """Draw each peer before and after, a panel for every arm."""
    names, arms = summary["names"], list(summary["arms"])

    def paint(figure: Figure) -> None:
        panels = panels_of(figure, len(names), sharey=True)
        for axes, name in zip(panels, names, strict=False):
            for y, arm in enumerate(arms):
                _slope(axes, y, summary["arms"][arm]["peers"][name])
            axes.set_title(short_name(name, names))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            _arm_axis(axes, arms)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles[:2], labels[:2], loc="outside lower center", ncols=2)

    show = summary_format(summary)
    alt = "; ".join(
        f"{arm}, {name}: {show(peer['before']['mean'])} to {show(peer['after']['mean'])}"
        for arm in arms
        for name, peer in summary["arms"][arm]["peers"].items()
    )
    caption = (
        f"{summary['metric']} before and after training, mean over seeds; the bar is the standard "
        "deviation over seeds. Each peer has its own scale."
    )
    rows = math.ceil(len(names) / 2)
    return figure_tag(draw(paint, 0.5 + rows * (0.6 + 0.26 * len(arms))), alt, caption)


def _slope(axes: Axes, y: int, peer: Row) -> None:
    before, after, sd = peer["before"]["mean"], peer["after"]["mean"], peer["after"]["sd"]
    axes.plot([before, after], [y, y], color="#b9c0c7", linewidth=1.4, zorder=1)
    axes.plot(before, y, "o", color="#8a919a", markerfacecolor="white", label="before")
    axes.errorbar(after, y, xerr=sd, fmt="o", color=COLORS[0], capsize=2)
    axes.plot(after, y, "o", color=COLORS[0], label="after")


def flips_figure(summary: Mapping[str, Any], flips_are: str | None = None) -> list[Html]:
    """Draw how many samples each arm fixed and broke; ``flips_are``: what was counted instead."""
    names, arms = summary["names"], list(summary["arms"])
    peers = {arm: summary["arms"][arm]["peers"] for arm in arms}
    if not has_flips(summary):
        return []

    def paint(figure: Figure) -> None:
        panels = panels_of(figure, len(names), sharex=True, sharey=True)
        for axes, name in zip(panels, names, strict=False):
            for what, sign, color in (("fixed", 1, COLORS[2]), ("broken", -1, COLORS[1])):
                counts = [sign * (peers[arm][name][what] or 0) for arm in arms]
                bars = axes.barh(range(len(arms)), counts, color=color, label=what, height=0.7)
                axes.bar_label(bars, [f"{abs(c):.0f}" for c in counts], padding=2, fontsize=8)
            axes.axvline(0, color="#8a919a", linewidth=1)
            axes.margins(x=0.22)
            axes.set_title(short_name(name, names))
            axes.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
            _arm_axis(axes, arms)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)

    alt = "; ".join(
        f"{arm}, {name}: {as_count(peer['fixed'])} fixed, {as_count(peer['broken'])} broken"
        for arm in arms
        for name, peer in peers[arm].items()
    )
    caption = f"Fixed and broken: {flips_are or FLIPS_ARE}, mean over seeds."
    rows = math.ceil(len(names) / 2)
    return [figure_tag(draw(paint, 0.5 + rows * (0.6 + 0.26 * len(arms))), alt, caption)]


def panels_of(figure: Figure, count: int, sharex: bool = False, sharey: bool = False) -> list[Axes]:
    """Lay panels out in two columns and hide what is left over."""
    columns = min(count, 2)
    grid = figure.subplots(
        math.ceil(count / columns), columns, sharex=sharex, sharey=sharey, squeeze=False
    )
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes in grid.flat[:count][-columns:]:
        axes.tick_params(labelbottom=True)
    return list(grid.flat)


def _arm_axis(axes: Axes, arms: Sequence[str]) -> None:
    axes.set_yticks(range(len(arms)), [short_name(arm, arms) for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.grid(False, axis="y")
