"""The table that ``scouting.py`` keeps: what was predicted for every team, and what it gained.

One row a team and member, short enough for the repository, and all that the rank correlations and
their p need: also what was predicted for teams that were not run (``runs`` 0, no gain), for models
change places with them.

    team,member,rule,runs,gain_METRIC,PREDICTOR...

``gain_METRIC`` is over the control, in the metric's unit, mean over the team's runs; the first
predictor is the one that teams are ranked by. Numbers have six digits.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from common.disk import write_text
from common.realised import correlate, possible_teams

FIRST = ("team", "member", "rule", "runs")
GAIN = "gain_"


def write_table(path: Path, found: Mapping[str, Any]) -> None:
    """Write what a task's ``scout.py --realised`` found, in the order of the models."""
    told, number = found["realised"], found["names"].index
    runs = told["runs"]
    # A stable sort: the one that teams are ranked by, then the others as they are.
    predictors = sorted(told["correlations"], key=lambda name: name != found["predictor"])
    teams = [*runs, *({**team, "rule": runs[0]["rule"], "runs": 0} for team in told["others"])]
    teams.sort(key=lambda team: [number(name) for name in team["members"]])

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*FIRST, f"{GAIN}{found['metric']}", *predictors])
    for team in teams:
        columns = [team.get("gains"), *(team["predicted"].get(x) for x in predictors)]
        for k, name in enumerate(team["members"]):
            values = ["" if column is None else f"{column[k]:.6g}" for column in columns]
            start = " ".join(team["members"]), name, team["rule"], team["runs"]
            table.writerow([*start, *values])
    write_text(path, text.getvalue())


def read_table(path: Path) -> dict[str, Any]:
    """Read a table, and correlate anew; no model and no data is needed.

    Returns:
        As ``scout.py --realised`` tells it: ``names``, ``metric``, ``predictor`` and ``realised``.

    Raises:
        ValueError: No such table (says what does not fit).
    """
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        head, rows = list(table.fieldnames or ()), list(table)
    gain = head[len(FIRST)] if len(head) > len(FIRST) else ""
    if tuple(head[: len(FIRST)]) != FIRST or not gain.startswith(GAIN) or len(head) < 6:
        expected = ",".join((*FIRST, f"{GAIN}METRIC", "PREDICTOR..."))
        raise ValueError(f"{path}: the columns are {','.join(head)}; expected {expected}")
    predictors = head[len(FIRST) + 1 :]
    names = list(dict.fromkeys(row["member"] for row in rows))
    teams = [
        _team(path, list(several), gain, predictors)
        for _, several in groupby(rows, key=itemgetter("team"))
    ]
    runs = [team for team in teams if team["runs"]]
    if not runs:
        raise ValueError(f"{path}: no team that was run; expected runs above 0")
    number = {name: i for i, name in enumerate(names)}
    predicted = {tuple(number[x] for x in team["members"]): team["predicted"] for team in teams}
    numbers = [tuple(number[x] for x in team["members"]) for team in runs]
    possible = list(possible_teams(numbers))
    known = [x for x in predictors if all(x in predicted.get(team, ()) for team in possible)]
    correlations = correlate(
        runs, numbers, lambda name, _, members: predicted[tuple(members)][name], known
    )
    return {
        "names": names,
        "metric": gain.removeprefix(GAIN),
        "predictor": predictors[0],
        "realised": {"runs": runs, "correlations": correlations},
    }


def _team(
    path: Path, rows: Sequence[Mapping[str, str]], gain: str, predictors: Sequence[str]
) -> dict[str, Any]:
    """Read the rows of one team."""
    members, team = [row["member"] for row in rows], rows[0]["team"]
    if members != team.split():
        raise ValueError(f"{path}: team {team} has rows of {', '.join(members)}; one a member")
    runs = int(rows[0]["runs"])
    columns = {x: [row[x] for row in rows] for x in predictors if all(row[x] for row in rows)}
    predicted = {name: [float(value) for value in column] for name, column in columns.items()}
    found = {"members": members, "rule": rows[0]["rule"], "runs": runs, "predicted": predicted}
    if runs:
        found["gains"] = [float(row[gain]) for row in rows]
        found["gain"] = statistics.fmean(found["gains"])
    return found
