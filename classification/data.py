"""Images for N peers: decoded and augmented once, then seen by each peer in its own view."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, create_dataset, create_transform, resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from classification.images import BrokenImageError, name_of, read_image
from classification.options import mixes
from common.ahead import ReadAhead
from common.broken import (
    BadSample,
    BadSamples,
    Counted,
    Replaced,
    other_index,
    read_or_replace,
    sound,
)
from common.distributed import World
from common.options import OptionError
from common.seeding import drawn_for, generators_kept, seed_generators
from common.termination import outlive_sigterm

STREAMS = ("wds/", "tfds/", "hfids/")
"""What ``--dataset`` begins with where timm reads a stream, not samples by their number."""


@dataclass(frozen=True)
class View:
    """How a peer wants its images.

    Attributes:
        size: Channels, height, width.
        mean: Per channel, of images in [0, 1].
        std: Per channel.
        interpolation: Of evaluation.
        crop_pct: Of evaluation: crop size over resize size.
        crop_mode: Of evaluation.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @property
    def geometry(self) -> tuple[Any, ...]:
        """What decides the pixels before normalisation."""
        return self.size, self.interpolation, self.crop_pct, self.crop_mode

    def __str__(self) -> str:
        numbers = "/".join(f"{x:g}" for x in self.mean), "/".join(f"{x:g}" for x in self.std)
        return (
            f"{self.size[1]}x{self.size[2]} {self.interpolation} crop {self.crop_pct:g} "
            f"mean {numbers[0]} std {numbers[1]}"
        )


