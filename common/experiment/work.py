"""One job: the starts of a seed, or one arm on one seed; what came of it is kept in a file."""

from __future__ import annotations

import filecmp
import hashlib
import json
import math
import resource
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import recipes
from common.card import versions
from common.checkpoint import list_runs
from common.demo import write_json
from common.experiment.corruptions import label_of, measure_corruptions, without_corruptions
from common.experiment.plan import MEASURES, START, Experiment
from common.experiment.sources import check_sources
from common.experiment.task import Measured, Task, Trained
from common.options import OptionError
from common.peers import RESERVED_NAMES


def labels_of(experiment: Experiment) -> list[str]:
    """List all jobs, ``ARM:SEED``: the starts, which all others need, then seed by seed."""
    starts = [f"{START}:{seed}" for seed in experiment.seeds]
    return starts + [f"{arm}:{seed}" for seed in experiment.seeds for arm in experiment.arms]


def read_label(label: str, experiment: Experiment) -> tuple[str, int]:
    """Return arm and seed.

    Raises:
        OptionError: No such job.
    """
    if label not in labels_of(experiment):
        raise OptionError(
            f"no job {label!r}; a job is ARM:SEED with an arm of {', '.join(experiment.arms)}, "
            f"{START}, and a seed of {', '.join(map(str, experiment.seeds))}"
        )
    arm, _, seed = label.rpartition(":")
    return arm, int(seed)


def finished(experiment: Experiment, arm: str, seed: int) -> dict[str, Any] | None:
    """Return what came of a job; None where it is not finished.

    Raises:
        OptionError: Its result is of other options than the experiment's.
    """
    found = _trained(experiment, arm, seed)
    wanted = [label_of(one) for one in experiment.corruptions]
    if found is not None and wanted and found.get("corruptions") != wanted:
        return None  # other corruptions are measured without training anew
    return found


def _trained(experiment: Experiment, arm: str, seed: int) -> dict[str, Any] | None:
    path = experiment.result(arm, seed)
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if found["asked"] != _asked(experiment, arm, seed):
        raise OptionError(
            f"{path}: of other options than the experiment has now; give the experiment another "
            f"`output`, or remove {path.parent} to run it again"
        )
    return found


def work(experiment: Experiment, task: Task, label: str) -> dict[str, Any]:
    """Do one job, or what is left of it.

    Returns:
        The content of its ``result.json``.

    Raises:
        OptionError: No such job, an arm whose starts are not there yet, or starts or data that
            changed since another seed was begun.
    """
    arm, seed = read_label(label, experiment)
    found = finished(experiment, arm, seed)
    if found is not None:
        return found
    rests_on = check_sources(experiment, task, [seed])
    found = _trained(experiment, arm, seed)
    if found is None:
        do = _start if arm == START else _train
        found = {
            "arm": arm,
            "seed": seed,
            "asked": _asked(experiment, arm, seed),
            "versions": versions(**getattr(task, "hosts", {})),
            **({"sources": rests_on} if arm == START else {}),
            **do(experiment, task, arm, seed),
        }
        write_json(experiment.result(arm, seed), found)
    if experiment.corruptions:
        _corrupt(experiment, task, found)
        write_json(experiment.result(arm, seed), found)
    return found


def _corrupt(experiment: Experiment, task: Task, found: dict[str, Any]) -> None:
    """Add to a result what its weights are worth under the experiment's corruptions."""
    arm, seed = found["arm"], found["seed"]
    names = task.check(experiment.options(START, seed))
    starts = start_files(experiment, task, names, seed)
    options = experiment.options(arm, seed, ranked=names)
    measured: list[tuple[dict[str, Path], dict[str, float]]] = []
    for what in ("test",) if arm == START else MEASURES:
        files = starts if arm == START else _weights(experiment, task, found, what)
        clean = without_corruptions(found[what]["metrics"])
        same = [metrics for other, metrics in measured if _are_equal(files, other)]
        metrics = (
            same[0]
            if same
            else measure_corruptions(task, options, files, experiment.corruptions, clean)
        )
        measured.append((files, metrics))
        found[what]["metrics"] = {**clean, **metrics}
    found["corruptions"] = [label_of(one) for one in experiment.corruptions]


def _weights(
    experiment: Experiment, task: Task, found: Mapping[str, Any], what: str
) -> dict[str, Path]:
    """Say where a finished arm's weights lie."""
    arm, called = found["arm"], found.get("files", {"chosen": "best", "last": "last"})
    folder, alone = experiment.folder(arm, found["seed"]), experiment.arms[arm].alone
    files = {}
    for name, setting in found["settings"].items():
        number = experiment.tuned.index(setting)
        place = _place(folder, name if alone else "", number, setting)
        files[name] = place / name / f"{called[what]}{task.suffix}"
    return files


def _are_equal(one: Mapping[str, Path], two: Mapping[str, Path]) -> bool:
    return all(filecmp.cmp(one[name], two[name], shallow=False) for name in one)


def _asked(experiment: Experiment, arm: str, seed: int) -> str:
    """Tell the options of a job apart from others, in a few digits."""
    options = replace(experiment, device="").options(arm, seed)
    content = [options, experiment.tuned]
    if options.get("recipe") in recipes.RECIPES:  # its values may change
        content.append(recipes.values_of(options["recipe"]))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _start(experiment: Experiment, task: Task, arm: str, seed: int) -> dict[str, Any]:
    options = experiment.options(START, seed)
    files = start_files(experiment, task, task.check(options), seed)
    return {what: found.plain() for what, found in task.start(options, files).items()}


