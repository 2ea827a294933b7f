"""What the page of scouting says of frames: who predicts which of them better than whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.report.numbers import MISSING, as_percent, number
from common.report.page import Html, data_table
from common.report.scouting import Outcome, Parts, matrix_figure, pair_scatter

CAUTION = (
    "A prediction, not a result: nothing was trained. What teams are ranked by is a hypothesis "
    "about who gains from whom, and it says nothing of how large a gain will be; test it with "
    "scout.py --realised RUN... on finished runs. On small saliency models it did not order teams "
    "by their mean gain, nor did like predictors on classifiers."
)


def _about(outcome: Outcome) -> str:
    return (
        f"{len(outcome['names'])} models predicted {outcome['samples']} frames, each from its own "
        "clips."
    )


def _best(outcome: Outcome, team: Mapping[str, Any]) -> str:
    return (
        f"Its strongest member has {outcome['metric']} {max(team['accuracy'].values()):.4f}; "
        f"taking the best member on every frame, {team['oracle']:.4f}."
    )


def _columns(outcome: Outcome, teams: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    return {
        outcome["metric"]: [
            " / ".join(number(value, 3) for value in team["accuracy"].values()) for team in teams
        ],
        "Oracle": [number(team["oracle"], 4) for team in teams],
        "Ensemble": [number(team["ensemble"], 4) for team in teams],
        "Overlap": [number(team["agreement"], 3) for team in teams],
    }


def _legend(outcome: Outcome) -> str:
    height, width = outcome["settings"]["kept_size"]
    return (
        f" Then {outcome['metric']} of each, and of the best member on every frame (oracle). "
        f"Ensemble: the mean of the members' maps, at {height} x {width} pixels, where values "
        "differ a little from those at full size. Overlap: how alike the members' maps are, 1 "
        "where they are the same."
    )


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
        pair_scatter(
            outcome,
            [fact[metric] for fact in outcome["models"]],
            outcome["pairs"]["oracle"],
            metric,
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


FRAMES = Parts(
    about=_about,
    best=_best,
    columns=_columns,
    legend=_legend,
    others="Who predicts what the others do not",
    figures=_figures,
    models=_model_table,
)
