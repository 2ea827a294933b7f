"""Experiments on segmentors: arms over seeds, chosen on held-out data, told with tests.

python segmentation/experiment.py segmentation/configs/experiments/scenes.yaml
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``segmentation.trials``, which needs Detectron2 to be there."""
    return importlib.import_module("segmentation.launch").start("segmentation.trials", arguments)


if __name__ == "__main__":
    # Python puts this folder first, where mask2former.py would hide the package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
