"""Finished runs, read back: which models, and what became of them."""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.options import OptionError, number_repeats
from common.outputs import plain
from common.realised import FinishedRun

# Options of every task that are the transfer's, but for what predictions are made by.
_TRANSFER = frozenset(
    (
        "temperature transfer_weight transfer_warmup_steps detach_teacher gap_power "
        "transfer_classes teachers calibrate_scores"
    ).split()
)
# Options of every task that are the transfer's, or change nothing of what is learned.
_NOT_SETTING = _TRANSFER | frozenset(
    (
        "peers recipe rule score margin engine output "
        "experiment workers log_interval log_wandb wandb_project checkpoint_hist config device "
        "recovery_interval in_place resume val_interval no_resume_opt plan gpu_mem soup"
    ).split()
)
_DATA = ("data", "data_root")
_REPEATED = frozenset(("seed", "data"))  # a mean may go over these

Parse = Callable[[Sequence[str]], tuple[argparse.Namespace, Sequence[Any]]]


@dataclass(frozen=True)
class ReadRun:
    """A run's folder, read.

    Attributes:
        folder: Of the run.
        started: The options or the config that it was started with.
        specs: Its peers as asked for, each with a ``name``.
        models: Of each peer what it is before training, as text: where it is the same in two runs,
            it is the same model, whatever its name and however it is trained.
        trained: Of each peer the options of its own that say how it is trained.
        before: Metric of each at the start.
        after: Metric of each at the end.
        rule, score, margin: Of the transfer.
        setting: All else that it was trained with, as text; a control has the same.
        alike: Options, as text, which runs of one team have in common where they are averaged.
        grouped: What has one teacher, where that is not each sample.
    """

    folder: Path
    started: Any
    specs: Sequence[Any]
    models: Sequence[str]
    trained: Sequence[Mapping[str, str]]
    before: tuple[float, ...]
    after: tuple[float, ...]
    rule: str
    score: str
    margin: float | None
    setting: str
    alike: Mapping[str, str]
    grouped: str = ""


def read_run(
    folder: Path,
    parse: Parse,
    metric: str,
    last: str,
    own: Collection[str],
    at_start: Collection[str],
    not_setting: Collection[str] = (),
) -> ReadRun:
    """Read ``args.yaml`` and ``summary.csv`` of a finished run.

    Args:
        folder: Of the run.
        parse: The command line of train.py, which gives its options and its peers.
        metric: What is gained.
        last: Name of the file that a peer has at the end.
        own: Options that a peer may set for itself.
        at_start: Of these, what decides what it predicts before training.
        not_setting: Options of the task that change nothing of what is learned.

    Raises:
        OptionError: No such run, one that did not finish, or one whose files do not fit.
    """
    require_files(folder, ("args.yaml", "summary.csv"))
    options, specs = parse(["-c", str(folder / "args.yaml")])
    names = [spec.name for spec in specs]
    require_ends(folder, names, last)
    before, after = read_ends(folder / "summary.csv", names, metric)
    left_out = {*_NOT_SETTING, *not_setting, *own}
    told = plain(options)
    told |= {name: place_of(told[name]) for name in _DATA if name in told}
    setting = {name: x for name, x in told.items() if name not in left_out}
    transfer = {name: x for name, x in told.items() if name in _TRANSFER}
    return ReadRun(
        folder,
        options,
        specs,
        [_model(spec, at_start) for spec in specs],
        [_trained(spec, {*own} - {*at_start}) for spec in specs],
        before,
        after,
        options.rule,
        options.score,
        options.margin,
        as_text(setting),
        as_texts({name: x for name, x in (transfer | setting).items() if name not in _REPEATED}),
    )


def _model(spec: Any, at_start: Collection[str]) -> str:
    mine = {name: x for name, x in plain(spec.options).items() if name in at_start}
    several = isinstance(spec.checkpoint, (list, tuple))
    files = [place_of(x) for x in spec.checkpoint] if several else place_of(spec.checkpoint)
    return as_text([place_of(spec.model), files, mine])


