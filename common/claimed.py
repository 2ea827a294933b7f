"""Folders that one command writes into, kept from others that would write into them too."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.disk import OutputError

try:
    import fcntl
except ImportError:  # Windows has other locks; there nothing keeps two commands apart
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)  # by another process
_ours: dict[Path, IO[str]] = {}
if fcntl is not None:
    os.register_at_fork(after_in_child=_ours.clear)  # a child has none of its parent's locks


def claim(folder: Path) -> None:
    """Keep other commands out of a folder, till ``claims_end`` or the end of this process.

    The system takes the lock back, after ``kill -9`` too. It is one of POSIX's, which the processes
    that read data do not inherit, and which most shared file systems tell other machines of; where
    one knows no locks, nothing is kept apart.

    Args:
        folder: That exists; a file ``.lock`` stays in it.

    Raises:
        OutputError: Another process has it; named where it says who it is.
    """
    path = folder.resolve() / LOCK
    if fcntl is None or path in _ours:
        return
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError:  # a folder that cannot be written is told by what is written
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            if error.errno not in _HELD:
                return
            file.seek(0)
            raise OutputError(
                f"{folder}: another command writes into it ({file.read(100) or 'unknown'}); wait "
                "for its end, or end it"
            ) from error
    _ours[path] = file
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()


@contextmanager
def claims_end() -> Iterator[None]:
    """Give up all that was claimed inside, at its end."""
    before = set(_ours)
    try:
        yield
    finally:
        for path in set(_ours) - before:
            with contextlib.suppress(OSError):  # what a full disk could not take
                _ours.pop(path).close()
