"""A signal to two ranks in an evaluation: both end by it, and the run goes on bit for bit."""

import logging
import os
import signal
import sys

import pytest

from common.checkpoint import load_run
from common.termination import EXIT_STATUS, INTERRUPTED
from tests.faults.runs import same
from tests.faults.test_preempted import terminate_in_evaluation
from tests.launch import launch

COMMAND = ["--dist-bn", "reduce", "--resume", "auto"]  # one for the start and for what follows


def run_rank(world, task, folder, number, sent):
    """Run the command line in a forked rank; keep what it tells, and its status."""
    told = os.open(folder / f"log-{world.rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(told, 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    logging.getLogger().handlers.clear()  # pytest's, which would keep it all
    if number:
        terminate_in_evaluation(task, number, sent)
    status = task.main(folder, *COMMAND)
    (folder / f"status-{world.rank}").write_text(str(status))


def statuses(task, folder, number=0, sent=None):
    folder.mkdir(exist_ok=True)
    launch(run_rank, 2, task, folder, number, sent)
    return [int((folder / f"status-{rank}").read_text()) for rank in (0, 1)]


def told(folder):
    return "".join((folder / f"log-{rank}.txt").read_text() for rank in (0, 1))


@pytest.fixture(scope="module")
def whole_of_two(whole_runs, tmp_path_factory):
    task, folder = whole_runs("classification").task, tmp_path_factory.mktemp("two") / "whole"
    assert statuses(task, folder) == [0, 0], told(folder)[-3000:]
    return task.final(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "sent", "status", "line"),
    [
        (2, signal.SIGTERM, EXIT_STATUS, "SIGTERM: saved after"),
        (3, signal.SIGTERM, EXIT_STATUS, "SIGTERM: saved after"),
        (2, signal.SIGINT, INTERRUPTED, "interrupted: go on from the last run file with --resume"),
    ],
)
def test_ranks_are_ended_in_an_evaluation_and_go_on(
    whole_runs, whole_of_two, tmp_path, number, sent, status, line
):
    task = whole_runs("classification").task
    assert statuses(task, tmp_path, number, sent) == [status] * 2, told(tmp_path)[-3000:]
    lines = told(tmp_path)
    assert line in lines and "Traceback" not in lines
    assert lines.count("interrupted: ") == (sent == signal.SIGINT)  # by one rank for all
    task.check_saved(tmp_path)
    history = load_run(tmp_path / "run")["progress"]["history"]
    assert len(history) == number - 1  # that evaluation did not come to its end
    assert statuses(task, tmp_path) == [0, 0], told(tmp_path)[-3000:]
    assert same(task.final(tmp_path), whole_of_two)