def place_of(value: Any) -> Any:
    """Return the one name of what lies on this machine; all else as it is."""
    there = isinstance(value, (str, Path)) and value and os.path.exists(value)
    return os.path.realpath(value) if there else value


def _trained(spec: Any, by: Collection[str]) -> dict[str, str]:
    mine = {name: x for name, x in plain(spec.options).items() if name in by}
    return as_texts({**mine, "frozen": spec.frozen})


def as_text(value: Any) -> str:
    """Write plain containers as text, in which the order of keys does not count."""
    return json.dumps(value, sort_keys=True, default=str)


def as_texts(options: Mapping[str, Any]) -> dict[str, str]:
    """Write the value of each option as text."""
    return {name: as_text(value) for name, value in options.items()}


def require_files(folder: Path, files: Sequence[str]) -> None:
    """Refuse a folder that is no run's.

    Raises:
        OptionError: Names the folder and what it lacks.
    """
    for name in files:
        if not (folder / name).is_file():
            raise OptionError(
                f"{folder}: not the folder of a run of training: it has no {name}; give the folder "
                f"that training wrote, with {' and '.join(files)} in it"
            )


def require_ends(folder: Path, names: Sequence[str], last: str) -> None:
    """Refuse a run that did not finish.

    Args:
        folder: Of the run.
        names: Of the peers that have a file at the end.
        last: The file's name.

    Raises:
        OptionError: Names the first peer without it.
    """
    for name in names:
        if not (folder / name / last).is_file():
            raise OptionError(
                f"{folder}: did not finish: {name} has no {last}; resume it, or leave it out"
            )


def read_ends(
    path: Path, names: Sequence[str], metric: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each peer's metric at the first and at the last evaluation of a ``summary.csv``.

    Raises:
        OptionError: A table that has it not.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        before, after = (
            tuple(float(row[f"{name}/{metric}"]) for name in names) for row in (rows[0], rows[-1])
        )
    except (KeyError, ValueError, IndexError) as error:
        raise OptionError(
            f"{path}: {metric} of {', '.join(names)} cannot be read ({error!r})"
        ) from error
    return before, after


def shared_models(runs: Sequence[ReadRun]) -> tuple[list[Any], list[str], list[FinishedRun]]:
    """Find the models that runs have in common.

    Names of peers may repeat between runs; here each model gets its own.

    Returns:
        The different models as asked for, their names, and the runs with their members' numbers.

    Raises:
        OptionError: A run with transfer between two peers that start as one model.
    """
    numbers: dict[str, int] = {}
    specs: list[Any] = []
    finished = []
    for run in runs:
        if run.rule != "none":
            _refuse_twins(run)
        members = []
        for spec, model in zip(run.specs, run.models, strict=True):
            number = numbers.setdefault(model, len(numbers))
            members.append(number)
            if number == len(specs):
                specs.append(spec)
        finished.append(
            FinishedRun(
                title=str(run.folder),
                members=tuple(members),
                before=run.before,
                after=run.after,
                rule=run.rule,
                score=run.score,
                margin=run.margin,
                setting=run.setting,
                trained=tuple(run.trained),
                alike=run.alike,
                grouped=run.grouped,
            )
        )
    return specs, number_repeats(("", spec.name) for spec in specs), finished


def _refuse_twins(run: ReadRun) -> None:
    for i, model in enumerate(run.models):
        first = run.models.index(model)
        if first < i:
            raise OptionError(
                f"{run.folder}: {run.specs[first].name} and {run.specs[i].name} start as the same "
                "model, and scouting judges teams of different ones; leave this run out"
            )


def refuse_other_data(asked: str, of_runs: Sequence[str], flag: str) -> None:
    """Refuse runs of different data where none was chosen to scout on.

    Args:
        asked: The data that is scouted on.
        of_runs: The data of each run, in words.
        flag: How data is chosen.

    Raises:
        OptionError: Names the data.
    """
    data = sorted({*of_runs, asked})
    if len(data) > 1 and asked == of_runs[0]:
        raise OptionError(f"the runs have different data, {', '.join(data)}; give {flag}")
