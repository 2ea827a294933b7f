"""The report of a prediction's test: what was predicted against what finished runs gained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.report.numbers import MISSING, is_finite, listed, number
from common.report.page import (
    Html,
    data_table,
    figure_tag,
    section,
    settings_table,
    tag,
    write_page,
)
from common.report.plots import COLORS, draw

CAUTION = (
    "Teams that share a model are not independent: the interval and the first p take them to be, "
    "and are too sure. The p by models moves whole models instead, and is the one to look at. "
    "Several predictors were compared; nothing is corrected for that."
)


def write_realised_report(path: Path | str, outcome: Mapping[str, Any]) -> Path:
    """Write the page.

    Args:
        path: The HTML file; written whole or not at all.
        outcome: ``names``, ``samples``, ``predictor``, ``realised`` (from
            ``common.realised.compare``) and ``settings``.

    Returns:
        Where it lies.
    """
    told = outcome["realised"]
    body = [
        section(
            "In short",
            tag("p", realised_lead(outcome), class_="lead"),
            tag("p", CAUTION, class_="caution"),
        ),
        section("How well each predictor orders the outcomes", _correlation_table(outcome)),
        section("Predicted and realised", _scatter(told)),
        section("Teams", _run_table(outcome)),
        section("Settings", settings_table(outcome["settings"])),
    ]
    return write_page(path, f"Predictions against {len(told['runs'])} teams", body)


def realised_lead(outcome: Mapping[str, Any]) -> str:
    """Say in plain words whether the predictor that teams are ranked by holds."""
    told, name = outcome["realised"], outcome["predictor"]
    found = told["correlations"][name]["teams"]
    base = (
        "the same models trained without transfer"
        if told["controlled"]
        else "their own start, which training alone moves too: there is no control among the runs"
    )
    start = (
        f"{len(told['runs'])} teams of {len(outcome['names'])} models; gains are over {base}. "
        f"{name}, by which teams are ranked,"
    )
    if not is_finite(found["rho"]):
        return f"{start} cannot be tested on so few teams, or on ones that do not differ."
    p = found["p_models"] if is_finite(found["p_models"]) else found["p"]
    verdict = "does not order them beyond chance"
    if p < 0.05:
        right = found["rho"] > 0
        verdict = "orders them better than chance" if right else "orders them the wrong way round"
    return (
        f"{start} {verdict}: rank correlation {number(found['rho'], sign=True)} "
        f"[{number(found['low'], sign=True)}, {number(found['high'], sign=True)}], p {p:.3f}."
    )


def correlation_rows(outcome: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of text a predictor, under ``HEAD``."""
    rows = []
    for name, found in outcome["realised"]["correlations"].items():
        teams, partners = found["teams"], found["partners"]
        rows.append(
            [
                name + " (ranked by)" * (name == outcome["predictor"]),
                _interval(teams),
                _p(teams["p"]),
                _p(teams["p_models"]),
                _interval(found["members"]),
                _interval(partners),
                _p(partners["p"]),
            ]
        )
    return rows


HEAD = ["Predictor", "Teams", "p", "p by models", "Members", "Partners of a model", "p "]


def _interval(found: Mapping[str, Any]) -> str:
    if not is_finite(found["rho"]):
        return MISSING
    low, high = number(found["low"], sign=True), number(found["high"], sign=True)
    return f"{number(found['rho'], sign=True)} [{low}, {high}]"


def _p(value: Any) -> str:
    return number(value, 4)


def _correlation_table(outcome: Mapping[str, Any]) -> Html:
    first = next(iter(outcome["realised"]["correlations"].values()))
    caption = (
        f"Spearman's rank correlation with the mean gain of a team, over {first['teams']['count']} "
        f"teams, and with each member's own gain, over {first['members']['count']}; with 95 % "
        "bootstrap intervals. p: share of permutations as far from 0. Partners of a model: the "
        "gains of one model with different partners alone, which is what --for asks; pooled."
    )
    return data_table(caption, HEAD, correlation_rows(outcome))


def _scatter(told: Mapping[str, Any]) -> Html:
    names, rows = list(told["correlations"]), told["runs"]
    columns = 2
    lines = math.ceil(len(names) / columns)

    def paint(figure: Figure) -> None:
        grid = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
        for axes, name in zip(grid, names, strict=False):
            x = [_mean(row["predicted"][name]) for row in rows]
            axes.axhline(0, color="#8a919a", linewidth=1)
            axes.plot(x, [row["gain"] for row in rows], "o", color=COLORS[0], alpha=0.6)
            axes.set_title(name)
        for axes in grid[len(names) :]:
            axes.set_visible(False)
        figure.supylabel("gain (points)", fontsize=9.5)
        figure.supxlabel("predicted, mean over members", fontsize=9.5)

    alt = f"Predicted against realised gain of {len(rows)} teams, for {listed(names)}"
    caption = "Each point is a team: what a predictor said, and the mean gain of its members."
    return figure_tag(draw(paint, 0.6 + 1.7 * lines), alt, caption)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _run_table(outcome: Mapping[str, Any]) -> Html:
    chosen = outcome["predictor"]
    rows = [
        [
            ", ".join(row["members"]),
            row["rule"],
            row["runs"],
            number(row["gain"], sign=True),
            " / ".join(number(value, sign=True) for value in row["gains"]),
            number(_mean(row["predicted"][chosen]), 4),
        ]
        for row in sorted(outcome["realised"]["runs"], key=lambda row: -row["gain"])
    ]
    head = ["Team", "Rule", "Runs", "Gain", "Gain of each", chosen]
    return data_table("Most gained first; gains in points, at the end of training.", head, rows)
