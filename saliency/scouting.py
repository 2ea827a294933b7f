"""Saliency models to choose from, and what each says of a split: frame by frame, kept.

A model runs over the split once. Of every frame its scores are kept as they are, and its map at a
reduced size, from which agreement, KL and ensembles of any team follow without the model.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import CheckpointError
from common.distributed import World
from common.logit_cache import CachedLogits, LogitCache, hash_weights
from common.options import OptionError
from common.scouting import PREDICTORS, Predictor, refuse_unfit
from common.survey import Survey, survey
from saliency.check import fingerprint
from saliency.clips import ClipView
from saliency.data import ClipBatch
from saliency.layouts import VideoSet
from saliency.metrics import cc, draw_frames, similarity
from saliency.models import ModelError
from saliency.options import PeerSpec
from saliency.peer import build_modules, log_map
from saliency.train import build_evaluator

_logger = logging.getLogger("scout")

UNFIT = (ModelError, CheckpointError, OptionError)
Watch = Callable[[Iterable[Any], str], Iterable[Any]]
Target = tuple[int, int]
AT_ANY_SIZE = {"cc": cc, "similarity": similarity}  # metrics of two maps alone
_STRETCH = 2**22  # numbers of all models' maps at once
_WHY = {
    "gain-taught": (
        "flips",
        "by how much the student's metric would rise if, on the frames on which it is taught, it "
        "predicted as its teachers do",
    ),
    "loss-gap": ("loss-gap", "by how much the student's KL less CC would fall, likewise"),
    "complementarity": (
        "complementarity",
        "metric of the best member on each frame, less the student's own, whatever the rule",
    ),
    "strength": (
        "strength",
        "mean metric of the member's partners: the baseline for choosing them",
    ),
    "kl": ("kl", "the transfer loss at the start: how much is taught, good or bad"),
}
# what scouting ranks teams by; hypotheses, like those of ``common.scouting``
FRAME_PREDICTORS = {
    name: Predictor(PREDICTORS[known].estimate, why, PREDICTORS[known].needs)
    for name, (known, why) in _WHY.items()
}


@dataclass(frozen=True)
class Candidate:
    """A model that can be scouted.

    Attributes:
        asked: As given on the command line, for the command that trains it.
        spec: As understood.
        view: Its own.
        parameters: How many it has.
        weights: Hash of them.
    """

    asked: str
    spec: PeerSpec
    view: ClipView
    parameters: int
    weights: str

    @property
    def told(self) -> dict[str, Any]:
        """What decides its answers, besides the data and the options of all."""
        return {
            "weights": self.weights,
            "model": self.spec.model,
            "kwargs": self.spec.options.kwargs,
            "view": repr(self.view),
        }

    @property
    def identity(self) -> str:
        """The same of two that answer alike, whatever they are called."""
        return repr(self.told)


def inspect(
    specs: Sequence[PeerSpec], asked: Sequence[str], skip: bool, watch: Watch
) -> list[Candidate]:
    """Build every model once, for its view and the hash of its weights.

    Args:
        specs: As understood.
        asked: As given.
        skip: Go on without those that cannot be had, and say which.
        watch: Wraps the models, for instance in a progress bar.

    Raises:
        OptionError: Some cannot, and ``skip`` is not set (names all of them); or fewer than two.
    """
    found, unfit = [], {}
    for spec, text in watch(list(zip(specs, asked, strict=True)), "looking at models"):
        try:
            (module,), (view,) = build_modules([spec])
        except UNFIT as error:
            unfit[spec.name] = str(error)
            continue
        count = sum(parameter.numel() for parameter in module.parameters())
        found.append(Candidate(text, spec, view, count, hash_weights(module.state_dict())))
    refuse_unfit(unfit, len(specs), skip)
    return found


def cached_answers(
    candidates: Sequence[Candidate],
    videos: VideoSet,
    options: argparse.Namespace,
    world: World,
    watch: Watch,
) -> list[LogitCache]:
    """Run the models over a split, as far as their answers are not in ``options.cache``.

    Args:
        candidates: The models.
        videos: The split.
        options: Of the command line.
        world: Of this process.
        watch: Wraps batches.

    Returns:
        A complete cache a model. Its logits are the logarithm of each map at ``kept_size``; beside
        them lie ``scores`` [n, metrics] and the ground truth at that size, ``truth`` [n, h * w].
    """
    whole = build_evaluator(options, videos, [candidates[0].view], world)
    generator = torch.Generator().manual_seed(options.seed)
    places = draw_frames(whole.loader.targets, options.frames, generator)
    data = {"files": fingerprint(videos), "places": places, "metrics": list(whole.names)}
    caches = []
    for candidate in candidates:
        cache = LogitCache(
            options.cache,
            {**_told(candidate, options), **data},
            candidate.spec.name,
            len(places),
            options.kept_size[0] * options.kept_size[1],
        )
        missing = cache.missing()
        module = _module(candidate, world) if missing else None
        for chunk in missing:
            here = [places[k] for k in cache.samples(chunk)]
            _answer(candidate, module, here, cache, chunk, videos, options, world, watch)
        caches.append(cache)
    return caches


def _told(candidate: Candidate, options: argparse.Namespace) -> dict[str, Any]:
    """Say what decides a model's answers, but for the data."""
    return {
        **candidate.told,
        "amp": options.amp_dtype if options.amp else None,
        **{name: getattr(options, name) for name in ("val_stride", "blur", "kept_size", "seed")},
    }


