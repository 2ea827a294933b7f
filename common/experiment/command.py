"""The command line of an experiment."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import CheckpointError
from common.claimed import claim, claims_end
from common.experiment.corruptions import check_corruptions
from common.experiment.local import run_local, run_submitit
from common.experiment.plan import CONTROLS, START, Experiment, read_experiment
from common.experiment.results import write_results
from common.experiment.sources import check_sources
from common.experiment.task import Task
from common.experiment.work import finished, labels_of, read_label, work
from common.options import OptionError, check_least
from common.outputs import make_writable, run_command
from common.termination import Interrupted

_logger = logging.getLogger("experiment")


def main(
    task: Task, faults: tuple[type[Exception], ...], arguments: Sequence[str] | None = None
) -> int:
    """Run the command line; bad input ends in one line, not in a traceback.

    Args:
        task: Classification, say.
        faults: What it raises on bad input.
        arguments: As on the command line; None: those of the process.
    """
    return run_command(lambda: run(task, arguments), (OptionError, *faults))


def build_parser(task: Task) -> argparse.ArgumentParser:
    """Build the parser."""
    parser = argparse.ArgumentParser(
        prog=f"{task.module.replace('.', '/')}.py",
        description="Train arms over seeds from the same starts, and test what they gain. Control "
        f"arms come by themselves: {', '.join(CONTROLS)}.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("experiment", type=Path, metavar="FILE", help="YAML of peers, data, seeds and arms")
    add("--jobs", type=int, default=1, help="runs side by side on this machine")
    add("--list", action="store_true", help="print the jobs, ARM:SEED, for a scheduler of your own")
    add("--only", nargs="+", metavar="ARM:SEED", help="do these jobs one by one, here")
    add("--threads", type=int, help="of the processor, for one job (default: shared out)")
    add("--device", default="", help="of the jobs given by --only; else GPUs are taken in turns")
    add("--report", action="store_true", help="only write the report of what is finished")
    group = parser.add_argument_group("cluster (needs submitit)")
    add = group.add_argument
    add("--submitit", action="store_true", help="submit every job to a cluster")
    add("--cluster", choices=("slurm", "local", "debug"), help="instead of the one that is found")
    add("--partition")
    add("--timeout-min", type=int, default=24 * 60, help="of one job; it goes on where it was")
    add("--cpus", type=int, default=8, help="of one job")
    add("--gpus", type=int, default=1, help="of one job")
    add("--mem-gb", type=int, default=64, help="of one job")
    return parser


def run(task: Task, arguments: Sequence[str] | None = None, executor: Any = None) -> Path | None:
    """Run as the arguments say.

    Args:
        task: Classification, say.
        arguments: As on the command line; None: those of the process.
        executor: Of submitit, instead of one made from the options.

    Returns:
        The report; None where none was asked for.

    Raises:
        OptionError: Bad input, before any job runs; or jobs that failed, after all have ended.
        OutputError: Another command runs the jobs.
        Interrupted: Ctrl-C came; the jobs of this machine have saved and ended.
    """
    asked = build_parser(task).parse_args(arguments)
    try:
        return _run(task, asked, executor)
    except KeyboardInterrupt as error:
        jobs = "the cluster's jobs go on; " if asked.submitit else ""
        raise Interrupted(f"{jobs}give the same command again to go on") from error


def _run(task: Task, asked: argparse.Namespace, executor: Any) -> Path | None:
    experiment = _read(asked, task)
    if asked.list:
        sys.stdout.write("\n".join(labels_of(experiment)) + "\n")
        return None
    if not asked.report:
        make_writable(experiment.output, f"{asked.experiment}: output")
    if asked.only:
        if asked.threads:
            torch.set_num_threads(asked.threads)
        for label in asked.only:
            work(experiment, task, label)
        return None
    if not asked.report:
        executor = executor or (_executor(asked, experiment) if asked.submitit else None)
        with claims_end():
            claim(experiment.output)
            run_jobs(experiment, task, asked, executor)
    report = write_results(experiment, task)
    _logger.info("report: %s", report)
    return report


def _read(asked: argparse.Namespace, task: Task) -> Experiment:
    """Read the experiment and try the options of every arm, before any work is done."""
    if not asked.experiment.is_file():
        raise OptionError(f"{asked.experiment}: no such experiment file; expected one of YAML")
    check_least(asked, {"jobs": 1, "threads": 1})
    experiment = read_experiment(task.read(asked.experiment), asked.experiment)
    check_corruptions(experiment.corruptions, task, asked.experiment)
    experiment = replace(experiment, device=asked.device)
    for seed in experiment.seeds:  # each may have starts and data of its own
        try:
            names = task.check(experiment.options(START, seed))
        except (OptionError, CheckpointError) as error:
            raise _named(asked.experiment, "", error) from error
    if len(names) != len(experiment.peers):
        raise OptionError(
            f"{asked.experiment}: {len(experiment.peers)} peers stand for {len(names)} models; an "
            "experiment needs each by its own name"
        )
    for arm in experiment.arms:
        for setting in experiment.tuned:
            try:
                _refuse_hidden(task, experiment, {**setting, **experiment.arms[arm].options}, names)
                task.check(experiment.options(arm, seed, None, setting, names))
            except OptionError as error:
                raise _named(asked.experiment, f"arm {arm!r}: ", error) from error
    return experiment


def _named(path: Path, where: str, error: Exception) -> OptionError:
    """Put the experiment's file before an error, once."""
    return OptionError(f"{path}: {where}{str(error).removeprefix(f'{path}: ')}")


