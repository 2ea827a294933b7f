"""One command a folder: another is refused, and how the first one ended does not matter."""

import errno
import os
import signal
import time

import pytest

from common import claimed
from common.claimed import claim, claims_end
from common.disk import OutputError

pytestmark = pytest.mark.skipif(claimed.fcntl is None, reason="Windows has no such locks")


@pytest.fixture
def holder(tmp_path):
    """Fork a process that claims the folder and stays."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            claim(tmp_path)
            os.write(write, b"1")
            time.sleep(60)
        finally:
            os._exit(1)
    os.read(read, 1)
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def held_here(folder):
    """Whether a process forked from this one is refused."""
    child = os.fork()
    if not child:
        try:
            claim(folder)
            os._exit(0)
        except OutputError:
            os._exit(1)
        finally:
            os._exit(2)
    return {0: False, 1: True}[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


def test_another_process_is_named_and_its_kill_frees_the_folder(tmp_path, holder):
    with pytest.raises(OutputError, match=f"another command writes into it .process {holder} of "):
        claim(tmp_path)
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
    with claims_end():
        claim(tmp_path)


def test_a_process_may_claim_again_and_gives_up_what_it_claimed_inside(tmp_path):
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    outer.mkdir()
    inner.mkdir()
    with claims_end():
        claim(outer)
        with claims_end():
            claim(inner)
            claim(inner)
            claim(outer)
            assert held_here(inner) and held_here(outer)
        assert held_here(outer) and not held_here(inner)
    assert not held_here(outer)


def test_a_link_to_the_folder_is_the_folder(tmp_path, holder):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError):
        claim(tmp_path / "link")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_a_file_system_knows_no_locks_nothing_is_refused(tmp_path, monkeypatch, number):
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(claimed.fcntl, "lockf", refuse)
    with claims_end():
        claim(tmp_path)
        assert not held_here(tmp_path)