def _module(candidate: Candidate, world: World) -> nn.Module:
    (module,), _ = build_modules([candidate.spec])
    return module.to(world.device)


def _answer(
    candidate: Candidate,
    module: nn.Module | None,
    places: Sequence[int],
    cache: LogitCache,
    chunk: int,
    videos: VideoSet,
    options: argparse.Namespace,
    world: World,
    watch: Watch,
) -> None:
    """Run a model over one chunk of the frames, and keep what it says."""
    name = candidate.spec.name
    found: dict[str, dict[Target, Tensor]] = {"maps": {}, "scores": {}, "truth": {}}

    def keep(what: str, targets: Sequence[Target], values: Tensor) -> None:
        found[what].update(zip(targets, values.float().cpu(), strict=True))

    def truths(batches: Iterable[ClipBatch], title: str) -> Iterator[ClipBatch]:
        for batch in watch(batches, f"{name}, {cache.samples(chunk).stop} of {cache.count}"):
            keep("truth", batch.targets, reduced(batch.maps, options.kept_size))
            yield batch

    evaluator = build_evaluator(
        options,
        videos,
        [candidate.view],
        world,
        watch=truths,
        on_maps=lambda _, targets, maps: keep("maps", targets, reduced(maps, options.kept_size)),
        on_scores=lambda _, targets, values: keep("scores", targets, values),
    )
    evaluator.loader.choose(lambda total: places)
    evaluator.score([module], [candidate.view], [name])
    order = sorted(found["scores"])
    maps, scores, truth = (torch.stack([part[k] for k in order]) for part in found.values())
    labels = torch.zeros(len(order), dtype=torch.long)
    cache.write(chunk, log_map(maps), labels, scores=scores, truth=truth.half())


