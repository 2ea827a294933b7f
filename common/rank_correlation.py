"""Whether a prediction orders outcomes: rank correlation, and how far chance could make it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

FEWEST = 4
_DRAWS = 10000

Relabel = Callable[[np.random.Generator], Sequence[float]]


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of predictions with outcomes.

    Attributes:
        rho: In [-1, 1]; NaN where one side does not vary, or there are fewer than ``FEWEST``.
        low: Lower end of the bootstrap interval; NaN as ``rho``.
        high: Upper end.
        p: Share of permutations with a correlation as far from 0, two-sided; NaN as ``rho``.
        p_models: The same, where models instead of outcomes change places; NaN where not asked.
        count: Outcomes.
    """

    rho: float
    low: float
    high: float
    p: float
    p_models: float
    count: int


def rank_correlation(
    predicted: Sequence[float],
    realised: Sequence[float],
    *,
    relabel: Relabel | None = None,
    relabellings: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> RankCorrelation:
    """Correlate the order of predictions with that of outcomes.

    The permutation test and the bootstrap treat the outcomes as independent. Pairs that share a
    model are not: then ``relabel`` gives the test of Mantel, which moves whole models.

    Args:
        predicted: One an outcome, finite.
        realised: The outcomes, finite.
        relabel: Returns the predictions that the same outcomes would have had, had the models
            carried each other's names in an order that it draws.
        relabellings: How often it is asked.
        level: Of the percentile interval.
        seed: Of all draws.

    Raises:
        ValueError: Lengths that differ, or values that are not finite.

    Source: Spearman, 1904; Mantel, "The detection of disease clustering", Cancer Research, 1967.
    """
    x, y = np.asarray(predicted, dtype=float), np.asarray(realised, dtype=float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"{len(predicted)} predictions for {len(realised)} outcomes")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("predictions and outcomes must be finite")
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        nothing = math.nan
        return RankCorrelation(nothing, nothing, nothing, nothing, nothing, len(x))
    random = np.random.default_rng(seed)
    rho = float(_spearman(x[None], y[None])[0])
    orders = random.permuted(np.tile(np.arange(len(x)), (_DRAWS, 1)), axis=1)
    p = _tail(_spearman(x[None].repeat(_DRAWS, 0), y[orders]), rho)
    drawn = random.integers(len(x), size=(_DRAWS, len(x)))
    resampled = _spearman(x[drawn], y[drawn])
    low, high = np.nanquantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    p_models = math.nan
    if relabel is not None:
        moved = np.array([relabel(random) for _ in range(relabellings)], dtype=float)
        p_models = _tail(_spearman(moved, y[None].repeat(relabellings, 0)), rho)
    return RankCorrelation(rho, float(low), float(high), p, p_models, len(x))


def correlation_within(
    predicted: Sequence[float],
    realised: Sequence[float],
    groups: Sequence[int],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> RankCorrelation:
    """Correlate orders inside groups alone: what groups differ in does not count.

    Ranks are taken in each group, less their mean there, and correlated over all. The permutation
    test exchanges outcomes inside groups; the bootstrap draws whole groups.

    Args:
        predicted: One an outcome, finite.
        realised: The outcomes, finite.
        groups: Which group each belongs to.
        level: Of the percentile interval.
        seed: Of all draws.

    Returns:
        NaNs where nothing varies inside the groups; ``p_models`` is never known.
    """
    x, y, which = (np.asarray(v, dtype=float) for v in (predicted, realised, groups))
    parts = [np.flatnonzero(which == group) for group in np.unique(which)]
    a = [_centred(x[part]) for part in parts]
    b = [_centred(y[part]) for part in parts]
    products = np.array(
        [[(u * v).sum(), (u * u).sum(), (v * v).sum()] for u, v in zip(a, b, strict=True)]
    )
    rho = float(_ratio(products.sum(axis=0)))
    nothing = math.nan
    if len(x) < FEWEST or not math.isfinite(rho):
        return RankCorrelation(nothing, nothing, nothing, nothing, nothing, len(x))
    random = np.random.default_rng(seed)
    crossed = np.zeros(_DRAWS)
    for u, v in zip(a, b, strict=True):
        orders = random.permuted(np.tile(np.arange(len(v)), (_DRAWS, 1)), axis=1)
        crossed += v[orders] @ u
    total = products.sum(axis=0)
    drawn = products[random.integers(len(parts), size=(_DRAWS, len(parts)))].sum(axis=1)
    low, high = np.nanquantile(_ratio(drawn), [(1 - level) / 2, (1 + level) / 2])
    p = _tail(crossed / math.sqrt(total[1] * total[2]), rho)
    return RankCorrelation(rho, float(low), float(high), p, nothing, len(x))


def _centred(values: np.ndarray) -> np.ndarray:
    ranks = stats.rankdata(values)
    return ranks - ranks.mean()


def _ratio(products: np.ndarray) -> np.ndarray:
    size = np.sqrt(products[..., 1] * products[..., 2])
    found = np.full(size.shape, np.nan)
    return np.divide(products[..., 0], size, out=found, where=size > 0)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlate the ranks of rows [k, n]; NaN for a row that does not vary."""
    a, b = stats.rankdata(x, axis=1), stats.rankdata(y, axis=1)
    a -= a.mean(axis=1, keepdims=True)
    b -= b.mean(axis=1, keepdims=True)
    size = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), size, out=np.full(len(a), np.nan), where=size > 0)


def _tail(drawn: np.ndarray, rho: float) -> float:
    """Return the share of draws as far from 0, the observed one counted among them."""
    return float((1 + (np.abs(drawn) >= abs(rho) - 1e-12).sum()) / (1 + len(drawn)))
