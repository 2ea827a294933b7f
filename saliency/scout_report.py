"""The page of scouting: who predicts which frames better than whom, and the teams to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.report.numbers import MISSING, as_percent, listed, number
from common.report.page import (
    Html,
    Summary,
    bullets,
    commands,
    data_table,
    figure_grid,
    folded,
    section,
    settings_section,
    write_page,
)
from common.report.scouting import COSTS_TOLD, cost_columns, matrix_figure

CAUTION = (
    "A prediction, not a result: nothing was trained. What teams are ranked by is a hypothesis "
    "about who gains from whom, and it says nothing of how large a gain will be; test it with "
    "scout.py --realised RUN... on finished runs. On classifiers like predictors did not order "
    "teams by their mean gain; on saliency models they were not tested."
)
Outcome = Mapping[str, Any]


def write_frames_report(path: Path, outcome: Outcome, top: int = 20) -> Path:
    """Write the page.

    Args:
        path: The HTML file; written whole or not at all.
        outcome: What ``scout.json`` holds.
        top: Teams in the table.

    Returns:
        Where it lies.
    """
    teams = outcome["teams"][:top]
    told = frames_sentences(outcome)
    why = [
        f"{name}{' (ranked by)' * (name == outcome['predictor'])}: {text}."
        for name, text in outcome["why"].items()
    ]
    first = Summary(
        kind="Scouting",
        verdict=told[1:],
        facts={
            "Models": len(outcome["names"]),
            "Frames": outcome["samples"],
            "Teams": outcome["judged"],
            "Ranked by": outcome["predictor"],
        },
        cautions=[CAUTION],
        about=told[0],
    )
    sections = [
        section(
            "Teams",
            _team_table(outcome, teams),
            folded("Every predictor", _predictor_table(outcome, teams), bullets(why)),
        ),
        section("To train them", *commands(outcome["commands"])),
        section("Who predicts what the others do not", figure_grid(_figures(outcome))),
        section("Models", _model_table(outcome)),
        settings_section(outcome["settings"]),
    ]
    title = f"Scouting {len(outcome['names'])} saliency models"
    return write_page(path, title, first, sections)


def frames_lead(outcome: Outcome) -> str:
    """Say in plain words what was found."""
    return " ".join(frames_sentences(outcome))


def frames_sentences(outcome: Outcome) -> list[str]:
    """Say in plain words what was asked, then what was found."""
    metric = outcome["metric"]
    told = [
        f"{len(outcome['names'])} models predicted {outcome['samples']} frames, each from its own "
        "clips."
    ]
    if not outcome["teams"]:
        return [*told, "No team fits."]
    best = outcome["teams"][0]
    aim = f"for {outcome['for']}" if outcome["for"] else "for all members"
    strongest = max(best["accuracy"].values())
    told.append(
        f"Of {outcome['judged']} teams the most is predicted {aim} in {listed(best['members'])} "
        f"({outcome['predictor']} {best['value']:.4f}). Its strongest member has {metric} "
        f"{strongest:.4f}; taking the best member on every frame, {best['oracle']:.4f}."
    )
    if outcome["judged"] < outcome["possible"]:
        told.append(
            f"{outcome['possible']} teams are possible; the larger ones were grown from the best "
            "smaller ones, which can miss some."
        )
    if outcome["too_large"]:
        told.append(f"{outcome['too_large']} teams were left out: they do not fit the memory.")
    return told


def _team_table(outcome: Outcome, teams: Sequence[Mapping[str, Any]]) -> Html:
    costs = cost_columns(teams)
    head = ["#", "Team", outcome["predictor"], "Taught", outcome["metric"], "Oracle", "Ensemble"]
    head += ["Overlap", *costs]
    rows = [
        [
            k,
            ", ".join(team["members"]),
            number(team["value"], 4),
            " / ".join(f"{100 * share:.0f}" for share in team["taught"].values()) + " %",
            " / ".join(number(value, 3) for value in team["accuracy"].values()),
            number(team["oracle"], 4),
            MISSING if team["ensemble"] is None else number(team["ensemble"], 4),
            number(team["agreement"], 3),
            *(column[k - 1] for column in costs.values()),
        ]
        for k, team in enumerate(teams, 1)
    ]
    roles = f"rule {outcome['rule']}" + (f", score {outcome['score']}" if outcome["score"] else "")
    height, width = outcome["settings"]["kept_size"]
    caption = (
        f"The best of {outcome['judged']} teams; {roles}. Taught: expected share of frames on "
        f"which each member is taught, in the order of the names; then {outcome['metric']} of "
        "each, and of the best member on every frame (oracle). Ensemble: the mean of the members' "
        f"maps, at {height} x {width} pixels, where values differ a little from those at full "
        "size. Overlap: how alike the members' maps are, 1 where they are the same."
        + (f" The ranking is by what {outcome['for']} may gain." if outcome["for"] else "")
        + COSTS_TOLD * bool(costs)
    )
    return data_table(caption, head, rows, labels=2)


def _predictor_table(outcome: Outcome, teams: Sequence[Mapping[str, Any]]) -> Html:
    names = list(outcome["why"])
    rows = [
        [
            k,
            ", ".join(team["members"]),
            *(number(np.mean(list(team["predicted"][name].values())), 4) for name in names),
        ]
        for k, team in enumerate(teams, 1)
    ]
    caption = "What every predictor says of these teams, mean over members."
    return data_table(caption, ["#", "Team", *names], rows, labels=2)


def _figures(outcome: Outcome) -> list[Html]:
    names, metric = outcome["names"], outcome["metric"]
    won = 100 * np.asarray(outcome["pairs"]["wins"], dtype=float)
    overlap = np.asarray(outcome["pairs"]["overlap"], dtype=float)
    return [
        matrix_figure(
            names,
            won,
            "better",
            "worse (% of frames)",
            f"Frames, in per cent, that the row's model predicts better than the column's, by "
            f"{metric}; other metrics are in pairs.csv.",
        ),
        matrix_figure(
            names,
            overlap,
            "one model",
            "another: overlap of the maps",
            "How alike two models' maps are, each over its sum: 1 where they are the same.",
        ),
    ]


def _model_table(outcome: Outcome) -> Html:
    first = outcome["models"][0]
    kept = [key for key in first if key not in ("name", "best_on", "parameters")]
    reduced = f"{outcome['metric']}_reduced"
    metrics = [key for key in kept if key != reduced]
    head = ["Model", *metrics, f"{outcome['metric']}, reduced", "Best on"]
    rows = [
        [
            fact["name"],
            *(number(fact[key], 4) for key in metrics),
            MISSING if fact[reduced] is None else number(fact[reduced], 4),
            as_percent(fact["best_on"]),
        ]
        for fact in outcome["models"]
    ]
    caption = (
        "Each alone, means over frames. Reduced: on the maps of which ensembles are made. Best on: "
        f"share of frames on which no other model has a higher {outcome['metric']}."
    )
    return data_table(caption, head, rows)
