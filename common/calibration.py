"""How far a model's confidence can be believed, and the temperature that mends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

BINS = 15
COLDEST, HOTTEST = 0.05, 20.0
_TOLERANCE, _ROUNDS = 1e-5, 60
_GRID = torch.logspace(
    math.log10(1 / HOTTEST), math.log10(1 / COLDEST), 33, dtype=torch.float64
).tolist()

_NOTHING = "no labelled sample to fit a temperature on"

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class CalibrationBins:
    """Sums up how far confidence is from accuracy, however many samples there are.

    Args:
        bins: Of equal width; each is open below and closed above.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 5.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.gaps = torch.zeros(bins, dtype=torch.float64)
        self.count = 0

    def add(self, confidence: Tensor, correct: Tensor) -> None:
        """Take samples in.

        Args:
            confidence: Largest probability of each [n], in (0, 1].
            correct: Whether that answer is right [n], bool.
        """
        bins = len(self.gaps)
        confidence = confidence.double()
        where = (confidence * bins).ceil().long().clamp(1, bins) - 1
        self.gaps.index_add_(0, where.cpu(), (correct.double() - confidence).cpu())
        self.count += len(confidence)

    def error(self) -> float:
        """Return the sum over bins of (its samples / n) * |accuracy - mean confidence|, in [0, 1].

        Raises:
            ValueError: No sample.
        """
        if not self.count:
            raise ValueError("no sample to measure calibration on")
        return float(self.gaps.abs().sum()) / self.count


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = BINS) -> float:
    """Average the gap between confidence and accuracy over bins; see ``CalibrationBins``.

    Args:
        confidence: Largest probability of each sample [n], in (0, 1].
        correct: Whether that answer is right [n], bool.
        bins: Of equal width.

    Returns:
        In [0, 1].

    Raises:
        ValueError: No sample, or shapes that differ.
    """
    if confidence.shape != correct.shape or confidence.ndim != 1:
        raise ValueError(
            "expected confidence and correctness of the same samples [n], got "
            f"{list(confidence.shape)} and {list(correct.shape)}"
        )
    sums = CalibrationBins(bins)
    sums.add(confidence, correct)
    return sums.error()


def fit_temperature(batches: Batches) -> float:
    """Find the temperature under which a model's probabilities fit the labels best.

    The mean negative log-likelihood is convex in 1 / T: Newton's steps, kept inside a bracket that
    shrinks, find its one minimum.

    Args:
        batches: Gives the held-out logits [b, C] and labels [b] anew at every call.

    Returns:
        T between ``COLDEST`` and ``HOTTEST``; one of these where the minimum lies beyond it, as for
        a model that is right on every sample.

    Raises:
        ValueError: No sample.

    Source: Guo et al., ICML 2017, section 4.2 (temperature scaling).
    """
    low, high, inverse = 1 / HOTTEST, 1 / COLDEST, 1.0
    for _ in range(_ROUNDS):
        slope, curvature = _derivatives(batches, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        wanted = inverse - slope / curvature if curvature > 0 else -1.0
        if not low < wanted < high:
            wanted = (low * high) ** 0.5
        moved = abs(wanted - inverse)
        inverse = wanted
        if moved <= _TOLERANCE * inverse:
            break
    return 1 / inverse


def _derivatives(batches: Batches, inverse: float) -> tuple[float, float]:
    """Return the first two derivatives of the mean NLL by 1 / T: E[z] - z_y, and Var[z]."""
    slope, curvature, count = 0.0, 0.0, 0
    for logits, labels in batches():
        summed = _sums(*_below_largest(logits, labels), inverse)
        slope += float(summed[0])
        curvature += float(summed[1])
        count += len(labels)
    if not count:
        raise ValueError(_NOTHING)
    return slope / count, curvature / count


def _below_largest(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.float()
    z = z - z.amax(dim=1, keepdim=True)
    return z, z.gather(1, labels.unsqueeze(1)).squeeze(1)


def _sums(z: Tensor, own: Tensor, inverse: float) -> Tensor:
    """Sum both derivatives of each sample's NLL, [2] float64."""
    p = (z * inverse).softmax(dim=1)
    mean = (p * z).sum(dim=1)
    square = (p * z * z).sum(dim=1)
    return torch.stack([mean - own, square - mean * mean]).double().sum(dim=1)


class TemperatureFit:
    """Fits the temperature of ``fit_temperature`` in one pass, without keeping any logits.

    Both derivatives are summed at a grid of inverse temperatures. The slope only grows with them,
    so its one zero lies between two neighbours, where a cubic through the slopes and curvatures at
    both is solved; what that is off by is less than a thousandth.

    Attributes:
        sums: Slopes, curvatures and, in the third row, the count of samples, [3, points] float64.
            Those of several parts of the data may be added up.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(3, len(_GRID), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take a batch [b, C] with its labels [b] in. Nothing here waits for the device."""
        z, own = _below_largest(logits, labels)
        found = torch.stack([_sums(z, own, inverse) for inverse in _GRID], dim=1)
        self.sums[:2] += found.to(self.sums)
        self.sums[2] += len(labels)

    def temperature(self) -> float:
        """Return T, between ``COLDEST`` and ``HOTTEST``; see ``fit_temperature``.

        Raises:
            ValueError: No sample.
        """
        slope, curvature, counts = self.sums.tolist()
        if not counts[0]:
            raise ValueError(_NOTHING)
        if slope[0] >= 0:
            return HOTTEST
        if slope[-1] <= 0:
            return COLDEST
        k = next(i for i in range(1, len(slope)) if slope[i] > 0)
        return 1 / _zero_between(
            _GRID[k - 1 : k + 1], slope[k - 1 : k + 1], curvature[k - 1 : k + 1]
        )


def _zero_between(x: Sequence[float], y: Sequence[float], rise: Sequence[float]) -> float:
    """Find where the cubic through two points, with these derivatives, is 0: y[0] <= 0 < y[1]."""
    width = x[1] - x[0]
    low, high = 0.0, 1.0
    for _ in range(_ROUNDS):
        t = (low + high) / 2
        value = (
            y[0] * (1 + 2 * t) * (1 - t) ** 2
            + y[1] * t * t * (3 - 2 * t)
            + width * t * (1 - t) * (rise[0] * (1 - t) - rise[1] * t)
        )
        low, high = (low, t) if value > 0 else (t, high)
    return x[0] + width * (low + high) / 2
