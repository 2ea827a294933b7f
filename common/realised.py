"""Predictions of scouting against what finished runs gained."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from common.rank_correlation import rank_correlation
from common.scouting import Judge, Team

_logger = logging.getLogger("scout")

_FEW = 1000  # teams that were not run and are told nevertheless


@dataclass(frozen=True)
class FinishedRun:
    """One run, in the numbers that its evaluations wrote.

    Attributes:
        title: For messages.
        members: Numbers of its models among those scouted, in the order of its peers.
        before: Metric of each at the start.
        after: Metric of each at the end.
        rule: Of the transfer; ``none`` for a control.
        score: What the rule compared.
        margin: Of the rule.
        setting: All else that it was trained with, as text; a control has the same.
        trained: How each model is trained by itself; the same in a control.
        alike: Options that runs of one team have in common where they are averaged.
        grouped: What has one teacher, such as an ``image`` of pixels; empty: each sample.
    """

    title: str
    members: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    rule: str
    score: str
    margin: float | None
    setting: str
    trained: tuple[Mapping[str, str], ...]
    alike: Mapping[str, str]
    grouped: str = ""


@dataclass(frozen=True)
class Realised:
    """What one team gained under one rule, mean over its runs.

    Attributes:
        members: Numbers of the models, ascending.
        rule, score, margin: Of its runs.
        gain: Of each member, in the metric's unit; positive is better.
        runs: How many.
        controlled: Whether the gain is over the same model trained without transfer; False: over
            its own start, which more training alone moves too.
        grouped: Of its runs.
    """

    members: tuple[int, ...]
    rule: str
    score: str
    margin: float | None
    gain: tuple[float, ...]
    runs: int
    controlled: bool
    grouped: str = ""


def realised_gains(runs: Sequence[FinishedRun], lower_is_better: bool = False) -> list[Realised]:
    """Measure every run against its control, and average the runs of a team.

    A control has the rule ``none``, the same setting, and all of the run's models, trained in the
    same way, perhaps among others: without transfer nobody's training depends on who is there
    besides.

    Args:
        runs: Controls among them.
        lower_is_better: Of the metric.

    Returns:
        One a team, rule and kind of comparison; where some runs have controls, only those, which is
        told.

    Raises:
        ValueError: No run with transfer, a gain that is not finite (names the run), or runs of one
            team that differ in more than seed and data (names the options).
    """
    controls = [run for run in runs if run.rule == "none"]
    gains: dict[_Kind, list[tuple[float, ...]]] = {}
    averaged: dict[_Kind, list[FinishedRun]] = {}
    for run in runs:
        if run.rule == "none":
            continue
        other = _control_of(run, controls)
        start = run.before if other is None else other
        sign = -1 if lower_is_better else 1
        gain = {
            i: sign * (after - base)
            for i, after, base in zip(run.members, run.after, start, strict=True)
        }
        if not all(map(math.isfinite, gain.values())):
            raise ValueError(
                f"{run.title}: what its peers gained is {list(gain.values())}, which is not "
                "finite: it or what it is compared with diverged; leave it out"
            )
        members = tuple(sorted(gain))
        kind = _Kind(members, run.rule, run.score, run.margin, other is not None, run.grouped)
        gains.setdefault(kind, []).append(tuple(gain[i] for i in members))
        averaged.setdefault(kind, []).append(run)
    if not gains:
        raise ValueError("no run with transfer among them; nothing to compare predictions with")
    compared = any(kind.controlled for kind in gains)
    for kind, several_runs in averaged.items():
        if kind.controlled == compared:
            _refuse_unlike(several_runs)
    found = [
        Realised(
            kind.members,
            kind.rule,
            kind.score,
            kind.margin,
            tuple(float(x) for x in np.mean(several, axis=0)),
            len(several),
            kind.controlled,
            kind.grouped,
        )
        for kind, several in gains.items()
    ]
    controlled = [one for one in found if one.controlled]
    if controlled and len(controlled) < len(found):
        _logger.warning(
            "%d of %d runs with transfer are left out: among the runs with rule none there is no "
            "control for them, one with the same settings, seed and models",
            sum(one.runs for one in found if not one.controlled),
            sum(one.runs for one in found),
        )
    return controlled or found


class _Kind(NamedTuple):
    members: tuple[int, ...]
    rule: str
    score: str
    margin: float | None
    controlled: bool
    grouped: str


def _refuse_unlike(runs: Sequence[FinishedRun]) -> None:
    """Refuse to average runs of one team that differ in more than seed and data."""
    ways = [_way(run) for run in runs]
    values = {
        name: list(dict.fromkeys(way.get(name, "unset") for way in ways))
        for name in dict.fromkeys(name for way in ways for name in way)
    }
    unlike = [f"{name} ({' or '.join(v)})" for name, v in values.items() if len(v) > 1]
    if unlike:
        other = next(run for run, way in zip(runs, ways, strict=True) if way != ways[0])
        raise ValueError(
            f"runs of one team under rule {runs[0].rule}, such as {runs[0].title} and "
            f"{other.title}, differ in {', '.join(unlike)}, and their mean is the gain of none; "
            "compare runs of one setting at a time (seeds may differ, controls may be the same)"
        )


def _way(run: FinishedRun) -> dict[str, str]:
    """Return a run's options, those of its models in the order of their numbers."""
    found = dict(run.alike)
    models = [
        way for _, way in sorted(zip(run.members, run.trained, strict=True), key=itemgetter(0))
    ]
    for name in dict.fromkeys(name for way in models for name in way):
        own = [way.get(name, "unset") for way in models]
        found[name] = own[0] if len({*own}) == 1 else "/".join(own)
    return found


