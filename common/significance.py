"""Tests of paired differences, and corrections for many of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXACT_UP_TO = 14  # pairs; 2^14 sign patterns are looked at in milliseconds
DRAWS = 100_000


@dataclass(frozen=True)
class PValue:
    """The p-value of a test.

    Attributes:
        p: In (0, 1].
        error: Standard error of a Monte Carlo p; 0 where it is exact.
    """

    p: float
    error: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether every sign pattern was looked at."""
        return self.error == 0


def sign_flip_test(
    differences: Sequence[float],
    *,
    exact_up_to: int = EXACT_UP_TO,
    draws: int = DRAWS,
    seed: int = 0,
) -> PValue:
    """Test whether paired differences are symmetric about zero, by flipping their signs.

    Two-sided, on the mean. Under the null hypothesis each pair's difference has either sign equally
    often, so p is the share of sign patterns whose mean is at least as far from zero as the one
    seen. With n pairs p is at least 2 / 2^n.

    Args:
        differences: One a pair (for instance a seed), finite.
        exact_up_to: With more pairs, sign patterns are drawn instead of counted.
        draws: How many are drawn; the pattern seen counts as one more.
        seed: Of the draws.

    Raises:
        ValueError: No difference, or one that is not finite.

    Source: Fisher, "The Design of Experiments", 1935; Phipson and Smyth, 2010 (the drawn p).
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected a sequence of differences, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"differences must be finite, got {values.tolist()}")
    # sums of the same numbers in another order differ in their last bits
    seen = abs(values.sum()) - 1e-12 * np.abs(values).sum()
    if len(values) <= exact_up_to:
        return PValue(_share_at_least(_all_signs(len(values)) @ values, seen))
    generator = np.random.default_rng(seed)
    count = 0
    for start in range(0, draws, 10_000):
        size = (min(10_000, draws - start), len(values))
        signs = 2.0 * generator.integers(0, 2, size=size) - 1
        count += int((np.abs(signs @ values) >= seen).sum())
    p = (count + 1) / (draws + 1)
    return PValue(p, math.sqrt(p * (1 - p) / draws))


def _all_signs(count: int) -> np.ndarray:
    bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
    return 2.0 * bits - 1


def _share_at_least(sums: np.ndarray, seen: float) -> float:
    return float((np.abs(sums) >= seen).mean())


def smallest_p(count: int) -> float:
    """Return the smallest p that ``count`` pairs can give."""
    return min(1.0, 2 / 2**count) if count else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values for their number, so that any false claim in the family is rare.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.

    Args:
        p: Of one family, each in [0, 1].

    Returns:
        Adjusted p, in the order given; at most 1.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted
