"""A finished run, resumed: it is told that it has finished, and nothing is trained."""

import os
import shutil

from common.engine import JointEngine
from tests.faults.runs import same

TOLD = {
    "classification": "has finished its 2 epochs; its last files and its report are made anew",
    "saliency": "has finished its 2 epochs; its last files and its report are made anew",
    "segmentation": "has finished, at iteration 4 of 4; a larger SOLVER.MAX_ITER goes on",
}


def refuse_steps():
    JointEngine.step = lambda *given, **named: os._exit(98)


def test_a_finished_run_says_so_and_trains_nothing(whole, tmp_path):
    task = whole.task
    assert TOLD[task.name] not in (whole.folder / "log.txt").read_text()
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    assert task.run(tmp_path, resume=True, before=refuse_steps) == 0
    told = (tmp_path / "log.txt").read_text()
    assert told.count(TOLD[task.name]) == 1 and "Traceback" not in told
    assert same(task.final(tmp_path), whole.final)
