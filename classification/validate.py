"""Measure classifiers: timm models, published ones, and files that a run exported.

    python classification/validate.py DATA --peer resnet18.a1_in1k --peer out/vit/best.safetensors

Takes the options of train.py; each model is measured in its own view, and all as an ensemble.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch

from classification.data import open_dataset
from classification.evaluation import PeerEvaluator
from classification.options import parse
from classification.peer import build_modules
from classification.train import FAULTS, check_classes, start
from common.broken import BadSamples
from common.outputs import progress_bars, run_command

_logger = logging.getLogger("validate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    logging.getLogger("timm").setLevel(logging.WARNING)
    return run_command(lambda: validate(arguments), FAULTS)


def validate(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Measure every ``--peer``.

    Returns:
        ``NAME/top1``, ``NAME/top5``, ``NAME/loss`` of each, ``ensemble/top1`` and ``oracle/top1``.

    Raises:
        OptionError, ModelError, CheckpointError: Bad input.
        BadSampleError: More files are broken than allowed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, specs = parse([*given, "--rule", "none"], "validate")
    world = start(options)
    modules, views = build_modules(specs, options)
    held_out = open_dataset(options, False, views[0].size[0])
    check_classes(held_out, modules[0].num_classes)
    for spec, module in zip(specs, modules, strict=True):
        module.to(world.device, getattr(torch, spec.options.model_dtype or "float32"))
    evaluator = PeerEvaluator(
        held_out,
        views,
        options,
        world,
        getattr(torch, options.amp_dtype) if options.amp else None,
        dtypes=[next(module.parameters()).dtype for module in modules],
        watch=progress_bars(world.is_main),
        bad=BadSamples(options.max_bad_samples),
    )
    scores = evaluator.score(modules)
    metrics = scores.metrics([spec.name for spec in specs], None)
    _logger.info("%d images of %s", int(scores.valid.sum()), options.data)
    for spec, view in zip(specs, views, strict=True):
        _logger.info(
            "%s  top-1 %.3f  top-5 %.3f  loss %.4f  (%s)",
            spec.name,
            metrics[f"{spec.name}/top1"],
            metrics[f"{spec.name}/top5"],
            metrics[f"{spec.name}/loss"],
            view,
        )
    if len(specs) > 1:
        _logger.info(
            "ensemble  top-1 %.3f   best of all  top-1 %.3f",
            metrics["ensemble/top1"],
            metrics["oracle/top1"],
        )
    return metrics


if __name__ == "__main__":
    sys.exit(main())
