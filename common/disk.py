"""Writing where a disk may be full or read-only: told in one line, and nothing of it is left."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# torch's own writer raises RuntimeErrors that do not tell why a write failed.
_OF_TORCHS_WRITER = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos")


class OutputError(OSError):
    """The output cannot be written; names the folder, and says what to do."""


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turn a write that fails into one line that names the folder and the way out.

    Args:
        folder: Where the file shall be.

    Raises:
        OutputError: In place of the OSError, or of what safetensors and torch make of it.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _OF_TORCHS_WRITER.search(str(error)):
            raise
        raise OutputError(
            f"{folder}: cannot be written ({_reason(error)}; {_free(folder)} MB are free); make "
            "room there, or make it writable, and resume the run: what it saved before is whole"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    return "torch could not write all of a file"


def _free(folder: Path) -> int:
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    return shutil.disk_usage(there).free // 2**20


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part of it.

    Args:
        path: Where the file shall be; its folder is made.
        write: Called with a temporary path in the same folder.

    Raises:
        OutputError: Disk full or read-only folder; the old file stays as it is.
    """
    with writing_into(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            _sync(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what writes that a kill cut off have left; no other run may write there."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        OutputError: As ``atomic_write``.
    """
    atomic_write(path, lambda to: to.write_text(text, encoding="utf-8", newline=""))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a table, atomically; the columns are the union of the rows' names, in order.

    Raises:
        OutputError: As ``atomic_write``.
    """
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
