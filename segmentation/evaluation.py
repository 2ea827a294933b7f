"""Evaluation of every peer and of their ensemble, with Detectron2's own evaluators."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import SemSegEvaluator
from torch import Tensor

from common import distributed
from common.broken import BadSamples, Counted, sound
from common.clock import with_lines
from common.distributed import World
from common.termination import outlive_sigterm
from segmentation.data import (
    LeavingOut,
    TestMapper,
    allowed,
    check_labels,
    load_datasets,
    peer_view,
    read_labels,
)
from segmentation.errors import DataError
from segmentation.peer import SegmentorPeer

_logger = logging.getLogger(__name__)

METRICS = ("mIoU", "fwIoU", "mACC", "pACC")
ENSEMBLE = "ensemble"
_SEMANTIC = ("sem_seg", "cityscapes_sem_seg", "ade20k_panoptic_seg")


class LabelEvaluator(SemSegEvaluator):
    """Detectron2's evaluator without the file of predictions, which costs more than the rest.

    Args:
        dataset: A registered name.
        replicas: Which ranks look at a part of it each; None: all.
    """

    def __init__(self, dataset: str, replicas: dist.ProcessGroup | None = None) -> None:
        # its own reader breaks with numpy 2 (copy=False)
        super().__init__(dataset, distributed=False, sem_seg_loading_fn=self._read)
        self._compute_boundary_iou = False  # for which each map would be eroded too
        self._replicas = replicas

    def evaluate(self) -> dict[str, Any]:
        """Sum over the ranks, which must all call this; the same on each."""
        parts = distributed.gather_objects(self._conf_matrix, self._replicas)
        self._conf_matrix = sum(parts)
        return super().evaluate()

    def _read(self, path: str, **settings: Any) -> np.ndarray:
        labels = read_labels(path, **settings)
        check_labels(labels, self._num_classes, self._ignore_label, path)
        return labels

    def encode_json_sem_seg(self, sem_seg: np.ndarray, input_file_name: str) -> list[Any]:
        """Encode nothing."""
        return []


def evaluate_group(
    peers: Sequence[SegmentorPeer],
    dataset: str,
    world: World,
    tta: bool = False,
    bad: BadSamples | None = None,
    part: slice = slice(None),
    watch: Callable[[str, dict[str, Any], Tensor], None] | None = None,
    corruption: tuple[str, int] | None = None,
) -> dict[str, float]:
    """Evaluate every peer and, of several, the mean of their probabilities.

    Every peer sees an image in its own test geometry; an image is read once for all peers that
    share one. Under several ranks each takes its part of the images.

    Args:
        peers: That this process holds, as they are; their modes are put back afterwards.
        dataset: A registered name.
        world: Where this process stands.
        tta: Average over the sizes and flips of each peer's TEST.AUG; metrics end in ``_TTA``.
        bad: Counts broken files, whose images are left out for all peers alike; None: by itself,
            and none is allowed.
        part: Which of the dataset's images; by default all.
        watch: Called with the name of a peer or ``ensemble``, a sample and the probabilities
            [C, height, width], which it must leave as they are; those of the ensemble are a sum.
        corruption: Spoils every image before any peer's geometry, by a name and a severity of
            ``segmentation.corruptions``.

    Returns:
        ``PEER/mIoU``, ``fwIoU``, ``mACC``, ``pACC`` and ``PEER/IoU-CLASS``, in percent, the same on
        all ranks; and those of ``ensemble``.

    Raises:
        DataError: More files that are missing or broken than allowed, or a dataset of another kind.
    """
    bad, done = bad or allowed(), 0
    records = load_datasets([dataset])[part]
    names = [peer.name for peer in peers] + [ENSEMBLE] * (len(peers) * world.seats > 1)
    evaluators = {name: _evaluator(dataset, world) for name in names}
    for evaluator in evaluators.values():
        evaluator.reset()
    with torch.no_grad(), evaluating(peers):
        for inputs in with_lines(
            test_samples(peers, records, world, tta, bad, corruption), "evaluating images"
        ):
            done += 1
            mean: Tensor | None = None
            for peer, sample in zip(peers, inputs, strict=True):
                p = augmented(peer, sample) if tta else predict(peer, sample)
                evaluators[peer.name].process([sample], [{"sem_seg": p}])
                if watch is not None:
                    watch(peer.name, sample, p)
                if ENSEMBLE in evaluators:
                    mean = p if mean is None else mean.add_(p)
                del p  # or it stays while the next one is made
            if mean is not None:
                mean = distributed.sum_over_team(mean, world)
                evaluators[ENSEMBLE].process([inputs[0]], [{"sem_seg": mean}])
                if watch is not None:
                    watch(ENSEMBLE, inputs[0], mean)
    bad.share()
    seen = sum(distributed.gather_objects(done, world.replicas))
    bad.tell_evaluation(len(records) - seen, len(records))
    found = {name: evaluator.evaluate() for name, evaluator in evaluators.items()}
    found = distributed.merge_over_seats(found, world)
    suffix = "_TTA" if tta else ""
    return {
        f"{name}/{metric}{suffix}": float(value)
        for name, results in sorted(found.items(), key=lambda item: item[0] == ENSEMBLE)
        for metric, value in results["sem_seg"].items()
    }


def predict(peer: SegmentorPeer, sample: dict[str, Any]) -> Tensor:
    """Return a peer's probabilities [C, height, width] for one image, at the file's resolution.

    Of the average of its weights, where it has one.
    """
    seen = peer_view(sample, peer.cfg.INPUT.FORMAT)
    return peer.probabilities(peer.best_module([seen])[0]["sem_seg"])


def augmented(peer: SegmentorPeer, sample: dict[str, Any]) -> Tensor:
    """Return a peer's mean probabilities [C, height, width] over TEST.AUG's sizes and flips.

    Args:
        peer: Its TEST.AUG gives MIN_SIZES, MAX_SIZE and FLIP.
        sample: With the image as it is in the file.
    """
    settings = peer.cfg.TEST.AUG
    image = sample["image"].permute(1, 2, 0).numpy()
    total: Tensor | None = None
    flips = (False, True) if settings.FLIP else (False,)
    for size in settings.MIN_SIZES:
        resized = ResizeShortestEdge(size, settings.MAX_SIZE).get_transform(image)
        tensor = torch.from_numpy(resized.apply_image(image).transpose(2, 0, 1).copy())
        for flip in flips:
            seen = {**sample, "image": tensor.flip(-1) if flip else tensor}
            p = predict(peer, seen)
            p = p.flip(-1) if flip else p
            total = p if total is None else total.add_(p)
            del p
    if total is None:
        raise DataError("TEST.AUG.MIN_SIZES is empty; give at least one size")
    return total.div_(len(settings.MIN_SIZES) * len(flips))


def test_samples(
    peers: Sequence[SegmentorPeer],
    records: list[dict[str, Any]],
    world: World,
    tta: bool,
    bad: BadSamples,
    corruption: tuple[str, int] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield one image after another of this process's part, as each peer's sample."""
    loader = build_detection_test_loader(
        records,
        mapper=LeavingOut(_GroupMapper(peers, tta, bad.most > 0, corruption)),
        sampler=range(world.shard, len(records), world.shards),
        num_workers=peers[0].cfg.DATALOADER.NUM_WORKERS,
    )
    loader.worker_init_fn = outlive_sigterm
    yield from chain.from_iterable(Counted(map(sound, loader), bad, evaluating=True))


