"""How far a model's confidence can be believed, and the temperature that mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

BINS = 15
COLDEST, HOTTEST = 0.05, 20.0
_TOLERANCE, _ROUNDS = 1e-5, 60

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
    """Average the gap between confidence and accuracy over bins; see ``CalibrationBins``."""
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
        z = logits.float()
        z = z - z.amax(dim=1, keepdim=True)
        p = (z * inverse).softmax(dim=1)
        mean = (p * z).sum(dim=1)
        square = (p * z * z).sum(dim=1)
        own = z.gather(1, labels.unsqueeze(1)).squeeze(1)
        slope += float((mean - own).double().sum())
        curvature += float((square - mean * mean).double().sum())
        count += len(labels)
    if not count:
        raise ValueError("no labelled sample to fit a temperature on")
    return slope / count, curvature / count
