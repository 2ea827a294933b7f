"""Finished runs of train.py, read back; see ``common.finished``."""

from __future__ import annotations

import functools

from classification.options import EXPORT, PEER_OPTIONS, parse
from common import finished

METRIC = "top1"
_NOT_SETTING = "pin_mem wandb_tags local_rank data_dir validation_batch_size".split()

read_run = functools.partial(
    finished.read_run,
    parse=parse,
    metric=METRIC,
    last=f"last{EXPORT}",
    own=PEER_OPTIONS,
    not_setting=_NOT_SETTING,
)
