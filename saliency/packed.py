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
    videos: VideoSet, sizes: Sequence[Size], folder: str | Path, progress: bool = True
) -> PackedFrames:
    """Pack a split's frames where they are not packed yet, or where their files changed.

    A file appears only when it is whole. Under data parallelism call it on one process first, then
    on all: the others find the files.

    Args:
        videos: Of one split.
        sizes: Heights and widths, such as those of the peers' views.
        folder: Where packed files live; made where it is missing.
        progress: Show a bar.

    Raises:
        DataError: Too little space on the disk, or a frame that cannot be read; names it.
    """
    folder = Path(folder).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = list(dict.fromkeys(sizes))
    files: dict[tuple[str, Size], Path] = {}
    missing: dict[Video, list[Size]] = {}
    for video in videos.videos:
        key = _key(video)
        for size in sizes:
            path = folder / f"{_prefix(videos.name, video, size)}{key}.npy"
            files[video.folder, size] = path
            if not path.exists():
                missing.setdefault(video, []).append(size)
    _refuse_full_disk(folder, missing)
    total = sum(len(video) for video in missing)
    with tqdm(total=total, desc="packing", unit="frame", disable=not (progress and total)) as bar:
        for video, wanted in missing.items():
            _pack(video, {size: files[video.folder, size] for size in wanted}, bar)
    _remove_stale(folder, videos, sizes, set(files.values()))
    return PackedFrames(files)


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


def _refuse_full_disk(folder: Path, missing: Mapping[Video, Sequence[Size]]) -> None:
    need = sum(
        len(video) * height * width * 3
        for video, sizes in missing.items()
        for height, width in sizes
    )
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
