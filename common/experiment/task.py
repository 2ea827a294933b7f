"""What a task says so that experiments run on it."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.checkpoint import atomic_write
from common.options import OptionError

FILES: Mapping[str, str] = {"chosen": "best", "last": "last"}
"""How weights are called where a task does not say."""
CALIBRATION = "ece"
RECALIBRATED = "ece_calibrated"
TEMPERATURE = "temperature"


@dataclass
class Measured:
    """What is measured on one set of data.

    Attributes:
        metrics: ``PEER/METRIC`` and, where there is one, ``ensemble/METRIC``. Metrics with a
            meaning of their own in the report: ``fixed``, ``broken`` (against the start), ``ece``
            (calibration error, in percent), ``temperature`` (fitted on the held-out part, never on
            this set) and ``ece_calibrated`` (the error at that temperature).
        classes: For each peer the metric of every class, by the class's name.
    """

    metrics: dict[str, float]
    classes: dict[str, dict[str, float]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return plain containers."""
        return asdict(self)


@dataclass
class Trained:
    """Where a training run ended.

    Attributes:
        history: Evaluations on the held-out part; the first is the start.
        lessons: Rows of the ledger.
        chosen: For each peer the epoch or iteration of its best weights, and their held-out value.
        updates: Optimizer steps made.
        resumed: It went on from a checkpoint of the task's own loop, so its cost is not known.
        files: How the weights are called in the folder of a peer, without the task's suffix.
    """

    history: Sequence[Mapping[str, float]]
    lessons: Sequence[Mapping[str, float]]
    chosen: Mapping[str, tuple[int, float]]
    updates: int
    resumed: bool = False
    files: Mapping[str, str] = field(default_factory=lambda: FILES)


def unchanged(
    starts: Mapping[str, Path], folder: Path, suffix: str, files: Mapping[str, str] = FILES
) -> Trained:
    """Leave what a run of frozen peers alone would: their starts, to be measured.

    Args:
        starts: Weights of each peer.
        folder: Of the run.
        suffix: Of exported weights.
        files: See ``Trained``.
    """
    none = {name: (0, math.nan) for name in starts}
    for name, start in starts.items():
        for file in files.values():
            copied = functools.partial(shutil.copyfile, start)
            atomic_write(folder / name / f"{file}{suffix}", copied)
    return Trained([], [], none, updates=0, files=files)


def refuse_frozen(peers: Sequence[Any]) -> None:
    """Refuse an experiment in which nobody learns.

    Args:
        peers: As the task understood them, with ``frozen``.

    Raises:
        OptionError: Every peer is frozen.
    """
    if all(peer.frozen for peer in peers):
        raise OptionError("every peer is frozen; nothing would be trained")


def hidden_by(
    peer: Mapping[str, Any], own: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, str]:
    """Answer ``Task.hidden`` where a peer's entry has options beside its model.

    Args:
        peer: Its entry.
        own: Options of an arm.
        aliases: Other names of options in an entry.
    """
    written = {str(key).replace("-", "_"): value for key, value in peer.items()}
    of_peer = {aliases.get(key, key): value for key, value in written.items()}
    return {
        option: f"its entry has {option} {of_peer[option]}; take it out there, and give it under "
        "train"
        for option, value in own.items()
        if option in of_peer and not _apart(value, of_peer[option])
    }


def _apart(one: Any, other: Any) -> bool:
    """Whether two options hold keys of their own, of which none is in both."""
    both = isinstance(one, Mapping) and isinstance(other, Mapping)
    return both and not set(one) & set(other)


class Task(Protocol):
    """Classification, say. Options are those of its training script, by their YAML names.

    Attributes:
        module: What ``python -m`` runs the experiment script by.
        metric: The one that counts.
        lower_is_better: Of it.
        suffix: Of exported weights.
        others: Metrics that the report shows beside it, each with whether lower is better. A task
            that has none may leave this out.
        flips: What ``fixed`` and ``broken`` count, if not samples that turned right and wrong. May
            be left out.
        hosts: Versions of the libraries that it runs on, by name. May be left out.
    """

    module: str
    metric: str
    lower_is_better: bool
    suffix: str

    def read(self, path: Path) -> Any:
        """Read a YAML file into plain containers."""

    def check(self, options: Mapping[str, Any]) -> list[str]:
        """Refuse options that cannot be used; return the peers' names."""

    def hidden(
        self, peer: Mapping[str, Any], train: Mapping[str, Any], own: Mapping[str, Any]
    ) -> Mapping[str, str]:
        """Say which options of an arm would not reach a peer, as it has its own.

        Args:
            peer: Its entry.
            train: The options for all arms.
            own: Those of the arm, and of what is tried for all.

        Returns:
            By option where the peer's value stands, and the way out.
        """

    def sources(self, options: Mapping[str, Any]) -> dict[str, str]:
        """Say what a run rests on: files to start from, training data and test set.

        Returns:
            Of each the sum, by what it is called in the options.

        Raises:
            OptionError: Files are missing, or some are both trained on and in the test set.
        """

    def start(self, options: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Measured]:
        """Write each peer's weights as they are before training; measure them.

        Returns:
            ``held_out`` and ``test``.
        """

    def started(self, peer: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
        """Return a peer's entry that starts from a file of ``start``, its options kept."""

    def train(self, options: Mapping[str, Any], folder: Path) -> Trained:
        """Train, or go on with the run of that folder; leave each peer's best and last weights.

        Frozen peers alone, as in ``solo``, stay ``unchanged``.
        """

    def measure(
        self, options: Mapping[str, Any], files: Mapping[str, Path], start: Mapping[str, Path]
    ) -> Measured:
        """Measure exported weights on the test set; ``start`` has the starts', for flips."""
