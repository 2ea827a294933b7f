"""Choose, before any training, which of several segmentors should teach each other.

python segmentation/scout.py --config-file run.yaml [--for NAME]
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``segmentation.scouting``, which needs Detectron2 to be there."""
    return importlib.import_module("segmentation.launch").start("segmentation.scouting", arguments)


if __name__ == "__main__":
    # Python puts this folder first, where mask2former.py would hide the package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
