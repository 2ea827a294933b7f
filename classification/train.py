"""Fine-tune N image classifiers that teach each other: timm's train.py, for N peers."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import distribute_bn, random_seed
from torch import nn
from tqdm import tqdm

from classification.data import TrainLoader, View, classes_of, common_view, open_dataset
from classification.evaluation import PeerEvaluator
from classification.models import PUBLISHED_TOP1, ModelError
from classification.options import OptionError, PeerSpec, parse
from classification.peer import ClassifierPeer, build_modules, build_peers
from common import distributed
from common.checkpoint import CheckpointError, list_runs, load_run
from common.distributed import World
from common.engine import JointEngine
from common.peers import PeerGroup
from common.report import write_run_report
from common.trainer import NonFiniteError, Plan, Progress, Trainer, Writer
from common.transfer import KnowledgeTransfer

_logger = logging.getLogger("train")

BASELINE_GAP = 0.5
_FAULTS = (OptionError, ModelError, CheckpointError, NonFiniteError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        run(arguments)
    except _FAULTS as error:
        _logger.error("error: %s", error)
        return 1
    finally:
        distributed.stop()
    return 0


def run(arguments: Sequence[str] | None = None, watch: bool = True) -> Progress:
    """Train as the arguments say.

    Args:
        arguments: As on the command line; None: ``sys.argv``.
        watch: Show progress bars on a terminal.

    Returns:
        Where the run ended: best values, history of evaluations, lessons of every epoch.

    Raises:
        OptionError, ModelError, CheckpointError: Bad input, before any training.
        NonFiniteError, ValueError: A loss that is not finite.
    """
    options, specs = parse(arguments)
    state = _resume_state(options)
    try:
        world = distributed.start(options.device)
    except (ValueError, RuntimeError) as error:
        raise OptionError(str(error)) from error
    if not world.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    if world.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if options.fast_norm:
        timm.layers.set_fast_norm()
    random_seed(options.seed, 0)
    modules, views = build_modules(specs, options)
    _check_published_classes(specs, modules)
    train_set = open_dataset(options, True, views[0].size[0])
    _check_classes(train_set, modules[0].num_classes, specs)
    loader = TrainLoader(train_set, common_view(views), options, world, modules[0].num_classes)
    updates = -(-len(loader) // options.grad_accum_steps)
    profile = [_describe(spec, m, v) for spec, m, v in zip(specs, modules, views, strict=True)]
    peers, epochs = build_peers(specs, modules, views, options, world, updates)
    group = PeerGroup(peers)
    amp_dtype = getattr(torch, options.amp_dtype) if options.amp else None
    evaluator = PeerEvaluator(
        lambda: open_dataset(options, False, views[0].size[0]),
        views,
        options,
        world,
        amp_dtype,
        [spec.options.channels_last for spec in specs],
        [next(module.parameters()).dtype for module in modules],
        watch=_bars(watch and world.is_main),
    )
    random_seed(options.seed, world.rank)
    transfer = _transfer(options, group, world)
    folder = _folder(options, specs)
    if world.is_main:
        _print_table(profile, peers)
        _write_arguments(folder, options, specs)
    trainer = Trainer(
        peers=group,
        engine=JointEngine(group, transfer, world.device, amp_dtype),
        transfer=transfer,
        loader=loader,
        evaluator=evaluator,
        plan=_plan(options, epochs),
        folder=folder,
        world=world,
        config=_plain(options),
        metadata={
            spec.name: _metadata(spec, module, view)
            for spec, module, view in zip(specs, modules, views, strict=True)
        },
        writers=_writers(options, folder, world),
        before_evaluation=lambda: _average_buffers(peers, options, world),
        watch=lambda batches: _bars(watch and world.is_main)(batches, "training"),
    )
    if state is not None:
        trainer.resume(state, optimizer=not options.no_resume_opt)
        _logger.info("resumed at epoch %d", trainer.progress.epoch)
    elif options.start_epoch:
        trainer.progress.epoch = options.start_epoch
    trainer.on_baseline = lambda metrics: _check_baseline(specs, metrics)
    progress = trainer.fit()
    if world.is_main:
        _check_exports(trainer, specs, evaluator)
        report = write_run_report(
            folder / "report.html",
            names=group.names,
            history=progress.history,
            lessons=progress.lessons,
            metric=options.eval_metric,
            settings=_settings(options),
        )
        _print_result(progress, group.names, options.eval_metric)
        _logger.info("report: %s", report)
    distributed.barrier()
    return progress
