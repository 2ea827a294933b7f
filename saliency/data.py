"""Clips for N peers: every frame decoded once a sample, then seen by each peer in its own view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

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
from common.termination import outlive_sigterm
from saliency.check import refuse
from saliency.clips import ClipView
from saliency.errors import DataError
from saliency.frames import FrameReader, Size
from saliency.images import read_fixations, read_map, resize_map, scale_fixations
from saliency.layouts import Video, VideoSet
from saliency.packed import PackedFrames


@dataclass
class ClipSample:
    """One target frame, and the frames around it.

    Attributes:
        video: Number of the video in its ``VideoSet``.
        target: The frame to predict, from 0.
        clips: Of each view, the numbers of its frames, int64 [T].
        numbers: Of each size, the numbers of the distinct frames below, int64 [K].
        frames: Of each size, uint8 RGB [K, height, width, 3].
        map: Ground truth, float32 [H, W], in [0, 1].
        fixations: Bool as stored, of a size of its own; or, at a common training size, float32
            [H, W]: how many fell on each pixel. All zero where the frame has none; None where
            nobody asked.
    """

    video: int
    target: int
    clips: dict[ClipView, np.ndarray]
    numbers: dict[Size, np.ndarray]
    frames: dict[Size, Tensor]
    map: Tensor
    fixations: Tensor | None


@dataclass
class ClipBatch:
    """A batch for all peers: distinct frames as bytes, from which each peer's clips are taken.

    Nothing is repeated: a frame is in it once a size, however many clips and samples show it. So
    little is copied between processes and to the device, and normalisation happens there.

    Attributes:
        frames: Of each size, uint8 RGB [K, height, width, 3].
        rows: Of each view, int64 [B, T]: which of these frames its clips show.
        maps: float32 [B, H, W], in [0, 1].
        fixations: Bool [B, h, w] or float32 [B, H, W], see ``ClipSample``; or None.
        video: Int64 [B]; stays on the CPU, as only the host asks for it.
        target: Int64 [B]; so does this.
    """

    frames: dict[Size, Tensor]
    rows: dict[ClipView, Tensor]
    maps: Tensor
    fixations: Tensor | None
    video: Tensor
    target: Tensor
    _clips: dict[tuple[ClipView, torch.dtype], Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def targets(self) -> list[tuple[int, int]]:
        """The number of each sample's video, and of its frame."""
        return list(zip(self.video.tolist(), self.target.tolist(), strict=True))

    def clips(self, view: ClipView, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the clips of a view, normalised, [B, 3, T, height, width].

        Peers of one view share one tensor, so none may change it in place.

        Raises:
            KeyError: The loader was not told of this view.
        """
        if view not in self.rows:
            told = "; ".join(str(known) for known in self.rows)
            raise KeyError(f"no clips of {view} in this batch; its loader was told of {told}")
        if (view, dtype) not in self._clips:
            rows = self.rows[view]
            clips = self.frames[view.size].index_select(0, rows.flatten())
            clips = clips.unflatten(0, rows.shape).permute(0, 4, 1, 2, 3)
            self._clips[view, dtype] = view.normalise(clips, dtype)
        return self._clips[view, dtype]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ClipBatch:
        """Return the batch on a device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ClipBatch:
        """Return the batch in pinned memory; torch's loader asks for it."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, change: Any) -> ClipBatch:
        return ClipBatch(
            frames={size: change(x) for size, x in self.frames.items()},
            rows={view: change(x) for view, x in self.rows.items()},
            maps=change(self.maps),
            fixations=None if self.fixations is None else change(self.fixations),
            video=self.video,
            target=self.target,
        )


def collate(samples: Sequence[ClipSample]) -> ClipBatch:
    """Join samples; frames that several of them show are kept once.

    Raises:
        DataError: Maps or fixations of different sizes, which cannot be stacked.
    """
    frames: dict[Size, Tensor] = {}
    at: dict[Size, dict[tuple[int, int], int]] = {}
    for size in samples[0].frames:
        frames[size], at[size] = _distinct(samples, size)
    rows = {
        view: torch.tensor(
            [[at[view.size][s.video, n] for n in s.clips[view].tolist()] for s in samples]
        )
        for view in samples[0].clips
    }
    fixations = None
    if samples[0].fixations is not None:
        fixations = _stack([sample.fixations for sample in samples], "fixations", samples)
    return ClipBatch(
        frames=frames,
        rows=rows,
        maps=_stack([sample.map for sample in samples], "maps", samples),
        fixations=fixations,
        video=torch.tensor([sample.video for sample in samples]),
        target=torch.tensor([sample.target for sample in samples]),
    )


def _distinct(
    samples: Sequence[ClipSample], size: Size
) -> tuple[Tensor, dict[tuple[int, int], int]]:
    """Return the frames of all samples, and the row of each (video, number)."""
    rows: dict[tuple[int, int], int] = {}
    frames = []
    for sample in samples:
        for number, pixels in zip(sample.numbers[size].tolist(), sample.frames[size], strict=True):
            if (sample.video, number) not in rows:
                rows[sample.video, number] = len(frames)
                frames.append(pixels)
    return torch.stack(frames), rows


def _stack(maps: Sequence[Tensor], what: str, samples: Sequence[ClipSample]) -> Tensor:
    sizes = sorted({tuple(x.shape) for x in maps})
    if len(sizes) > 1:
        raise DataError(
            f"{what} of the sizes {sizes} in one batch, of video number {samples[0].video}; read "
            "them at one size (map_size)"
        )
    return torch.stack(list(maps))


class ClipDataset(Dataset):
    """Reads one target frame at a time, with the clips of all views around it.

    Args:
        videos: Of one split.
        views: What the peers see; equal ones count once.
        map_size: Height and width to which maps and fixations are brought; None: as stored.
        fixations: Also read fixations.
        reader: Of the frames.
        elsewhere: Of peers in other processes; a sample is sound where their frames are too.

    Raises:
        DataError: The listing of the videos has fatal faults; no view.
    """

    def __init__(
        self,
        videos: VideoSet,
        views: Sequence[ClipView],
        *,
        map_size: Size | None = None,
        fixations: bool = False,
        reader: FrameReader | None = None,
        elsewhere: Sequence[ClipView] = (),
    ) -> None:
        refuse(videos.faults)
        if not views:
            raise DataError("no view was given; every peer has one")
        self.videos = videos
        self.views = tuple(dict.fromkeys(views))
        self.elsewhere = frozenset(elsewhere).difference(views)
        self.map_size = map_size
        self.fixations = fixations
        self.reader = reader or FrameReader()
        self._looks_size: dict[int, Size] = {}

    def sample(self, video: int, target: int, truth: np.ndarray | None = None) -> ClipSample:
        """Read a sample.

        Args:
            video: Its number.
            target: The frame to predict.
            truth: The target's map as stored, where it is read already.

        Raises:
            DataError: A file that cannot be read; names it.
        """
        its = self.videos.videos[video]
        clips = {view: view.indices(target, len(its)) for view in self.views}
        wanted: dict[Size, list[np.ndarray]] = {}
        for view, frames in clips.items():
            wanted.setdefault(view.size, []).append(frames)
        numbers = {size: np.unique(np.concatenate(parts)) for size, parts in wanted.items()}
        if truth is None:
            truth = self.truth(its, target)
        self._try_others(its, target, numbers)
        return ClipSample(
            video=video,
            target=target,
            clips=clips,
            numbers=numbers,
            frames=self.reader.read(its, numbers),
            map=torch.from_numpy(resize_map(truth, self.map_size or truth.shape)),
            fixations=self._fixations(video, target, truth.shape) if self.fixations else None,
        )

    def _try_others(self, video: Video, target: int, numbers: Mapping[Size, np.ndarray]) -> None:
        """Read the frames that only peers elsewhere see, at a size that a next clip may ask for."""
        shown = [view.indices(target, len(video)) for view in self.elsewhere]
        if shown:
            unread = np.setdiff1d(np.concatenate(shown), np.concatenate(list(numbers.values())))
            self.reader.read(video, {next(iter(numbers)): unread})

    def truth(self, video: Video, target: int) -> np.ndarray:
        """Read the map of a frame, and no other."""
        return read_map(video.path(video.maps[target]))

    def _fixations(self, number: int, target: int, size: Size) -> Tensor:
        video = self.videos.videos[number]
        file = video.fixations[target]
        if self.map_size is not None:
            points = np.zeros(size, bool) if file is None else read_fixations(video.path(file))
            return torch.from_numpy(scale_fixations(points, self.map_size))
        if file is None:
            return torch.zeros(self._size_of_fixations(number, size), dtype=torch.bool)
        return torch.from_numpy(read_fixations(video.path(file)))

    def _size_of_fixations(self, number: int, otherwise: Size) -> Size:
        """Return the size of a video's first fixations, so that its other frames stack with it."""
        if number not in self._looks_size:
            video = self.videos.videos[number]
            files = [file for file in video.fixations if file is not None]
            if not files:
                return otherwise
            self._looks_size[number] = read_fixations(video.path(files[0])).shape
        return self._looks_size[number]


class Draw(NamedTuple):
    """A training sample asked of the data."""

    index: int
    epoch: int


class TrainClips(ClipDataset):
    """Draws target frames, each from a generator of its own: of the seed, the epoch and the index.

    So a sample is the same whatever the number of workers and processes, and wherever a run was
    interrupted; no generator of the process is touched. Every frame of a video can be a target,
    unless its map is empty: an empty map has no loss, so another frame is drawn.

    Args:
        videos: See ``ClipDataset``; as are those not named here.
        seed: Of the run.
        clips_per_video: Targets drawn from each video in an epoch.
        rest: See ``ClipDataset``.
    """

    def __init__(
        self,
        videos: VideoSet,
        views: Sequence[ClipView],
        *,
        seed: int,
        clips_per_video: int = 1,
        **rest: Any,
    ) -> None:
        _refuse_below_one(clips_per_video=clips_per_video)
        super().__init__(videos, views, **rest)
        self.seed = seed
        self.clips_per_video = clips_per_video

    def __len__(self) -> int:
        return len(self.videos.videos) * self.clips_per_video

    def __getitem__(self, draw: Draw) -> ClipSample:
        number = draw.index // self.clips_per_video
        video = self.videos.videos[number]
        generator = np.random.default_rng((self.seed, draw.epoch, draw.index))
        for target in generator.permutation(len(video)).tolist():
            truth = self.truth(video, target)
            if truth.any():
                return self.sample(number, target, truth)
        raise DataError(
            f"{video.folder}: every map of this video is empty (all zero); remove it, or extract "
            "its maps anew"
        )


class EvalClips(ClipDataset):
    """Reads the target frames that it is asked for as (video, frame)."""

    def __getitem__(self, target: tuple[int, int]) -> ClipSample:
        return self.sample(*target)


class EpochOrder:
    """Orders an epoch's samples; the order depends on seed and epoch alone.

    Shards take every ``world.shards``-th sample of one common order, and equally many: where it
    does not divide, the first ones of the order are seen twice (``DistributedSampler``).

    Args:
        dataset: To be ordered.
        world: Where this process stands.
        seed: Of the run.
    """

    def __init__(self, dataset: TrainClips, world: World, seed: int) -> None:
        self.order = DistributedSampler(
            dataset, num_replicas=world.shards, rank=world.shard, shuffle=True, seed=seed
        )

    def __len__(self) -> int:
        return len(self.order)

    def draws(self, epoch: int, start: int = 0) -> Iterator[Draw]:
        """Yield this rank's samples of an epoch, without the first ``start``."""
        self.order.set_epoch(epoch)
        for index in islice(self.order, start, None):
            yield Draw(int(index), epoch)


class TrainLoader:
    """Training batches on the device, ``ClipBatch`` after ``ClipBatch``.

    Order, targets and position restore exactly. The last batch of an epoch may be smaller.

    Args:
        videos: Of the training split.
        views: What the peers see.
        world: Where this process stands.
        batch_size: Samples a batch, on this process.
        seed: Of the run.
        workers: Processes that read; 0: this one.
        clips_per_video: Targets drawn from each video (shot) in an epoch.
        map_size: Height and width of maps and fixations; None: those of the largest view.
        fixations: Also give fixations, for losses that need them.
        packed: Frames packed beforehand.
        bad: Counts broken files; None: by itself, and none is allowed.
        elsewhere: Views of peers in other processes. Where broken files are allowed, a frame that
            is broken in one peer's clip makes all peers see another sample.

    Raises:
        DataError: Fatal faults in the listing, no view, or a number out of its range.
    """

    def __init__(
        self,
        videos: VideoSet,
        views: Sequence[ClipView],
        world: World,
        *,
        batch_size: int,
        seed: int = 0,
        workers: int = 4,
        clips_per_video: int = 1,
        map_size: Size | None = None,
        fixations: bool = False,
        packed: PackedFrames | None = None,
        bad: BadSamples | None = None,
        elsewhere: Sequence[ClipView] = (),
    ) -> None:
        _refuse_below_one(batch_size=batch_size)
        self.bad = bad or allowed()
        dataset = TrainClips(
            videos,
            views,
            seed=seed,
            clips_per_video=clips_per_video,
            map_size=map_size or max((view.size for view in views), key=_area, default=None),
            fixations=fixations,
            reader=FrameReader(packed),
            elsewhere=elsewhere if self.bad.most else (),
        )
        self.videos = videos.videos
        self.device = world.device
        order = EpochOrder(dataset, world, seed)
        self.batches = -(-len(order) // batch_size)
        self._loader = ReadAhead(
            _Replacing(dataset, self.bad.most),
            order.draws,
            batch_size,
            self.batches,
            seed=seed,
            workers=workers,
            **_reading(world, _join),
        )
        self._batches = Counted(self._loader, self.bad)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begin to read an epoch, without its first ``start`` batches."""
        self._loader.set_epoch(epoch, start)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[ClipBatch]:
        for batch in self._batches:
            yield batch.to(self.device, non_blocking=True)

    def names_of(self, batch: ClipBatch) -> Callable[[], list[str]]:
        """Return what tells a batch's samples: the file of each target frame."""
        videos, targets = self.videos, batch.targets
        return lambda: [videos[v].path(videos[v].frames[frame]) for v, frame in targets]


class EvalLoader:
    """This rank's target frames of a split, none twice and none left out.

    A batch is of one video, because maps and fixations stay at their own size; where these differ
    within a video, a batch comes in parts, one a size. Ranks take consecutive batches, and of these
    so does each worker, so that frames read for one target serve the next ones; hence the batches
    of several workers come in turns. With more ranks than batches, some have none.

    A target whose files are broken, where some may be, is left out.

    Args:
        videos: Of the validation split.
        views: What the peers see.
        world: Where this process stands.
        batch_size: Samples a batch, at most.
        stride: From one target of a video to the next, from frame 0 to its end.
        workers: Processes that read; 0: this one.
        fixations: Also give fixations.
        packed: Frames packed beforehand.
        bad: Counts broken files; None: by itself, and none is allowed.
        corruption: Spoils every frame, see ``FrameReader``.
        elsewhere: Views of peers in other processes. Where broken files are allowed, a target whose
            files are broken for one peer is left out for all.

    Attributes:
        left_out: Targets that the last pass left out, on this rank.

    Raises:
        DataError: Fatal faults in the listing, no view, or a number out of its range.
    """

    def __init__(
        self,
        videos: VideoSet,
        views: Sequence[ClipView],
        world: World,
        *,
        batch_size: int = 1,
        stride: int = 1,
        workers: int = 4,
        fixations: bool = True,
        packed: PackedFrames | None = None,
        bad: BadSamples | None = None,
        corruption: tuple[str, int] | None = None,
        elsewhere: Sequence[ClipView] = (),
    ) -> None:
        _refuse_below_one(batch_size=batch_size, stride=stride)
        self.bad = bad or allowed()
        others = elsewhere if self.bad.most else ()
        reader = FrameReader(packed, _window([*views, *others], stride), corruption)
        self.dataset = EvalClips(
            videos, views, fixations=fixations, reader=reader, elsewhere=others
        )
        self.batch_size = batch_size
        self.stride = stride
        self.workers = workers
        self.world = world
        self.device = world.device
        self.left_out = 0
        self._read(_targets(videos, stride))

    @property
    def targets(self) -> int:
        """How many targets all ranks read together."""
        return len(self._targets)

    def choose(self, choose: Callable[[int], Sequence[int]]) -> None:
        """Keep some of the split's target frames.

        Args:
            choose: Given how many there are, returns the places of those to keep, ascending; it
                must return the same on every rank.
        """
        self._read([self._targets[place] for place in choose(len(self._targets))])

    def _read(self, targets: list[tuple[int, int]]) -> None:
        """Share targets out to the ranks, and to the workers of this one."""
        self._targets = targets
        every = _batches(targets, self.batch_size)
        shards, shard = self.world.shards, self.world.shard
        share = slice(*(len(every) * k // shards for k in (shard, shard + 1)))
        self.batches = _in_turns(every[share], self.workers)
        loader = DataLoader(
            _LeavingOut(self.dataset),
            batch_sampler=self.batches,
            generator=torch.Generator().manual_seed(0),
            num_workers=self.workers,
            **_reading(self.world, _join_by_size),
        )
        self._loader = Counted(loader, self.bad, evaluating=True)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ClipBatch]:
        asked = iter(self.batches)
        self.left_out = 0
        for parts in self._loader:
            self.left_out += len(next(asked)) - sum(map(len, parts))
            for batch in parts:
                yield batch.to(self.device, non_blocking=True)


def allowed(most: int = 0) -> BadSamples:
    """Return a count of broken files that raises ``DataError``."""
    return BadSamples(most, fault=DataError)


class _Replacing(Dataset):
    """In the place of a sample whose files are broken comes another one.

    Which one depends on seed, epoch and the sample alone. What was broken is handed over with it:
    torch puts a traceback in what a worker raises.

    Args:
        dataset: Reads the samples.
        most: Broken files that the run may do without.
    """

    def __init__(self, dataset: TrainClips, most: int) -> None:
        self.dataset = dataset
        self.most = most

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> ClipSample | Replaced:
        def other(attempt: int) -> Draw:
            numbers = self.dataset.seed, draw.epoch, draw.index, attempt
            return draw._replace(index=other_index(len(self), *numbers))

        return read_or_replace(self.dataset.__getitem__, draw, other, (DataError,), self.most)


class _LeavingOut(Dataset):
    """Hands over what is wrong with a target's files in its place.

    Args:
        dataset: Reads the samples.
    """

    def __init__(self, dataset: EvalClips) -> None:
        self.dataset = dataset

    def __getitem__(self, target: tuple[int, int]) -> ClipSample | Replaced:
        try:
            return self.dataset[target]
        except DataError as error:
            return Replaced(None, [BadSample.of(error)])


def _join(samples: Sequence[ClipSample | Replaced]) -> tuple[ClipBatch | None, list[BadSample]]:
    """Join samples, and tell what was passed over; None: one could not be replaced."""
    found, bad = sound(samples)
    return collate(found) if len(found) == len(samples) else None, bad


def _join_by_size(
    samples: Sequence[ClipSample | Replaced],
) -> tuple[list[ClipBatch], list[BadSample]]:
    """Join those samples whose maps and fixations have the same sizes."""
    groups: dict[Any, list[ClipSample]] = {}
    found, bad = sound(samples)
    for sample in found:
        points = None if sample.fixations is None else sample.fixations.shape
        groups.setdefault((sample.map.shape, points), []).append(sample)
    return [collate(group) for group in groups.values()], bad


def _targets(videos: VideoSet, stride: int) -> list[tuple[int, int]]:
    """List every ``stride``-th frame of all videos."""
    return [
        (number, frame)
        for number, video in enumerate(videos.videos)
        for frame in range(0, len(video), stride)
    ]


def _batches(targets: Iterable[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Cut targets into batches of one video each."""
    batches = []
    for _, group in groupby(targets, key=itemgetter(0)):
        its = list(group)
        batches += [its[k : k + size] for k in range(0, len(its), size)]
    return batches


def _in_turns(batches: list[Any], workers: int) -> list[Any]:
    """Order batches so that each worker, dealt every ``workers``-th one, gets consecutive ones."""
    if workers < 2:
        return batches
    least, more = divmod(len(batches), workers)
    starts = [least * k + min(k, more) for k in range(workers)]
    order = [start + turn for turn in range(least) for start in starts]
    return [batches[k] for k in order + [start + least for start in starts[:more]]]


def _window(views: Sequence[ClipView], stride: int) -> int:
    """Count the frames to remember so that none is decoded twice for consecutive targets."""
    before = max((view.before for view in views), default=0)
    after = max((view.span - 1 - view.before for view in views), default=0)
    return before + after + 1 + stride


def _reading(world: World, join: Callable[..., Any]) -> Mapping[str, Any]:
    """Return what training and evaluation loaders share."""
    _one_thread()
    return {
        "collate_fn": join,
        "pin_memory": world.device.type == "cuda",
        "worker_init_fn": _begin_reading,
    }


def _refuse_below_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise DataError(f"{name} is {value}; expected at least 1")


def _begin_reading(worker: int) -> None:
    _one_thread()
    outlive_sigterm()


def _one_thread() -> None:
    """Let OpenCV use one thread, as torch does in a reading process.

    This process must too: forked from one that has OpenCV's threads, a worker would wait for them.
    """
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)


def _area(size: Size) -> int:
    return size[0] * size[1]
