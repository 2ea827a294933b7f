"""The report of a prediction's test: what was predicted against what finished runs gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.report.numbers import MISSING, difference_unit, is_finite, number
from common.report.page import (
    Html,
    Panel,
    Summary,
    data_table,
    figure_tag,
    long_table,
    section,
    settings_section,
    write_page,
)
from common.report.plots import COLORS, draw, name_axis, zero_line

CAUTION = (
    "Teams that share a model are not independent: p moves whole models, and intervals draw whole "
    "models, which leaves them a little too narrow; p is the one to look at. Several predictors "
    "were compared; nothing is corrected for that."
)
SAME_DATA = (
    "Predictions were made on samples on which the runs were evaluated too, their gains measured "
    "and perhaps their best epochs chosen: what is chance in these samples is in both, and the "
    "correlations may be off for it. Scout on other labelled data."
)


def realised_cautions(outcome: Mapping[str, Any]) -> list[str]:
    """Say what to beware of."""
    return [*outcome["starts"], CAUTION, *([SAME_DATA] if outcome["same_data"] else [])]


def write_realised_report(path: Path | str, outcome: Mapping[str, Any]) -> Path:
    """Write the page.

    Args:
        path: The HTML file; written whole or not at all.
        outcome: ``names``, ``samples`` and their ``unit``, ``metric`` that was gained,
            ``predictor``, ``realised`` (from ``common.realised.compare``), ``settings``,
            ``same_data``: whether models answered what runs were evaluated on, and ``starts``
            (from ``common.scout_starts.unlike_starts``).

    Returns:
        Where it lies.
    """
    told = outcome["realised"]
    first = Summary(
        kind="Scouting, tested",
        verdict=[realised_lead(outcome)],
        facts={
            "Models": len(outcome["names"]),
            "Teams": len(told["runs"]),
            outcome["unit"].capitalize(): outcome["samples"],
            "Ranked by": outcome["predictor"],
        },
        cautions=realised_cautions(outcome),
    )
    sections = [
        section(
            "How well each predictor orders the outcomes",
            _correlation_figure(told["correlations"]),
            _correlation_table(outcome),
        ),
        section("Predicted and realised", _scatter(outcome)),
        section("Teams", _run_table(outcome)),
        settings_section(outcome["settings"]),
    ]
    return write_page(path, f"Predictions against {len(told['runs'])} teams", first, sections)


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
        f"{len(told['runs'])} teams of {len(outcome['names'])} models; gains of "
        f"{outcome['metric']} are over {base}. {name}, by which teams are ranked,"
    )
    if not is_finite(found["rho"]):
        return f"{start} cannot be tested on so few teams, or on ones that do not differ."
    p = found["p"]
    verdict = "does not order them beyond chance"
    if not is_finite(p):
        verdict = "cannot be tested, for models of a rule that names one cannot change places"
    elif p < 0.05:
        right = found["rho"] > 0
        verdict = "orders them better than chance" if right else "orders them the wrong way round"
    return f"{start} {verdict}: rank correlation {_interval(found)}, p {number(p, 3)}."


def correlation_rows(outcome: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of text a predictor, under ``HEAD``."""
    rows = []
    for name, found in outcome["realised"]["correlations"].items():
        rows.append(
            [
                name + " (ranked by)" * (name == outcome["predictor"]),
                *(text for over in found.values() for text in (_interval(over), _p(over["p"]))),
            ]
        )
    return rows


HEAD = ["Predictor", "Teams", "p", "Members", "p ", "Partners of a model", "p  "]


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
        "intervals of a bootstrap of models. p: share of orders of the models as far from 0; none "
        "where models cannot change places. Partners of a model: the gains of one model with "
        "different partners alone, which is what --for asks; pooled."
    )
    return data_table(caption, HEAD, correlation_rows(outcome))


def _correlation_figure(correlations: Mapping[str, Mapping[str, Any]]) -> Html:
    """Draw every predictor's rank correlations with their intervals."""
    kinds = {"teams": "teams", "members": "members", "partners": "partners of one model"}
    panels = []
    for kind, title in kinds.items():
        found = {name: told[kind] for name, told in correlations.items()}
        if any(is_finite(one["rho"]) for one in found.values()):
            alt = "; ".join(f"{name}: {_interval(one)}" for name, one in found.items())
            panels.append(Panel(_correlation_plot(found), alt, title))
    caption = (
        "Rank correlation of what a predictor said with what was gained; bars are 95 % intervals "
        "of a bootstrap of models. 1: the right order, 0: says nothing, -1: the wrong way round."
    )
    return figure_tag(panels, caption)


def _correlation_plot(found: Mapping[str, Mapping[str, Any]]) -> str:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        zero_line(axes, upright=True)
        for y, one in enumerate(found.values()):
            if is_finite(one["low"]) and is_finite(one["high"]):
                axes.plot([one["low"], one["high"]], [y, y], color=COLORS[0], linewidth=1.8)
            if is_finite(one["rho"]):
                axes.plot(one["rho"], y, "o", color=COLORS[0], markersize=6)
        axes.set_xlim(-1.05, 1.05)
        axes.set_xlabel("rank correlation (no unit)")
        name_axis(axes, list(found))

    return draw(paint, 0.65 + 0.23 * len(found))


def _scatter(outcome: Mapping[str, Any]) -> Html:
    told, unit = outcome["realised"], difference_unit(outcome["metric"])
    rows = told["runs"]
    panels = [
        Panel(
            _scatter_plot([_mean(row["predicted"][name]) for row in rows], rows, unit),
            f"Predicted by {name} against realised gain of {len(rows)} teams",
            name,
        )
        for name in told["correlations"]
    ]
    caption = "Each point is a team: what a predictor said, and the mean gain of its members."
    return figure_tag(panels, caption)


def _scatter_plot(predicted: Sequence[float], rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        zero_line(axes)
        axes.plot(predicted, [row["gain"] for row in rows], "o", color=COLORS[0], alpha=0.6)
        axes.set_ylabel(f"gain ({unit})")
        axes.set_xlabel("predicted, mean over members")
        axes.xaxis.set_major_locator(MaxNLocator(5))  # more would run into one another

    return draw(paint, 2.2)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _run_table(outcome: Mapping[str, Any]) -> Html:
    chosen, metric = outcome["predictor"], outcome["metric"]
    unit = difference_unit(metric)
    digits = 2 if unit == "points" else 4
    rows = [
        [
            ", ".join(row["members"]),
            row["rule"],
            row["runs"],
            number(row["gain"], digits, sign=True),
            " / ".join(number(value, digits, sign=True) for value in row["gains"]),
            number(_mean(row["predicted"][chosen]), 4),
        ]
        for row in sorted(outcome["realised"]["runs"], key=lambda row: -row["gain"])
    ]
    head = ["Team", "Rule", "Runs", "Gain", "Gain of each", chosen]
    caption = f"Most gained first; gains of {metric} ({unit}) at the end."
    return long_table("Every team", caption, head, rows)
