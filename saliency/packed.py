"""Frames packed at the training sizes, for disks or processors that are too slow to decode.

One uint8 file a video and size, [frames, height, width, 3], exactly the pixels that decoding gives.
It is large: 0.26 MB a frame at 224x384, 0.35 MB at 256x456; DHF1K's 600 training videos take about
210 GB in both.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.distributed import World, gather_objects
from saliency.errors import DataError
from saliency.images import read_frame, resize_frame
from saliency.layouts import Video, VideoSet

_FORMAT = 1  # of the pixels: another resize makes old files stale
Size = tuple[int, int]


class PackedFrames:
    """Reads packed frames.

    Args:
        files: Of each video's folder and size, the packed file.
    """

    def __init__(self, files: Mapping[tuple[str, Size], Path]) -> None:
        self.files = dict(files)

    def holds(self, video: Video, size: Size) -> bool:
        """Whether this video is packed at this size."""
        return (video.folder, size) in self.files

    def read(self, video: Video, size: Size, numbers: np.ndarray) -> Tensor:
        """Return frames, uint8 RGB [K, height, width, 3].

        Raises:
            DataError: The packed file is gone or broken; names it.
        """
        path = self.files[video.folder, size]
        try:
            # opened each time: a thousand maps held open exceed a process's limit of files
            frames = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: cannot be read: {error}; remove it, and it is packed anew at the start"
            ) from error
        return torch.from_numpy(frames[numbers])


def pack_frames(
    datasets: VideoSet | Sequence[VideoSet],
    sizes: Sequence[Size],
    folder: str | Path,
    progress: bool = True,
    world: World | None = None,
) -> PackedFrames:
    """Pack frames where they are not packed yet, or where their files changed.

    A file appears only when it is whole. Under data parallelism all ranks call this, each packs its
    share of the videos, and all return once everything is packed; what is wrong for one of them is
    raised by all. Where machines do not share the folder, each packs all it lacks.

    Args:
        datasets: One or more splits.
        sizes: Heights and widths, such as those of the peers' views.
        folder: Where packed files live; made where it is missing.
        progress: Show a bar.
        world: Where this process stands; None: alone.

    Raises:
        DataError: Too little space on the disk, or a frame that cannot be read; names it.
    """
    folder = Path(folder).expanduser().absolute()
    datasets = [datasets] if isinstance(datasets, VideoSet) else list(datasets)
    sizes = list(dict.fromkeys(sizes))
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    with _together():
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            place: path
            for dataset in datasets
            for place, path in _place(dataset, sizes, folder).items()
        }
        videos = {video.folder: video for dataset in datasets for video in dataset.videos}
        # shares of all videos, not of those missing: by now another rank may have packed some
        mine = set(list(videos)[rank::ranks])
        missing = _missing(files)
        _refuse_full_disk(folder, [(videos[place], size) for place, size in missing])
    with _together():
        _pack_all(videos, {k: v for k, v in missing.items() if k[0] in mine}, progress)
    with _together():
        _pack_all(videos, _missing(files), progress)
    for dataset in datasets:
        _remove_stale(folder, dataset, sizes, set(files.values()))
    return PackedFrames(files)


@contextmanager
def _together() -> Iterator[None]:
    """Wait for the other ranks at the end, and raise what is wrong for any of them."""
    wrong = None
    try:
        yield
    except DataError as error:
        wrong = str(error)
    for told in gather_objects(wrong):
        if told is not None:
            raise DataError(told)


def _place(dataset: VideoSet, sizes: Sequence[Size], folder: Path) -> dict[tuple[str, Size], Path]:
    """Name the packed file of each video's folder and size."""
    files = {}
    for video in dataset.videos:
        key = _key(video)
        for size in sizes:
            path = folder / f"{_prefix(dataset.name, video, size)}{key}.npy"
            files[video.folder, size] = path
    return files


def _missing(files: Mapping[tuple[str, Size], Path]) -> dict[tuple[str, Size], Path]:
    return {place: path for place, path in files.items() if not path.exists()}


def _pack_all(
    videos: Mapping[str, Video], files: Mapping[tuple[str, Size], Path], progress: bool
) -> None:
    """Pack videos, given by their folders, into these files."""
    wanted: dict[str, dict[Size, Path]] = {}
    for (place, size), path in files.items():
        wanted.setdefault(place, {})[size] = path
    total = sum(len(videos[place]) for place in wanted)
    with tqdm(total=total, desc="packing", unit="frame", disable=not (progress and total)) as bar:
        for place, its in wanted.items():
            _pack(videos[place], its, bar)


def _pack(video: Video, files: Mapping[Size, Path], bar: tqdm) -> None:
    """Decode a video once, into one file a size."""
    with ExitStack() as stack:
        arrays = {
            size: stack.enter_context(_new_array(path, (len(video), *size, 3)))
            for size, path in files.items()
        }
        for number, file in enumerate(video.frames):
            image = read_frame(video.path(file))
            for size, array in arrays.items():
                array[number] = resize_frame(image, size).numpy()
            bar.update()


@contextmanager
def _new_array(path: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Give a uint8 array in a temporary file, which takes its name once it is filled."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        yield array
        array.flush()
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _prefix(name: str, video: Video, size: Size) -> str:
    """Return what the packed files of a video and size begin with, whatever its frames hold."""
    place = hashlib.sha256(video.folder.encode()).hexdigest()[:8]
    safe = re.sub(r"[^\w.-]", "_", video.name)
    return f"{name}-{safe}-{place}-{size[0]}x{size[1]}-"


def _key(video: Video) -> str:
    """Digest what tells that a video's files changed: names, sizes, times of change."""
    digest = hashlib.sha256(f"{_FORMAT}".encode())
    for file in video.frames:
        try:
            status = os.stat(video.path(file))
        except OSError as error:
            raise DataError(f"{video.path(file)}: cannot be read: {error.strerror}") from error
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _refuse_full_disk(folder: Path, missing: Sequence[tuple[Video, Size]]) -> None:
    need = sum(len(video) * height * width * 3 for video, (height, width) in missing)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"{folder}: packing needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; choose "
            "another folder, or train without packed frames"
        )


def _remove_stale(folder: Path, videos: VideoSet, sizes: Sequence[Size], used: set[Path]) -> None:
    """Remove packed files of these videos and sizes whose frames have changed since."""
    prefixes = {_prefix(videos.name, video, size) for video in videos.videos for size in sizes}
    for path in folder.glob("*.npy"):
        if path not in used and path.stem[:-16] in prefixes:
            path.unlink(missing_ok=True)
