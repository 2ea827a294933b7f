"""Push what a run exported to the Hugging Face hub, in the layout that timm loads.

    python classification/push.py output/train/RUN --peer vit --repo ORG/NAME
    python classification/push.py output/train/RUN --folder OUT        # writes the files only

Then ``timm.create_model("hf-hub:ORG/NAME", pretrained=True)``, or ``"local-dir:OUT"``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from classification.models import ModelError
from classification.publish import deliver, peers_of
from common.checkpoint import CheckpointError
from common.disk import OutputError
from common.options import OptionError
from common.outputs import run_command

FAULTS = (OptionError, ModelError, CheckpointError, OutputError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    return run_command(lambda: push(arguments), FAULTS)


def push(arguments: Sequence[str] | None = None) -> dict[str, str]:
    """Push, or write, the peers asked for.

    Returns:
        Where each went, by peer.

    Raises:
        OptionError, ModelError, CheckpointError, OutputError: Bad input, or a hub that refuses.
    """
    asked = build_parser().parse_args(arguments)
    return deliver(
        asked.run,
        peers_of(asked.run, asked.peer),
        repo=asked.repo,
        folder=asked.folder,
        which=asked.which,
        private=asked.private,
        analysis=read_analysis(asked.analysis) if asked.analysis else None,
    )


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = argparse.ArgumentParser(
        prog="classification/push.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a finished run")
    add("--peer", nargs="+", default=[], metavar="NAME", help="default: all that learned")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--repo", default="", metavar="ORG/NAME", help="of several peers: ORG/NAME-PEER"
    )
    where.add_argument(
        "--folder", type=Path, metavar="OUT", help="write only; of several peers: OUT/PEER"
    )
    add("--private", action="store_true", help="make new repositories private")
    add("--which", default="best", choices=("best", "last", "soup"))
    add(
        "--analysis",
        type=Path,
        metavar="FILE",
        help="analysis.json of an experiment with these peers: its numbers go into the card",
    )
    return parser


def read_analysis(path: Path) -> Any:
    """Read what an experiment wrote.

    Raises:
        OptionError: Missing, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--analysis {path}: cannot be read ({error}); give the analysis.json of experiment.py"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