def _refuse_hidden(
    task: Task, experiment: Experiment, own: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Refuse an arm that would differ from others less than it says."""
    for name, peer in zip(names, experiment.peers, strict=True):
        for option, why in task.hidden(peer, experiment.train, own).items():
            raise OptionError(f"{option} {own[option]} would not reach peer {name!r}: {why}")


def run_jobs(
    experiment: Experiment, task: Task, asked: argparse.Namespace, executor: Any = None
) -> None:
    """Run all jobs that are not finished: first the starts, then the arms.

    Raises:
        OptionError: Starts or data changed since a seed was begun, before any job runs. Or names
            the jobs that failed, once all have ended.
    """
    labels = labels_of(experiment)
    if any(finished(experiment, *read_label(x, experiment)) is None for x in labels):
        check_sources(experiment, task, experiment.seeds)
    starts = [label for label in labels if label.startswith(f"{START}:")]
    for title, wave in (("starts", starts), ("arms", labels[len(starts) :])):
        left = [x for x in wave if finished(experiment, *read_label(x, experiment)) is None]
        if not left:
            continue
        commands = {label: _command(task, asked.experiment, label) for label in left}
        logs = {x: experiment.folder(*read_label(x, experiment)) / "log.txt" for x in left}
        if executor is not None:
            statuses = run_submitit(executor, commands, logs, title)
        else:
            statuses = run_local(commands, logs, _slots(asked, len(left)), title)
        _check(statuses, logs)


def _slots(asked: argparse.Namespace, left: int) -> list[list[str]]:
    """Share processor and GPUs out among the jobs that run side by side."""
    jobs = min(asked.jobs, left)
    threads = asked.threads or max(1, torch.get_num_threads() // jobs)
    gpus = torch.cuda.device_count()
    return [
        ["--threads", str(threads), *(["--device", f"cuda:{i % gpus}"] if gpus else [])]
        for i in range(jobs)
    ]


def _command(task: Task, path: Path, label: str) -> list[str]:
    return [sys.executable, "-m", task.module, str(path), "--only", label]


def _check(statuses: Mapping[str, int], logs: Mapping[str, Path]) -> None:
    failed = [label for label, status in statuses.items() if status]
    for label in failed:
        lines = logs[label].read_text(errors="replace").splitlines() if logs[label].exists() else []
        _logger.error("%s failed: %s", label, lines[-1] if lines else "it wrote nothing")
    if failed:
        raise OptionError(
            f"{len(failed)} of {len(statuses)} jobs failed ({', '.join(failed[:5])}); see "
            f"{logs[failed[0]]}, mend it, and give the same command again: what is finished stays; "
            "--report shows it"
        )


def _executor(asked: argparse.Namespace, experiment: Experiment) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise OptionError(
            '--submitit needs submitit: pip install -e ".[cluster]"; or give the jobs of --list to '
            "your scheduler, each with --only"
        ) from error
    executor = submitit.AutoExecutor(folder=experiment.output / "submitit", cluster=asked.cluster)
    wanted = {
        "name": experiment.output.name,
        "timeout_min": asked.timeout_min,
        "cpus_per_task": asked.cpus,
        "gpus_per_node": asked.gpus,
        "mem_gb": asked.mem_gb,
        "slurm_partition": asked.partition,
        # submitit asks sbatch alone, and from there srun takes it no more, since Slurm 22.05
        "slurm_srun_args": [f"--cpus-per-task={asked.cpus}"],
    }
    executor.update_parameters(**{key: value for key, value in wanted.items() if value is not None})
    return executor
