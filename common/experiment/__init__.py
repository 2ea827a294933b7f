"""Experiments: arms over seeds from the same starts, chosen on held-out data, told with tests."""

from common.experiment.command import main
from common.experiment.plan import Experiment, read_experiment
from common.experiment.task import (
    RECALIBRATED,
    TEMPERATURE,
    Measured,
    Task,
    Trained,
    hidden_by,
    refuse_frozen,
    unchanged,
)

__all__ = [
    "RECALIBRATED",
    "TEMPERATURE",
    "Experiment",
    "Measured",
    "Task",
    "Trained",
    "hidden_by",
    "main",
    "read_experiment",
    "refuse_frozen",
    "unchanged",
]
