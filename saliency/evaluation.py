"""Every peer on held-out videos, and the group as an ensemble, by the benchmark's metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import distributed
from common.broken import BadSample, BadSamples
from common.distributed import World, gather_objects
from common.peers import PeerGroup
from saliency.clips import ClipView
from saliency.data import ClipBatch, EvalLoader, allowed
from saliency.errors import DataError
from saliency.images import read_fixations, scale_fixations
from saliency.layouts import VideoSet
from saliency.metrics import METRICS, SaliencyMetrics, Scores, resize_and_blur
from saliency.peer import check_output

Watch = Callable[[Iterable[Any], str], Iterable[Any]]
OnFrames = Callable[[str, Sequence[tuple[int, int]], Tensor], None]
_logger = logging.getLogger("train")

ENSEMBLE = "ensemble"
OTHERS = 10  # frames whose fixations are pooled for shuffled AUC, as the official evaluation does


def has_fixations(videos: VideoSet) -> bool:
    """Whether any frame of a split has fixations."""
    return any(file is not None for video in videos.videos for file in video.fixations)


def metrics_for(videos: VideoSet, asked: Sequence[str] | None, shuffled: bool = False) -> list[str]:
    """Choose the metrics: those asked for, else all that the data allows; CC and KL always.

    Args:
        videos: To be evaluated.
        asked: Names of ``METRICS``, or nothing.
        shuffled: Whether shuffled AUC, which is slower, is among all.

    Raises:
        ValueError: A metric that needs fixations, of data without any.
    """
    fixated = has_fixations(videos)
    all_of_them = [
        name
        for name in METRICS
        if (fixated or not needs_fixations(name)) and (shuffled or name != "auc_shuffled")
    ]
    chosen = list(asked or all_of_them)
    lacking = [name for name in chosen if needs_fixations(name) and not fixated]
    if lacking:
        raise ValueError(
            f"{', '.join(lacking)}: {videos} has no fixations; expected VIDEO/fixation/maps/*.mat "
            "or VIDEO/fixation/*.png; or leave these metrics out"
        )
    return [*chosen, *(name for name in ("cc", "kldiv") if name not in chosen)]


def needs_fixations(name: str) -> bool:
    """Whether a metric scores against fixations."""
    return "fixations" in METRICS[name].needs


class OtherFixations:
    """The fixations of other frames, for shuffled AUC: of ten frames drawn from the whole split.

    What is drawn for a frame depends on the seed and the frame alone. No frame is drawn twice, nor
    is the frame itself; where the split has fewer others with fixations, all of them are taken.

    Args:
        videos: Of the split.
        seed: Of the draws.
        bad: Counts broken files; a frame with one has no fixations here. None: none is allowed.
    """

    def __init__(self, videos: VideoSet, seed: int = 0, bad: BadSamples | None = None) -> None:
        self.videos = videos
        self.bad = bad or allowed()
        self.seed = seed
        self.places = [
            (number, frame)
            for number, video in enumerate(videos.videos)
            for frame, file in enumerate(video.fixations)
            if file is not None
        ]
        self._rank = {place: k for k, place in enumerate(self.places)}
        self._points: dict[tuple[int, int], tuple[np.ndarray, tuple[int, ...]]] = {}

    def around(self, targets: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor:
        """Return bool [B, H, W]: where people looked in frames drawn for each target."""
        found = np.zeros((len(targets), *size), bool)
        for row, target in zip(found, targets, strict=True):
            for place in self.drawn(target):
                row |= self._read(place, size)
        return torch.from_numpy(found)

    def drawn(self, target: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the frames drawn for a target, as (video, frame)."""
        own = self._rank.get(target, len(self.places))
        others = len(self.places) - (own < len(self.places))
        generator = np.random.default_rng((self.seed, *target))
        chosen = generator.choice(others, min(OTHERS, others), replace=False).tolist()
        return [self.places[k + (k >= own)] for k in chosen]

    def _read(self, place: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """Return a frame's fixations at a size; of each file only the points are kept."""
        if place not in self._points:
            video = self.videos.videos[place[0]]
            try:
                points = read_fixations(video.path(str(video.fixations[place[1]])))
            except DataError as error:
                self.bad.add([BadSample.of(error)], evaluating=True)
                points = np.zeros(size, bool)
            self._points[place] = np.flatnonzero(points), points.shape
        points, shape = self._points[place]
        whole = np.zeros(shape, bool)
        whole.flat[points] = True
        return whole if shape == size else scale_fixations(whole, size) > 0


class SaliencyEvaluator:
    """Evaluates models over a split: each map resized to the ground truth's size, and blurred.

    Fixations may have a size of their own: what a model predicts is then also resized to that, for
    the metrics that need them, as the official evaluation does.

    Args:
        loader: Of this process's share of the data, in the views of the peers that it holds.
        world: Where this process stands.
        metrics: Names of ``METRICS``.
        blur: See ``saliency.metrics.resize_and_blur``.
        interpolation: ``bilinear``; or ``bicubic``, with antialias and cut at each map's own
            limits, as the official evaluation resizes its 8-bit maps.
        amp_dtype: Autocast the forwards to it.
        flags: Of the metrics' definitions, see ``SaliencyMetrics``.
        seed: Of what the metrics draw.
        watch: Wraps the batches, for instance in a progress bar.
        on_maps: Called with a model's name, the targets (video, frame), and its maps [B, h, w] at
            the ground truth's size.
        on_scores: Called with a model's name, the targets, and each one's scores [B, metrics].
    """

    def __init__(
        self,
        loader: EvalLoader,
        world: World,
        metrics: Sequence[str],
        *,
        blur: int = 11,
        interpolation: str = "bilinear",
        amp_dtype: torch.dtype | None = None,
        flags: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
        watch: Watch = lambda batches, title: batches,
        on_maps: OnFrames | None = None,
        on_scores: OnFrames | None = None,
    ) -> None:
        self.loader = loader
        self.world = world
        self.names = tuple(metrics)
        self.blur = blur
        self.interpolation = interpolation
        self.amp_dtype = amp_dtype
        self.flags = flags
        self.seed = seed
        self.watch = watch
        self.on_maps = on_maps
        self.on_scores = on_scores
        self.videos = loader.dataset.videos
        shuffled = "auc_shuffled" in self.names
        self.others = OtherFixations(self.videos, seed, loader.bad) if shuffled else None
        self._told = False

    def evaluate(self, peers: PeerGroup) -> dict[str, float]:
        """Measure every peer (its averaged weights, if any); equal on every rank."""
        here = peers.here
        scores = self.score(
            [peer.best_module for peer in here],
            [peer.view for peer in here],
            [peer.name for peer in here],
        )
        self._tell_undefined(next(iter(scores.values())))
        return flatten(scores)

    @torch.inference_mode()
    def score(
        self, modules: Sequence[nn.Module], views: Sequence[ClipView], names: Sequence[str]
    ) -> dict[str, Scores]:
        """Run the models that are here over the split; every rank gets the scores of all.

        Returns:
            By name, and as ``ensemble`` where there are several: the mean of their maps, each
            divided by its sum.
        """
        together = [ENSEMBLE] if len(names) * self.world.seats > 1 else []
        running = {
            name: SaliencyMetrics(self.names, self.world.device, flags=self.flags, seed=self.seed)
            for name in [*names, *together]
        }
        modes = [module.training for module in modules]
        for module in modules:
            module.eval()
        for batch in self.watch(self.loader, "evaluating"):
            looks = self._looks(batch)
            found = self._predict_all(modules, batch, views, names)
            video = self.videos.videos[batch.targets[0][0]].name
            numbers = [frame for _, frame in batch.targets]
            for name, sizes in found.items():
                maps, at_looks = sizes[0], sizes[-1]
                values = running[name].update(
                    maps, batch.maps, *looks, video=video, numbers=numbers, pred_looks=at_looks
                )
                if self.on_maps is not None:
                    self.on_maps(name, batch.targets, maps)
                if self.on_scores is not None:
                    self.on_scores(name, batch.targets, values)
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
        replicas = self.world.replicas
        self.loader.bad.share()
        left_out = sum(gather_objects(self.loader.left_out, replicas))
        self.loader.bad.tell_evaluation(left_out, self.loader.targets)
        found = {name: self._in_order(its.compute(replicas)) for name, its in running.items()}
        found = distributed.merge_over_seats(found, self.world)
        return {name: found[name] for name in sorted(found, key=lambda name: name == ENSEMBLE)}

    def _in_order(self, scores: Scores) -> Scores:
        """Put the videos into the split's order, whatever was read first."""
        names = [video.name for video in self.videos.videos if video.name in scores.videos]
        return replace(scores, videos={name: scores.videos[name] for name in names})

    def _looks(self, batch: ClipBatch) -> tuple[Tensor | None, Tensor | None]:
        """Return where people looked in a batch's frames, and in others."""
        if batch.fixations is None:
            return None, None
        fixations = batch.fixations > 0
        if self.others is None:
            return fixations, None
        other = self.others.around(batch.targets, tuple(fixations.shape[-2:]))
        return fixations, other.to(self.world.device)

    def _predict_all(
        self,
        modules: Sequence[nn.Module],
        batch: ClipBatch,
        views: Sequence[ClipView],
        names: Sequence[str],
    ) -> dict[str, list[Tensor]]:
        """Return every model's maps, and their ensemble's, at the map's and the fixations' size."""
        found = {
            name: self._predict(module, batch, view, name)
            for name, module, view in zip(names, modules, views, strict=True)
        }
        if len(names) * self.world.seats > 1:
            sizes = zip(*found.values(), strict=True)
            mine = [torch.stack([over_sum(x) for x in maps]).sum(0) for maps in sizes]
            found[ENSEMBLE] = [distributed.sum_over_team(x, self.world) for x in mine]
        return found

    def _predict(
        self, module: nn.Module, batch: ClipBatch, view: ClipView, name: str
    ) -> list[Tensor]:
        """Return a model's maps at the map's size, and at the fixations' where it is another."""
        device = self.world.device.type
        with torch.autocast(device, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            maps = check_output(module(batch.clips(view)), len(batch), name)
        truths = [x for x in (batch.maps, batch.fixations) if x is not None]
        sizes = dict.fromkeys(tuple(x.shape[-2:]) for x in truths)
        return [self._resize(maps, size) for size in sizes]

    def _resize(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        if self.interpolation == "bilinear":
            return resize_and_blur(maps, size, self.blur)
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        wide = resize_and_blur(maps, size, 0, interpolation=self.interpolation, antialias=True)
        # beyond the limits the cubic would give negative maps, for which KL has no value
        return resize_and_blur(wide.clamp(low, high), size, self.blur)

    def _tell_undefined(self, scores: Scores) -> None:
        """Say once which metrics leave frames out."""
        left = {name: count for name, count in scores.undefined.items() if count}
        if left and self.world.is_main and not self._told:
            told = ", ".join(f"{name} {count}" for name, count in left.items())
            _logger.warning("of %d frames, not defined and left out: %s", scores.frames, told)
        self._told = True

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: every evaluation starts anew."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up nothing."""


def over_sum(maps: Tensor) -> Tensor:
    """Divide each map [B, H, W] by its sum; an empty one stays empty."""
    total = maps.sum(dim=(1, 2), keepdim=True)
    return maps / total.clamp(min=torch.finfo(maps.dtype).tiny)


def flatten(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Name the means over frames ``NAME/METRIC``, and ``NAME/loss``, which is KL less CC."""
    found: dict[str, float] = {}
    for name, its in scores.items():
        found[f"{name}/loss"] = its.mean["kldiv"] - its.mean["cc"]
        found |= {f"{name}/{metric}": value for metric, value in its.mean.items()}
    return found
