"""Finished runs of train.py, read back; see ``common.finished``."""

from __future__ import annotations

import argparse
import functools
import os
from dataclasses import replace
from pathlib import Path

from classification.options import EXPORT, PEER_OPTIONS, parse
from common import finished
from common.finished import ReadRun

METRIC = "top1"
# What decides what a peer predicts before training; the rest of PEER_OPTIONS is how it is trained.
AT_START = (
    "pretrained gp img_size input_size crop_pct mean std interpolation model_kwargs model_dtype "
    "head_init_scale head_init_bias bn_eps"
).split()
_NOT_SETTING = "pin_mem wandb_tags local_rank data_dir validation_batch_size".split()

_read = functools.partial(
    finished.read_run,
    parse=parse,
    metric=METRIC,
    last=f"last{EXPORT}",
    own=PEER_OPTIONS,
    at_start=AT_START,
    not_setting=_NOT_SETTING,
)


def read_run(folder: Path) -> ReadRun:
    """Read a finished run, with the score as it was compared: calibrated, or as it is.

    Raises:
        OptionError: See ``common.finished.read_run``.
    """
    run = _read(folder)
    raw = run.score == "confidence" and run.started.calibrate_scores == "off"
    return replace(run, score="raw confidence") if raw else run


def evaluated_on(options: argparse.Namespace) -> tuple[str, ...]:
    """Say on which images a run with these options is evaluated, whichever are held out of them."""
    split = f"held out of {options.train_split}" if options.held_out else options.val_split
    return os.path.abspath(options.data), options.dataset, split
