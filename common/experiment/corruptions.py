"""Robustness in an experiment: the same weights, measured again on a spoilt test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from common.experiment.task import CALIBRATION, RECALIBRATED, TEMPERATURE, Task
from common.options import OptionError, near

MILD = 3
"""The severity where none is given."""
CORRUPTED = "corrupted"
ENSEMBLE = "ensemble"

Corruption = tuple[str, int]


@runtime_checkable
class CorruptingTask(Protocol):
    """A task that can spoil its test set; what else a task must have is in ``Task``.

    Attributes:
        severities: How many there are of each corruption, from 1 on, by its name.
    """

    severities: Mapping[str, int]

    def measure_corrupted(
        self,
        options: Mapping[str, Any],
        files: Mapping[str, Path],
        corruptions: Sequence[Corruption],
        temperatures: Mapping[str, float],
    ) -> list[dict[str, float]]:
        """Measure weights on the test set under each corruption.

        What becomes of a sample depends on the sample and the corruption alone.

        Args:
            options: Of the training script.
            files: The peers' weights.
            corruptions: One after the other.
            temperatures: Of those peers (and the ensemble), as fitted on the held-out part, which
                nothing spoils; empty where the task fits none.

        Returns:
            Metrics as of ``Measured``, a row a corruption.
        """


def read_corruptions(value: Any, path: Path) -> list[Corruption]:
    """Understand the key ``corruptions`` of an experiment file.

    Args:
        value: A list whose entries are a name, or ``name: severity``, or a name and a list of
            severities.
        path: Of the file; names it in errors.

    Raises:
        OptionError: It is nothing of this kind, or a corruption is there twice.
    """
    entries = [] if value is None else value
    if not isinstance(entries, list):
        raise OptionError(f"{path}: corruptions is {value!r}; expected a list of `name: severity`")
    found: list[Corruption] = []
    for entry in entries:
        pairs = entry.items() if isinstance(entry, Mapping) else [(entry, MILD)]
        for name, severities in pairs:
            many = severities if isinstance(severities, list) else [severities]
            if not isinstance(name, str) or any(type(severity) is not int for severity in many):
                raise OptionError(
                    f"{path}: corruptions: {entry!r}; expected a name, or `name: severity` with a "
                    "whole number or a list of them"
                )
            found += [(name, severity) for severity in many]
    twice = [label_of(one) for one in found if found.count(one) > 1]
    if twice:
        raise OptionError(f"{path}: corruptions: {twice[0]} is there twice")
    return found


def check_corruptions(corruptions: Sequence[Corruption], task: Task, path: Path) -> None:
    """Refuse corruptions that the task does not have.

    Raises:
        OptionError: Names it and the choices.
    """
    if not corruptions:
        return
    if not isinstance(task, CorruptingTask):
        raise OptionError(f"{path}: corruptions: this task has none; leave the key out")
    for name, severity in corruptions:
        if name not in task.severities:
            raise OptionError(
                f"{path}: unknown corruption {name!r}{near(name, task.severities)}; choose from "
                f"{', '.join(task.severities)}"
            )
        if not 1 <= severity <= task.severities[name]:
            raise OptionError(
                f"{path}: corruption {name}: severity is {severity}; expected 1 to "
                f"{task.severities[name]}"
            )


def label_of(corruption: Corruption) -> str:
    """Name a corruption at its severity, as metrics do behind the ``@``."""
    name, severity = corruption
    return f"{name}-{severity}"


def measure_corruptions(
    task: Task,
    options: Mapping[str, Any],
    files: Mapping[str, Path],
    corruptions: Sequence[Corruption],
    clean: Mapping[str, float],
) -> dict[str, float]:
    """Measure weights under all corruptions.

    Args:
        task: Whose they are.
        options: Of its training script.
        files: The peers' weights.
        corruptions: As the experiment asks.
        clean: What was measured of these weights on the test set as it is: their temperatures.

    Returns:
        ``PEER/METRIC@LABEL`` for every corruption, and ``PEER/METRIC@corrupted``, their mean; of
        the calibration errors and of the ensemble too, where the task measures them.

    Raises:
        TypeError: The task measures none (``check_corruptions`` tells a user so).
    """
    if not isinstance(task, CorruptingTask):
        raise TypeError(f"{type(task).__name__} measures no corruptions")
    fitted = {who: clean.get(f"{who}/{TEMPERATURE}") for who in (*files, ENSEMBLE)}
    temperatures = {who: value for who, value in fitted.items() if value is not None}
    rows = task.measure_corrupted(options, files, corruptions, temperatures)
    found: dict[str, float] = {}
    metrics = (task.metric, CALIBRATION, RECALIBRATED)
    for key in (f"{who}/{metric}" for metric in metrics for who in (*files, ENSEMBLE)):
        if key not in rows[0]:
            continue
        for corruption, row in zip(corruptions, rows, strict=True):
            found[f"{key}@{label_of(corruption)}"] = row[key]
        found[f"{key}@{CORRUPTED}"] = float(np.mean([row[key] for row in rows]))
    return found


def without_corruptions(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of the test set as it is."""
    return {key: value for key, value in metrics.items() if "@" not in key.rpartition("/")[2]}
