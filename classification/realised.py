"""Finished runs of train.py, read back: which models, and what became of them."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from classification.options import PEER_OPTIONS, PeerSpec, parse
from common.options import OptionError, number_repeats
from common.outputs import plain
from common.realised import FinishedRun

METRIC = "top1"
# Options that are the transfer's, or change nothing of what is learned.
_NOT_SETTING = frozenset(
    (
        "peers rule score margin temperature transfer_weight transfer_warmup_steps detach_teacher "
        "engine output experiment workers pin_mem log_interval log_wandb wandb_project wandb_tags "
        "checkpoint_hist recovery_interval config device in_place resume local_rank val_interval "
        "data_dir validation_batch_size no_resume_opt plan gpu_mem"
    ).split()
)


@dataclass(frozen=True)
class ReadRun:
    """A run's folder, read.

    Attributes:
        folder: Of the run.
        options: It was started with.
        specs: Its peers.
        before: Top-1 of each at the start, in per cent.
        after: Top-1 of each at the end.
    """

    folder: Path
    options: argparse.Namespace
    specs: list[PeerSpec]
    before: tuple[float, ...]
    after: tuple[float, ...]


def read_run(folder: Path) -> ReadRun:
    """Read ``args.yaml`` and ``summary.csv`` of a finished run.

    Raises:
        OptionError: No such run, one that did not finish, or one whose files do not fit.
        CheckpointError: A peer's own file is gone.
    """
    arguments, summary = folder / "args.yaml", folder / "summary.csv"
    for path in (arguments, summary):
        if not path.is_file():
            raise OptionError(
                f"{folder}: not the folder of a run of train.py: it has no {path.name}"
            )
    options, specs = parse(["-c", str(arguments)])
    for spec in specs:
        if not (folder / spec.name / "last.safetensors").is_file():
            raise OptionError(f"{folder}: did not finish: {spec.name} has no last.safetensors")
    with summary.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        before, after = (
            tuple(float(row[f"{spec.name}/{METRIC}"]) for spec in specs)
            for row in (rows[0], rows[-1])
        )
    except (KeyError, ValueError, IndexError) as error:
        raise OptionError(f"{summary}: cannot be read ({error!r})") from error
    return ReadRun(folder, options, specs, before, after)


def shared_specs(runs: Sequence[ReadRun]) -> tuple[list[PeerSpec], list[FinishedRun]]:
    """Find the models that runs have in common.

    Two peers are the same model where name of the model, checkpoint and all options that a peer may
    set are the same. Names of peers may repeat between runs; here each gets its own.

    Returns:
        The different models, and the runs with their members' numbers.
    """
    numbers: dict[str, int] = {}
    specs: list[PeerSpec] = []
    finished = []
    for run in runs:
        members = []
        for spec in run.specs:
            number = numbers.setdefault(_identity(spec), len(numbers))
            members.append(number)
            if number == len(specs):
                specs.append(spec)
        finished.append(
            FinishedRun(
                title=str(run.folder),
                members=tuple(members),
                before=run.before,
                after=run.after,
                rule=run.options.rule,
                score=run.options.score,
                margin=run.options.margin,
                setting=_setting(run.options),
            )
        )
    names = number_repeats(("", spec.name) for spec in specs)
    return [replace(spec, name=name) for spec, name in zip(specs, names, strict=True)], finished


def _identity(spec: PeerSpec) -> str:
    own = {name: value for name, value in plain(spec.options).items() if name in PEER_OPTIONS}
    return json.dumps([spec.model, spec.checkpoint, spec.frozen, own], sort_keys=True)


def _setting(options: argparse.Namespace) -> str:
    own = {
        name: value
        for name, value in plain(options).items()
        if name not in _NOT_SETTING and name not in PEER_OPTIONS
    }
    return json.dumps(own, sort_keys=True)