def _control_of(run: FinishedRun, controls: Sequence[FinishedRun]) -> tuple[float, ...] | None:
    for control in controls:
        if control.setting == run.setting:
            ways = list(zip(control.members, control.trained, strict=True))
            wanted = list(zip(run.members, run.trained, strict=True))
            if all(way in ways for way in wanted):
                return tuple(control.after[ways.index(way)] for way in wanted)
    return None


def compare(
    realised: Sequence[Realised],
    judge: Callable[[Realised], Judge],
    ensemble: Mapping[tuple[int, ...], Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Correlate every predictor with what was gained.

    Args:
        realised: From ``realised_gains``.
        judge: Judges by a survey of all models before training, as a run's transfer chose.
        ensemble: By how much the members' mean is better than each of them at the start, by team;
            one more predictor.

    Returns:
        Plain containers: ``runs`` (team, gain, predictions, each also by member), ``others``
        (predictions for the teams that were not run, where these are few), ``correlations``
        (see ``correlate``), and ``controlled``.

    Raises:
        ValueError: A rule or score under which the survey's models cannot be judged.
    """
    judges = _Judges(judge)
    rows: list[dict[str, Any]] = []
    for one in realised:
        team = judges.team(one, one.members)
        predicted = dict(team.predicted)
        if ensemble is not None:
            predicted["ensemble"] = list(ensemble[one.members])
        rows.append(
            {
                "members": [judges.of(one).found.names[i] for i in one.members],
                "rule": one.rule,
                "runs": one.runs,
                "gains": list(one.gain),
                "gain": _mean(one.gain),
                "predicted": predicted,
            }
        )
    teams = [one.members for one in realised]
    known = set(judges.of(realised[0]).usable) if realised else set()
    if ensemble is not None and all(team in ensemble for team in possible_teams(teams)):
        known.add("ensemble")

    def told(name: str, k: int, members: Sequence[int]) -> Sequence[float]:
        if name == "ensemble" and ensemble is not None:
            return ensemble[tuple(members)]
        return judges.team(realised[k], members).predicted[name]

    return {
        "controlled": bool(realised) and realised[0].controlled,
        "runs": rows,
        "others": _others(realised, judges),
        "correlations": correlate(rows, teams, told, known),
    }


Told = Callable[[str, int, Sequence[int]], Sequence[float]]
"""What a predictor says of models [k], ascending, under the rule of a row: name, row, models."""


def correlate(
    rows: Sequence[Mapping[str, Any]],
    teams: Sequence[tuple[int, ...]],
    told: Told,
    known: Collection[str],
) -> dict[str, dict[str, Any]]:
    """Correlate every predictor of a table with its gains.

    Args:
        rows: One a team, as ``compare`` tells them: ``rule``, ``gains``, ``gain``, ``predicted``.
        teams: Numbers of the models of each, ascending.
        told: Asked for the predictions of models that carry others' names.
        known: Predictors of which ``told`` knows all teams; others have no p.

    Returns:
        For each predictor a ``RankCorrelation``, as a dict: over ``teams`` by the mean of their
        members, over ``members``, and over the ``partners`` of each single model.
    """
    names = list(rows[0]["predicted"]) if rows else []
    return {name: _correlations(name, rows, teams, told, name in known) for name in names}


def possible_teams(teams: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """List all teams of the same models and sizes, one by one."""
    used, sizes = sorted({i for team in teams for i in team}), sorted({len(team) for team in teams})
    return itertools.chain.from_iterable(itertools.combinations(used, size) for size in sizes)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


class _Judges:
    """Judges teams under the transfer of runs; each way and each team once."""

    def __init__(self, judge: Callable[[Realised], Judge]) -> None:
        self._judge = judge
        self._judges: dict[tuple[Any, ...], Judge] = {}
        self._teams: dict[tuple[Any, ...], Team] = {}

    def way(self, one: Realised) -> tuple[Any, ...]:
        return one.rule, one.score, one.margin, one.grouped

    def of(self, one: Realised) -> Judge:
        way = self.way(one)
        if way not in self._judges:
            self._judges[way] = self._judge(one)
        return self._judges[way]

    def team(self, one: Realised, members: Sequence[int]) -> Team:
        key = (*self.way(one), tuple(sorted(members)))
        if key not in self._teams:
            self._teams[key] = self.of(one).judge(key[-1])
        return self._teams[key]


def _others(realised: Sequence[Realised], judges: _Judges) -> list[dict[str, Any]]:
    """Judge the teams that were not run, where these are few and all runs had one transfer."""
    if len({judges.way(one) for one in realised}) != 1:
        return []
    first, run = realised[0], {one.members for one in realised}
    left = (team for team in possible_teams([*run]) if team not in run)
    few = list(itertools.islice(left, _FEW + 1))
    names = judges.of(first).found.names
    return [
        {"members": [names[i] for i in team], "predicted": judges.team(first, team).predicted}
        for team in (few if len(few) <= _FEW else ())
    ]


def _correlations(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    teams: Sequence[tuple[int, ...]],
    told: Told,
    known: bool,
) -> dict[str, Any]:
    """Correlate over teams, over their members, and over the partners of each single model.

    Models change places for p, where the rule names none of them.
    """
    used = sorted({i for team in teams for i in team})
    movable = known and len(used) > 3 and all(":" not in row["rule"] for row in rows)

    def by_member(random: np.random.Generator) -> list[tuple[float, ...]]:
        other = dict(zip(used, random.permutation(used).tolist(), strict=True))
        found = []
        for k, team in enumerate(teams):
            members = [other[i] for i in team]
            ordered = sorted(members)
            values = told(name, k, ordered)
            found.append(tuple(values[ordered.index(i)] for i in members))
        return found

    def of_teams(random: np.random.Generator) -> list[float]:
        return [_mean(team) for team in by_member(random)]

    def of_members(random: np.random.Generator) -> list[float]:
        return [value for team in by_member(random) for value in team]

    each: dict[str, Any] = {
        "predicted": [x for row in rows for x in row["predicted"][name]],
        "realised": [x for row in rows for x in row["gains"]],
        "models": [team for team in teams for _ in team],
        "relabel": of_members if movable else None,
    }
    found = {
        "teams": rank_correlation(
            [_mean(row["predicted"][name]) for row in rows],
            [row["gain"] for row in rows],
            models=teams,
            relabel=of_teams if movable else None,
        ),
        "members": rank_correlation(**each),
        "partners": rank_correlation(**each, within=[i for team in teams for i in team]),
    }
    return {over: asdict(one) for over, one in found.items()}
