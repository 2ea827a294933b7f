"""What many models answer on the same held-out data: read once, kept as tables."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.calibration import expected_calibration_error, fit_temperature
from common.transfer import confidence, pairwise_kl

_STRETCH = 2**24  # numbers of all models' logits at once, 64 megabytes


class LogitSource(Protocol):
    """Logits of M models on the same n samples, read a stretch at a time."""

    names: Sequence[str]
    count: int
    classes: int

    def read(self, model: int, start: int, stop: int) -> Tensor:
        """Return one model's logits of the samples from start to stop, [b, C] float32."""


class HeldLogits:
    """Logits that are in memory.

    Args:
        names: Of the models, unique.
        logits: [M, n, C].

    Raises:
        ValueError: Names that repeat, or are not as many as the models.
    """

    def __init__(self, names: Sequence[str], logits: Tensor) -> None:
        if len(set(names)) != len(names) or len(names) != len(logits):
            raise ValueError(f"{len(logits)} models need as many different names, got {names}")
        self.names = list(names)
        self.logits = logits
        self.count, self.classes = logits.shape[1:]

    def read(self, model: int, start: int, stop: int) -> Tensor:
        """Return [b, C] float32."""
        return self.logits[model, start:stop].float()


@dataclass(frozen=True)
class Survey:
    """What M models say of n samples; all that teams are judged by.

    Attributes:
        names: Of the models.
        prediction: Class with the largest logit [M, n].
        confidence: Largest probability [M, n].
        kl: KL(p_t || p_s) [M(t), M(s), n], in nats.
        correct: [M, n] bool; None without labels. Where no answer is simply right or wrong, as with
            maps: how good each is, float, higher is better.
        log_true: Log-probability of the true class, or minus another loss [M, n]; None without
            labels.
        pair_accuracy: Accuracy of two models' mean probabilities [M, M]; None without labels.
        temperature: Under which each model's confidence is calibrated [M]; None: not known.
        calibrated: Largest probability at that temperature [M, n]; None: not known.
        fitted: Samples that the temperatures were fitted on [n], bool; None: on other data.
    """

    names: Sequence[str]
    prediction: Tensor
    confidence: Tensor
    kl: Tensor
    correct: Tensor | None = None
    log_true: Tensor | None = None
    pair_accuracy: Tensor | None = None
    temperature: Tensor | None = None
    calibrated: Tensor | None = None
    fitted: Tensor | None = None

    @property
    def labelled(self) -> bool:
        """Whether the truth is known."""
        return self.correct is not None

    def score(self, kind: str) -> Tensor:
        """Return how well each model does on each sample [M, n]; higher is better.

        Args:
            kind: ``loss``, ``confidence`` (calibrated), or ``raw confidence``.

        Raises:
            ValueError: A score that this survey does not have; says what it needs.
        """
        found = {
            "loss": self.log_true,
            "confidence": self.calibrated,
            "raw confidence": self.confidence,
        }
        if kind not in found:
            raise ValueError(f"unknown score {kind!r}; choose from {', '.join(found)}")
        score = found[kind]
        if score is None:
            needs = "labels" if kind == "loss" else "temperatures from labelled data"
            raise ValueError(f"score {kind!r} needs {needs}")
        return score


