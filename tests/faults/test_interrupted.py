"""Ctrl-C: a run ends in one line that says how to go on, and goes on from its last run file."""

import os
import signal
import subprocess
import time

import pytest

from common.termination import INTERRUPTED
from tests.faults.runs import same
from tests.faults.test_preempted import terminate_at, terminate_in_evaluation


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_is_interrupted_says_how_to_go_on(whole, tmp_path):
    task = whole.task
    assert task.run(tmp_path, before=lambda: terminate_at(4, interrupt)) == INTERRUPTED
    told = (tmp_path / "log.txt").read_text()
    assert told.count("interrupted: ") == told.count("interrupted: go on from the last") == 1
    assert "--resume" in told and "Traceback" not in told
    task.check_saved(tmp_path)
    assert task.run(tmp_path, resume=True) == 0
    assert same(task.final(tmp_path), whole.final)


def test_before_anything_is_saved_it_begins_anew(whole, tmp_path):
    task = whole.task
    before = lambda: terminate_in_evaluation(task, 1, signal.SIGINT)  # noqa: E731
    assert task.run(tmp_path, before=before) == INTERRUPTED
    told = (tmp_path / "log.txt").read_text()
    assert told.count("interrupted: nothing was saved yet; the same command begins anew") == 1
    assert "Traceback" not in told and not task.has_saved(tmp_path)


@pytest.mark.parametrize("pause", [0.0, 0.002, 0.02, 0.2])
def test_pressing_it_again_shows_no_traceback_either(whole_runs, tmp_path, pause):
    task = whole_runs("classification").task
    press = f"while kill -INT $0; do sleep {pause}; done 2> /dev/null"  # till it is gone

    def keep_pressing():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
        subprocess.Popen(["sh", "-c", press, str(os.getpid())])
        time.sleep(20)

    assert task.run(tmp_path, before=lambda: terminate_at(3, keep_pressing)) in (
        INTERRUPTED,
        -signal.SIGINT,
    )
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
