"""Write the demo's videos, and small models pretrained on parts of them, for experiments.

    python -m saliency.prepare_videos datasets/videos --seeds 10

What is there already is kept, so more seeds can be asked for later.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.demo import side_by_side
from common.outputs import run_command
from saliency.demo import OWN_MOTIONS, pretrain, write_splits

VIDEOS = {"pretrain": 48, "tune": 16, "val": 24}  # of tune an experiment holds some out
EPOCHS = 10
PEERS = ("pair", "around")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write ``seed-S/tune`` and ``seed-S/PEER-run/PEER/last.pth`` for every seed."""
    parser = argparse.ArgumentParser(
        prog="python -m saliency.prepare_videos", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where data and checkpoints shall lie")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0 on")
    parser.add_argument("--peers", nargs="+", choices=tuple(OWN_MOTIONS), default=list(PEERS))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    asked = parser.parse_args(arguments)
    jobs = {}
    for seed in range(asked.seeds):
        write_splits(asked.folder / f"seed-{seed}", seed, VIDEOS)
        jobs |= {(seed, name): (asked.folder, seed, name, EPOCHS, 0) for name in asked.peers}
    with side_by_side(max(1, asked.jobs), len(jobs)) as workers:
        workers.run("pretraining", pretrain, jobs)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, ()))
