"""What the scripts share: without Detectron2 they say how to get it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from segmentation import compat


def start(module: str, arguments: Sequence[str] | None) -> int:
    """Run a command line whose module imports Detectron2.

    Args:
        module: With ``main``.
        arguments: As on the command line; None: those of the process.

    Returns:
        The exit status.
    """
    try:
        compat.require()
    except compat.MissingDetectron2Error as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return importlib.import_module(module).main(arguments)
