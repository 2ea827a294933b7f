"""Folders that one command trains into, kept from others that would train into them too."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.disk import OutputError

try:
    import fcntl
except ImportError:  # Windows has other locks; there nothing keeps two commands apart
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
PATIENCE = 120.0
"""Seconds in which another machine's lock may still go: a file server takes back what a machine
that is gone had when its lease ends, mostly after 90."""

_HELD = (errno.EACCES, errno.EAGAIN)  # by another process
_ours: dict[Path, int | None] = {}
"""Files that are open, None where there are no locks. Whoever opens one again and closes it lifts
its lock."""
_logger = logging.getLogger("train")


def claim(folder: Path) -> None:
    """Keep other commands out of a folder, till ``claims_end`` or the end of this process.

    The system takes the lock back, after ``kill -9`` too. It is one of POSIX's, which the processes
    that read data do not inherit, and which most shared file systems tell other machines of. A lock
    of another machine is waited for, since that may be gone: a scheduler starts its job elsewhere.
    Where a file system has none, a warning says so; on Windows nothing is claimed.

    Args:
        folder: That exists; a file ``.lock`` stays in it, with the name of its last process.

    Raises:
        OutputError: Another process has it, or ``.lock`` is something else; says the way out.
    """
    path = folder.resolve() / LOCK
    if fcntl is None or path in _ours or not os.access(folder, os.W_OK):
        return  # what cannot be written is told by whoever writes
    try:
        _ours[path] = _locked(folder, path)
    except OutputError:
        raise
    except OSError as error:
        _ours[path] = None
        _logger.warning(
            "%s: cannot be locked (%s); nothing keeps a second command out", folder, error.strerror
        )


def _locked(folder: Path, path: Path) -> int:
    """Open the lock, take it and write down who has it; an OSError says that there are no locks."""
    other = f"{path}: is a link, a folder or no file, not the lock of a run; remove it"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise OutputError(other) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OutputError(other)
        _lock(folder, path, handle)
    except BaseException:
        os.close(handle)
        raise
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(handle, 0)
        told = f"process {os.getpid()} of {socket.gethostname()}\n{_boot()}\n"
        os.pwrite(handle, told.encode(), 0)
    return handle


def _lock(folder: Path, path: Path, handle: int) -> None:
    end, told = time.monotonic() + PATIENCE, False
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _HELD:
                raise
            holder, boot = _holder(handle)
            here = boot == _boot()
            if here or time.monotonic() > end:
                gone = "" if here else f"; where that machine is gone, remove {path}"
                raise OutputError(
                    f"{folder}: another command trains into it ({holder or 'of no name'}); wait "
                    f"for its end, or end it{gone}"
                ) from error
        if not told:
            told = True
            _logger.warning(
                "%s: another command trains into it (%s); waiting up to %d seconds for its end, "
                "since its machine may be gone",
                *(folder, holder, PATIENCE),
            )
        time.sleep(min(1.0, PATIENCE))


def _holder(handle: int) -> tuple[str, str]:
    """Return who wrote the lock, and in which run of which machine; empty where none did."""
    with contextlib.suppress(OSError):
        lines = os.pread(handle, 400, 0).decode(errors="replace").split("\n")
        if len(lines) == 3:
            name = "".join(character for character in lines[0] if character.isprintable())
            return name, lines[1]
    return "", _boot()


def _boot() -> str:
    """Name this run of this machine: containers that are started elsewhere keep a host's name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


@contextmanager
def claims_end() -> Iterator[None]:
    """Give up all that was claimed inside, at its end."""
    before = set(_ours)
    try:
        yield
    finally:
        for path in set(_ours) - before:
            _close(_ours.pop(path))


def _forget() -> None:
    """Close what a fork inherited: it has none of its parent's locks."""
    for handle in _ours.values():
        _close(handle)
    _ours.clear()


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)