class _GroupMapper:
    """Read an image once for every distinct test geometry.

    Args:
        peers: Whose.
        tta: As the file is, for the sizes of TEST.AUG.
        labels: Look at the labels too, before any peer is judged by them.
        corruption: Spoils the image.
    """

    def __init__(
        self,
        peers: Sequence[SegmentorPeer],
        tta: bool,
        labels: bool,
        corruption: tuple[str, int] | None,
    ) -> None:
        head = peers[0].cfg.MODEL.SEM_SEG_HEAD
        self.classes, self.ignore = head.NUM_CLASSES, head.IGNORE_VALUE
        self.labels = labels
        self.geometries = [
            (0, 0) if tta else (peer.cfg.INPUT.MIN_SIZE_TEST, peer.cfg.INPUT.MAX_SIZE_TEST)
            for peer in peers
        ]
        self.mappers = {size: TestMapper(*size, corruption) for size in self.geometries}

    def __call__(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        if self.labels:
            path = record["sem_seg_file_name"]
            check_labels(read_labels(path, dtype=np.int64), self.classes, self.ignore, path)
        samples = {size: mapper(record) for size, mapper in self.mappers.items()}
        return [samples[size] for size in self.geometries]


def _evaluator(dataset: str, world: World) -> LabelEvaluator:
    """Build what compares label files; Cityscapes' own evaluator needs more, and tells less."""
    kind = MetadataCatalog.get(dataset).get("evaluator_type")
    if kind not in _SEMANTIC:
        raise DataError(
            f"{dataset}: evaluator type {kind!r}; semantic datasets are of {', '.join(_SEMANTIC)}"
        )
    return LabelEvaluator(dataset, world.replicas)


@contextmanager
def evaluating(peers: Sequence[SegmentorPeer]) -> Iterator[None]:
    """Evaluate, then put every module's mode back as it was."""
    evaluated = [peer.best_module for peer in peers]
    modes = [[(module, module.training) for module in whole.modules()] for whole in evaluated]
    for whole in evaluated:
        whole.eval()
    try:
        yield
    finally:
        for module, training in (pair for of_one in modes for pair in of_one):
            module.training = training
