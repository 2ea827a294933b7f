"""What averages of a peer's start and best were worth."""

from __future__ import annotations

from collections.abc import Sequence

from common.report.numbers import Row, Show
from common.report.page import Section, data_table, section


def soup_section(soups: Sequence[Row], show: Show) -> list[Section]:
    """Show each peer's start, best and soup, and all averages that were tried."""
    if not soups:
        return []
    head = ["Peer", "Start", "Best", "Soup", "Share of best"]
    rows, every = [], []
    for soup in soups:
        measured = dict(zip(soup["alphas"], soup["measured"], strict=True))
        values = [show(measured[alpha]) for alpha in (0.0, 1.0, soup["alpha"])]
        rows.append([soup["peer"], *values, f"{soup['alpha']:g}"])
        for half, key in (("chose", "chosen_by"), ("measured", "measured")):
            every.append([f"{soup['peer']}, half that {half}", *map(show, soup[key])])
    metric = soups[0]["metric"]
    return [
        section(
            "Soup",
            data_table(
                f"{metric} of the average of start and best weights that did best on one half of "
                "the held-out data, measured on the other half. The best weights themselves were "
                "chosen on both halves, so what an average owes to them is optimistic still.",
                head,
                rows,
            ),
            data_table(
                f"{metric} of all averages that were tried, by their share of the best weights "
                "(0: the start itself, 1: the best itself).",
                ["Peer", *(f"{alpha:g}" for alpha in soups[0]["alphas"])],
                every,
            ),
        )
    ]
