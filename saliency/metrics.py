"""Metrics of saliency maps by their official definitions, and their means over frames and videos.

Per frame, in float64 (float32 on MPS, which has no float64: the last digits differ there), on the
maps' device, without gradient. A score that is not defined for a frame is NaN, and
``SaliencyMetrics`` leaves it out and counts it.

Source: the code of the MIT Saliency Benchmark, which DHF1K's evaluation uses.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from common.distributed import gather_objects, sum_over_ranks
from saliency import losses
from saliency.losses import check_maps, constant, empty, scale_to_unit

# MATLAB's eps
EPS = 2.0**-52
JITTER = 1e-7
FRAME_CAP = 50_000
_STRETCH = 2**22  # random numbers drawn at once, 32 megabytes
# SplitMix64's constants, as int64
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


@torch.no_grad()
def auc_judd(
    pred: Tensor,
    fixations: Tensor,
    *,
    jitter: bool = False,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Measure the area under the curve whose thresholds are the map's values at the fixations.

    With n fixated of M pixels, the i-th highest threshold has TP = i / n and FP = (pixels at least
    as high - i) / (M - n); trapezoids from (0, 0) through those to (1, 1). Fixations that tie with
    other pixels come last among them, so that a coarsely quantised map scores low.

    Args:
        pred: Maps [B, H, W] of a float dtype.
        fixations: [B, H, W], fixated where positive; any dtype.
        jitter: Break ties with uniform noise of up to 1e-7, as the official evaluation does for
            maps of a few values. It is added in the map's own unit.
        seeds: Of each map's jitter, int64 [B]; None: drawn from the generator, or without one its
            place in the batch.
        generator: Where seeds are drawn from.

    Returns:
        Areas [B]. NaN without fixations, where every pixel is fixated, and for a map that is
        constant or not finite.

    Raises:
        ValueError: Shapes that differ or are not [B, H, W], or a ``pred`` that is not float.
    """
    check_maps(pred=pred, fixations=fixations)
    values = _jittered(pred, _seeds(seeds, generator, pred)) if jitter else pred.detach()
    # only the order counts, and it is the same in float32 and without the scaling to [0, 1]
    values = values.to(torch.promote_types(values.dtype, torch.float32)).flatten(1)
    looked = (fixations > 0).flatten(1)
    ranked = _sorted(values)
    thresholds, valid = _compact(values, looked)
    above = (values.shape[1] - torch.searchsorted(ranked, thresholds)) * valid
    n = looked.sum(1)
    rest = values.shape[1] - n
    # the sum of all trapezoids, in whole numbers: 1 - mean(FP) + FP of the lowest threshold / 2n
    area = 1 - _wide(2 * above.sum(1) - n * n - above.amax(1)) / _wide(2 * n * rest)
    defined = (n > 0) & (rest > 0) & _varies(ranked[:, 0], ranked[:, -1])
    return area.masked_fill(~defined, math.nan)


