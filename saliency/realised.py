"""Finished runs of saliency's training scripts, read back; see ``common.finished``."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path

from common import finished
from common.finished import ReadRun
from common.options import OptionError
from common.yaml_files import read_yaml
from saliency.options import PEER_OPTIONS, parse

# What decides what a peer predicts before training; the rest of PEER_OPTIONS is how it is trained.
AT_START = "backbone size view before stride mean std kwargs".split()
_NOT_SETTING = (
    "val_stride val_batch_size blur metrics eval_metric packed check_data check_depth layouts "
    "compiled origins data_root"
).split()


def read_run(folder: Path, metric: str, dataset: str | None) -> ReadRun:
    """Read a finished run.

    Args:
        folder: Of the run.
        metric: What is gained.
        dataset: Of the run, where it does not say so itself, as one of ``train_dhf1k.py``.

    Raises:
        OptionError: See ``common.finished.read_run``; or no data set.
    """
    finished.require_files(folder, ("args.yaml",))
    if dataset is None and "dataset" not in read_yaml(folder / "args.yaml"):
        raise OptionError(f"{folder}: does not say its data set; give --dataset")
    return finished.read_run(
        folder,
        functools.partial(parse, None, "train"),
        metric,
        "last.pth",
        PEER_OPTIONS,
        AT_START,
        _NOT_SETTING,
    )


def evaluated_on(options: argparse.Namespace, split: str = "val") -> tuple[str, ...]:
    """Say on which frames a run with these options is evaluated, whichever are held out of them.

    Args:
        options: Of the command line.
        split: What is taken where nothing is held out.
    """
    held_out = "held out" if options.held_out else split
    return os.path.abspath(options.data_root), options.dataset, held_out
