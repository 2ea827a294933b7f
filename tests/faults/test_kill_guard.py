"""kill -9 after the guard took a peer back and before the next save: it is taken back again."""

import os
import signal

import pytest

from common.checkpoint import load_run, read_file
from common.guard import Guard
from tests.faults.runs import KILLED, make_task, same

OPTIONS = {
    "classification": "--guard rollback --guard-patience 1 --guard-flips 0",
    "saliency": "--guard rollback --guard-patience 1 --guard-metric-drop 1e-6",
    "segmentation": "TRANSFER.GUARD rollback TRANSFER.GUARD_PATIENCE 1 SEED 4 SOLVER.BASE_LR 0.05"
    " TRANSFER.GUARD_METRIC_DROP 1e-3",
}
LATER = {
    "when it is back": None,
    "when it is measured again": "in an evaluation",
    "while a file is written": "while a file is written",
    "before a file takes its place": "before a file takes its place",
}


def events(task, folder):
    state = read_file(folder / "run" / "run.pt") if task.name == "segmentation" else None
    return (state or load_run(folder / "run"))["guard"]["events"]


@pytest.fixture(scope="module")
def guarded(request, tmp_path_factory):
    """Return a task, its options, and what a run that goes back ends with, by the task's name."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            own = name == "classification"
            data = request.getfixturevalue("digits") if own else folder / "data"
            task, more = make_task(name, data), OPTIONS[name].split()
            assert task.run(folder / "whole", *more) == 0, told(folder / "whole")
            acted = events(task, folder / "whole")
            assert acted, "the guard had nothing to do: this tests nothing"
            made[name] = task, more, task.final(folder / "whole"), acted
        return made[name]

    return make


def told(folder):
    return (folder / "log.txt").read_text()[-3000:]


def kill_after_a_rollback(task, later):
    """Let the first call at a point after the guard has acted kill the process."""
    roll_back, back = Guard.roll_back, []

    def acting(guard):
        back.extend(roll_back(guard))
        if back and LATER[later] is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return back

    Guard.roll_back = acting
    if LATER[later] is None:
        return
    owner, name = task.points[LATER[later]]
    function = getattr(owner, name)

    def wrapped(*given, **named):
        if back:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)

    setattr(owner, name, wrapped)


@pytest.mark.slow
@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_kill_takes_from_the_guard_is_done_again(guarded, tmp_path, name, later):
    task, more, whole, acted = guarded(name)
    status = task.run(tmp_path, *more, before=lambda: kill_after_a_rollback(task, later))
    assert status == KILLED, told(tmp_path)
    task.check_saved(tmp_path)
    assert not events(task, tmp_path)  # what it did is in no run file
    assert task.run(tmp_path, *more, resume=True) == 0, told(tmp_path)
    assert events(task, tmp_path) == acted
    assert same(task.final(tmp_path), whole)