def survey(
    source: LogitSource,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    calibration: Tensor | None = None,
    seed: int = 0,
    fit_on: Tensor | None = None,
    watch: Callable[[Sequence[slice]], Sequence[slice]] = lambda stretches: stretches,
) -> Survey:
    """Read all models' logits once, a stretch of samples at a time, and keep what teams need.

    Kept are tables [M, n] and the KL [M, M, n]; the logits of a stretch, and a few copies of
    them, are all that is in memory besides.

    Args:
        source: The logits.
        labels: True classes [n]; None: not known.
        temperature: Of the KL, as in the transfer.
        calibration: Temperatures of the models from other data [M]; None: with labels they are
            fitted on a random half of the samples.
        seed: Of that half.
        fit_on: The samples to fit on [n], bool, instead of that half.
        watch: Wraps the stretches, for instance in a progress bar.

    Raises:
        ValueError: Labels that do not fit the logits.
    """
    count = source.count
    if labels is not None:
        _check_labels(labels, source)
    fitted = None
    if labels is not None and calibration is None:
        fitted = random_half(count, seed) if fit_on is None else fit_on
        calibration = fit_temperatures(source, labels, fitted)
    tables = _Tables.empty(source, labels is not None, calibration)
    for part in watch(_stretches(source)):
        _fill(tables, source, part, labels, temperature, calibration)
    return Survey(
        names=list(source.names),
        prediction=tables.prediction,
        confidence=tables.confidence,
        kl=tables.kl,
        correct=tables.correct,
        log_true=tables.log_true,
        pair_accuracy=None if tables.pair_right is None else tables.pair_right / count,
        temperature=calibration,
        calibrated=tables.calibrated,
        fitted=fitted,
    )


def random_half(count: int, seed: int) -> Tensor:
    """Draw half of the samples [n], bool: data are often sorted by class."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[order[: (count + 1) // 2]] = True
    return chosen


def fit_temperatures(source: LogitSource, labels: Tensor, chosen: Tensor) -> Tensor:
    """Fit each model's temperature on the chosen samples [n]; returns [M]."""

    def batches(model: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in _stretches(source, models=1):
            here = chosen[part]
            yield source.read(model, part.start, part.stop)[here], labels[part][here]

    found = [fit_temperature(functools.partial(batches, i)) for i in range(len(source.names))]
    return torch.tensor(found, dtype=torch.float32)


def _check_labels(labels: Tensor, source: LogitSource) -> None:
    if labels.shape != (source.count,):
        raise ValueError(f"{list(labels.shape)} labels for {source.count} samples")
    if source.count and not 0 <= int(labels.min()) <= int(labels.max()) < source.classes:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())}; the models tell "
            f"{source.classes} classes"
        )


