"""How a command line ends."""

import logging

import pytest

from common import distributed
from common.checkpoint import CheckpointError
from common.outputs import run_command
from tests.launch import launch


def one_fails(world):
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger().addHandler(handler)

    def work():
        if world.rank == 1:
            raise CheckpointError("x.pth: broken")
        distributed.barrier()

    assert run_command(work, (CheckpointError,)) == 1
    expected = "x.pth: broken" if world.rank == 1 else "another process of the run has ended"
    assert len(told) == 1 and told[0].startswith("error: ") and expected in told[0]


def test_where_one_process_fails_the_others_end_in_a_line_too():
    launch(one_fails, 2)


def all_fail(world, folder):
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger().addHandler(handler)

    def work():
        raise CheckpointError("x.pth: broken")

    assert run_command(work, (CheckpointError,)) == 1
    (folder / str(world.rank)).write_text("".join(told))


def test_what_all_processes_find_is_told_once(tmp_path):
    launch(all_fail, 3, tmp_path)
    told = sorted((tmp_path / str(rank)).read_text() for rank in range(3))
    assert told == ["", "", "error: x.pth: broken"]


def test_what_is_no_fault_of_the_user_keeps_its_traceback():
    def work():
        raise RuntimeError("Connection closed by peer")  # of whom? there are no ranks

    with pytest.raises(RuntimeError, match="closed by peer"):
        run_command(work, (CheckpointError,))
