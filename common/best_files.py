"""Whether a best file is that of the run file, and what to put in its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoint import CheckpointError, digest_of, read_weights

EXPORTED = "exported"
"""Where a peer's part of a run file has the digest of its best weights."""


def fault_of(path: Path, digest: str | None) -> str:
    """Say what is wrong with a best file; nothing where it is the right one.

    A run that is killed after it wrote a best file and before its run file leaves one of a moment
    that is lost. On a CPU that moment comes again, elsewhere it need not.

    Args:
        path: Of the file.
        digest: Of the weights that it held when the run file was written; None: not known.
    """
    if not path.is_file():
        return "is gone"
    try:
        found = digest_of(read_weights(path))
    except CheckpointError:
        return "cannot be read"
    return "is of a later moment than the run file" if digest and found != digest else ""


def best_in(saved: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
    """Return a peer's best weights from its part of a run file; None where they are not in it.

    They are where the guard kept them, or where the run file is of the best evaluation.
    """
    for held in (saved.get("best"), saved):
        if held is not None:
            weights: Mapping[str, Tensor] = held["average"] or held["module"]
            if digest_of(weights) == saved.get(EXPORTED):
                return weights
    return None
