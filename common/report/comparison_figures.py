"""Figures of arms over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.report.effects import SHORT_TARGETS, has_flips, interval_text, summary_format
from common.report.numbers import Row, as_count, difference_unit, with_unit
from common.report.page import Html, Panel, figure_tag
from common.report.plots import COLORS, draw, name_axis, row_labels, zero_line
from common.report.style import AXIS, GRID, PAPER, SOFT

FLIPS_ARE = "samples that turned right, and wrong"
_BETTER, _WORSE = COLORS[0], COLORS[1]


def forest(summary: Mapping[str, Any], by_peer: bool = False) -> list[Html]:
    """Draw the gain of every arm over the control with its interval; filled where shown.

    Args:
        summary: From ``common.statistics.summarise``, or ``corrected``.
        by_peer: A panel for every peer, not for the mean, the ensemble and so on.

    Returns:
        A figure; nothing where the control is alone.
    """
    targets = summary["names" if by_peer else "targets"]
    label = f"gain in {summary['metric']} over {summary['control']}"
    return effects_figure(summary["peer_gains" if by_peer else "gains"], targets, label, summary)


def effects_figure(
    rows: Mapping[str, Mapping[str, Row | None]],
    targets: Sequence[str],
    label: str,
    summary: Mapping[str, Any],
) -> list[Html]:
    """Draw effects with their intervals, a panel for every target; filled where shown.

    Args:
        rows: Effects by target, for every row.
        targets: Which, in order.
        label: What an effect is, without its unit.
        summary: Where they come from.

    Returns:
        A figure; nothing where there is no effect.
    """
    known = {
        what: [effects[what] for effects in rows.values()]
        for what in targets
        if any(effects.get(what) is not None for effects in rows.values())
    }
    if not known:
        return []
    limits = _limits([effect for effects in known.values() for effect in effects])
    unit = difference_unit(summary["metric"])
    panels = [
        Panel(
            _forest_plot(list(rows), effects, limits, f"{label} ({unit})"),
            "; ".join(
                f"{row}: {interval_text(effect, summary)}"
                for row, effect in zip(rows, effects, strict=True)
            ),
            SHORT_TARGETS.get(what, what),
        )
        for what, effects in known.items()
    ]
    caption = (
        f"{label[0].upper()}{label[1:]}, right is better; bars are {100 * summary['level']:g} % "
        "intervals, and a point without a bar has no interval. Filled: shown. Hollow: not shown."
    )
    return [figure_tag(panels, caption)]


def _limits(effects: Sequence[Row | None]) -> tuple[float, float]:
    """Return what all panels reach from and to, with zero inside."""
    ends = [0.0]
    for effect in effects:
        if effect is not None:
            ends += [effect[end] for end in ("low", "mean", "high") if effect[end] is not None]
    room = 0.06 * (max(ends) - min(ends)) or 1.0
    return min(ends) - room, max(ends) + room


def _forest_plot(
    arms: Sequence[str], effects: Sequence[Row | None], limits: tuple[float, float], label: str
) -> str:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        zero_line(axes, upright=True)
        for y, effect in enumerate(effects):
            _whisker(axes, y, effect)
        axes.set_xlim(limits)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(label)
        name_axis(axes, arms)

    return draw(paint, _height(arms))


def _height(arms: Sequence[str]) -> float:
    return 0.75 + (0.38 if "\n" in row_labels(arms)[0] else 0.23) * len(arms)


def _whisker(axes: Axes, y: int, effect: Row | None) -> None:
    if effect is None:
        return
    color = (_BETTER if effect["mean"] > 0 else _WORSE) if effect["shown"] else SOFT
    if effect["low"] is not None:
        axes.plot([effect["low"], effect["high"]], [y, y], color=color, linewidth=1.8)
    face = color if effect["shown"] else PAPER
    axes.plot(effect["mean"], y, "o", color=color, markerfacecolor=face, markersize=6)


def before_after_figure(summary: Mapping[str, Any]) -> Html:
    """Draw each peer before and after, a panel for every peer."""
    arms, show = list(summary["arms"]), summary_format(summary)
    panels = []
    for name in summary["names"]:
        peers = {arm: summary["arms"][arm]["peers"][name] for arm in arms}
        alt = "; ".join(
            f"{arm}: {show(peer['before']['mean'])} to {show(peer['after']['mean'])}"
            for arm, peer in peers.items()
        )
        panels.append(Panel(_before_after_plot(peers, with_unit(summary["metric"])), alt, name))
    caption = (
        f"{summary['metric']} before (hollow) and after training, mean over seeds; the bar is the "
        "standard deviation over seeds. Each peer has its own scale."
    )
    return figure_tag(panels, caption)


def _before_after_plot(peers: Mapping[str, Row], label: str) -> str:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for y, peer in enumerate(peers.values()):
            _slope(axes, y, peer)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(label)
        name_axis(axes, list(peers))

    return draw(paint, _height(list(peers)))


def _slope(axes: Axes, y: int, peer: Row) -> None:
    before, after, sd = peer["before"]["mean"], peer["after"]["mean"], peer["after"]["sd"]
    axes.plot([before, after], [y, y], color=GRID, linewidth=1.6, zorder=1)
    axes.plot(before, y, "o", color=AXIS, markerfacecolor=PAPER)
    axes.errorbar(after, y, xerr=sd, fmt="o", color=COLORS[0], capsize=2)


def flips_figure(summary: Mapping[str, Any], flips_are: str | None = None) -> list[Html]:
    """Draw how many samples each arm fixed and broke; ``flips_are``: what was counted instead."""
    if not has_flips(summary):
        return []
    arms = list(summary["arms"])
    unit = "%" if "in percent" in (flips_are or "") else "count"
    panels = []
    for name in summary["names"]:
        peers = {arm: summary["arms"][arm]["peers"][name] for arm in arms}
        alt = "; ".join(
            f"{arm}: {as_count(peer['fixed'])} fixed, {as_count(peer['broken'])} broken"
            for arm, peer in peers.items()
        )
        panels.append(Panel(_flips_plot(peers, unit), alt, name))
    caption = f"Fixed and broken: {flips_are or FLIPS_ARE}, mean over seeds."
    return [figure_tag(panels, caption)]


def _flips_plot(peers: Mapping[str, Row], unit: str) -> str:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for what, sign, color in (("fixed", 1, COLORS[2]), ("broken", -1, COLORS[1])):
            counts = [sign * (peer[what] or 0) for peer in peers.values()]
            bars = axes.barh(range(len(peers)), counts, color=color, height=0.7)
            axes.bar_label(bars, [f"{abs(c):.0f}" for c in counts], padding=2, fontsize=8.5)
        axes.axvline(0, color=AXIS, linewidth=1)
        axes.margins(x=0.2)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
        axes.set_xlabel(f"broken ← {unit} → fixed")
        name_axis(axes, list(peers))

    return draw(paint, _height(list(peers)))
