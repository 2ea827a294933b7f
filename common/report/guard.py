"""What the guard did in a run."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from common.report.numbers import Row, number
from common.report.page import Section, data_table, section
from common.report.plots import color_of


def guard_section(events: Sequence[Row], unit: str) -> list[Section]:
    """Show which peers got worse than at the start, when, and what was done; nothing if none."""
    if not events:
        return []
    head = ["Peer", unit.capitalize(), "Done", "Metric", "Start", "Then", "Evaluations"]
    rows = [
        [
            event["peer"],
            event[unit],
            event["action"],
            event["metric"],
            number(event["start"], 3),
            number(event["now"], 3),
            event["evaluations"],
        ]
        for event in events
    ]
    caption = (
        "Peers that got worse than at the start by more than their bound, in this many evaluations "
        "in a row. Rolled back: to the peer's best weights so far; taught no more: it went on with "
        "its task loss alone; frozen: it learned nothing any more."
    )
    return [section("Guard", data_table(caption, head, rows))]


def mark_events(axes: Axes, names: Sequence[str], events: Sequence[Row], unit: str) -> None:
    """Draw a dotted line in the peer's colour where the guard acted."""
    for event in events:
        color = color_of(list(names).index(event["peer"]))
        axes.axvline(event[unit], color=color, linestyle=":", linewidth=1.2)
