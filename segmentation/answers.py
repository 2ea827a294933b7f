"""What segmentors say of a few pixels of every image, computed once and kept."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.broken import BadSamples, Replaced
from common.distributed import World
from common.logit_cache import CHUNK, CachedLogits, ChunkWriter, LogitCache, hash_weights
from common.options import OptionError
from common.scouting import refuse_unfit
from segmentation.config import PeerConfig, RunConfig
from segmentation.data import (
    LeavingOut,
    TestMapper,
    allowed,
    check_labels,
    classes_of,
    load_datasets,
    read_labels,
)
from segmentation.errors import FAULTS
from segmentation.evaluation import evaluating, predict, test_samples
from segmentation.models import build_with_weights
from segmentation.peer import SegmentorPeer

_logger = logging.getLogger("scout")
_BROKEN = -1
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
Watch = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Pixels:
    """The pixels that are scouted on: as many of every image, drawn from those with a label.

    Where an image has fewer, some are drawn twice; an image without any counts nothing.

    Attributes:
        records: Of the images.
        classes: Names of the classes.
        where: Flat positions in the file's image [I, P].
        labels: Their classes [I, P]; -1 in an image without labels.
        weight: For how many labelled pixels each of an image's stands [I].
        key: What decides which pixels these are.
        labelled: Whether the labels are known; else they are all 0.
    """

    records: list[dict[str, Any]]
    classes: list[str]
    where: Tensor
    labels: Tensor
    weight: Tensor
    key: str
    labelled: bool = True

    @property
    def each(self) -> int:
        """Pixels an image."""
        return self.where.shape[1]


def draw_pixels(
    dataset: str,
    each: int,
    images: int | None,
    seed: int,
    watch: Watch,
    bad: BadSamples | None = None,
) -> Pixels:
    """Draw pixels of a dataset's images, the same for every model.

    Args:
        dataset: A registered name.
        each: Pixels of an image; a power of two up to 1024, so that no image is cut in two.
        images: How many, drawn at random; None: all.
        seed: Of the draws.
        watch: Wraps the images, for instance in a progress bar.
        bad: Counts images whose files are broken, which are left out; None: none is allowed. Where
            some are, each image is read too.

    Raises:
        OptionError: Another number of pixels, or no labelled pixel at all.
        DataError: More files that are missing or broken than allowed.
    """
    classes, ignore = classes_of(dataset)
    bad = bad or allowed()
    read = functools.partial(_truth, len(classes), ignore, bad.most > 0)
    found = _draw(load_datasets([dataset]), classes, ignore, read, each, images, seed, watch, bad)
    if not bool(found.weight.any()):
        raise OptionError(f"{dataset}: no pixel has a label; there is nothing to scout on")
    return found


def draw_unlabelled(
    folder: Path,
    classes: list[str],
    each: int,
    images: int | None,
    seed: int,
    watch: Watch,
    bad: BadSamples | None = None,
) -> Pixels:
    """Draw pixels of the images in a folder, which have no labels; see ``draw_pixels``.

    Args:
        folder: Of the images, at any depth.
        classes: Names of those that the models tell.

    Raises:
        OptionError: Another number of pixels, or no image in the folder.
        DataError: More files that are broken than allowed.
    """
    records = [{"file_name": str(path)} for path in list_unlabelled(folder)]
    found = _draw(records, classes, -1, _blank, each, images, seed, watch, bad or allowed())
    if not found.records:
        raise OptionError(f"--unlabelled {folder}: no image there can be read")
    return replace(found, labelled=False)


def list_unlabelled(folder: Path) -> list[Path]:
    """List the images in a folder, at any depth.

    Raises:
        OptionError: There is none.
    """
    if not folder.is_dir():
        raise OptionError(f"--unlabelled {folder}: no such folder; give one with images")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES)
    if not files:
        raise OptionError(
            f"--unlabelled {folder}: no image there, at any depth; give a folder with "
            f"{', '.join(_IMAGES)} files"
        )
    return files


def _draw(
    records: list[dict[str, Any]],
    classes: list[str],
    ignore: int,
    labels_of: Callable[[dict[str, Any]], np.ndarray],
    each: int,
    images: int | None,
    seed: int,
    watch: Watch,
    bad: BadSamples,
) -> Pixels:
    if each < 1 or CHUNK % each:
        raise OptionError(f"--pixels {each}: expected a power of two from 1 to {CHUNK}")
    if images is not None and images < len(records):
        order = np.random.default_rng([seed, 3]).permutation(len(records))
        records = [records[i] for i in sorted(order[:images])]
    read = LeavingOut(labels_of)
    kept: list[dict[str, Any]] = []
    where, labels, weight = [], [], []
    for i, record in enumerate(watch(records, "drawing pixels")):
        truth = read(record)
        if isinstance(truth, Replaced):
            bad.add(truth.passed_over, evaluating=True)
            continue
        there = np.flatnonzero(truth != ignore)
        chosen = np.zeros(each, dtype=np.int64)
        if len(there):
            draw = np.random.default_rng([seed, 4, i])
            chosen = np.sort(draw.choice(there, each, replace=len(there) < each))
        kept.append(record)
        where.append(torch.from_numpy(chosen))
        told = torch.from_numpy(truth.flat[chosen])
        labels.append(told if len(there) else torch.full((each,), _BROKEN))
        weight.append(len(there) / each)
    bad.tell_evaluation(len(records) - len(kept), len(records))
    return Pixels(
        kept,
        classes,
        torch.stack(where) if kept else torch.zeros(0, each, dtype=torch.long),
        torch.stack(labels) if kept else torch.zeros(0, each, dtype=torch.long),
        torch.tensor(weight, dtype=torch.float64),
        _fingerprint(kept, each, seed),
    )


def _truth(classes: int, ignore: int, whole: bool, record: dict[str, Any]) -> np.ndarray:
    """Read an image's labels, and where ``whole`` the image, so that it is known to be sound."""
    path = record["sem_seg_file_name"]
    truth = read_labels(path, dtype=np.int64)
    check_labels(truth, classes, ignore, path)
    if whole:
        TestMapper(0, 0)(record)
    return truth


