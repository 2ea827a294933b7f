"""Whether a prediction orders outcomes: rank correlation, and how far chance could make it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
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
        p: Share of permutations with a correlation as far from 0, two-sided; NaN as ``rho``, and
            where outcomes share models and none can change places.
        count: Outcomes.
    """

    rho: float
    low: float
    high: float
    p: float
    count: int


def rank_correlation(
    predicted: Sequence[float],
    realised: Sequence[float],
    *,
    within: Sequence[int] | None = None,
    models: Sequence[Collection[int]] | None = None,
    relabel: Relabel | None = None,
    relabellings: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> RankCorrelation:
    """Correlate the order of predictions with that of outcomes.

    Outcomes that share a model are not independent. So whole models are drawn for the interval, an
    outcome as often as the product of its models, and whole models change places for p: the test of
    Mantel. Ranks are those of all outcomes, whatever is drawn.

    Args:
        predicted: One an outcome, finite.
        realised: The outcomes, finite.
        within: A group for each; ranks are taken in each group, less their mean there, so that what
            groups differ in does not count.
        models: Whose each outcome is; None: each is of models of its own.
        relabel: Returns the predictions that the same outcomes would have had, had the models
            carried each other's names in an order that it draws. Without it outcomes change places
            (in their group), where they share no models.
        relabellings: How often it is asked.
        level: Of the percentile interval. With models that matter much, and twelve of them, the
            interval of nothing excluded 0 in 8 to 10 % of simulations, not in 5.
        seed: Of all draws.

    Raises:
        ValueError: Lengths that differ, or values that are not finite.

    Source: Spearman, 1904; Mantel, "The detection of disease clustering", Cancer Research, 1967;
    Snijders and Borgatti, "Non-parametric standard errors and tests for network statistics",
    Connections, 1999 (the bootstrap of nodes).
    """
    x, y = np.asarray(predicted, dtype=float), np.asarray(realised, dtype=float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"{len(predicted)} predictions for {len(realised)} outcomes")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("predictions and outcomes must be finite")
    groups = np.zeros(len(x)) if within is None else np.asarray(within)
    parts = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    a, b = _ranks(x[None], parts)[0], _ranks(y[None], parts)[0]
    rho = float(_correlation(a, b, np.ones((1, len(x))), parts)[0])
    if len(x) < FEWEST or not math.isfinite(rho):
        return RankCorrelation(math.nan, math.nan, math.nan, math.nan, len(x))
    random = np.random.default_rng(seed)
    whose = models or [{i} for i in range(len(x))]
    drawn = _correlation(a, b, _times_drawn(whose, random), parts)
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    p = math.nan
    if relabel is not None:
        moved = np.array([relabel(random) for _ in range(relabellings)], dtype=float)
        p = _tail(_plain(_ranks(moved, parts), b), rho)
    elif sum(map(len, whose)) == len(set().union(*whose)):
        p = _tail(_plain(a, _shuffled(b, parts, random)), rho)
    return RankCorrelation(rho, float(low), float(high), p, len(x))


def _ranks(values: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rank the columns of every row [k, n] within their group, less the mean there."""
    ranks = np.empty_like(values)
    for part in parts:
        ranks[:, part] = stats.rankdata(values[:, part], axis=1) - (len(part) + 1) / 2
    return ranks


def _times_drawn(whose: Sequence[Collection[int]], random: np.random.Generator) -> np.ndarray:
    """Draw as many models as there are, with replacement; return how often each outcome is seen."""
    every = {model: i for i, model in enumerate(sorted(set().union(*whose)))}
    counts = random.multinomial(len(every), np.full(len(every), 1 / len(every)), size=_DRAWS)
    return np.stack([counts[:, [every[m] for m in own]].prod(axis=1) for own in whose], axis=1)


def _correlation(
    a: np.ndarray, b: np.ndarray, times: np.ndarray, parts: Sequence[np.ndarray]
) -> np.ndarray:
    """Correlate two rows of ranks [n], each outcome counted as often as a row of [k, n] says."""
    products = np.zeros((3, len(times)))
    for part in parts:
        w, u, v = times[:, part].astype(float), a[part], b[part]
        total = np.maximum(w.sum(axis=1), 1)
        mean_u, mean_v = w @ u / total, w @ v / total
        products += [
            w @ (u * v) - total * mean_u * mean_v,
            w @ (u * u) - total * mean_u**2,
            w @ (v * v) - total * mean_v**2,
        ]
    return _ratio(products[0], products[1] * products[2])


def _plain(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlate ranks [k, n] or [n] with others, of which each outcome counts once."""
    return _ratio((a * b).sum(axis=-1), (a * a).sum(axis=-1) * (b * b).sum(axis=-1))


def _ratio(product: np.ndarray, squares: np.ndarray) -> np.ndarray:
    varies = squares > 1e-9  # ranks are at least a half apart
    found = np.full(np.broadcast(product, squares).shape, np.nan)
    return np.divide(product, np.sqrt(np.where(varies, squares, 1)), out=found, where=varies)


def _shuffled(
    ranks: np.ndarray, parts: Sequence[np.ndarray], random: np.random.Generator
) -> np.ndarray:
    """Exchange ranks [n] inside their groups, many times: [k, n]."""
    moved = np.tile(ranks, (_DRAWS, 1))
    for part in parts:
        moved[:, part] = random.permuted(moved[:, part], axis=1)
    return moved


def _tail(drawn: np.ndarray, rho: float) -> float:
    """Return the share of draws as far from 0, the observed one counted among them."""
    return float((1 + (np.abs(drawn) >= abs(rho) - 1e-12).sum()) / (1 + len(drawn)))
