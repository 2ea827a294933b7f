"""A part of the training data, held out to choose by, so that the test set chooses nothing."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from segmentation.config import RunConfig
from segmentation.errors import ConfigError, DataError

_PART = re.compile(r"(?P<names>.+)@(?P<kind>rest|held_out)-(?P<share>[0-9.e-]+)-(?P<seed>\d+)")


@dataclass(frozen=True)
class Part:
    """Some images of registered datasets, themselves a dataset.

    Attributes:
        names: Of the datasets.
        kind: ``rest`` or ``held_out``.
        share: What is held out of all their images together, in (0, 1).
        seed: Of the draw, which depends on nothing else.
    """

    names: tuple[str, ...]
    kind: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        """By which it is registered; it tells all there is to know, in any process."""
        return f"{'+'.join(self.names)}@{self.kind}-{self.share!r}-{self.seed}"

    def indices(self, count: int) -> np.ndarray:
        """Return which of so many images belong to it, in their order.

        Raises:
            DataError: Nothing would be left to train on.
        """
        held_out = max(1, round(self.share * count))
        if held_out >= count:
            raise DataError(
                f"TRANSFER.HELD_OUT {self.share}: {', '.join(self.names)} has {count} images; "
                "nothing would be left to train on; take a smaller share"
            )
        order = np.random.default_rng([self.seed, 2]).permutation(count)
        return np.sort(order[:held_out] if self.kind == "held_out" else order[held_out:])

    def records(self) -> list[dict[str, Any]]:
        """Return its records."""
        whole = [record for name in self.names for record in DatasetCatalog.get(name)]
        files = list(dict.fromkeys(record["file_name"] for record in whole))  # each once
        mine = {files[i] for i in self.indices(len(files))}
        return [record for record in whole if record["file_name"] in mine]


def sources(name: str) -> tuple[str, ...]:
    """Return the datasets of which one is a part; itself where it is none."""
    part = part_of(name)
    return (name,) if part is None else part.names


def part_of(name: str) -> Part | None:
    """Read a part's name; None where it is that of a whole dataset."""
    found = _PART.fullmatch(name)
    if found is None:
        return None
    names = tuple(found["names"].split("+"))
    return Part(names, found["kind"], float(found["share"]), int(found["seed"]))


def register_part(part: Part, register: Callable[[str], None]) -> None:
    """Register a part with Detectron2.

    Args:
        part: What to register.
        register: Sees to it that a whole dataset is registered.
    """
    for name in part.names:
        register(name)
    DatasetCatalog.register(part.name, functools.partial(Part.records, part))
    known = MetadataCatalog.get(part.names[0]).as_dict()
    own = ("name", "image_root", "sem_seg_root")
    MetadataCatalog.get(part.name).set(**{k: x for k, x in known.items() if k not in own})


def hold_out(run: RunConfig) -> RunConfig:
    """Let a run train on the rest of its training data, and evaluate on the part held out.

    Args:
        run: With TRANSFER.HELD_OUT 0 it is returned as it is.

    Raises:
        ConfigError: No SEED, so that a resume would hold out others.
    """
    share, seed, train = run.transfer.HELD_OUT, run.cfg.SEED, run.cfg.DATASETS.TRAIN
    if not share or any(part_of(name) for name in train):
        return run
    if seed < 0:
        raise ConfigError(
            f"TRANSFER.HELD_OUT is {share} and SEED is {seed}; give a SEED of 0 or more, which "
            "draws the part, so that a resume holds out the same"
        )
    rest, held_out = (Part(tuple(train), kind, share, seed).name for kind in ("rest", "held_out"))
    return replace(run, peers=[_on(peer, (rest,), (held_out,)) for peer in run.peers])


def _on(peer: Any, train: Sequence[str], test: Sequence[str]) -> Any:
    cfg = peer.cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    cfg.freeze()
    return replace(peer, cfg=cfg)
