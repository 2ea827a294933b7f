"""Write composed scenes, and small segmentors pretrained on others, for experiments.

    python -m segmentation.prepare_scenes --seeds 30 31 32 --starts 30

What is there already is kept, so more can be asked for later.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.demo import side_by_side
from common.outputs import run_command
from segmentation import scenes
from segmentation.demo import GROUPS, OWN_DIGITS, pretrain, write_pretraining

CHECKPOINTS = "scenes-checkpoints"
TUNE, TEST = 32, 60  # scenes; of the first an experiment holds a part out


def main(arguments: Sequence[str] | None = None) -> int:
    """Write ``scenes/sSEED-{tune,val}`` and ``scenes-checkpoints/seed-START/PEER/PEER/``."""
    parser = argparse.ArgumentParser(
        prog="python -m segmentation.prepare_scenes", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--root", type=Path, default=Path("datasets"), help="default: datasets")
    add("--seeds", type=int, nargs="+", default=[], help="of scenes to tune on and to test with")
    add("--starts", type=int, nargs="+", default=[], help="seeds of pretraining")
    add("--peers", nargs="+", default=list(GROUPS["two"]), choices=OWN_DIGITS)
    add("--jobs", type=int, default=1, help="runs side by side")
    asked = parser.parse_args(arguments)
    os.environ["DETECTRON2_DATASETS"] = str(asked.root.resolve())
    place, folder = asked.root / scenes.FOLDER, asked.root / CHECKPOINTS
    for seed in {*asked.seeds, *asked.starts}:
        scenes.write_scenes(place, f"s{seed}-tune", TUNE, seed=10 * seed + 9)
        scenes.write_scenes(place, f"s{seed}-val", TEST, seed=10 * seed, held_out=True)
    for seed in asked.starts:
        write_pretraining(place, seed)
    jobs = {(seed, name): (folder, seed, name) for seed in asked.starts for name in asked.peers}
    if jobs:
        with side_by_side(max(1, asked.jobs), len(jobs)) as workers:
            workers.run("pretraining", pretrain, jobs)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, ()))