def _blank(record: dict[str, Any]) -> np.ndarray:
    """Read an image for its size; every pixel of it may be drawn."""
    image = TestMapper(0, 0)(record)
    return np.zeros((image["height"], image["width"]), dtype=np.int64)


def _fingerprint(records: Sequence[dict[str, Any]], each: int, seed: int) -> str:
    """Hash names, sizes and times of change of the files."""
    digest = hashlib.sha256(f"{each} {seed}".encode())
    for record in records:
        for key in ("file_name", "sem_seg_file_name"):
            if key not in record:
                continue
            path = record[key]
            file = os.stat(path)
            told = Path(path).parent.name, Path(path).name, file.st_size, file.st_mtime_ns
            digest.update(f"{told}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Candidate:
    """A segmentor that can be scouted.

    Attributes:
        config: As asked for.
        parameters: How many it has.
        weights: Hash of them.
    """

    config: PeerConfig
    parameters: int
    weights: str

    @property
    def told(self) -> dict[str, str]:
        """What decides its answers, besides the images."""
        cfg = self.config.cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = cfg.MODEL.DEVICE = ""
        view = cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        return {"model": cfg.MODEL.dump(), "view": str(view), "weights": self.weights}

    @property
    def identity(self) -> str:
        """The same of two that answer alike, whatever they are called."""
        return repr(self.told)


def inspect(run: RunConfig, skip: bool, watch: Watch) -> list[Candidate]:
    """Build every model once, for the hash of its weights.

    Args:
        run: Names them.
        skip: Go on without those that cannot be had, and say which.
        watch: Wraps them, for instance in a progress bar.

    Raises:
        OptionError: Some cannot be had, and ``skip`` is not set (names all of them); or fewer than
            two can.
    """
    found, unfit = [], {}
    for config in watch(run.peers, "looking at models"):
        try:
            found.append(_inspect(config))
        except (*FAULTS, OptionError) as error:
            unfit[config.name] = str(error)
    refuse_unfit(unfit, len(run.peers), skip)
    return found


def _inspect(config: PeerConfig) -> Candidate:
    if not config.cfg.MODEL.WEIGHTS:
        raise OptionError("has no WEIGHTS; a model that knows nothing teaches nothing")
    module, _ = build_with_weights(config)
    count = sum(p.numel() for p in module.parameters())
    return Candidate(config, count, hash_weights(module.state_dict()))


def cached_answers(
    candidates: Sequence[Candidate], pixels: Pixels, root: Path, world: World, watch: Watch
) -> CachedLogits:
    """Return every model's log-probabilities of the pixels, computing those no earlier call has.

    Each sees whole images in its own test geometry; a call that was cut off goes on after its last
    whole chunk.

    Args:
        candidates: The models.
        pixels: What they are asked.
        root: Of all caches.
        world: Where this process stands.
        watch: Wraps the images, for instance in a progress bar.
    """
    caches = [
        LogitCache(
            root,
            {**candidate.told, "data": pixels.key},
            candidate.config.name,
            pixels.where.numel(),
            len(pixels.classes),
        )
        for candidate in candidates
    ]
    lacking = [k for k, cache in enumerate(caches) if cache.missing()]
    done = len(caches) - len(lacking)
    _logger.info("answers of %d models known, of %d to be computed", done, len(lacking))
    for k in lacking:
        _compute(candidates[k], caches[k], pixels, world, watch)
    return CachedLogits(caches)


@torch.no_grad()
def _compute(
    candidate: Candidate, cache: LogitCache, pixels: Pixels, world: World, watch: Watch
) -> None:
    config = candidate.config
    module, cfg = build_with_weights(config)
    if hash_weights(module.state_dict()) != candidate.weights:
        raise OptionError(f"{config.name}: its weights changed while it was scouted; run it again")
    peer = SegmentorPeer(config.name, module, cfg, frozen=True)
    chunks = cache.missing()
    images = sorted({i // pixels.each for chunk in chunks for i in cache.samples(chunk)})
    writer = ChunkWriter(cache, chunks)
    records = [pixels.records[i] for i in images]
    with evaluating([peer]):
        samples = test_samples([peer], records, world, False, allowed())
        for i, (sample,) in zip(images, watch(samples, config.name), strict=True):
            p = predict(peer, sample).flatten(1)[:, pixels.where[i].to(world.device)].T
            writer.add(p.clamp_min(torch.finfo(p.dtype).tiny).log(), pixels.labels[i])
