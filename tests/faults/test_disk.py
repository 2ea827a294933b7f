"""A disk that fills up or turns read-only on the way: one line, nothing lost, nothing left."""

import csv
import errno
import importlib
import os
import random
import resource
import shutil
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.board import Board
from common.checkpoint import read_weights, save_weights
from common.disk import OutputError, atomic_write, write_csv
from common.engine import JointEngine
from common.outputs import _append, _trim
from tests.children import in_a_child
from tests.faults.runs import same

FAST, ALL = 1, 6
fsync = os.fsync


def full_from(count):
    """Let every write that is synced fail from the ``count``-th on, as on a full disk."""
    calls = [0]

    def wrapped(handle):
        calls[0] += 1
        if calls[0] >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    os.fsync = wrapped


def the_line(folder):
    told = (folder / "log.txt").read_text()
    assert "Traceback" not in told, told[-3000:]
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    "number", [*range(FAST), *(pytest.param(k, marks=pytest.mark.slow) for k in range(FAST, ALL))]
)
def test_a_disk_that_fills_up_costs_nothing_that_was_saved(whole, tmp_path, number):
    task = whole.task
    # a file is synced, and its folder; not every run writes as many files as the first one did
    count = random.Random(f"{task.name} {number}").randint(1, 2 * (whole.calls[REPLACED] - 1))
    status = task.run(tmp_path, before=lambda: full_from(count))
    line = the_line(tmp_path)
    assert status == 1 and str(tmp_path / "run") in line
    assert "No space left on device" in line and "make room" in line
    task.check_saved(tmp_path)
    assert not list(tmp_path.rglob(".*.tmp"))
    assert task.run(tmp_path, resume=task.has_saved(tmp_path)) == 0
    (tmp_path / "log.txt").unlink()
    assert same(task.final(tmp_path), whole.final)


REPLACED = "before a file takes its place"


@pytest.mark.slow
def test_a_file_that_the_system_cuts_off_is_told(whole, tmp_path):
    """In the middle of a file, whoever writes it: torch, safetensors, or Python."""
    task = whole.task
    largest = max(path.stat().st_size for path in (whole.folder / "run").rglob("*.pt*"))
    limit = (largest // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    before = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)  # noqa: E731
    assert task.run(tmp_path, before=before) == 1
    assert str(tmp_path / "run") in the_line(tmp_path)
    task.check_saved(tmp_path)
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.fixture
def open_folder():
    """A folder that a process without root's rights can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "name",
    [
        "classification",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("saliency", "segmentation")),
    ],
)
def test_a_folder_that_turns_read_only_is_told(whole_runs, open_folder, name):
    task = whole_runs(name).task
    output = open_folder / "out"
    (output / "run").mkdir(parents=True)
    data = shutil.copytree(task.data, open_folder / "data")
    data.chmod(0o755)  # pytest's own folders are root's alone
    for path in (output, output / "run"):
        os.chown(path, 65534, 65534) if os.geteuid() == 0 else None
    own = replace(task, data=data, environment=dict.fromkeys(task.environment, str(data)))

    def before():
        if os.geteuid() == 0:
            importlib.import_module("torch.utils.cpp_extension")  # what others may not read
            os.seteuid(65534)
        step, calls = JointEngine.step, [0]

        def closing(*given, **named):
            calls[0] += 1
            if calls[0] == 4:
                (output / "run").chmod(stat.S_IRUSR | stat.S_IXUSR)
            return step(*given, **named)

        JointEngine.step = closing

    status = own.run(output, before=before)
    assert status == 1, (output / "log.txt").read_text()[-3000:]
    (output / "run").chmod(0o755)
    line = the_line(output)
    assert f"{output / 'run'}: cannot be written (Permission denied;" in line
    assert own.has_saved(output)
    own.check_saved(output)


# The single writers.


@pytest.fixture
def small_files():
    """Run something in a child where no file may have more than 1000 bytes; return its error."""

    def run(folder, work):
        def limited():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            try:
                work()
            except OutputError as error:
                os.write(writes, str(error).encode())
            return 0

        reads, writes = os.pipe()
        assert in_a_child(limited) == 0
        os.close(writes)
        with os.fdopen(reads) as file:
            told = file.read()
        assert f"{folder}: cannot be written (" in told and "MB are free" in told
        assert not list(folder.rglob(".*.tmp"))
        return told

    return run


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_do_not_fit_leave_the_old_ones(tmp_path, small_files, suffix):
    path = tmp_path / f"best{suffix}"
    save_weights(path, {"x": torch.ones(9)})
    small_files(tmp_path, lambda: save_weights(path, {"x": torch.zeros(9999)}))
    assert torch.equal(read_weights(path)["x"], torch.ones(9))


def test_a_table_that_does_not_fit_leaves_the_old_one(tmp_path, small_files):
    path = tmp_path / "summary.csv"
    write_csv(path, [{"epoch": 0}])
    told = small_files(tmp_path, lambda: write_csv(path, [{"epoch": k} for k in range(999)]))
    assert "File too large" in told and path.read_text().split() == ["epoch", "0"]


def test_scalars_that_do_not_fit_are_told(tmp_path, small_files):
    def write():
        for step in range(99):
            _append(tmp_path, {"a/loss": 1.0}, step)

    small_files(tmp_path, write)
    path = tmp_path / "scalars.csv"
    with path.open("ab") as file:
        file.write(b"\n7,a/l")  # what a kill cut off
    _trim(path, 50)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == [str(k) for k in range(51)]


def test_tensorboard_that_does_not_fit_is_told_and_waits_for_nobody(tmp_path, small_files):
    def write():
        board = Board(tmp_path)
        for step in range(99):
            board({f"a/{k}": 1.0 for k in range(9)}, step)

    small_files(tmp_path, write)


def test_a_full_device_is_told(tmp_path):
    (tmp_path / "scalars.csv").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left on device"):
        _append(tmp_path, {"a/loss": 1.0}, 1)


def test_a_path_through_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/x: cannot be written \(Not a directory"):
        atomic_write(tmp_path / "file" / "x" / "y", lambda to: None)


def test_faults_that_are_no_disks_stay_what_they_are(tmp_path):
    def broken(path):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        atomic_write(tmp_path / "x", broken)


def test_tensorboard_reads_what_a_board_wrote(tmp_path):
    first = Board(tmp_path)
    for step in (1, 2, 3):
        first({"a/loss": float(step), "transfer/a->b/share": 0.5}, step)
    Board(tmp_path, purge_from=3)({"a/loss": 30.0}, 3)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("a/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert len(read.Scalars("transfer/a_to_b/share")) == 2
