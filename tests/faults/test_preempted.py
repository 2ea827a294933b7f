"""SIGTERM, as Slurm sends it: a run saves, ends with 75, and goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.engine import JointEngine
from common.finite import FiniteCheck
from common.termination import EXIT_STATUS
from tests.faults.runs import same

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "classification": "classification/train.py",
    "saliency": "saliency/train_dhf1k.py",
    "segmentation": "segmentation/train_net.py",
}


READING = {
    "classification": ["-j", "1"],
    "saliency": ["--workers", "1"],
    "segmentation": ["DATALOADER.NUM_WORKERS", "1"],
}


def terminate_all(times=2):
    """As Slurm: each process of the job, those that read too; torchrun hands its own on."""
    for _ in range(times):
        os.killpg(0, signal.SIGTERM)
        time.sleep(0.02)


def terminate_at(count, terminate=lambda: os.kill(os.getpid(), signal.SIGTERM)):
    step, calls = JointEngine.step, [0]

    def wrapped(*given, **named):
        calls[0] += 1
        if calls[0] == count:
            terminate()
        return step(*given, **named)

    JointEngine.step = wrapped


def test_a_run_that_is_asked_to_end_saves_and_goes_on(whole, tmp_path):
    task = whole.task
    assert task.run(tmp_path, before=lambda: terminate_at(3)) == EXIT_STATUS
    told = (tmp_path / "log.txt").read_text()
    assert "SIGTERM: saved after" in told and "Traceback" not in told
    task.check_saved(tmp_path)
    assert task.run(tmp_path, resume=True) == 0
    assert same(task.final(tmp_path), whole.final)


def terminate_while_it_is_built():
    build = FiniteCheck.__init__

    def wrapped(*given, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        build(*given, **named)

    FiniteCheck.__init__ = wrapped


def test_a_run_that_is_asked_to_end_before_it_trains_is_requeued_too(whole, tmp_path):
    task = whole.task
    assert task.run(tmp_path, before=terminate_while_it_is_built) == EXIT_STATUS
    told = (tmp_path / "log.txt").read_text()
    assert "SIGTERM: ended outside of the training" in told and "Traceback" not in told


def terminate_in_evaluation(task, number, sent=signal.SIGTERM):
    """Send the signal at the first batch of an evaluation; another batch is an end of its own."""
    owner, name = task.points["in an evaluation"]
    evaluate, evaluations, told = getattr(owner, name), [0], []

    def counted(*given, **named):
        evaluations[0] += 1
        return evaluate(*given, **named)

    setattr(owner, name, counted)
    owner, name = task.batch
    function = getattr(owner, name)

    def wrapped(*given, **named):
        if told:
            os._exit(98)
        if evaluations[0] == number:
            told.append(number)
            os.kill(os.getpid(), sent)
        return function(*given, **named)

    setattr(owner, name, wrapped)


@pytest.mark.parametrize("number", [*(pytest.param(k, marks=pytest.mark.slow) for k in (1, 3)), 2])
def test_an_evaluation_is_ended_at_once_and_made_anew(whole, tmp_path, number):
    task = whole.task
    status = task.run(tmp_path, before=lambda: terminate_in_evaluation(task, number))
    told = (tmp_path / "log.txt").read_text()
    assert status == EXIT_STATUS, told[-3000:]
    assert ("nothing was trained yet" if number == 1 else "SIGTERM: saved after") in told
    assert "Traceback" not in told and task.has_saved(tmp_path) == (number > 1)
    task.check_saved(tmp_path)
    assert task.run(tmp_path, resume=number > 1) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert same(task.final(tmp_path), whole.final)
    names = [sorted(p.name for p in (f / "run").rglob("*.pt*")) for f in (tmp_path, whole.folder)]
    assert names[0] == names[1]  # what was saved for the evaluation alone is gone


@pytest.mark.slow
def test_a_signal_to_the_reading_processes_too_is_outlived(whole, tmp_path):
    task = whole.task

    def before():
        os.setpgid(0, 0)
        terminate_at(3, terminate_all)

    status = task.run(tmp_path, *READING[task.name], before=before)
    told = (tmp_path / "log.txt").read_text()
    assert status == EXIT_STATUS, told[-3000:]
    assert "SIGTERM: saved after" in told and "Traceback" not in told
    assert task.run(tmp_path, *READING[task.name], resume=True) == 0
    assert same(task.final(tmp_path), whole.final)


@pytest.mark.slow
def test_the_command_itself_ends_so(whole, tmp_path):
    task = whole.task
    environment = os.environ | task.environment | {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT)

    def start(resume=False):
        command = [sys.executable, SCRIPTS[task.name], *task.arguments(tmp_path, resume=resume)]
        with (tmp_path / "log.txt").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    process = start()
    while not task.has_saved(tmp_path) and process.poll() is None:
        time.sleep(0.005)
    process.terminate()
    assert process.wait() == EXIT_STATUS, (tmp_path / "log.txt").read_text()[-3000:]
    assert start(resume=True).wait() == 0
    assert same(task.final(tmp_path), whole.final)
