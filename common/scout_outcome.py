"""What scouting found, as plain containers and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from common.disk import atomic_write, write_csv
from common.options import OptionError
from common.scouting import Judge, Ranking, Team, first_of_sizes
from common.survey import Survey, describe_models, describe_pairs


def describe_outcome(
    judge: Judge, ranking: Ranking, predictor: str, student: int | None, top: int
) -> dict[str, Any]:
    """Say what scouting found.

    Args:
        judge: Holds the survey and the rule.
        ranking: Of the teams.
        predictor: What they were ranked by.
        student: Whom they were ranked for; None: all members.
        top: Teams of each size whose calibration is looked at.

    Returns:
        Plain containers: ``models``, ``pairs`` (tables by name), ``teams`` (all that fit, in the
        order of the ranking), ``calibration`` and how many teams there were. None where a number is
        not known.
    """
    found = judge.found
    return {
        **describe_ranking(judge, ranking, predictor, student),
        "models": [asdict(fact) for fact in describe_models(found)],
        "pairs": {
            what: None if table is None else table.tolist()
            for what, table in vars(describe_pairs(found)).items()
        },
        "calibration": calibration_rows(found, ranking.best(top)),
    }


def describe_ranking(
    judge: Judge, ranking: Ranking, predictor: str, student: int | None
) -> dict[str, Any]:
    """Say which teams were found, and nothing of models and pairs; see ``describe_outcome``."""
    found = judge.found
    names = list(found.names)
    return {
        "names": names,
        "samples": int(found.prediction.shape[1]),
        "labelled": found.labelled,
        "rule": judge.rule,
        "score": judge.score if judge.compares else None,
        "predictor": predictor,
        "why": {name: judge.predictors[name].why for name in judge.usable},
        "for": None if student is None else names[student],
        "teams": [_describe_team(team, names, predictor, student) for team in ranking.teams],
        "judged": ranking.judged,
        "possible": ranking.possible,
        "too_large": ranking.too_large,
        "least_too_large": ranking.least,
    }


def _describe_team(
    team: Team, names: Sequence[str], predictor: str, student: int | None
) -> dict[str, Any]:
    members = [names[i] for i in team.members]
    by_member = {
        what: None if values is None else dict(zip(members, values, strict=True))
        for what, values in (
            ("taught", team.taught),
            ("teaches", team.teaches),
            ("kl", team.kl),
            ("accuracy", team.accuracy),
        )
    }
    return {
        "members": members,
        "value": team.gain(predictor, student),
        "predicted": {
            name: dict(zip(members, values, strict=True)) for name, values in team.predicted.items()
        },
        **by_member,
        "agreement": team.agreement,
        "oracle": team.oracle,
        "ensemble": team.ensemble,
        "engine": team.engine,
        "memory": team.memory,
        "step_seconds": team.step_seconds,
    }


def teams_by_size(outcome: Mapping[str, Any], top: int) -> list[list[dict[str, Any]]]:
    """Return so many of the best teams of each size, a list a size; none: nothing fits."""
    shown = first_of_sizes(outcome["teams"], lambda team: len(team["members"]), top)
    return [list(group) for _, group in groupby(shown, lambda team: len(team["members"]))]


def teams_to_train(outcome: Mapping[str, Any], most: int) -> list[dict[str, Any]]:
    """Return so many of the best teams, one of each size at least: first the best of each."""
    groups = teams_by_size(outcome, most)
    rounds = zip_longest(*groups)
    best = [team for some in rounds for team in some if team is not None]
    return best[: max(most, len(groups))]


def require_team(outcome: Mapping[str, Any]) -> None:
    """End a command line that has no team to propose, after its report is written.

    Args:
        outcome: What ``scout.json`` holds; without ``teams`` none were to be proposed.

    Raises:
        OptionError: No team fits.
    """
    if not outcome.get("teams", True):
        raise OptionError(
            "no team to propose, for none fits; what the smallest takes is told above, and in the "
            "report"
        )


def calibration_rows(found: Survey, teams: Sequence[Team]) -> list[dict[str, Any]]:
    """Say, for teams under ``--score confidence``, whom it lets teach, raw and calibrated.

    Measured on the samples that the temperatures were not fitted on. ``right_raw`` and
    ``right_calibrated`` are the shares of taught samples whose teacher is right, ``same`` the share
    of samples on which both choose the same teacher; the first two are None without labels.
    """
    if found.calibrated is None:
        return []
    apart = slice(None) if found.fitted is None else ~found.fitted
    rows = []
    for team in teams:
        chosen = list(team.members)
        raw, calibrated = found.confidence[chosen][:, apart], found.calibrated[chosen][:, apart]
        right = None if found.correct is None else found.correct[chosen][:, apart]
        first, second = _teacher(raw), _teacher(calibrated)
        rows.append(
            {
                "members": [found.names[i] for i in team.members],
                "same": float((first == second).double().mean()),
                "right_raw": _share_right(first, right),
                "right_calibrated": _share_right(second, right),
            }
        )
    return rows


def _teacher(score: Tensor) -> Tensor:
    """Return who teaches under ``best`` [n]; -1 where the highest score is shared."""
    top = score.topk(2, dim=0)
    teacher = top.indices[0]
    return teacher.masked_fill(top.values[0] == top.values[1], -1)


def _share_right(teacher: Tensor, right: Tensor | None) -> float | None:
    taught = teacher >= 0
    if right is None or not bool(taught.any()):
        return None
    return float(right.gather(0, teacher.clamp(min=0)[None])[0][taught].double().mean())


def write_outcome(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Write ``scout.json``, ``models.csv``, ``pairs.csv`` (ordered pairs) and ``teams.csv``."""
    text = json.dumps(outcome, indent=1)
    atomic_write(folder / "scout.json", lambda to: to.write_text(text, encoding="utf-8"))
    write_csv(folder / "models.csv", outcome["models"])
    write_csv(folder / "pairs.csv", _pair_rows(outcome))
    write_csv(folder / "teams.csv", [_team_row(team) for team in outcome["teams"]])


def _pair_rows(outcome: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = outcome["names"]
    tables = {what: table for what, table in outcome["pairs"].items() if table is not None}
    return [
        {"teacher": t, "student": s, **{what: table[i][j] for what, table in tables.items()}}
        for i, t in enumerate(names)
        for j, s in enumerate(names)
        if i != j
    ]


def _team_row(team: Mapping[str, Any]) -> dict[str, Any]:
    count = len(team["members"])
    means = {name: sum(v.values()) / count for name, v in team["predicted"].items()}
    single = ("agreement", "oracle", "ensemble", "engine", "memory", "step_seconds")
    several = ("taught", "teaches", "kl", "accuracy")
    return {
        "members": " ".join(team["members"]),
        "value": team["value"],
        **{what: team[what] for what in single},
        **means,
        **{what: _joined(team[what]) for what in several},
    }


def _joined(by_member: Mapping[str, float] | None) -> str | None:
    return None if by_member is None else " ".join(f"{value:.6g}" for value in by_member.values())