def _stretches(source: LogitSource, models: int | None = None) -> list[slice]:
    step = max(1, _STRETCH // ((models or len(source.names)) * source.classes))
    ends = [*range(0, source.count, step), source.count]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


@dataclass
class _Tables:
    prediction: Tensor
    confidence: Tensor
    kl: Tensor
    correct: Tensor | None
    log_true: Tensor | None
    pair_right: Tensor | None
    calibrated: Tensor | None

    @classmethod
    def empty(cls, source: LogitSource, labelled: bool, calibration: Tensor | None) -> _Tables:
        models, count = len(source.names), source.count
        return cls(
            prediction=torch.empty(models, count, dtype=torch.int32),
            confidence=torch.empty(models, count),
            kl=torch.empty(models, models, count),
            correct=torch.empty(models, count, dtype=torch.bool) if labelled else None,
            log_true=torch.empty(models, count) if labelled else None,
            pair_right=torch.zeros(models, models, dtype=torch.float64) if labelled else None,
            calibrated=None if calibration is None else torch.empty(models, count),
        )


def _fill(
    tables: _Tables,
    source: LogitSource,
    part: slice,
    labels: Tensor | None,
    temperature: float,
    calibration: Tensor | None,
) -> None:
    logits = [source.read(i, part.start, part.stop) for i in range(len(source.names))]
    tables.kl[:, :, part] = pairwise_kl(logits, temperature).clamp(min=0)
    for i, z in enumerate(logits):
        tables.prediction[i, part] = z.argmax(dim=1).int()
        tables.confidence[i, part] = confidence(z)
        if tables.calibrated is not None and calibration is not None:
            tables.calibrated[i, part] = confidence(z / calibration[i])
    if labels is None or tables.correct is None or tables.log_true is None:
        return
    target = labels[part]
    for i, z in enumerate(logits):
        tables.log_true[i, part] = -F.cross_entropy(z, target, reduction="none")
    tables.correct[:, part] = tables.prediction[:, part] == target
    if tables.pair_right is not None:
        tables.pair_right += _pairs_right([z.softmax(dim=1) for z in logits], target)


def _pairs_right(p: Sequence[Tensor], target: Tensor) -> Tensor:
    """Count where the mean of two models is right [M, M]; the diagonal: each alone."""
    right = torch.zeros(len(p), len(p), dtype=torch.float64)
    for i, j in itertools.combinations_with_replacement(range(len(p)), 2):
        right[i, j] = right[j, i] = ((p[i] + p[j]).argmax(dim=1) == target).sum()
    return right


def ensemble_accuracy(
    source: LogitSource, labels: Tensor, teams: Sequence[Sequence[int]]
) -> list[float]:
    """Measure the mean of the members' probabilities, for every team; reads the logits once."""
    right = [0] * len(teams)
    used = sorted({i for team in teams for i in team})
    for part in _stretches(source) if teams else ():
        p = {i: source.read(i, part.start, part.stop).softmax(dim=1) for i in used}
        for k, team in enumerate(teams):
            together = torch.stack([p[i] for i in team]).sum(dim=0)
            right[k] += int((together.argmax(dim=1) == labels[part]).sum())
    return [count / max(1, source.count) for count in right]


@dataclass(frozen=True)
class ModelFacts:
    """One model, alone; shares, None where labels or temperatures are not known.

    The errors of calibration are measured on samples that the temperature was not fitted on.
    """

    name: str
    accuracy: float | None
    loss: float | None
    confidence: float
    temperature: float | None
    ece: float | None
    ece_calibrated: float | None


def describe_models(found: Survey) -> list[ModelFacts]:
    """Return the facts of every model, in order."""
    apart = slice(None) if found.fitted is None else ~found.fitted
    facts = []
    for i, name in enumerate(found.names):
        right = None if found.correct is None else found.correct[i]
        facts.append(
            ModelFacts(
                name=name,
                accuracy=None if right is None else _mean(right),
                loss=None if found.log_true is None else -_mean(found.log_true[i]),
                confidence=_mean(found.confidence[i]),
                temperature=None if found.temperature is None else float(found.temperature[i]),
                ece=_ece(found.confidence[i], right, apart),
                ece_calibrated=None
                if found.calibrated is None
                else _ece(found.calibrated[i], right, apart),
            )
        )
    return facts


def _ece(confident: Tensor, right: Tensor | None, apart: slice | Tensor) -> float | None:
    if right is None or not len(confident[apart]):
        return None
    return expected_calibration_error(confident[apart], right[apart])


def _mean(values: Tensor) -> float:
    return float(values.mean(dtype=torch.float64))


@dataclass(frozen=True)
class PairTables:
    """Every pair, as tables [M, M]; shares of the samples.

    Attributes:
        agreement: Both give the same class.
        flips: The row's model is right and the column's wrong; None without labels.
        oracle: At least one is right; None without labels.
        ensemble: The mean of both is right; None without labels.
        kl: Mean of KL(row || column).
    """

    agreement: Tensor
    kl: Tensor
    flips: Tensor | None
    oracle: Tensor | None
    ensemble: Tensor | None


def describe_pairs(found: Survey) -> PairTables:
    """Compare every model with every other."""
    models, count = found.prediction.shape
    same = torch.stack([(found.prediction == row).sum(dim=1) for row in found.prediction])
    flips = oracle = None
    if found.correct is not None:
        right = found.correct.double()
        flips = right @ (1 - right).T / count
        own = right.mean(dim=1)
        oracle = own.expand(models, models) + flips
    return PairTables(
        agreement=same.double() / count,
        kl=found.kl.mean(dim=2, dtype=torch.float64),
        flips=flips,
        oracle=oracle,
        ensemble=found.pair_accuracy,
    )