def start_files(experiment: Experiment, task: Task, names: list[str], seed: int) -> dict[str, Path]:
    """Say where the starts of a seed lie."""
    folder = experiment.folder(START, seed)
    return {name: folder / f"{name}{task.suffix}" for name in names}


def rank_at_start(start: Mapping[str, Any], names: list[str], task: Task) -> list[str]:
    """Order the peers by the held-out part, from the strongest to the weakest at the start."""
    metrics = start["held_out"]["metrics"]
    sign = 1 if task.lower_is_better else -1
    return sorted(names, key=lambda name: sign * metrics[f"{name}/{task.metric}"])


def _train(experiment: Experiment, task: Task, arm: str, seed: int) -> dict[str, Any]:
    start = finished(experiment, START, seed)
    if start is None:
        raise OptionError(f"the starts of seed {seed} are not there yet; run {START}:{seed} first")
    names = task.check(experiment.options(START, seed))
    files = start_files(experiment, task, names, seed)
    peers = [
        task.started(entry, name, files[name])
        for entry, name in zip(experiment.options(START, seed)["peers"], names, strict=True)
    ]
    ranked = rank_at_start(start, names, task)
    folder = experiment.folder(arm, seed)
    alone = experiment.arms[arm].alone
    parts = {name: [i] for i, name in enumerate(names)} if alone else {"": range(len(names))}
    runs: dict[str, _Run] = {}
    spent: list[dict[str, Any]] = []
    for part, members in parts.items():
        tried = []
        for number, setting in enumerate(experiment.tuned):
            chosen = [peers[i] for i in members]
            options = experiment.options(arm, seed, chosen, setting, ranked)
            place = _place(folder, part, number, setting)
            trained, cost = _measured_cost(task, options, place)
            tried.append(_Run(place, setting, options, trained))
            spent.append(cost)
        run = min(tried, key=lambda run: run.rank([names[i] for i in members], task))
        runs |= {names[i]: run for i in members}
    return {
        "epochs": {name: run.trained.chosen[name][0] for name, run in runs.items()},
        "settings": {name: run.setting for name, run in runs.items()},
        "history": _merged([run.trained.history for run in _distinct(runs)]),
        "lessons": [] if alone else list(runs[names[0]].trained.lessons),
        "cost": _sum(spent),
        "files": dict(runs[names[0]].trained.files),
        **{what: _measure(task, runs, what, files, peers).plain() for what in MEASURES},
    }


def _place(folder: Path, part: str, number: int, setting: Mapping[str, Any]) -> Path:
    """Say where the run of a setting lies; each peer has its own where it is alone."""
    return folder / f"{part or 'run'}{f'-{number}' if setting else ''}"


class _Run:
    """A finished training run.

    Args:
        folder: Of the run.
        setting: What was tried.
        options: It was trained with.
        trained: Where it ended.
    """

    def __init__(
        self, folder: Path, setting: dict[str, Any], options: dict[str, Any], trained: Trained
    ) -> None:
        self.folder, self.setting, self.options, self.trained = folder, setting, options, trained

    def rank(self, names: list[str], task: Task) -> float:
        """Return what the smallest of is best: the peers' mean on the held-out part."""
        values = [self.trained.chosen[name][1] for name in names]
        mean = sum(values) / len(values)
        if math.isnan(mean):
            return math.inf
        return mean if task.lower_is_better else -mean


def _distinct(runs: Mapping[str, _Run]) -> list[_Run]:
    return list(dict.fromkeys(runs.values()))


def _measured_cost(
    task: Task, options: dict[str, Any], folder: Path
) -> tuple[Trained, dict[str, Any]]:
    """Train, and count what it took; nothing is known of a run that was interrupted."""
    whole = not list_runs(folder)
    begun, cpu = time.perf_counter(), _cpu_seconds()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trained = task.train(options, folder)
    cost = {"wall_seconds": time.perf_counter() - begun, "cpu_seconds": _cpu_seconds() - cpu}
    if cuda:
        cost["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return trained, {
        "updates": trained.updates,
        **(cost if whole and not trained.resumed else {}),
    }


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended, as workers have."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _sum(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the runs of an arm up; memory is that of the largest."""
    common = [key for key in costs[0] if all(key in cost for cost in costs)]
    add = {key: max if key == "gpu_bytes" else sum for key in common}
    return {key: add[key](cost[key] for cost in costs) for key in common}


def _merged(histories: list[Any]) -> list[dict[str, float]]:
    """Join the peers' evaluations of the same epochs, where each had a run of its own."""
    if len(histories) == 1:
        return [dict(row) for row in histories[0]]
    rows: dict[Any, dict[str, float]] = {}
    for history in histories:
        for row in history:
            unit = "epoch" if "epoch" in row else "iteration"
            # what a peer alone says of a group is about itself
            own = {k: v for k, v in row.items() if k.split("/")[0] not in RESERVED_NAMES}
            rows.setdefault(row[unit], {}).update(own)
    return [rows[key] for key in sorted(rows)]


def _measure(
    task: Task,
    runs: Mapping[str, _Run],
    what: str,
    starts: Mapping[str, Path],
    peers: list[dict[str, Any]],
) -> Measured:
    """Measure all peers' weights together, whatever run each comes from."""
    files = {
        name: run.folder / name / f"{run.trained.files[what]}{task.suffix}"
        for name, run in runs.items()
    }
    # of a peer that was trained alone, the options name no other
    options = {**next(iter(runs.values())).options, "peers": peers}
    return task.measure(options, files, starts)
