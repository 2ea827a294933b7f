"""Write the demo's digits, and small models pretrained on parts of them, for experiments.

    python -m classification.prepare_digits datasets/digits --seeds 10

What is there already is kept, so more seeds can be asked for later.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from classification.demo import OWN_CLASSES, pretrain
from classification.digits import write_digits, write_splits
from common.demo import side_by_side


def main(arguments: Sequence[str] | None = None) -> int:
    """Write ``seed-S/tune`` and ``seed-S/PEER-run/PEER/last.safetensors`` for every seed."""
    parser = argparse.ArgumentParser(
        prog="python -m classification.prepare_digits", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where data and checkpoints shall lie")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0 on")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    asked = parser.parse_args(arguments)
    digits = write_digits(asked.folder / "digits")
    jobs = {}
    for seed in range(asked.seeds):
        write_splits(digits, asked.folder / f"seed-{seed}", OWN_CLASSES, seed)
        jobs |= {(seed, name): (asked.folder, seed, name) for name in OWN_CLASSES}
    with side_by_side(max(1, asked.jobs), len(jobs)) as workers:
        workers.run("pretraining", pretrain, jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