def reduced(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Average maps [B, H, W] over the cells of a smaller grid [B, h * w]."""
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.adaptive_avg_pool2d(wide[:, None], tuple(size)).flatten(1)


class Answered:
    """What all models said of the frames on which every one has a score.

    Args:
        caches: Complete, of the same frames.
        metrics: Which scores they hold.
        metric: Which one counts.
        size: Of the reduced maps.
        temperature: Of the KL.

    Attributes:
        found: The survey; ``correct`` is the metric by frame, ``log_true`` minus KL less CC.
        scores: Of each metric [M, n], NaN where one is not defined.
        overlap: How alike the maps of two models are, the sum of the smaller one of both over the
            pixels, mean over frames [M, M].

    Raises:
        OptionError: No frame has a score of every model.
    """

    def __init__(
        self,
        caches: Sequence[LogitCache],
        metrics: Sequence[str],
        metric: str,
        size: Sequence[int],
        temperature: float,
    ) -> None:
        every = torch.stack([cache.table("scores") for cache in caches])
        at = {name: k for k, name in enumerate(metrics)}
        needed = every[:, :, [at[metric], at["cc"], at["kldiv"]]]
        known = ~needed.isnan().any(dim=2).any(dim=0)
        if not bool(known.any()):
            raise OptionError(f"--metric {metric}: not defined for any frame of the split")
        self.source = CachedLogits(caches, known)
        self.size = tuple(size)
        self.truth = caches[0].table("truth")[known].float().unflatten(1, self.size)
        self.scores = {name: every[:, known, k] for name, k in at.items()}
        self.metric = metric
        self.found: Survey = replace(
            survey(self.source, temperature=temperature),
            correct=self.scores[metric],
            log_true=self.scores["cc"] - self.scores["kldiv"],
        )
        self.overlap = self._overlap()

    def _parts(self) -> Iterator[slice]:
        step = max(1, _STRETCH // (len(self.source.names) * self.source.classes))
        for start in range(0, self.source.count, step):
            yield slice(start, min(start + step, self.source.count))

    def _maps(self, model: int, part: slice) -> Tensor:
        """Return a model's maps over their sums [b, h * w]."""
        return self.source.read(model, part.start, part.stop).softmax(dim=1)

    def _overlap(self) -> Tensor:
        models = len(self.source.names)
        total = torch.zeros(models, models, dtype=torch.float64)
        for part in self._parts():
            maps = [self._maps(i, part) for i in range(models)]
            for i, j in itertools.combinations_with_replacement(range(models), 2):
                total[i, j] += torch.minimum(maps[i], maps[j]).sum(dtype=torch.float64)
        return (total + total.triu(1).T) / self.source.count

    def together(self, members: Sequence[int]) -> float | None:
        """Measure the mean of the members' maps, each over its sum, at the reduced size.

        Returns:
            The metric; None for one that needs fixations, which have no reduced size.
        """
        function = AT_ANY_SIZE.get(self.metric)
        if function is None:
            return None
        values = [
            function(
                torch.stack([self._maps(i, part) for i in members]).sum(0).unflatten(1, self.size),
                self.truth[part],
            )
            for part in self._parts()
        ]
        return float(torch.cat(values).nanmean())

    def over_members(
        self, teams: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, ...], list[float]] | None:
        """Measure by how much the mean of a team's maps is better than each member's, both reduced.

        Returns:
            By team; None for a metric that needs fixations.
        """
        alone = [self.together([i]) for i in range(len(self.source.names))]
        found = {}
        for team in teams:
            whole = self.together(team)
            mine = [alone[i] for i in team]
            if whole is None:
                return None
            found[team] = [whole - value for value in mine if value is not None]
        return found


def oracles(values: Tensor) -> Tensor:
    """Take the better one of two models on every frame.

    Args:
        values: [M, n]; higher is better, none is NaN.

    Returns:
        The mean over frames for every pair [M, M] float64; each model's own on the diagonal.
    """
    return torch.stack([torch.maximum(row, values).double().mean(dim=1) for row in values])


def wins(values: Tensor, lower_is_better: bool = False) -> Tensor:
    """Count on which share of the frames the row's model does better than the column's.

    Args:
        values: [M, n]; a frame where one of two is NaN does not count for them.
        lower_is_better: Of the metric.

    Returns:
        [M, M] float64; NaN where two models share no frame.
    """
    if lower_is_better:
        values = -values
    known = (~values.isnan()).double()
    better = torch.stack([(row > values).sum(dim=1) for row in values])
    return better / (known @ known.T)