@torch.no_grad()
def auc_shuffled(
    pred: Tensor,
    fixations: Tensor,
    other: Tensor,
    generator: torch.Generator | None = None,
    *,
    splits: int | None = 100,
    step: float | None = 0.1,
    drawn: int | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Measure how well the map tells a frame's fixations from those of other frames.

    TP and FP are the shares of the frame's fixations, and of points drawn without replacement from
    ``other``, where the map scaled to [0, 1] reaches a threshold; trapezoids, mean over the draws.

    Args:
        pred: Maps [B, H, W] of a float dtype.
        fixations: [B, H, W], fixated where positive; any dtype.
        other: [B, H, W], positive where other frames are fixated (officially the union over 10
            frames drawn from the whole data set, see ``draw_frames``).
        splits: Draws to average. None: their expectation, which nothing random enters; it takes
            every point of ``other``, as the area is linear in the share of false positives.
        step: Between thresholds, in (0, 1]. None: every value is a threshold.
        drawn: Points of a draw, at most all; None: as many as the frame has fixations.
        generator: Where seeds are drawn from.
        seeds: Of each map's draws, int64 [B]; None: drawn from the generator, or without one its
            place in the batch. What is drawn depends on the seed and on ``other`` alone: not on
            the rest of the batch, nor on the device.

    Returns:
        Areas [B]. NaN without fixations here or in ``other``, and for a map that is constant or not
        finite. With 500 fixations the draws are about 1e-3 from their expectation. They wait for
        the device (to pack the points), the expectation does not.

    Raises:
        ValueError: As ``auc_judd``, or a flag out of its range.
    """
    check_maps(pred=pred, fixations=fixations, other=other)
    _check_draws(splits, step, drawn)
    values = scale_to_unit(_wide(pred)).flatten(1)
    looked, elsewhere = (fixations > 0).flatten(1), (other > 0).flatten(1)
    n, m = looked.sum(1), elsewhere.sum(1)
    positive, counted = _compact(values, looked)
    if splits is None:
        negative, weight = _compact(values, elsewhere)
    else:
        negative, weight = _pack(values, elsewhere)
        wanted = n if drawn is None else torch.full_like(n, drawn)
        weight = _draw(weight, torch.minimum(wanted, m), splits, _seeds(seeds, generator, pred))
    if step is not None:
        positive, negative = _levels(positive, step), _levels(negative, step)
    area = _area(positive, counted, negative, weight)
    undefined = (n == 0) | (m == 0) | ~_varies(*pred.flatten(1).aminmax(dim=1))
    return area.masked_fill(undefined, math.nan)


@torch.no_grad()
def nss(pred: Tensor, fixations: Tensor) -> Tensor:
    """Average the map, in standard deviations (n - 1) above its mean, over the fixated pixels.

    Args:
        pred: Maps [B, H, W] of a float dtype.
        fixations: [B, H, W], fixated where positive; any dtype.

    Returns:
        Scores [B]. NaN without fixations, and for a map that is constant or not finite.

    Raises:
        ValueError: As ``auc_judd``.
    """
    check_maps(pred=pred, fixations=fixations)
    p, looked = _wide(pred), fixations > 0
    undefined = ~looked.flatten(1).any(1) | constant(p)
    return losses.nss(p, looked).masked_fill(undefined, math.nan)


@torch.no_grad()
def cc(pred: Tensor, density: Tensor) -> Tensor:
    """Correlate the map with the ground truth.

    Returns:
        Pearson's r [B] of maps [B, H, W]. NaN where either is constant or not finite.

    Raises:
        ValueError: As ``auc_judd``.
    """
    p, g = _both(pred, density)
    return losses.cc(p, g).masked_fill(constant(p) | constant(g), math.nan)


@torch.no_grad()
def similarity(pred: Tensor, density: Tensor) -> Tensor:
    """Intersect the map with the ground truth, each scaled to [0, 1] and divided by its sum.

    Returns:
        Share in common [B] of maps [B, H, W]. By the definition a map of zeros stays so, and scores
        0. NaN where either map has one value other than 0 everywhere, or is not finite.

    Raises:
        ValueError: As ``auc_judd``.
    """
    p, g = _both(pred, density)
    undefined = (constant(p) & ~_zero(p)) | (constant(g) & ~_zero(g))
    return losses.similarity(p, g).masked_fill(undefined, math.nan)


@torch.no_grad()
def kldiv(pred: Tensor, density: Tensor, *, eps: float = EPS) -> Tensor:
    """Measure KL(density || pred) of the maps over their sums; lower is better.

    Args:
        pred: Maps [B, H, W] of a float dtype, not negative.
        density: Ground truth [B, H, W], not negative.
        eps: Floor under the logarithm and the division.

    Returns:
        Nats [B]. NaN where either map is empty (sums to 0) or not finite.

    Raises:
        ValueError: As ``auc_judd``.
    """
    p, g = _both(pred, density)
    return losses.kldiv(p, g, eps=eps).masked_fill(empty(p) | empty(g), math.nan)


@dataclass(frozen=True)
class Metric:
    """How to score a frame.

    Attributes:
        function: Of maps [B, H, W], the prediction first; gives [B].
        needs: Names of the maps that it takes after the prediction.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...]

    @property
    def flags(self) -> dict[str, Any]:
        """Its keyword flags, with the official values."""
        parameters = inspect.signature(self.function).parameters.values()
        names = [
            p
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name not in ("seeds", "generator")
        ]
        return {p.name: p.default for p in names}

    @property
    def draws(self) -> bool:
        """Whether it takes seeds."""
        return "seeds" in inspect.signature(self.function).parameters


METRICS = {
    "auc_judd": Metric(auc_judd, ("fixations",)),
    "similarity": Metric(similarity, ("density",)),
    "auc_shuffled": Metric(auc_shuffled, ("fixations", "other")),
    "cc": Metric(cc, ("density",)),
    "nss": Metric(nss, ("fixations",)),
    "kldiv": Metric(kldiv, ("density",)),
}
# what the DHF1K benchmark reports, in its order
DHF1K = ("auc_judd", "similarity", "auc_shuffled", "cc", "nss")


