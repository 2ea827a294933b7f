"""A second command in the folder of a run that goes on: refused before it changes anything."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.claimed import claim, claims_end
from tests.faults.test_disk import the_line
from tests.faults.test_foreign import newest
from tests.faults.test_preempted_ranks import statuses, told

ROOT = Path(__file__).parents[2]


def listing(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    # whoever opens the lock and closes it gives it up
    return {path: path.read_bytes() for path in files if path.name != ".lock"}


def test_two_commands_do_not_write_into_one_folder(whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    unfinished = folder / ".run.pt.half.tmp"  # what the first one is writing
    unfinished.write_bytes(b"half")
    with claims_end():
        claim(folder)
        assert whole.task.run(tmp_path) == 1
        assert f"{folder}: another command trains into it (process " in the_line(tmp_path)
        assert {path.name for path in listing(folder)} == {unfinished.name}
    assert whole.task.run(tmp_path) == 0
    assert not unfinished.exists()


def test_nor_do_they_go_on_with_one_run(whole, tmp_path):
    """What the second one reads could be of a moment that the first one has left behind."""
    task = whole.task
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    path = newest(tmp_path / "run")
    path.write_bytes(path.read_bytes()[:-100])  # what is read says so
    before = listing(tmp_path / "run")
    with claims_end():
        claim(tmp_path / "run")
        assert task.run(tmp_path, resume=True) == 1
    line = the_line(tmp_path)
    assert f"{tmp_path / 'run'}: another command trains into it (process " in line
    assert listing(tmp_path / "run") == before


def test_a_fresh_one_is_told_that_the_run_goes_on(whole, tmp_path):
    """Not that an earlier run is there, which --resume would go on with."""
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    with claims_end():
        claim(tmp_path / "run")
        assert whole.task.run(tmp_path) == 1
    assert "another command trains into it" in the_line(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--engine", "peer-parallel"]])
def test_nor_do_those_of_torchrun_which_wait_for_nobody(whole_runs, tmp_path, more):
    task = whole_runs("classification").task
    given = [*task.arguments(tmp_path, *more)[:5], "--resume", "auto"]  # two peers
    given += task.arguments(tmp_path, *more)[7:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    (tmp_path / "run").mkdir()
    claim(tmp_path / "run")
    done = subprocess.run(
        [*torchrun, "classification/train.py", *given], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.count("another command trains into it") == 1
    assert "forcefully" not in done.stderr  # a rank that waited would be killed 30 seconds later
    assert not listing(tmp_path / "run")


def test_nor_do_several_ranks(whole_runs, tmp_path):
    task = whole_runs("classification").task
    (tmp_path / "run").mkdir()
    with claims_end():
        claim(tmp_path / "run")
        assert statuses(task, tmp_path) == [1, 1]
    assert told(tmp_path).count("another command trains into it") == 1
    assert "Traceback" not in told(tmp_path) and not listing(tmp_path / "run")