def view_of(module: nn.Module, options: argparse.Namespace) -> View:
    """Resolve a peer's view from its pretrained config and its options, by timm's rules."""
    for name in ("mean", "std"):
        values = getattr(options, name)
        if values is not None and len(values) not in (1, module.pretrained_cfg["input_size"][0]):
            raise OptionError(f"--{name} has {len(values)} values; expected one for every channel")
    config = resolve_data_config(vars(options), model=module)
    channels = config["input_size"][0]
    return View(
        size=tuple(config["input_size"]),
        mean=_per_channel(config["mean"], channels),
        std=_per_channel(config["std"], channels),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(float(x) for x in values)
    return (float(np.mean(values)),) * channels


def common_view(views: Sequence[View]) -> View:
    """Choose how images are decoded for training: the largest size, shared statistics if any."""
    channels = {view.size[0] for view in views}
    if len(channels) > 1:
        raise OptionError(f"peers take images of {sorted(channels)} channels; set --in-chans")
    first = views[0]
    same = len({(view.mean, view.std) for view in views}) == 1
    count = first.size[0]
    return View(
        size=(count, max(v.size[1] for v in views), max(v.size[2] for v in views)),
        mean=first.mean if same else _per_channel(IMAGENET_DEFAULT_MEAN, count),
        std=first.std if same else _per_channel(IMAGENET_DEFAULT_STD, count),
        interpolation=first.interpolation,
        crop_pct=first.crop_pct,
        crop_mode=first.crop_mode,
    )


class ToView(nn.Module):
    """Turn images of the common view into a peer's own, on their device.

    Resizing is antialiased and bicubic; normalisation is one fused multiply-add, skipped where the
    statistics agree.

    Args:
        common: What the loader gives.
        own: What the peer wants.
        channels_last: Memory format of the result.
        dtype: Of the result.
    """

    def __init__(
        self,
        common: View,
        own: View,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        std, own_std = torch.tensor(common.std), torch.tensor(own.std)
        scale = std / own_std
        shift = (torch.tensor(common.mean) - torch.tensor(own.mean)) / own_std
        self.same_statistics = common.mean == own.mean and common.std == own.std
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)
        self.size = own.size[1:]
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """Return [B, C, h, w] of the peer from [B, C, H, W] of the common view."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        if not self.same_statistics:
            images = torch.addcmul(self.shift, images, self.scale)
        return images.to(dtype=self.dtype, memory_format=self.format)


class Draw(NamedTuple):
    """One sample asked of the data: which image, and the seed of its augmentation."""

    index: int
    position: int
    epoch: int


class EpochOrder:
    """Orders an epoch's samples; the order and seeds depend on seed and epoch alone.

    Shards take every ``world.shards``-th sample of one common order, so that the union of what the
    ranks see does not depend on their number. An epoch can begin in its middle without decoding
    what came before.

    Args:
        order: Gives this rank's indices, and has ``set_epoch``.
        world: Where this process stands.
    """

    def __init__(self, order: Any, world: World) -> None:
        self.order = order
        self.world = world

    def __len__(self) -> int:
        return len(self.order)

    def draws(self, epoch: int, start: int = 0, stop: int | None = None) -> Iterator[Draw]:
        """Yield this rank's samples ``start`` to ``stop`` of an epoch."""
        self.order.set_epoch(epoch)
        for k, index in enumerate(itertools.islice(self.order, start, stop), start):
            yield Draw(int(index), k * self.world.shards + self.world.shard, epoch)


class SeededDataset(Dataset):
    """Augments every sample from a seed of its own.

    So a sample looks the same whatever the number of workers and ranks, and wherever a run was
    interrupted. The process's own generators are left as they were.

    In the place of a broken image comes another one, chosen by epoch and position alone.

    Args:
        dataset: Map-style.
        seed: Of the run.
        most: Broken images that the run may do without.
    """

    def __init__(self, dataset: Dataset, seed: int, most: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.most = most

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Any:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[Any]:
        """Return a batch's samples; torch's loader asks for them at once."""
        with generators_kept():
            return [self._sample(draw) for draw in draws]

    def _sample(self, draw: Draw) -> Any:
        return read_or_replace(
            functools.partial(self._read, draw),
            draw.index,
            functools.partial(self.other, draw),
            (BrokenImageError,),
            self.most,
        )

    def _read(self, draw: Draw, index: int) -> Any:
        seed_generators(self.seed, draw.epoch, draw.position)
        return read_image(self.dataset, index)

    def other(self, draw: Draw, attempt: int) -> int:
        """Return the image that is tried in a draw's place after so many others."""
        numbers = self.seed, draw.epoch, draw.position, attempt
        return other_index(len(self.dataset), *numbers)


def collate(samples: Sequence[Any]) -> tuple[Any, list[BadSample]]:
    """Join samples, and tell which files were passed over; None: one could not be replaced."""
    found, bad = sound(samples)
    return fast_collate(found) if len(found) == len(samples) else None, bad


def check_folder(options: argparse.Namespace) -> None:
    """Refuse a data folder that is not there; what is read from elsewhere is not looked at.

    Raises:
        OptionError: Names it.
    """
    local = not options.dataset or options.dataset.startswith(("torch/", "wds/"))
    remote = "://" in str(options.data)
    if local and not remote and not options.dataset_download and not Path(options.data).exists():
        raise OptionError(f"{options.data}: no such data folder; give the path of your dataset")


class NoImagesError(OptionError):
    """A folder that holds no images of a split."""


def open_dataset(options: argparse.Namespace, training: bool, channels: int) -> Dataset:
    """Open the training or validation split through timm's readers.

    Raises:
        NoImagesError: A folder that holds no images of the split.
        OptionError: A folder that is missing, or a dataset that cannot be opened.
    """
    check_folder(options)
    mode = options.input_img_mode or ("RGB" if channels == 3 else "L")
    split = options.train_split if training else options.val_split
    try:
        dataset = create_dataset(
            options.dataset,
            root=options.data,
            split=split,
            is_training=training,
            class_map=options.class_map,
            download=options.dataset_download,
            batch_size=options.batch_size,
            seed=options.seed,
            repeats=options.epoch_repeats if training else 0,
            input_img_mode=mode,
            input_key=options.input_key,
            target_key=options.target_key,
            num_samples=options.train_num_samples if training else options.val_num_samples,
            trust_remote_code=options.dataset_trust_remote_code,
        )
    except (RuntimeError, FileNotFoundError, ValueError, ImportError, AssertionError) as error:
        if not options.dataset and str(error).startswith("Found 0 images"):  # timm's words
            raise NoImagesError(
                f"{options.data}: no images of split {split!r} ({error}); expected "
                f"{Path(options.data, split)}/CLASS/NAME.jpg: give the folder of your dataset, or "
                f"name the split's with {'--train-split' if training else '--val-split'}"
            ) from error
        raise OptionError(
            f"{options.data}: cannot open split {split!r} of this dataset: {error}"
        ) from error
    if not options.dataset:
        _refuse_whole_folder(dataset, options, split)
    return dataset


def _refuse_whole_folder(dataset: Dataset, options: argparse.Namespace, split: str) -> None:
    """Refuse what timm reads where a split's folder is missing: the images of all other splits."""
    folder = Path(options.data)
    if not folder.is_dir() or Path(getattr(dataset.reader, "root", "")) != folder:
        return
    inner = sorted(path.name for path in folder.iterdir() if path.is_dir())
    other = options.val_split if split == options.train_split else options.train_split
    if {"train", "training", "val", "validation", "eval", other} & set(inner):
        raise OptionError(
            f"{folder}: no folder for split {split!r}, only {', '.join(inner)}; make one, or name "
            "it with --train-split and --val-split"
        )


def mode_of(options: argparse.Namespace, channels: int) -> str:
    """Return the mode that images are read in, for models of so many channels.

    Raises:
        OptionError: A mode that is none, or of other channels.
    """
    if not options.input_img_mode:
        return "RGB" if channels == 3 else "L"
    mode = options.input_img_mode
    try:
        bands = len(Image.new(mode, (1, 1)).getbands())
    except (ValueError, KeyError) as error:
        raise OptionError(
            f"--input-img-mode {mode}: no mode of PIL; give L, RGB or RGBA"
        ) from error
    if bands != channels:
        raise OptionError(
            f"--input-img-mode {mode} has {bands} channels, the models take {channels}; leave "
            f"it out, or give --in-chans {bands} to models that can be built so"
        )
    return mode


def classes_of(dataset: Dataset) -> dict[str, int] | None:
    """Return class names to indices where the dataset tells them."""
    return getattr(getattr(dataset, "reader", None), "class_to_idx", None) or getattr(
        dataset, "class_to_idx", None
    )


class TrainLoader:
    """Training batches of the common view, on the device.

    Yields ``(images [B, C, H, W] float, target)``; the target is [B] int, or [B, classes] float
    under mixup or cutmix. Order, augmentation and position restore exactly for map-style datasets;
    streaming ones are read again up to the position.

    Args:
        dataset: From ``open_dataset``; its transform is set here.
        view: The common view.
        options: The run's.
        world: Where this process stands.
        num_classes: For mixup's soft targets.
        bad: Counts broken images; None: by itself, and none is allowed.

    Raises:
        OptionError: Fewer samples than a batch, images of other channels, or broken ones allowed of
            a stream.
    """

    def __init__(
        self,
        dataset: Dataset,
        view: View,
        options: argparse.Namespace,
        world: World,
        num_classes: int,
        bad: BadSamples | None = None,
    ) -> None:
        self.options = options
        self.bad = bad or BadSamples()
        self.batch_size = options.batch_size
        self.streaming = isinstance(dataset, IterableDataset)
        self.world = world
        self.epoch, self.start = 0, 0
        self._given = 0
        mode_of(options, view.size[0])
        dataset.transform = _train_transform(view, options)
        self.dataset = dataset
        if self.streaming:
            if world.seats > 1:
                raise OptionError(
                    f"--engine peer-parallel with --dataset {options.dataset}: a stream is split "
                    "by process, and peers would see different samples; take --engine two-pass, "
                    "or data that is read by index"
                )
            _refuse_bad_of_stream(options)
            dataset.set_loader_cfg(num_workers=options.workers)
            samples = len(dataset) // world.shards
        else:
            self.order = EpochOrder(_order(dataset, options, world), world)
            self.source = SeededDataset(dataset, options.seed, self.bad.most)
            samples = len(self.order)
        self.batches = samples // self.batch_size
        if options.train_batches_per_epoch:
            self.batches = min(self.batches, options.train_batches_per_epoch)
        if self.batches == 0:
            raise OptionError(
                f"{samples} training samples for each of {world.shards} processes do not fill one "
                f"batch of {self.batch_size}; lower --batch-size"
            )
        reading = {
            "collate_fn": collate,
            # not pinned, every copy would wait for the GPU
            "pin_memory": options.pin_mem or world.device.type == "cuda",
            "worker_init_fn": outlive_sigterm,
        }
        self._loader = self._stream(reading) if self.streaming else self._ahead(reading)
        self._prefetch = PrefetchLoader(
            Counted(self._loader, self.bad),
            mean=view.mean,
            std=view.std,
            channels=view.size[0],
            device=world.device,
        )
        self._erase = (
            RandomErasing(
                options.reprob,
                mode=options.remode,
                max_count=options.recount,
                device=world.device,
            )
            if options.reprob > 0 and not options.no_aug
            else None
        )
        self.mixup = _mixup(options, num_classes)

    def _ahead(self, reading: dict[str, Any]) -> ReadAhead:
        return ReadAhead(
            self.source,
            self.order.draws,
            self.batch_size,
            self.batches,
            seed=self.options.seed,
            workers=self.options.workers,
            **reading,
        )

    def _stream(self, reading: dict[str, Any]) -> DataLoader:
        self._generator = torch.Generator()
        return DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            num_workers=self.options.workers,
            drop_last=True,
            persistent_workers=self.options.workers > 0,
            generator=self._generator,
            **reading,
        )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Prepare an epoch, without its first ``start`` batches; it may be read from now on."""
        self.epoch, self.start = epoch, start
        if self.streaming:
            self._generator.manual_seed(self.options.seed + epoch)
            self.dataset.set_epoch(epoch)
        else:
            self._loader.set_epoch(epoch, start)
        if self.mixup is not None and self.options.mixup_off_epoch:
            self.mixup.mixup_enabled = epoch < self.options.mixup_off_epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.start >= self.batches:  # saved after the last batch, with data behind it
            return
        skip = self.start if self.streaming else 0
        for k, (images, target) in enumerate(self._prefetch):
            if k < skip:
                continue
            self._given = self.start + k - skip
            if self._erase is not None or self.mixup is not None:
                images, target = self._mixed(images, target, self._given)
            yield images, target
            if self._given + 1 >= self.batches:
                return

    def names_of(self, batch: Any) -> Callable[[], list[str]]:
        """Return what tells the samples of the batch that was given last, in this epoch."""
        return functools.partial(self._names, self._given)

    def _names(self, batch: int) -> list[str]:
        start = batch * self.batch_size
        places = range(start, start + self.batch_size)
        if self.streaming:
            return [f"sample {k} of the stream of process {self.world.shard}" for k in places]
        draws = self.order.draws(self.epoch, start, places.stop)
        return [self._name(draw) for draw in draws]

    def _name(self, draw: Draw) -> str:
        """Return the file of a draw, or of what took its place."""
        name, attempt = name_of(self.dataset, draw.index), 0
        while name in self.bad.found:
            attempt += 1
            name = name_of(self.dataset, self.source.other(draw, attempt))
        return name

    def _mixed(self, images: Tensor, target: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Erase and mix; what is drawn depends on the batch alone, not on what peers drew."""
        seed = self.options.seed
        with drawn_for(images.device, seed, self.epoch, batch, self.world.shard + 1):
            if self._erase is not None:
                images = self._erase(images)
            if self.mixup is not None:
                images, target = self.mixup(images, target)
        return images, target


def _refuse_bad_of_stream(options: argparse.Namespace) -> None:
    if options.max_bad_samples:
        raise OptionError(
            f"--max-bad-samples {options.max_bad_samples} with --dataset {options.dataset}: a "
            "stream's own reader passes over what is broken, which cannot be counted here; take "
            "data that is read by index"
        )


def _order(dataset: Dataset, options: argparse.Namespace, world: World) -> Any:
    if options.aug_repeats:
        return RepeatAugSampler(
            dataset, num_replicas=world.shards, rank=world.shard, num_repeats=options.aug_repeats
        )
    return DistributedSampler(
        dataset, num_replicas=world.shards, rank=world.shard, shuffle=True, seed=options.seed
    )


def _train_transform(view: View, options: argparse.Namespace) -> Any:
    try:
        return _timm_transform(view, options)
    except (AssertionError, ValueError, KeyError) as error:
        raise OptionError(
            f"--aa {options.aa}: {error}; expected rand-..., augmix-..., v0, original or 3a"
        ) from error


def _timm_transform(view: View, options: argparse.Namespace) -> Any:
    return create_transform(
        view.size,
        is_training=True,
        no_aug=options.no_aug,
        train_crop_mode=options.train_crop_mode,
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        vflip=options.vflip,
        color_jitter=options.color_jitter,
        color_jitter_prob=options.color_jitter_prob,
        grayscale_prob=options.grayscale_prob or 0.0,
        gaussian_blur_prob=options.gaussian_blur_prob or 0.0,
        auto_augment=options.aa,
        interpolation=options.train_interpolation,
        mean=view.mean,
        std=view.std,
        use_prefetcher=True,
    )


def _mixup(options: argparse.Namespace, num_classes: int) -> Mixup | None:
    if not mixes(options):
        return None
    return Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        cutmix_minmax=options.cutmix_minmax,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
    )


