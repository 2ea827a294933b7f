"""Jobs as processes of their own: on this machine, or through a cluster's scheduler."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.termination import Preempted, Termination, deaf_to

PAUSE = 0.2
Commands = Mapping[str, Sequence[str]]


def run_local(
    commands: Commands, logs: Mapping[str, Path], slots: Sequence[Sequence[str]], title: str
) -> dict[str, int]:
    """Run commands side by side.

    Args:
        commands: By label.
        logs: Where each one's output goes.
        slots: Arguments to add, for each that runs at a time; such as its GPU.
        title: Of the bar of progress.

    Returns:
        Exit statuses by label.

    Raises:
        Preempted: SIGTERM came; the jobs were asked to save and to end, and did.
        KeyboardInterrupt: Ctrl-C came; they were asked by SIGTERM too.
    """
    waiting, free = list(commands), list(slots)
    found: dict[str, int] = {}
    running: dict[str, tuple[subprocess.Popen[bytes], Sequence[str]]] = {}
    with Termination() as termination, tqdm(total=len(waiting), unit="job", desc=title) as bar:
        try:
            while waiting or running:
                while waiting and free:
                    label, slot = waiting.pop(0), free.pop(0)
                    running[label] = _started([*commands[label], *slot], logs[label]), slot
                time.sleep(PAUSE)
                ended = [x for x, (job, _) in running.items() if job.poll() is not None]
                for label in ended:
                    job, slot = running.pop(label)
                    found[label] = job.returncode
                    free.append(slot)
                    bar.update()
                if termination.asked:
                    raise Preempted("SIGTERM: give the same command again to go on")
        finally:
            for job, _ in running.values():
                job.terminate()
            for job, _ in running.values():
                job.wait()
    return found


def _started(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file, deaf_to(signal.SIGINT):
        return subprocess.Popen(list(command), stdout=file, stderr=subprocess.STDOUT)


class ClusterJob:
    """A command that a cluster runs, and that is given again where its time was up.

    Args:
        command: What to run.
        log: Where its output goes.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command = list(command)
        self.log = log

    def __call__(self) -> int:
        """Run it; return its exit status."""
        return _started(self.command, self.log).wait()

    def checkpoint(self) -> Any:
        """Say how to go on after preemption: the same command resumes the run."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_submitit(
    executor: Any, commands: Commands, logs: Mapping[str, Path], title: str
) -> dict[str, int]:
    """Submit commands to a cluster and wait for all of them.

    Args:
        executor: Of submitit.
        commands: By label.
        logs: Where each one's output goes, on a file system that the nodes share.
        title: Of the bar of progress.

    Returns:
        Exit statuses by label; 1 for a job that the cluster lost.
    """
    jobs = {}
    with executor.batch():
        for label, command in commands.items():
            jobs[label] = executor.submit(ClusterJob(command, logs[label].resolve()))
    found: dict[str, int] = {}
    with tqdm(total=len(jobs), unit="job", desc=title) as bar:
        while len(found) < len(jobs):
            for label, job in jobs.items():
                if label not in found and job.done():
                    found[label] = job.result() if job.exception() is None else 1
                    bar.update()
            time.sleep(PAUSE)
    return found
