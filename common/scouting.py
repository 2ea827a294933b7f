"""Which models should teach which, before any training: teams, ranked by what they may gain."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from common.options import OptionError
from common.roles import ONE_WAY, assign_roles, check_rule, compares_scores
from common.survey import Survey

_logger = logging.getLogger("scout")


@dataclass(frozen=True)
class TeamView:
    """What predictors see of one team of k models.

    Attributes:
        roles: Weight with which t would teach s [k(t), k(s), n], by the rule, at the start.
        kl: KL(p_t || p_s) [k, k, n].
        prediction: [k, n].
        correct: [k, n], 0 or 1; None without labels.
        log_true: [k, n]; None without labels.
        calibrated: [k, n]; None where not known.
    """

    roles: Tensor
    kl: Tensor
    prediction: Tensor
    correct: Tensor | None
    log_true: Tensor | None
    calibrated: Tensor | None


def _taught(view: TeamView, worth: Tensor) -> Tensor:
    """Average over samples what every student is taught [k(s)]: sum_t roles * worth."""
    return (view.roles * worth).sum(dim=0).mean(dim=1, dtype=torch.float64)


def _gap(values: Tensor) -> Tensor:
    """Return the teacher's value minus the student's [k(t), k(s), n]."""
    return values.unsqueeze(1) - values.unsqueeze(0)


def _flips(view: TeamView) -> Tensor:
    assert view.correct is not None
    return _taught(view, _gap(view.correct))


def _right_kl(view: TeamView) -> Tensor:
    assert view.correct is not None
    return _taught(view, view.kl * view.correct.unsqueeze(1))


def _loss_gap(view: TeamView) -> Tensor:
    assert view.log_true is not None
    return _taught(view, _gap(view.log_true))


def _complementarity(view: TeamView) -> Tensor:
    assert view.correct is not None
    oracle = view.correct.amax(dim=0).double().mean()
    return oracle - view.correct.double().mean(dim=1)


def _error(view: TeamView) -> Tensor:
    assert view.correct is not None
    return 1 - view.correct.mean(dim=1, dtype=torch.float64)


def _strength(view: TeamView) -> Tensor:
    assert view.correct is not None
    accuracy = view.correct.mean(dim=1, dtype=torch.float64)
    others = 1 - torch.eye(len(accuracy), dtype=torch.float64, device=accuracy.device)
    return others @ accuracy / (len(accuracy) - 1)  # exact for a pair, for ranks to have ties


def _confidence_gap(view: TeamView) -> Tensor:
    assert view.calibrated is not None
    return _taught(view, _gap(view.calibrated) * _differ(view))


def _disagreement(view: TeamView) -> Tensor:
    return _taught(view, _differ(view).float())


def _differ(view: TeamView) -> Tensor:
    return view.prediction.unsqueeze(1) != view.prediction.unsqueeze(0)


@dataclass(frozen=True)
class Predictor:
    """A hypothesis of how much each member of a team will gain; only its order counts.

    Attributes:
        estimate: From a view to a number a member [k].
        why: What it rests on.
        needs: ``labels``, ``temperatures`` or nothing.
    """

    estimate: Callable[[TeamView], Tensor]
    why: str
    needs: str = ""


PREDICTORS: dict[str, Predictor] = {
    "flips": Predictor(
        _flips,
        "share of samples where a right teacher teaches a wrong student, minus the share where a "
        "wrong one teaches a right student: what the student would gain by taking over its "
        "teachers' answers",
        "labels",
    ),
    "right-kl": Predictor(
        _right_kl,
        "KL from right teachers: how much there is to learn, where it is worth learning",
        "labels",
    ),
    "loss-gap": Predictor(
        _loss_gap,
        "by how much the student's loss would fall if it answered as its teachers",
        "labels",
    ),
    "complementarity": Predictor(
        _complementarity,
        "accuracy of the oracle minus the student's own: what the team knows and it does not, "
        "whatever the rule",
        "labels",
    ),
    "error": Predictor(
        _error,
        "the member's own error, whoever its partners are: the baseline, for weak models may gain "
        "from anybody",
        "labels",
    ),
    "strength": Predictor(
        _strength,
        "mean accuracy of the member's partners: the baseline for choosing them",
        "labels",
    ),
    "kl": Predictor(
        lambda view: _taught(view, view.kl),
        "the transfer loss at the start: how much is taught, right or wrong",
    ),
    "confidence-gap": Predictor(
        _confidence_gap,
        "calibrated confidence of teachers minus the student's, where they differ: flips, "
        "estimated without labels",
        "temperatures",
    ),
    "disagreement": Predictor(
        _disagreement, "share of samples on which a teacher gives another answer"
    ),
}


_ALIKE = ("mutual", "random")  # rules under which everybody teaches everybody alike


def default_predictor(found: Survey, rule: str) -> str:
    """Choose the predictor to rank by; see ``PREDICTORS`` for what each rests on.

    Under ``mutual`` and ``random`` the flips of all members add up to nothing.
    """
    if found.labelled:
        return "complementarity" if rule in _ALIKE else "flips"
    if found.calibrated is not None and rule not in _ALIKE:
        return "confidence-gap"
    return "disagreement"


def judged_by(
    found: Survey, rule: str, score: str, margin: float | None
) -> tuple[str, str, float | None]:
    """Return rule, score and margin by which teams can be judged: without labels, by confidences.

    Where these are not calibrated, by how much a team's members differ alone; that is told.
    """
    if found.labelled:
        return rule, score, margin
    if found.calibrated is not None:
        return rule, "confidence", margin
    _logger.warning(
        "confidences of different models cannot be compared without labelled data to calibrate "
        "them; teams are judged by how much their members differ alone"
    )
    return "mutual", "confidence", None


def usable_predictors(
    labelled: bool, calibrated: bool, predictors: Mapping[str, Predictor] = PREDICTORS
) -> list[str]:
    """Name the predictors that there are data for.

    Args:
        labelled: Whether the truth is known of what teams are judged on.
        calibrated: Whether each model's temperature is.
        predictors: To choose from.
    """
    have = {"": True, "labels": labelled, "temperatures": calibrated}
    return [name for name, predictor in predictors.items() if have[predictor.needs]]


def check_request(
    names: Sequence[str],
    sizes: Sequence[int],
    rule: str,
    predictor: str | None,
    *,
    labelled: bool = True,
    calibrated: bool = True,
    predictors: Mapping[str, Predictor] = PREDICTORS,
) -> None:
    """Refuse what cannot be ranked whatever models answer; to be asked before they are.

    Args:
        names: Of the models.
        sizes: Of the teams.
        rule: See ``common.roles.assign_roles``.
        predictor: What to rank by; None: the default.
        labelled: See ``usable_predictors``.
        calibrated: See ``usable_predictors``.
        predictors: To choose from.

    Raises:
        OptionError: A team size, a rule or a predictor that does not fit.
    """
    try:
        check_rule(rule, names)
        _check_teams(len(names), sizes)
        if predictor is not None:
            _check_predictor(predictor, usable_predictors(labelled, calibrated, predictors))
    except ValueError as error:
        raise OptionError(str(error)) from error


def _check_teams(models: int, sizes: Sequence[int]) -> None:
    for size in sizes:
        if not 2 <= size <= models:
            raise ValueError(
                f"--team-size {size}: there are {models} models to choose from; give more models, "
                f"or a size of 2{f' to {models}' if models > 2 else ''}"
            )


def _check_predictor(predictor: str, usable: Sequence[str]) -> None:
    if predictor not in usable:
        raise ValueError(f"predictor {predictor!r} cannot be used; choose from {', '.join(usable)}")


@dataclass
class Team:
    """Models that could be trained together.

    Attributes:
        members: Their numbers.
        taught: Expected weight with which each is taught, mean over samples [k].
        teaches: Share of samples on which each teaches somebody [k].
        kl: Expected transfer loss of each [k].
        predicted: Each predictor's estimate for every member.
        agreement: Share of samples on which all give the same class.
        accuracy: Of each; None without labels.
        oracle: None without labels.
        ensemble: None without labels, and where it was not measured.
        engine: Under which training fits; None: not known.
        memory: Bytes that training takes at its peak, as planned; None: not known.
        step_seconds: Of one training step; None: not known.
    """

    members: tuple[int, ...]
    taught: list[float]
    teaches: list[float]
    kl: list[float]
    predicted: dict[str, list[float]]
    agreement: float
    accuracy: list[float] | None = None
    oracle: float | None = None
    ensemble: float | None = None
    engine: str | None = None
    memory: int | None = None
    step_seconds: float | None = None

    def gain(self, predictor: str, student: int | None = None) -> float:
        """Return the estimate for one member, or the mean over all."""
        values = self.predicted[predictor]
        if student is None:
            return math.fsum(values) / len(values)
        return values[self.members.index(student)]


def refuse_few(models: int, example: str) -> None:
    """Refuse fewer models than a team has, before a rule does so in the words of training.

    Args:
        models: How many were asked for.
        example: How more are given.

    Raises:
        OptionError: Fewer than two.
    """
    if models < 2:
        told = "1 model" if models else "no model"
        raise OptionError(
            f"{told} to choose from, and a team needs two: give --model MODEL for each, {example}"
        )


def refuse_unfit(unfit: Mapping[str, str], asked: int, skip: bool) -> None:
    """Stop where models cannot be scouted, or too few can.

    Args:
        unfit: Why each of them cannot, by name.
        asked: How many were asked for.
        skip: Go on without those, and say which.

    Raises:
        OptionError: Some cannot, and ``skip`` is not set (names all of them, with the way out); or
            fewer than two can.
    """
    told = "\n".join(f"  {name}: {why.removeprefix(f'{name}: ')}" for name, why in unfit.items())
    if unfit and not skip:
        raise OptionError(
            f"{len(unfit)} of {asked} models cannot be scouted:\n{told}\n"
            "mend them or leave them out; --skip-unfit goes on without them"
        )
    if unfit:
        _logger.warning("left out, for they cannot be scouted:\n%s", told)
    if asked - len(unfit) < 2:
        raise OptionError(f"{asked - len(unfit)} model(s) left; a team needs two")


class Identified(Protocol):
    """A model with what decides its answers."""

    @property
    def identity(self) -> str:
        """The same of two that answer alike, whatever they are called."""


_Model = TypeVar("_Model", bound=Identified)


def without_repeats(candidates: Sequence[_Model], names: Sequence[str]) -> list[_Model]:
    """Leave out models that were asked for twice, for instance by name and by a wildcard.

    Args:
        candidates: The models.
        names: Theirs, for the log.

    Raises:
        OptionError: Fewer than two are left.
    """
    found: dict[str, tuple[_Model, str]] = {}
    for candidate, name in zip(candidates, names, strict=True):
        first, known = found.setdefault(candidate.identity, (candidate, name))
        if first is not candidate:
            _logger.info("%s is %s; scouted once", name, known)
    if len(found) < 2:
        raise OptionError("all models are the same one; a team needs two")
    return [candidate for candidate, _ in found.values()]


def team_sizes(given: Sequence[str]) -> list[int]:
    """Read ``2..4``, or numbers.

    Raises:
        OptionError: Something else, or a size below 2.
    """
    sizes: set[int] = set()
    for text in given:
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(text))
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 2 <= low <= high:
            raise OptionError(f"--team-size {text}: expected 2 or more, or a range such as 2..4")
        sizes |= set(range(low, high + 1))
    return sorted(sizes)


@dataclass(frozen=True)
class Judge:
    """Judges teams by a survey, under one way of transfer.

    Args:
        found: The survey.
        rule: See ``common.roles.assign_roles``.
        score: See ``Survey.score``.
        margin: See ``common.roles.assign_roles``.
        groups: To which group each sample belongs [n], numbered from 0, as a pixel does to an
            image: a group has one teacher, by the mean score over it. None: each has its own.
        predictors: What is estimated for every team, by name.

    Raises:
        ValueError: A rule that does not exist, or a score that the survey does not have.
    """

    found: Survey
    rule: str = "best"
    score: str = "loss"
    margin: float | None = None
    groups: Tensor | None = None
    predictors: Mapping[str, Predictor] = field(default_factory=lambda: PREDICTORS)

    @property
    def usable(self) -> list[str]:
        """The predictors that the survey has the data for."""
        found = self.found
        return usable_predictors(found.labelled, found.calibrated is not None, self.predictors)

    def __post_init__(self) -> None:
        check_rule(self.rule, self.found.names)
        if self.compares:
            self.found.score(self.score)

    @property
    def compares(self) -> bool:
        """Whether the roles depend on the score."""
        return compares_scores(self.rule, self.margin)

    @property
    def teacher(self) -> int | None:
        """The one that ``one_way:NAME`` needs in a team; None under other rules."""
        if not self.rule.startswith(ONE_WAY):
            return None
        return self.found.names.index(self.rule.removeprefix(ONE_WAY))

    def may_be(self, members: Sequence[int]) -> bool:
        """Whether the rule applies to a team."""
        return self.teacher is None or self.teacher in members

    def view(self, members: Sequence[int]) -> TeamView:
        """Assign the roles and cut the survey to a team."""
        chosen, found = list(members), self.found

        def cut(table: Tensor | None) -> Tensor | None:
            return None if table is None else table[chosen]

        return TeamView(
            roles=self._roles(chosen),
            kl=found.kl[torch.tensor(chosen).unsqueeze(1), torch.tensor(chosen)],
            prediction=found.prediction[chosen],
            correct=None if found.correct is None else found.correct[chosen].float(),
            log_true=cut(found.log_true),
            calibrated=cut(found.calibrated),
        )

    def _roles(self, chosen: Sequence[int]) -> Tensor:
        score = torch.zeros(len(chosen), self.found.prediction.shape[1])
        if self.compares:
            score = group_means(self.found.score(self.score)[list(chosen)], self.groups)
        names = [self.found.names[i] for i in chosen]
        if self.rule == "random":  # what its draws come to in the mean
            everyone = assign_roles(score, "mutual", names=names, margin=self.margin)
            return (everyone > 0) / len(chosen)
        return assign_roles(score, self.rule, names=names, margin=self.margin)

    def judge(self, members: Sequence[int]) -> Team:
        """Return what is expected of a team."""
        view = self.view(members)
        right = view.correct
        drawn = 1 / len(members) if self.rule == "random" else 1.0
        same = (view.prediction == view.prediction[0]).all(dim=0)
        return Team(
            members=tuple(members),
            taught=view.roles.sum(dim=0).double().mean(dim=1).tolist(),
            teaches=(drawn * (view.roles > 0).any(dim=1).double().mean(dim=1)).tolist(),
            kl=PREDICTORS["kl"].estimate(view).tolist(),
            predicted={name: self.predictors[name].estimate(view).tolist() for name in self.usable},
            agreement=float(same.double().mean()),
            accuracy=None if right is None else right.double().mean(dim=1).tolist(),
            oracle=None if right is None else float(right.amax(dim=0).double().mean()),
        )


def group_means(values: Tensor, groups: Tensor | None) -> Tensor:
    """Give every sample the mean over its group.

    Args:
        values: [k, n].
        groups: [n], numbered from 0; None: each sample is a group.
    """
    if groups is None:
        return values
    sizes = torch.bincount(groups)
    sums = torch.zeros(len(values), len(sizes), dtype=torch.float64)
    sums.index_add_(1, groups, values.double())
    return (sums / sizes.clamp(min=1))[:, groups].to(values.dtype)


_Shown = TypeVar("_Shown")


def first_of_sizes(
    teams: Sequence[_Shown], size: Callable[[_Shown], int], top: int
) -> list[_Shown]:
    """Take as many of the first teams of each size, in the order of the whole."""
    taken: Counter[int] = Counter()
    found = []
    for team in teams:
        taken[size(team)] += 1
        if taken[size(team)] <= top:
            found.append(team)
    return found


@dataclass(frozen=True)
class Ranking:
    """Teams of each size apart, the smallest first; of a size the best first.

    What is predicted of different sizes cannot be compared: a larger team has more that may teach.

    Attributes:
        teams: All that were judged, and fit.
        judged: How many were judged.
        possible: How many there are, under the rule and with the student.
        too_large: How many of the judged do not fit.
        least: Bytes that the smallest of these needs; None: all fit, or it was not measured.
    """

    teams: list[Team]
    judged: int
    possible: int
    too_large: int
    least: int | None = None

    def best(self, top: int) -> list[Team]:
        """Return so many of each size."""
        return first_of_sizes(self.teams, lambda team: len(team.members), top)


def rank_teams(
    judge: Judge,
    sizes: Sequence[int],
    predictor: str,
    *,
    student: int | None = None,
    most: int = 20000,
    fits: Callable[[Team], bool] = lambda team: True,
    watch: Callable[[Sequence[tuple[int, ...]]], Sequence[tuple[int, ...]]] = lambda teams: teams,
) -> Ranking:
    """Order the teams of each size by a predictor.

    All pairs are judged. Where a larger size has more than ``most`` teams, only the best teams of
    one model fewer are tried with each further model, as many as ``most`` allows: a search that can
    miss a team.

    Args:
        judge: Judges one.
        sizes: How many members, each 2 or more.
        predictor: One of the judge's.
        student: Only teams with this model, ordered by its own estimate; None: by the mean.
        most: Teams judged of each size above 2.
        fits: Whether a judged team can be trained; it may fill in what training it takes.
        watch: Wraps the teams of a size, for instance in a progress bar.

    Raises:
        ValueError: A size that is too small or larger than the models, or an unknown predictor.
    """
    models = len(judge.found.names)
    _check_predictor(predictor, judge.usable)
    _check_teams(models, sizes)

    def value(team: Team) -> float:
        return team.gain(predictor, student)

    needed = {student, judge.teacher} - {None}
    counts = {size: _count(size, models, student) for size in range(2, max(sizes) + 1)}
    kept: list[Team] = []
    judged = possible = 0
    too_large: list[Team] = []
    smaller: list[Team] = []
    for size, count in counts.items():
        grown = any(counts[larger] > most for larger in sizes if larger > size)
        if size not in sizes and not grown:
            continue
        tried = _teams_of(size, models, student, count > most, most, smaller)
        teams = [judge.judge(members) for members in watch(tried) if judge.may_be(members)]
        smaller = sorted(teams, key=value, reverse=True)
        if size in sizes:
            for team in smaller:
                (kept if fits(team) else too_large).append(team)
            judged += len(teams)
            possible += math.comb(models - len(needed), size - len(needed))
    needs = [team.memory for team in too_large if team.memory is not None]
    return Ranking(kept, judged, possible, len(too_large), min(needs, default=None))


def _count(size: int, models: int, student: int | None) -> int:
    return math.comb(models, size) if student is None else math.comb(models - 1, size - 1)


def _teams_of(
    size: int, models: int, student: int | None, grow: bool, most: int, smaller: Sequence[Team]
) -> list[tuple[int, ...]]:
    """List all teams, or where there are too many those that grow from the best smaller ones."""
    if not grow or not smaller:
        everyone = itertools.combinations(range(models), size)
        return [team for team in everyone if student is None or student in team]
    found: dict[tuple[int, ...], None] = {}
    for team in smaller:
        for i in range(models):
            if i not in team.members and len(found) < most:
                found.setdefault(tuple(sorted((*team.members, i))))
    return list(found)
