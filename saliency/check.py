"""Look at the data before training: every fault in one listing, not one crash after the other."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.checkpoint import atomic_write
from saliency.errors import DataError
from saliency.images import read_fixations, read_map, size_of
from saliency.layouts import Fault, Video, VideoSet, name_some

_logger = logging.getLogger(__name__)

DEPTHS = ("listing", "headers", "full")
_FORMAT = 2  # of what is looked at: results of another version do not count
_SHOWN = 20


@dataclass(frozen=True)
class Listing:
    """What is wrong with the data.

    Attributes:
        faults: In the order of the videos.
    """

    faults: tuple[Fault, ...]

    @property
    def fatal(self) -> tuple[Fault, ...]:
        """Faults with which training must not begin."""
        return tuple(fault for fault in self.faults if fault.fatal)

    @property
    def warnings(self) -> tuple[Fault, ...]:
        """Faults that training can live with."""
        return tuple(fault for fault in self.faults if not fault.fatal)

    def __str__(self) -> str:
        return "\n".join(
            f"{'fault' if fault.fatal else 'warning'}: {fault}" for fault in self.faults
        )


def check_data(
    datasets: VideoSet | Sequence[VideoSet],
    *,
    depth: str = "headers",
    cache: str | Path | None = None,
    workers: int = 4,
    progress: bool = True,
    most_broken: int = 0,
) -> Listing:
    """Look at every file; warn of what training can live with, and refuse the rest.

    Args:
        datasets: Of one or more splits.
        depth: ``listing``: names alone. ``headers``: also the size of every image, whether PNGs
            were cut off, and whether maps in small files are empty (an empty map compresses to
            next to nothing). ``full``: decode every file.
        cache: Folder for the result; a second call is quick while names, sizes and times of change
            stay. None: ``~/.cache/peer-transfer``. Where it cannot be written, nothing is kept.
        workers: Threads.
        progress: Show a bar.
        most_broken: How many files that cannot be read are only warned of.

    Returns:
        The warnings, and no fatal fault.

    Raises:
        DataError: There are fatal faults; shows the first twenty and their number.
    """
    listing = list_faults(datasets, depth=depth, cache=cache, workers=workers, progress=progress)
    if sum(fault.broken for fault in listing.faults) <= most_broken:
        mild = [replace(fault, fatal=fault.fatal and not fault.broken) for fault in listing.faults]
        listing = Listing(tuple(mild))
    if listing.warnings:
        _logger.warning("%s", _told(listing.warnings, "warnings about the data"))
    refuse(listing.faults)
    return listing


def refuse(faults: Iterable[Fault]) -> None:
    """Refuse data with fatal faults.

    Raises:
        DataError: Shows the first twenty and their number.
    """
    fatal = [fault for fault in faults if fault.fatal]
    if fatal:
        raise DataError(_told(fatal, "faults in the data"))


def _told(faults: Sequence[Fault], what: str) -> str:
    lines = [f"{len(faults)} {what}", *(f"  {fault}" for fault in faults[:_SHOWN])]
    if len(faults) > _SHOWN:
        lines.append(f"  ... and {len(faults) - _SHOWN} more")
    return "\n".join(lines)


def list_faults(
    datasets: VideoSet | Sequence[VideoSet],
    *,
    depth: str = "headers",
    cache: str | Path | None = None,
    workers: int = 4,
    progress: bool = True,
) -> Listing:
    """Look at every file, and list what is wrong; see ``check_data``.

    Raises:
        DataError: An unknown depth.
    """
    if depth not in DEPTHS:
        raise DataError(f"depth is {depth!r}; choose from {', '.join(DEPTHS)}")
    if isinstance(datasets, VideoSet):
        datasets = [datasets]
    folder = Path.home() / ".cache" / "peer-transfer" if cache is None else Path(cache)
    faults: list[Fault] = []
    for dataset in datasets:
        faults += dataset.faults
        if depth != "listing":
            faults += _content(dataset, depth, folder, workers, progress)
    return Listing(tuple(faults))


def _content(
    dataset: VideoSet, depth: str, folder: Path, workers: int, progress: bool
) -> list[Fault]:
    """List what is wrong inside the files, from the cache where they did not change."""
    place = hashlib.sha256(dataset.root.encode()).hexdigest()[:12]
    path = folder / f"check-{dataset.name}-{dataset.split}-{place}.json"
    print_ = fingerprint(dataset)
    known = _read_result(path, print_, depth)
    if known is not None:
        return known
    faults: list[Fault] = []
    total = sum(len(video) for video in dataset.videos)
    with (
        ThreadPoolExecutor(max(1, workers)) as pool,
        tqdm(
            total=total, desc=f"checking {dataset.split}", unit="frame", disable=not progress
        ) as bar,
    ):
        found = pool.map(lambda video: _look_at(video, depth == "full"), dataset.videos)
        for video, inside in zip(dataset.videos, found, strict=True):
            faults += inside
            bar.update(len(video))
    _write_result(path, print_, depth, faults)
    return faults


def _look_at(video: Video, thorough: bool) -> list[Fault]:
    """List what is wrong inside the files of one video."""
    faults: list[Fault] = []
    empty, resized, shifted = [], [], []
    for frame, file, fixations in zip(video.frames, video.maps, video.fixations, strict=True):
        size = _try(lambda path: size_of(path, thorough), video.path(frame), faults)
        found = file and _try(lambda path: _look_at_map(path, thorough), video.path(file), faults)
        map_size, is_empty = found or (None, False)
        if is_empty:
            empty.append(file)
        if size and map_size and size != map_size:
            resized.append(file)
        if fixations is not None and thorough:
            points = _try(read_fixations, video.path(fixations), faults)
            if points is not None and map_size and points.shape != map_size:
                shifted.append(fixations)
    folder = Path(video.folder)
    faults += name_some(folder, resized, "map of another size than its frame", fatal=False)
    faults += name_some(folder, shifted, "fixations of another size than their map", fatal=False)
    if empty and len(empty) == len(video):
        return [*faults, Fault(str(folder / "maps"), "every map is empty (all zero)")]
    return faults + name_some(folder, empty, "empty map (all zero), never a target", fatal=False)


def _try(read: Callable[[str], Any], path: str, faults: list[Fault]) -> Any:
    """Read a file; None: it cannot be read, which is noted."""
    try:
        return read(path)
    except DataError as error:
        faults.append(Fault(path, str(error).removeprefix(f"{path}: "), broken=True))
        return None


def _look_at_map(path: str, thorough: bool) -> tuple[tuple[int, int], bool]:
    """Return a map's size, and whether it is empty."""
    if not thorough:
        size = size_of(path, thorough=False)
        if os.path.getsize(path) > 1024 + size[0] * size[1] // 100:
            return size, False  # zeros compress far better
    image = read_map(path)
    return image.shape, not image.any()


