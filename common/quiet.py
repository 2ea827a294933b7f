"""Warnings that no user can do anything about."""

from __future__ import annotations

import warnings


def hush_imports() -> None:
    """Silence what torch says of a dependency's own ``torch.jit.script`` at import (fvcore.nn's).

    To be called before it is imported; all other warnings are shown.
    """
    warnings.filterwarnings(
        "ignore", r"`torch\.jit\.script` is deprecated", FutureWarning, r"torch\.jit\._script"
    )
    warnings.filterwarnings(
        "ignore", r"`torch\.jit\.script` is deprecated", DeprecationWarning, r"torch\.jit\._script"
    )
