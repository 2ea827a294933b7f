"""Intervals for paired differences: what several seeds show, and what they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval.

    Attributes:
        mean: Of the differences.
        low: Lower end; NaN where one difference cannot tell.
        high: Upper end; NaN as ``low``.
        count: Differences.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of zero; False where its ends are NaN."""
        return self.low > 0 or self.high < 0


def paired_interval(differences: Sequence[float], level: float = 0.95) -> Interval:
    """Estimate the mean of paired differences, with Student's t.

    Args:
        differences: One a pair (for instance a seed), finite.
        level: Of confidence, in (0, 1).

    Returns:
        Mean and ends; the ends of a single difference are NaN.

    Raises:
        ValueError: No difference, one that is not finite, or a level outside (0, 1).
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected a sequence of differences, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"differences must be finite, got {values.tolist()}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return Interval(mean, math.nan, math.nan, count)
    error = float(values.std(ddof=1)) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    return Interval(mean, mean - reach, mean + reach, count)