@dataclass(frozen=True)
class Scores:
    """Means over the frames for which a metric is defined; NaN where there is none.

    Attributes:
        frames: How many were seen.
        mean: By metric, every frame with the same weight (the official dataset score).
        undefined: By metric, frames that were left out.
        videos: By video and metric, the mean over its frames.
        video_mean: By metric, the mean of ``videos``, every video with the same weight.
        flags: By metric, the definition that was used.
    """

    frames: int
    mean: dict[str, float]
    undefined: dict[str, int]
    videos: dict[str | int, dict[str, float]]
    video_mean: dict[str, float]
    flags: dict[str, dict[str, Any]]


class SaliencyMetrics:
    """Adds up scores on the device; nothing is read before ``compute``.

    Args:
        names: Of ``METRICS``.
        device: Where the maps come from.
        flags: By metric, what differs from its official definition, such as
            ``{"auc_shuffled": {"splits": None}}``.
        seed: Of what is drawn (jitter, points of other frames). What a frame gets depends on it and
            on the frame's video and number alone, so that batches and processes change no score.

    Raises:
        ValueError: A metric or flag that is not there.
    """

    def __init__(
        self,
        names: Sequence[str] = DHF1K,
        device: torch.device | str = "cpu",
        *,
        flags: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        self.names = tuple(names)
        self.device = torch.device(device)
        self.flags = _check_flags(self.names, flags or {})
        self.seed = seed
        self.reset()

    def reset(self) -> None:
        """Forget all frames."""
        self._seen = 0
        self._rows: dict[str | int | None, int] = {}
        # a row a video: sums of the metrics, frames where they are defined, frames
        self._state = torch.zeros(
            0, 2 * len(self.names) + 1, dtype=_dtype(self.device), device=self.device
        )

    @torch.no_grad()
    def update(
        self,
        pred: Tensor,
        density: Tensor | None = None,
        fixations: Tensor | None = None,
        other: Tensor | None = None,
        *,
        video: str | int | Sequence[str | int | None] | None = None,
        numbers: Sequence[int] | None = None,
        pred_looks: Tensor | None = None,
    ) -> Tensor:
        """Add a batch of frames.

        Args:
            pred: Predicted maps [B, H, W], of the ground truth's size: see ``resize_and_blur``.
            density: Ground-truth maps [B, H, W].
            fixations: Fixation maps [B, H, W], or of the size of ``pred_looks``.
            other: Fixations of other frames, of the size of ``fixations``.
            video: Which video the frames are from, one for all or one a frame. None: it counts for
                the mean over frames only.
            numbers: Of the frames in their videos, which seed what is drawn for them; None: how
                many frames this object has seen before.
            pred_looks: Predicted maps [B, h, w] of the fixations' size, for the metrics that need
                those; None: ``pred``.

        Returns:
            Every frame's scores [B, metrics], NaN where one is not defined.

        Raises:
            ValueError: Maps that a metric needs and that are missing, shapes that differ, or a
                number of videos that is not the number of frames.
        """
        maps = {"density": density, "fixations": fixations, "other": other}
        looks = pred if pred_looks is None else pred_looks
        videos = _one_each(video, len(pred), "videos")
        seeds = self._seeds(videos, numbers).to(self.device, non_blocking=True)
        values = torch.stack(
            [self._score(name, pred, looks, maps, seeds) for name in self.names], dim=1
        )
        defined = ~values.isnan()
        frames = torch.ones_like(values[:, :1])
        rows = self._rows_of(videos).to(self.device, non_blocking=True)
        sums = values.masked_fill(~defined, 0.0)
        entries = torch.cat([sums, defined.to(values.dtype), frames], dim=1)
        self._state.index_add_(0, rows, entries)
        return values

    def merge(self, other: SaliencyMetrics) -> None:
        """Add the frames of another one with the same metrics and flags.

        Raises:
            ValueError: Metrics or flags that differ.
        """
        if (self.names, self.flags) != (other.names, other.flags):
            raise ValueError(f"cannot merge {other.flags} into {self.flags}; expected the same")
        rows = self._rows_of(list(other._rows))
        self._state.index_add_(0, rows.to(self.device), other._state.to(self._state))

    def compute(self, group: dist.ProcessGroup | None = None) -> Scores:
        """Sum over the ranks of a group, which must all call this, and read the means.

        Args:
            group: None: all ranks.
        """
        ranks = gather_objects(list(self._rows), group)
        videos = list(dict.fromkeys(video for names in ranks for video in names))
        place = {video: i for i, video in enumerate(videos)}
        state = self._state.new_zeros(len(videos), self._state.shape[1])
        mine = torch.tensor([place[video] for video in self._rows], dtype=torch.long)
        state[mine.to(self.device)] = self._state
        return self._scores(videos, sum_over_ranks(state, group).cpu().double())

    def _score(
        self,
        name: str,
        pred: Tensor,
        looks: Tensor,
        maps: Mapping[str, Tensor | None],
        seeds: Tensor,
    ) -> Tensor:
        metric = METRICS[name]
        missing = [need for need in metric.needs if maps[need] is None]
        if missing:
            raise ValueError(f"{name} needs the maps {', '.join(missing)}; pass them, or drop it")
        flags = dict(self.flags[name])
        if metric.draws:
            flags["seeds"] = seeds
        chosen = looks if "fixations" in metric.needs else pred
        return metric.function(chosen, *(maps[need] for need in metric.needs), **flags)

    def _seeds(self, videos: Sequence[str | int | None], numbers: Sequence[int] | None) -> Tensor:
        """Return a seed for each frame."""
        if numbers is None:
            numbers = range(self._seen, self._seen + len(videos))
        numbers = _one_each(numbers, len(videos), "numbers")
        self._seen += len(videos)
        frames = zip(videos, numbers, strict=True)
        return torch.tensor(
            [_digest((self.seed, video, number)) for video, number in frames], dtype=torch.long
        )

    def _rows_of(self, videos: Sequence[str | int | None]) -> Tensor:
        return torch.tensor([self._row(name) for name in videos], dtype=torch.long)

    def _row(self, video: str | int | None) -> int:
        if video not in self._rows:
            self._rows[video] = len(self._rows)
            self._state = torch.cat([self._state, self._state.new_zeros(1, self._state.shape[1])])
        return self._rows[video]

    def _scores(self, videos: Sequence[str | int | None], state: Tensor) -> Scores:
        sums, counts, frames = state.split([len(self.names), len(self.names), 1], dim=1)
        means = sums / counts
        named = {i: video for i, video in enumerate(videos) if video is not None}
        return Scores(
            frames=round(frames.sum().item()),
            mean=self._named(sums.sum(0) / counts.sum(0)),
            undefined={k: round(v) for k, v in self._named((frames - counts).sum(0)).items()},
            videos={video: self._named(means[i]) for i, video in named.items()},
            video_mean=self._named(means[list(named)].nanmean(0)),
            flags={name: dict(flags) for name, flags in self.flags.items()},
        )

    def _named(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.names, values.tolist(), strict=True))


