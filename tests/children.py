"""Forked children of the tests: what they do, how they end, and how long they may take."""

import faulthandler
import logging
import multiprocessing.process
import os
import signal
import sys
import time
import traceback
from pathlib import Path

HUNG = 300  # seconds


def work_and_end(work, log, seconds=HUNG):
    """Work in a forked child, and end it with the status that the work returns; never returns.

    A child that hangs tells where each of its threads is, and ends: one forked from a process with
    threads may have inherited a lock that a thread held.

    Args:
        work: Called with nothing; None counts as 0.
        log: Gets what it tells; None: what gets the test's errors.
        seconds: What it may take.
    """
    status = 99
    try:
        multiprocessing.process._children.clear()  # the test's own, not this child's
        if log:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
        logging.getLogger().handlers.clear()  # pytest's, which would keep it all
        status = work()
    except BaseException:  # noqa: BLE001 - the child must end here
        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:  # a full disk too: it must not go on as a second pytest
            os._exit(status or 0)


def in_a_child(work, log=None, seconds=HUNG):
    """Fork, work there, and return how it ended.

    Args:
        work: As of ``work_and_end``.
        log: As of ``work_and_end``.
        seconds: What it may take.

    Raises:
        TimeoutError: It hung; with what it told.
    """
    child = os.fork()
    if not child:
        work_and_end(work, log, seconds)
    end = time.monotonic() + seconds
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end + 30:  # its own end has failed
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.005)
    if time.monotonic() > end:
        told = Path(log).read_text()[-8000:] if log else "see what it told above"
        raise TimeoutError(f"a child hung for {seconds} seconds: {told}")
    return os.waitstatus_to_exitcode(found[1])


def alive(group):
    """Return the processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state not in "ZX":
            found.append(path.parent.name)
    return found
