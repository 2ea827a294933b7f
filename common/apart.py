"""Training data and the data to measure on must not meet: a file in both tells nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

WAY_OUT = (
    "numbers of what was trained on tell nothing; to overfit on purpose, as in a smoke test, make "
    "a copy of the data for the other split"
)


def in_both(one: Iterable[str], other: Iterable[str]) -> list[str]:
    """Return the files of the first that the second has too, in the first's order.

    Links to folders are followed, so that it does not matter by which of its names a folder is
    reached; files are the same by their folder and name. Links to single files and copies are not
    seen: that would take a look at every one of them.
    """
    folders: dict[str, str] = {}

    def place(path: str) -> tuple[str, str]:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return folders[folder], name

    known = {place(path) for path in other}
    return [path for path in one if place(path) in known]


def told_shared(shared: Sequence[str], count: int) -> str:
    """Say how many of so many files are in both, and name the first."""
    return f"{len(shared)} of {count} files to train on are measured on too, {shared[0]} the first"
