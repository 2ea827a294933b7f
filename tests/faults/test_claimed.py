"""A second command in the folder of a run that goes on: refused before it changes anything."""

import shutil

from common.claimed import claim, claims_end
from tests.faults.test_disk import the_line
from tests.faults.test_foreign import newest
from tests.faults.test_preempted_ranks import statuses, told


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


def test_nor_do_several_ranks(whole_runs, tmp_path):
    task = whole_runs("classification").task
    (tmp_path / "run").mkdir()
    with claims_end():
        claim(tmp_path / "run")
        assert statuses(task, tmp_path) == [1, 1]
    assert told(tmp_path).count("another command trains into it") == 1
    assert "Traceback" not in told(tmp_path) and not listing(tmp_path / "run")
