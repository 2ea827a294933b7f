"""One stream of samples for all peers: its geometry, its order, its labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform
from detectron2.structures import Instances
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler

from common.ahead import Received
from common.apart import WAY_OUT, in_both, told_shared
from common.broken import (
    BadSample,
    BadSamples,
    Counted,
    Replaced,
    other_index,
    read_or_replace,
    sound,
)
from common.seeding import generators_kept, seed_generators
from common.termination import outlive_sigterm
from segmentation import held_out, scenes
from segmentation.corruptions import spoil
from segmentation.errors import DataError, told_of

FORMATS = ("RGB", "BGR")
_CROPS_TRIED = 10
_BROKEN_IMAGE = (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError)


class SharedMapper:
    """Turn a dataset's record into the training sample that every peer gets a view of.

    It owns the geometry (scale, crop, flip) and the colours' augmentation, all from ``cfg.INPUT``;
    normalisation and padding are the peers' own. A crop without any label is drawn again, up to ten
    times: a host's loss has no value there.

    Args:
        cfg: Of the run; any peer's, as they share it.
        needs_instances: Also give ``instances``, one mask a class, as MaskFormer's family learns.

    Returns (when called):
        ``image`` uint8 RGB [3, H, W], ``sem_seg`` int64 [H, W], ``file_name``, ``height`` and
        ``width`` of the file's image, and ``instances``.

    Raises (when called):
        DataError: Names the file.
    """

    def __init__(self, cfg: CfgNode, needs_instances: bool) -> None:
        self.needs_instances = needs_instances
        self.ignore = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        self.classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        self.augmentations = T.AugmentationList(_augmentations(cfg, self.ignore))

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Read and augment; draws from numpy's global generator, as Detectron2 does."""
        image, labels = _read_image(record), _read_labels(record)
        if image.shape[:2] != labels.shape:
            raise DataError(
                f"{record['file_name']}: {_size(image)} pixels, its labels "
                f"{record['sem_seg_file_name']}: {_size(labels)}; they must agree"
            )
        check_labels(labels, self.classes, self.ignore, record["sem_seg_file_name"])
        height, width = labels.shape
        image, labels = self._augment(image, labels)
        sample: dict[str, Any] = {
            "file_name": record["file_name"],
            "height": height,
            "width": width,
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "sem_seg": torch.from_numpy(labels.astype(np.int64)),
        }
        if self.needs_instances:
            sample["instances"] = class_masks(sample["sem_seg"], self.ignore)
        return sample

    def _augment(self, image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(_CROPS_TRIED):
            drawn = T.AugInput(image, sem_seg=labels)
            self.augmentations(drawn)
            if (drawn.sem_seg != self.ignore).any():
                break
        return drawn.image, drawn.sem_seg


def check_labels(labels: np.ndarray, classes: int, ignore: int, path: str) -> None:
    """Refuse labels that are neither a class nor ignored.

    Args:
        labels: [H, W].
        classes: How many there are.
        ignore: The ignore label.
        path: Of the file, for the error.

    Raises:
        DataError: Names the file and the label.
    """
    wrong = labels[((labels >= classes) | (labels < 0)) & (labels != ignore)]
    if wrong.size:
        raise DataError(
            f"{path}: holds the label {int(wrong[0])}; there are {classes} classes "
            f"(MODEL.SEM_SEG_HEAD.NUM_CLASSES), and {ignore} is ignored (IGNORE_VALUE). ADE20K's "
            "own annotations must be prepared first: python -m segmentation.prepare_ade20k"
        )


def _augmentations(cfg: CfgNode, ignore: int) -> list[T.Augmentation]:
    settings = cfg.INPUT
    if settings.RANDOM_FLIP not in ("none", "horizontal", "vertical"):
        raise DataError(
            f"INPUT.RANDOM_FLIP is {settings.RANDOM_FLIP!r}; choose from none, horizontal, vertical"
        )
    with told_of("INPUT"):
        return _built(settings, ignore)


def _built(settings: CfgNode, ignore: int) -> list[T.Augmentation]:
    built: list[Any] = [
        T.ResizeShortestEdge(
            settings.MIN_SIZE_TRAIN, settings.MAX_SIZE_TRAIN, settings.MIN_SIZE_TRAIN_SAMPLING
        )
    ]
    if settings.CROP.ENABLED:
        built.append(
            T.RandomCrop_CategoryAreaConstraint(
                settings.CROP.TYPE,
                settings.CROP.SIZE,
                settings.CROP.SINGLE_CATEGORY_MAX_AREA,
                ignore,
            )
        )
    if settings.COLOR_AUG_SSD:
        built.append(ColorAugSSDTransform(img_format="RGB"))
    if settings.RANDOM_FLIP != "none":
        horizontal = settings.RANDOM_FLIP == "horizontal"
        built.append(T.RandomFlip(horizontal=horizontal, vertical=not horizontal))
    return built


class TestMapper:
    """Turn a dataset's record into an image of one test geometry, uint8 RGB [3, h, w].

    Args:
        shortest: The shortest side, in pixels; 0 leaves the image as it is.
        longest: What the longest side may be.
        corruption: Spoils the image before it is resized, see ``segmentation.corruptions``.
    """

    def __init__(
        self, shortest: int, longest: int, corruption: tuple[str, int] | None = None
    ) -> None:
        self.resize = T.ResizeShortestEdge(shortest, longest)
        self.corruption = corruption

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Read and resize."""
        image = _read_image(record)
        if self.corruption is not None:
            image = spoil(image, self.corruption, record["file_name"])
        height, width = image.shape[:2]
        resized = T.AugInput(image)
        resized.transform(self.resize.get_transform(image))
        return {
            "file_name": record["file_name"],
            "height": height,
            "width": width,
            "image": torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1))),
        }


def class_masks(labels: torch.Tensor, ignore: int) -> Instances:
    """Split labels [H, W] into one mask a class that is there.

    Returns:
        ``gt_classes`` [K] and ``gt_masks`` bool [K, H, W].
    """
    counts = torch.bincount(labels[labels != ignore])  # unique() sorts, which takes far longer
    present = counts.nonzero().flatten()
    instances = Instances(tuple(labels.shape))
    instances.gt_classes = present
    instances.gt_masks = labels == present.view(-1, 1, 1)
    return instances


def peer_view(sample: Mapping[str, Any], order: str) -> dict[str, Any]:
    """Return a sample with its RGB channels in a peer's order, one of ``FORMATS``."""
    image = sample["image"]
    return {**sample, "image": image if order == "RGB" else image.flip(0)}


class Stream(Sampler[tuple[int, int]]):
    """An endless order of samples, of which any position can be the first.

    Position p is item p mod n of permutation p div n, drawn from the seed and p div n; rank r takes
    the positions r, r + ranks, ... Detectron2's own sampler and its grouping by aspect ratio keep
    hidden state, so that a run could not go on exactly where it stood.

    Args:
        size: n.
        seed: Of the run.
        rank: Of this process, among ``ranks``.
        start: The first position, over all ranks.
    """

    def __init__(self, size: int, seed: int, rank: int = 0, ranks: int = 1, start: int = 0) -> None:
        self.size, self.seed, self.rank, self.ranks, self.start = size, seed, rank, ranks, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield position and index."""
        position, drawn, order = self.start + self.rank, -1, np.empty(0, dtype=np.int64)
        while True:
            epoch, item = divmod(position, self.size)
            if epoch != drawn:
                drawn, order = (
                    epoch,
                    np.random.default_rng((self.seed, epoch)).permutation(self.size),
                )
            yield position, int(order[item])
            position += self.ranks


def allowed(most: int = 0) -> BadSamples:
    """Return a count of broken files that raises ``DataError``."""
    return BadSamples(most, "TRANSFER.MAX_BAD_SAMPLES", DataError)


class LeavingOut:
    """A mapper that hands over what is wrong with a record's files in the sample's place.

    So it crosses from a worker as it is.

    Args:
        mapper: Makes a sample of a record.
    """

    def __init__(self, mapper: Callable[[Any], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: Any) -> Any:
        """Return the sample, or ``Replaced`` by nothing."""
        try:
            return self.mapper(record)
        except DataError as error:
            return Replaced(None, [BadSample.of(error)])


class SeededRecords(Dataset):
    """Maps each record with draws that depend on the run's seed and the position alone.

    In the place of a record whose files are broken comes another, chosen by the same.

    Args:
        records: As Detectron2's catalog gives them.
        mapper: Makes a sample of a record.
        seed: Of the run.
        most: Broken files that the run may do without.
    """

    def __init__(
        self, records: Sequence[Mapping[str, Any]], mapper: Any, seed: int, most: int = 0
    ) -> None:
        self.records, self.mapper, self.seed, self.most = records, mapper, seed, most

    def __getitem__(self, drawn: tuple[int, int]) -> Any:
        return self.__getitems__([drawn])[0]

    def __getitems__(self, drawn: Sequence[tuple[int, int]]) -> list[Any]:
        """Return a batch's samples; torch's loader asks for them at once."""
        with generators_kept():
            return [self._sample(position, index) for position, index in drawn]

    def _sample(self, position: int, index: int) -> Any:
        def read(index: int) -> dict[str, Any]:
            seed_generators(self.seed, position)
            return self.mapper(self.records[index])

        def other(attempt: int) -> int:
            return other_index(len(self.records), self.seed, position, attempt)

        return read_or_replace(read, index, other, (DataError,), self.most)


def _collate(samples: list[Any]) -> tuple[list[Any] | None, list[BadSample]]:
    """Tell which files were passed over; None: a sample could not be replaced."""
    found, bad = sound(samples)
    return found if len(found) == len(samples) else None, bad


def build_train_loader(
    records: Sequence[Mapping[str, Any]],
    mapper: Any,
    *,
    batch: int,
    workers: int,
    seed: int,
    rank: int = 0,
    ranks: int = 1,
    start: int = 0,
    pin: bool = False,
    bad: BadSamples | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Build the endless stream of this rank's batches, lists of samples.

    Args:
        records: As Detectron2's catalog gives them.
        mapper: Makes a sample of a record.
        batch: Samples a rank.
        workers: Processes that read; 0: this one.
        seed: Of the run.
        rank: Of this process, among ``ranks``.
        start: How many samples all ranks together have already taken.
        pin: Put tensors where a GPU fetches them while this process goes on.
        bad: Counts broken files; None: by itself, and none is allowed.

    Raises:
        DataError: From the stream: more files that cannot be read than allowed; names them.
    """
    bad = bad or allowed()
    loader = DataLoader(
        SeededRecords(records, mapper, seed, bad.most),
        batch_size=batch,
        sampler=Stream(len(records), seed, rank, ranks, start),
        num_workers=workers,
        collate_fn=_collate,
        persistent_workers=workers > 0,
        pin_memory=pin,
        worker_init_fn=outlive_sigterm,
    )
    batches = iter(loader)  # opened now: that draws from torch's generator
    return iter(Counted(Received(batches) if workers else batches, bad))


def load_datasets(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the records of registered datasets, one after another.

    Raises:
        DataError: None named, an unknown name, files that are missing, or another list of classes.
    """
    if not names:
        raise DataError("no dataset: set DATASETS.TRAIN and DATASETS.TEST")
    records = [record for name in names for record in _records(name)]
    for record in records:
        if "sem_seg_file_name" not in record:
            raise DataError(f"{record['file_name']}: has no labels of a semantic segmentation")
    return records


def check_apart(trained: Sequence[str], measured: Sequence[str], way_out: str) -> None:
    """Refuse to measure on images that are trained on.

    Args:
        trained: Registered names of what is trained on.
        measured: Registered names of what is measured on.
        way_out: What to do.

    Raises:
        DataError: Names an image and the datasets.
    """
    one, other = ([x["file_name"] for x in load_datasets(names)] for names in (trained, measured))
    shared = in_both(one, other)
    if shared:
        raise DataError(
            f"DATASETS.TRAIN {', '.join(trained)}, DATASETS.TEST {', '.join(measured)}: "
            f"{told_shared(shared, len(one))}; {way_out}: {WAY_OUT}"
        )


def _records(name: str) -> list[dict[str, Any]]:
    register(name)
    try:
        records = DatasetCatalog.get(name)
    except (FileNotFoundError, AssertionError, OSError) as error:
        raise DataError(
            f"{name}: its files are not there ({str(error).splitlines()[0]}); {_root_told()}"
        ) from error
    if not records:
        raise DataError(f"{name}: no images; {_root_told()}")
    first = records[0]
    for key in ("file_name", "sem_seg_file_name"):
        if key in first and not Path(first[key]).is_file():
            raise DataError(f"{name}: {first[key]}: no such file; {_root_told()}")
    return records


def register(name: str) -> None:
    """Register the demo's scenes where they are asked for; refuse what nobody registered.

    Raises:
        DataError: An unknown name.
    """
    if name in DatasetCatalog.list():
        return
    part = held_out.part_of(name)
    if part is not None:
        held_out.register_part(part, register)
        return
    if name.startswith(scenes.PREFIX):
        folder = dataset_root() / scenes.FOLDER
        found = scenes.register_scenes(folder)
        if name not in found:
            raise DataError(
                f"{name}: {folder} has {', '.join(found) or 'no scenes'}; make demo "
                "TASK=segmentation writes them"
            )
        return
    raise DataError(f"unknown dataset {name!r}; choose from {_semantic_names()}")


def _semantic_names() -> str:
    return ", ".join(
        sorted(
            known
            for known in DatasetCatalog.list()
            if "stuff_classes" in MetadataCatalog.get(known).as_dict()
        )
    )


def dataset_root() -> Path:
    """Return DETECTRON2_DATASETS, where Detectron2 itself looks."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def _root_told() -> str:
    return f"data sets are looked for in DETECTRON2_DATASETS, now {dataset_root().absolute()}"


def check_classes(cfgs: Mapping[str, CfgNode], tested: bool = True) -> int:
    """Refuse peers and datasets whose classes differ; return the ignore label.

    Args:
        cfgs: Each peer's.
        tested: Whether there must be data to evaluate on.

    Raises:
        DataError: Names both sides.
    """
    names = []
    for cfg in cfgs.values():
        if not cfg.DATASETS.TRAIN or (tested and not cfg.DATASETS.TEST):
            raise DataError("no dataset: set DATASETS.TRAIN and DATASETS.TEST")
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            names += held_out.sources(name)
    for name in names:
        _check_semantic(name)
    classes, ignore = _known(names[0])
    for name in names[1:]:
        others, other_ignore = _known(name)
        if others != classes or other_ignore != ignore:
            raise DataError(
                f"{names[0]} and {name} have other classes ({len(classes)} and {len(others)}) or "
                f"ignore other labels ({ignore} and {other_ignore}); peers can only teach each "
                "other the same classes"
            )
    for peer, cfg in cfgs.items():
        head = cfg.MODEL.SEM_SEG_HEAD
        if len(classes) != head.NUM_CLASSES:
            others = ", ".join(
                f"{name}: {other.MODEL.SEM_SEG_HEAD.NUM_CLASSES}" for name, other in cfgs.items()
            )
            raise DataError(
                f"peer {peer!r} has {head.NUM_CLASSES} classes, {names[0]} has {len(classes)}; set "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES (peers: {others})"
            )
        if ignore != head.IGNORE_VALUE:
            raise DataError(
                f"peer {peer!r} ignores the label {head.IGNORE_VALUE}, {names[0]} {ignore}; set "
                "MODEL.SEM_SEG_HEAD.IGNORE_VALUE"
            )
    return ignore


def classes_of(name: str) -> tuple[list[str], int]:
    """Return a dataset's classes and its ignore label.

    Raises:
        DataError: Unknown, or no dataset of semantic segmentation.
    """
    _check_semantic(name)
    return _known(name)


def _known(name: str) -> tuple[list[str], int]:
    found = MetadataCatalog.get(name)
    return list(found.stuff_classes), int(found.ignore_label)


def _check_semantic(name: str) -> None:
    register(name)
    known = MetadataCatalog.get(name).as_dict()
    if "stuff_classes" not in known:
        raise DataError(
            f"{name}: no dataset of semantic segmentation (its metadata has no stuff_classes); "
            f"choose from {_semantic_names()}"
        )
    if "ignore_label" not in known:
        raise DataError(
            f"{name}: its metadata has no ignore_label; register it with "
            f"MetadataCatalog.get({name!r}).set(ignore_label=255)"
        )


def _read_image(record: Mapping[str, Any]) -> np.ndarray:
    try:
        return utils.read_image(record["file_name"], format="RGB")
    except _BROKEN_IMAGE as error:
        raise DataError(f"{record['file_name']}: cannot be read ({error})") from error


def _read_labels(record: Mapping[str, Any]) -> np.ndarray:
    return read_labels(record["sem_seg_file_name"])


def read_labels(path: str, dtype: Any = None, **ignored: Any) -> np.ndarray:
    """Read labels [H, W] from an image file.

    Args:
        path: Of the file.
        dtype: Of the result; None: the file's own.
        ignored: What else Detectron2's evaluator asks for.

    Raises:
        DataError: A file that is missing or broken.
    """
    try:
        with Image.open(path) as image:
            return np.array(image, dtype=dtype)
    except _BROKEN_IMAGE as error:
        raise DataError(f"{path}: labels cannot be read ({error})") from error


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"