class _Shard(Dataset):
    """Every ``size``-th sample from ``rank`` on: no sample twice, none left out.

    In the place of a broken image is a blank one, with the target -1.
    """

    def __init__(self, dataset: Dataset, rank: int, size: int, blank: Any) -> None:
        self.dataset, self.rank, self.size, self.blank = dataset, rank, size, blank

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.size))

    def __getitem__(self, index: int) -> Any:
        try:
            return read_image(self.dataset, self.rank + index * self.size)
        except BrokenImageError as error:
            return Replaced((self.blank, -1), [BadSample.of(error)])


def eval_loader(
    dataset: Dataset,
    view: View,
    options: argparse.Namespace,
    world: World,
    bad: BadSamples | None = None,
) -> PrefetchLoader:
    """Load this rank's validation samples in a view, in order, none dropped.

    A broken image, where some are allowed, has the target -1.

    Args:
        dataset: A dataset of its own: its transform is set here.
        view: Whose geometry and statistics are used.
        options: The run's.
        world: Where this process stands.
        bad: Counts broken images; None: by itself, and none is allowed.
    """
    dataset.transform = create_transform(
        view.size,
        is_training=False,
        interpolation=view.interpolation,
        mean=view.mean,
        std=view.std,
        crop_pct=view.crop_pct,
        crop_mode=view.crop_mode,
        use_prefetcher=True,
    )
    if isinstance(dataset, IterableDataset):
        _refuse_bad_of_stream(options)
        dataset.set_loader_cfg(num_workers=options.workers)
        source = dataset
    else:
        mode = mode_of(options, view.size[0])
        blank = dataset.transform(Image.new(mode, (view.size[2], view.size[1])))
        source = _Shard(dataset, world.shard, world.shards, blank)
        if len(source) == 0:
            raise OptionError(
                f"{options.data}: {len(dataset)} validation images for {world.shards} processes; "
                "every process needs one"
            )
    loader = DataLoader(
        source,
        batch_size=options.validation_batch_size or options.batch_size,
        num_workers=options.workers,
        collate_fn=collate,
        pin_memory=options.pin_mem or world.device.type == "cuda",
        worker_init_fn=outlive_sigterm,
        generator=torch.Generator().manual_seed(0),
    )
    return PrefetchLoader(
        Counted(loader, bad or BadSamples(), evaluating=True),
        mean=view.mean,
        std=view.std,
        channels=view.size[0],
        device=world.device,
    )
