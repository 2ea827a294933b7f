"""Folders of DHF1K, Hollywood-2 and UCF-Sports: which videos a split has, which file belongs where.

Nothing is opened here; folders are listed once. What is wrong with the listing is kept in
``VideoSet.faults`` and refused before training (``saliency.check``).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from saliency.errors import DataError
from saliency.images import FIXATION_SUFFIXES, IMAGE_SUFFIXES

SPLITS = ("train", "val")
_DHF1K_FOLDERS = ("train", "annotation", "val", "test")
_NAMED = 3  # files of one fault that are named; the rest is counted


@dataclass(frozen=True)
class Fault:
    """Something wrong with the data.

    Attributes:
        path: Of the file or folder.
        text: What is wrong with it.
        fatal: Whether training must not begin.
        broken: It is a file that cannot be read, of which a run may do without some.
    """

    path: str
    text: str
    fatal: bool = True
    broken: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass(frozen=True)
class Video:
    """A video, or one shot of it: clips never reach beyond.

    Attributes:
        name: Of its folder.
        folder: Its path.
        frames: Files relative to the folder, in natural order.
        maps: The map of each frame; None: it has none, which is a fatal fault.
        fixations: The fixations of each frame; None: it has none.
    """

    name: str
    folder: str
    frames: tuple[str, ...]
    maps: tuple[str | None, ...]
    fixations: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.frames)

    def path(self, file: str) -> str:
        """Return the path of one of its files."""
        return os.path.join(self.folder, file)


@dataclass(frozen=True)
class VideoSet:
    """The videos of one split.

    Attributes:
        name: Of the data set.
        root: Its folder.
        split: One of ``SPLITS``.
        videos: In natural order.
        faults: Of the listing.
    """

    name: str
    root: str
    split: str
    videos: tuple[Video, ...]
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.split} ({self.root})"


def open_dataset(name: str, root: str | Path, split: str) -> VideoSet:
    """List the videos of a split.

    DHF1K: ``ROOT/train/VIDEO`` (or ``ROOT/annotation``) and ``ROOT/val/VIDEO``; where there is only
    one folder, or the videos lie in ROOT itself, the official numbers decide: 1 to 600 train, 601
    to 700 val. Hollywood-2 and UCF-Sports: ``ROOT/training/SHOT`` and ``ROOT/testing/SHOT``, of
    which the latter is ``val``. In each video ``images/`` and ``maps/``, and where there are any,
    fixations in ``fixation/maps/`` or ``fixation/``.

    Args:
        name: One of ``LAYOUTS``.
        root: Of the data set.
        split: One of ``SPLITS``.

    Raises:
        DataError: An unknown name or split, a missing folder, no videos.
    """
    if name not in LAYOUTS:
        raise DataError(f"{name!r} is no known data set; choose from {', '.join(LAYOUTS)}")
    if split not in SPLITS:
        raise DataError(f"{split!r} is no split; choose from {', '.join(SPLITS)}")
    root = Path(root).expanduser().absolute()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder of {name}")
    folders, faults = LAYOUTS[name](root, split)
    videos = []
    for folder in folders:
        video, found = _video(folder, numbered=name == "dhf1k")
        videos.append(video)
        faults += found
    if not videos:
        raise DataError(f"{root}: no videos of split {split!r}; expected {_EXPECTED[name]}")
    return VideoSet(name, str(root), split, tuple(videos), tuple(faults))


def natural_key(name: str) -> tuple[object, ...]:
    """Order names as people do: ``shot_2`` before ``shot_10``."""
    parts = re.split(r"(\d+)", name)
    return (*(int(part) if i % 2 else part for i, part in enumerate(parts)), name)


def _dhf1k(root: Path, split: str) -> tuple[list[Path], list[Fault]]:
    """Choose the folders of a split: by its own folder, else by the official numbers."""
    inside = [name for name in ("train", "annotation") if (root / name).is_dir()]
    train = root / inside[0] if inside else None
    val = root / "val" if (root / "val").is_dir() else None
    if val is None:
        return _by_number(train or root, split)
    found = {
        "train": _folders(train) if train else _by_number(root, "train"),
        "val": _folders(val),
    }
    folders, faults = found.pop(split)
    others = {folder.name for rest, _ in found.values() for folder in rest}
    return folders, faults + [
        Fault(str(folder), "this video is in both splits; remove one of the two")
        for folder in folders
        if folder.name in others
    ]


def _by_number(where: Path, split: str) -> tuple[list[Path], list[Fault]]:
    official = range(1, 601) if split == "train" else range(601, 701)
    folders, faults = _folders(where)
    chosen = []
    for folder in folders:
        if folder.name in _DHF1K_FOLDERS:
            continue
        if not folder.name.isdecimal():
            text = "no number of DHF1K, so its split is unknown; make folders train and val"
            faults.append(Fault(str(folder), text))
        elif int(folder.name) in official:
            chosen.append(folder)
    if chosen and len(chosen) != len(official):
        text = f"holds {len(chosen)} of the {len(official)} videos of the official split {split!r}"
        faults.append(Fault(str(where), text, fatal=False))
    return chosen, faults


def _training_testing(root: Path, split: str) -> tuple[list[Path], list[Fault]]:
    folder = root / ("training" if split == "train" else "testing")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected {_EXPECTED['hollywood2']}")
    return _folders(folder)


LAYOUTS: dict[str, Callable[[Path, str], tuple[list[Path], list[Fault]]]] = {
    "dhf1k": _dhf1k,
    "hollywood2": _training_testing,
    "ucf_sports": _training_testing,
}

_EXPECTED = {
    "dhf1k": "annotation/0001/images/0001.png (and val/0601/images/0001.png)",
    "hollywood2": "training/SHOT/images and testing/SHOT/images",
    "ucf_sports": "training/CLIP/images and testing/CLIP/images",
}


def _folders(where: Path) -> tuple[list[Path], list[Fault]]:
    """List the folders in a folder, in natural order; everything else is stray."""
    names, stray = _listing(where, lambda entry: entry.is_dir())
    return [where / name for name in names], _stray(where, stray)


def _files(where: Path, suffixes: Sequence[str]) -> tuple[list[str] | None, list[Fault]]:
    """List the files of a folder, in natural order; None: there is no such folder."""
    if not where.is_dir():
        return None, []
    names, stray = _listing(where, lambda entry: entry.name.lower().endswith(tuple(suffixes)))
    return names, _stray(where, stray)


def _listing(
    where: Path, wanted: Callable[[os.DirEntry[str]], bool]
) -> tuple[list[str], list[str]]:
    names: list[str] = []
    stray: list[str] = []
    with os.scandir(where) as entries:
        for entry in entries:
            hidden = entry.name.startswith(".")
            (names if not hidden and wanted(entry) else stray).append(entry.name)
    return sorted(names, key=natural_key), sorted(stray, key=natural_key)


def _stray(where: Path, names: Iterable[str]) -> list[Fault]:
    return [Fault(str(where / name), "not of the data set; ignored", fatal=False) for name in names]


def _video(folder: Path, numbered: bool) -> tuple[Video, list[Fault]]:
    """List one video; frames and maps belong together by their stems."""
    frames, faults = _files(folder / "images", IMAGE_SUFFIXES)
    maps, found = _files(folder / "maps", IMAGE_SUFFIXES)
    faults += found
    for inner, names in (("images", frames), ("maps", maps)):
        if names is None:
            faults.append(Fault(str(folder / inner), "this folder is missing"))
        elif not names:
            faults.append(Fault(str(folder / inner), "no images in this folder"))
    frames, maps = frames or [], maps or []
    if numbered:
        faults += _gaps(folder, frames)
    paired: list[str | None] = [None] * len(frames)
    if frames and maps:
        paired, unpaired = _pair(folder, frames, maps)
        faults += unpaired
    fixations, found = _fixations(folder, frames)
    faults += found
    video = Video(
        folder.name,
        str(folder),
        _inside("images", frames),
        _inside("maps", paired),
        fixations,
    )
    return video, faults


def _inside(folder: str, names: Iterable[str | None]) -> tuple[str | None, ...]:
    # names repeat from video to video: interned, hundreds of thousands take little memory
    return tuple(None if name is None else sys.intern(f"{folder}/{name}") for name in names)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _pair(
    folder: Path, frames: Sequence[str], maps: Sequence[str]
) -> tuple[list[str | None], list[Fault]]:
    """Give each frame its map: by stem, or in order where no stem agrees and the counts do."""
    stems = {_stem(name): name for name in maps}
    own = {_stem(name) for name in frames}
    faults = _twice(folder / "images", frames) + _twice(folder / "maps", maps)
    if not own & set(stems) and len(frames) == len(maps):
        return list(maps), faults
    if len(frames) != len(maps):
        faults.append(Fault(str(folder), f"{len(frames)} frames, but {len(maps)} maps"))
    lonely = [name for name in frames if _stem(name) not in stems]
    faults += name_some(folder / "images", lonely, "frame without a map")
    lonely = [name for name in maps if _stem(name) not in own]
    faults += name_some(folder / "maps", lonely, "map without a frame")
    return [stems.get(_stem(name)) for name in frames], faults


def _twice(where: Path, names: Sequence[str]) -> list[Fault]:
    seen: set[str] = set()
    again = []
    for name in names:
        if _stem(name) in seen:
            again.append(name)
        seen.add(_stem(name))
    return name_some(where, again, "another file differs from it only in its suffix")


def _gaps(folder: Path, frames: Sequence[str]) -> list[Fault]:
    """Find missing numbers where all frames are numbered."""
    stems = [_stem(name) for name in frames]
    if not stems or not all(stem.isdecimal() for stem in stems):
        return []
    numbers = {int(stem) for stem in stems}
    missing = sorted(set(range(min(1, *numbers), max(numbers))) - numbers)
    suffix, width = os.path.splitext(frames[0])[1], len(stems[0])
    names = [f"{number:0{width}d}{suffix}" for number in missing]
    return name_some(folder / "images", names, "frame missing in the numbering")


def _fixations(folder: Path, frames: Sequence[str]) -> tuple[tuple[str | None, ...], list[Fault]]:
    """Find the fixations of each frame; a data set may have none."""
    for inner in ("fixation/maps", "fixation"):
        names, faults = _files(folder / inner, FIXATION_SUFFIXES)
        if not names:
            continue
        faults = [fault for fault in faults if fault.path != str(folder / "fixation/maps")]
        stems = {_stem(name): name for name in names}
        found = [stems.get(_stem(name)) for name in frames]
        lonely = [name for name, file in zip(frames, found, strict=True) if file is None]
        faults += name_some(folder / "images", lonely, "frame without fixations", fatal=False)
        return _inside(inner, found), faults
    return (None,) * len(frames), []


def name_some(where: Path, names: Sequence[str], text: str, fatal: bool = True) -> list[Fault]:
    """Name the first files with a fault, and count the rest."""
    faults = [Fault(str(where / name), text, fatal) for name in names[:_NAMED]]
    if len(names) > _NAMED:
        faults.append(Fault(str(where), f"{text}: {len(names) - _NAMED} more", fatal))
    return faults