def _one_each(given: Any, frames: int, what: str) -> list[Any]:
    """Return a value for each frame; one that is no list is for all of them."""
    if given is None or isinstance(given, str | int):
        return [given] * frames
    if len(given) != frames:
        raise ValueError(f"{len(given)} {what} for {frames} frames; expected one a frame")
    return list(given)


def _digest(content: tuple[Any, ...]) -> int:
    """Turn what tells a frame from others into an int64; the same in every process."""
    digest = hashlib.blake2b(repr(content).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _check_flags(
    names: Sequence[str], flags: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the flags of each metric, complete."""
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(f"no metrics {unknown}; there are: {', '.join(METRICS)}")
    stray = [name for name in flags if name not in names]
    if stray:
        raise ValueError(f"flags for {stray}, which are not among the metrics {list(names)}")
    complete = {name: METRICS[name].flags for name in names}
    for name, changes in flags.items():
        for flag in changes:
            if flag not in complete[name]:
                choices = ", ".join(complete[name]) or "none"
                raise ValueError(f"{name} has no flag {flag!r}; there are: {choices}")
        complete[name] |= changes
    return complete


def draw_frames(
    total: int, count: int | None = FRAME_CAP, generator: torch.Generator | None = None
) -> list[int]:
    """Draw different frames of a data set, without replacement.

    Args:
        total: Frames that there are.
        count: Frames wanted; where there are fewer, all of them. The official evaluation scores
            50,000, and takes the fixations of ``other`` from 10. None: all.
        generator: On the CPU; None: one with seed 0.

    Returns:
        Their indices, ascending.

    Raises:
        ValueError: A count below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"count is {count}; expected 1 or more, or None for all frames")
    if count is None or count >= total:
        return list(range(total))
    # its own, so that nobody else's draws move
    order = torch.randperm(total, generator=generator or torch.Generator().manual_seed(0))
    return sorted(order[:count].tolist())


def resize_and_blur(
    pred: Tensor,
    size: Sequence[int],
    blur: int = 11,
    *,
    sigma: float | None = None,
    interpolation: str = "bilinear",
    antialias: bool = False,
) -> Tensor:
    """Bring predicted maps to the ground truth's size, and smooth them.

    Args:
        pred: Maps [B, h, w] of a float dtype.
        size: Height and width to reach.
        blur: Pixels across the Gaussian, odd; 0: none.
        sigma: Of the Gaussian, in pixels; None: by OpenCV's formula, 2.0 for 11. (OpenCV itself
            has tables for 9 pixels and fewer.)
        interpolation: ``bilinear`` or ``bicubic``, with corners not aligned.
        antialias: Filter where the map shrinks. With ``bicubic`` this is what the official
            evaluation's resize does.

    Returns:
        Maps [B, H, W], in float32 or wider, as cv2.resize and cv2.GaussianBlur give with their
        default border (reflected without the edge). Gradient reaches ``pred``.

    Raises:
        ValueError: A shape that is not [B, h, w], or a flag out of its range.
    """
    check_maps(pred=pred)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {tuple(size)}; expected height and width, 1 or more each")
    if blur < 0 or (blur and blur % 2 == 0):
        raise ValueError(f"blur is {blur}; expected an odd number of pixels, or 0 for none")
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation is {interpolation!r}; expected bilinear or bicubic")
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma is {sigma}; expected more than 0, or None")
    maps = pred.to(torch.promote_types(pred.dtype, torch.float32))
    if tuple(maps.shape[1:]) != tuple(size):
        maps = F.interpolate(
            maps[:, None], size=tuple(size), mode=interpolation, antialias=antialias
        )[:, 0]
    if blur:
        sigma = 0.3 * ((blur - 1) * 0.5 - 1) + 0.8 if sigma is None else sigma
        weights = [math.exp(-0.5 * ((i - blur // 2) / sigma) ** 2) for i in range(blur)]
        maps = _smooth(_smooth(maps, weights, 1), weights, 2)
    return maps


def _smooth(maps: Tensor, weights: Sequence[float], dim: int) -> Tensor:
    """Average along an axis; by sums, as a convolution would use TF32 or half where allowed."""
    size, reach = maps.shape[dim], len(weights) // 2
    place = torch.arange(-reach, size + reach, device=maps.device)
    period = max(2 * (size - 1), 1)
    place = (size - 1) - ((size - 1) - place.remainder(period)).abs()
    wide = maps.index_select(dim, place)
    parts = (w * wide.narrow(dim, i, size) for i, w in enumerate(weights))
    return sum(parts, torch.zeros_like(maps)) / sum(weights)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(_dtype(x.device))


def _both(pred: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
    check_maps(pred=pred, density=density)
    return _wide(pred), _wide(density)


def _zero(maps: Tensor) -> Tensor:
    return (maps == 0).flatten(1).all(1)


def _varies(low: Tensor, high: Tensor) -> Tensor:
    """Say whether maps with these limits [B] are finite and not constant."""
    extent = _wide(high) - _wide(low)
    return (extent > 0) & extent.isfinite()


def _seeds(seeds: Tensor | None, generator: torch.Generator | None, maps: Tensor) -> Tensor | None:
    if seeds is not None or generator is None:
        return seeds
    drawn = torch.randint(2**62, (len(maps),), generator=generator, device=generator.device)
    return drawn.to(maps.device)


def _random(seeds: Tensor | None, rows: range, maps: Tensor) -> Tensor:
    """Draw from [0, 1) for each map [B, ..., P], on its device.

    A generator's numbers depend on how many are drawn together, and on the device. These depend on
    the seed, the row and the column alone.

    Returns:
        [B, rows, P], float64 (float32 on MPS).

    Source: the generator SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), whose state is a counter.
    """
    device, dtype = maps.device, _dtype(maps.device)
    if seeds is None:
        seeds = torch.arange(len(maps), device=device)
    row = torch.arange(rows.start, rows.stop, device=device)[:, None] << 32
    counter = row + torch.arange(maps.shape[-1], device=device)
    bits = _scrambled(_scrambled(seeds.to(device))[:, None, None] + counter * _GOLDEN)
    digits = 53 if dtype == torch.float64 else 24
    return _shifted(bits, 64 - digits).to(dtype).mul_(2.0**-digits)


def _scrambled(x: Tensor) -> Tensor:
    for shift, factor in _FACTORS:
        x = (x ^ _shifted(x, shift)).mul_(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    # int64 shifts copies of the sign in; what is wanted is zeros
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _jittered(pred: Tensor, seeds: Tensor | None) -> Tensor:
    return _wide(pred) + JITTER * _random(seeds, range(pred.shape[1]), pred)


def _sorted(values: Tensor) -> Tensor:
    """Sort each row; on the CPU with numpy, whose vectorised sort is many times faster."""
    if values.is_cpu:
        return torch.from_numpy(np.sort(values.contiguous().numpy(), axis=-1))
    return values.sort(dim=-1).values


def _compact(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Pack where it costs no wait for the device; elsewhere all columns stay."""
    return _pack(values, chosen) if values.is_cpu else (values, chosen)


def _pack(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Move the chosen values of each row [B, M] to its front.

    Returns:
        Values, and which of them are chosen, [B, P]; P is the most chosen in a row, at least 1.
    """
    count = chosen.sum(1)
    width = max([1, *count.tolist()])
    row, column = chosen.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=values.device) - (count.cumsum(0) - count)[row]
    packed = values.new_zeros(len(values), width)
    packed[row, place] = values[row, column]
    return packed, torch.arange(width, device=values.device) < count[:, None]


def _check_draws(splits: int | None, step: float | None, drawn: int | None) -> None:
    if splits is not None and splits < 1:
        raise ValueError(f"splits is {splits}; expected 1 or more, or None for the expectation")
    if step is not None and not 0 < step <= 1:
        raise ValueError(f"step is {step}; expected in (0, 1], or None for every value")
    if drawn is not None and drawn < 1:
        raise ValueError(f"drawn is {drawn}; expected 1 or more, or None for one a fixation")
    if drawn is not None and splits is None:
        raise ValueError(f"drawn is {drawn}, but the expectation draws nothing; give splits")


def _draw(valid: Tensor, count: Tensor, splits: int, seeds: Tensor | None) -> Tensor:
    """Draw ``count`` [B] of the valid columns [B, P] without replacement, ``splits`` times.

    Returns:
        How often each column was drawn [B, P].
    """
    rows, width = valid.shape
    first = torch.arange(width, device=valid.device) < count[:, None, None]
    times = torch.zeros(rows, width, dtype=torch.long, device=valid.device)
    stretch = max(1, _STRETCH // max(valid.numel(), 1))
    for start in range(0, splits, stretch):
        draws = range(start, min(start + stretch, splits))
        keys = _random(seeds, draws, valid).masked_fill(~valid[:, None], 2.0)
        order = keys.argsort(dim=2).flatten(1)
        times.scatter_add_(1, order, first.expand(keys.shape).flatten(1).long())
    return times


def _levels(values: Tensor, step: float) -> Tensor:
    """Replace values in [0, 1] by how many thresholds they reach."""
    # divided, not multiplied: 6 * 0.1 is more than 0.6
    per_unit = 1 / step
    count = math.floor(per_unit + 1e-9) + 1
    grid = torch.arange(count, dtype=values.dtype, device=values.device) / per_unit
    return torch.bucketize(values, grid, right=True)


def _area(positive: Tensor, counted: Tensor, negative: Tensor, weight: Tensor) -> Tensor:
    """Return the area under the curve of all thresholds [B].

    It is the share of pairs whose positive is higher, those that tie counted half.

    Args:
        positive: Values [B, P].
        counted: Which of them count [B, P], bool.
        negative: Values [B, Q].
        weight: How much each of them counts [B, Q], whole numbers.
    """
    negative, order = negative.sort(dim=1)
    reached = F.pad(weight.long().gather(1, order).cumsum(1), (1, 0))
    below = reached.gather(1, torch.searchsorted(negative, positive))
    upto = reached.gather(1, torch.searchsorted(negative, positive, right=True))
    pairs = counted.sum(1) * reached[:, -1]
    return _wide(((below + upto) * counted).sum(1)) / _wide(2 * pairs)
