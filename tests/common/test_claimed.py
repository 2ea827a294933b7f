"""One command a folder: another is refused, and how the first one ended does not matter."""

import errno
import os
import signal
import socket
import time

import pytest

from common import claimed
from common.claimed import claim, claims_end
from common.disk import OutputError

pytestmark = pytest.mark.skipif(claimed.fcntl is None, reason="Windows has no such locks")


@pytest.fixture
def hold(tmp_path):
    """Fork processes that claim the folder and stay."""
    children = []

    def start(host=None):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                if host:
                    socket.gethostname = lambda: host
                    claimed._boot = lambda: "another run of another machine"
                claim(tmp_path)
                os.write(write, b"1")
                time.sleep(60)
            finally:
                os._exit(1)
        os.read(read, 1)
        children.append(child)
        return child

    yield start
    for child in children:
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


def test_another_process_is_named_and_its_kill_frees_the_folder(tmp_path, hold):
    holder = hold()
    with pytest.raises(OutputError, match=f"another command trains into it .process {holder} of "):
        claim(tmp_path)
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
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


def test_a_link_to_the_folder_is_the_folder(tmp_path, hold):
    hold()
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="another command"):
        claim(tmp_path / "link")


def test_another_machines_lock_is_waited_for(tmp_path, hold, caplog, monkeypatch):
    holder, sleep = hold("elsewhere"), time.sleep

    def ended(seconds):
        os.kill(holder, signal.SIGKILL)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", ended)
    claim(tmp_path)
    assert f"(process {holder} of elsewhere); waiting up to 120 seconds" in caplog.text
    assert held_here(tmp_path)


def test_but_not_for_ever(tmp_path, hold, monkeypatch):
    hold("elsewhere")
    monkeypatch.setattr(claimed, "PATIENCE", 0.05)
    with pytest.raises(OutputError, match=f"machine is gone, remove {tmp_path}/.lock"):
        claim(tmp_path)
    (tmp_path / ".lock").unlink()
    claim(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_a_file_system_knows_no_locks_nothing_is_refused(
    tmp_path, monkeypatch, number, caplog
):
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(claimed.fcntl, "lockf", refuse)
    claim(tmp_path)
    claim(tmp_path)
    monkeypatch.undo()
    assert not held_here(tmp_path)
    assert caplog.text.count(f"{tmp_path}: cannot be locked ({os.strerror(number)})") == 1


def test_a_lock_that_another_user_owns_is_told(tmp_path, monkeypatch, caplog):
    def refuse(*given):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    claim(tmp_path)
    assert f"{tmp_path}: cannot be locked (Permission denied)" in caplog.text


def test_a_folder_of_somebody_else_has_nothing_written_over(tmp_path):
    treasure = tmp_path / "treasure"
    treasure.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(treasure)
    with pytest.raises(OutputError, match=r"run/.lock: is a link, a folder or no file"):
        claim(tmp_path / "run")
    assert treasure.read_text() == "mine"
    (tmp_path / "run" / ".lock").unlink()
    os.mkfifo(tmp_path / "run" / ".lock")
    with pytest.raises(OutputError, match=r"run/.lock: is a link, a folder or no file"):
        claim(tmp_path / "run")
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run" / ".lock").mkdir()
    with pytest.raises(OutputError, match=r"run/.lock: is a link, a folder or no file"):
        claim(tmp_path / "run")


def test_of_a_folder_that_cannot_be_written_others_tell(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    claim(tmp_path)
    assert not caplog.text and not (tmp_path / ".lock").exists()
