"""One of two ranks is killed: the other ends too, and the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.runs import same

ROOT = Path(__file__).parents[2]


def children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(whole_runs, tmp_path, victim):
    task = whole_runs("classification").task
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(folder, resume=False):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        given = task.arguments(folder, "--dist-bn", "reduce", resume=resume)
        command = [sys.executable, *launch, "classification/train.py", *given]
        folder.mkdir(exist_ok=True)
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0, (whole / "log.txt").read_text()[-3000:]
    run = start(killed)
    while not task.has_saved(killed) and run.poll() is None:
        time.sleep(0.005)
    ranks = sorted(children(run.pid))
    os.kill(ranks[victim], signal.SIGKILL)
    assert run.wait(timeout=300) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    task.check_saved(killed)
    assert start(killed, resume=True).wait() == 0, (killed / "log.txt").read_text()[-3000:]
    assert same(task.final(killed), task.final(whole))