def _files(dataset: VideoSet) -> Iterator[str]:
    for video in dataset.videos:
        for files in (video.frames, video.maps, video.fixations):
            yield from (video.path(file) for file in files if file is not None)


def fingerprint(dataset: VideoSet) -> str:
    """Digest the names, sizes and times of change of all files."""
    digest = hashlib.sha256(f"{_FORMAT}".encode())
    for path in _files(dataset):
        try:
            status = os.stat(path)
            told = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except OSError as error:
            told = f"{path}\0{error.errno}\n"
        digest.update(told.encode())
    return digest.hexdigest()


def _read_result(path: Path, fingerprint: str, depth: str) -> list[Fault] | None:
    """Return the faults found earlier; None: other files, or they were looked at less closely."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["fingerprint"] != fingerprint:
            return None
        if DEPTHS.index(known["depth"]) < DEPTHS.index(depth):
            return None
        return [Fault(*fault) for fault in known["faults"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_result(path: Path, fingerprint: str, depth: str, faults: Sequence[Fault]) -> None:
    known = {
        "fingerprint": fingerprint,
        "depth": depth,
        "faults": [[fault.path, fault.text, fault.fatal, fault.broken] for fault in faults],
    }
    text = json.dumps(known)
    try:
        atomic_write(path, lambda to: to.write_text(text, encoding="utf-8"))
    except OSError as error:
        _logger.warning(
            "%s: cannot keep the result of the check (%s); the next start looks at all files again",
            path,
            error,
        )
