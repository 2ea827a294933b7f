"""Per-sample supervised losses: their mean is the task loss, minus them the score."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from classification.options import mixes

SampleLoss = Callable[[Tensor, Tensor], Tensor]


def sample_loss(options: argparse.Namespace) -> SampleLoss:
    """Choose the per-sample loss that timm's arguments ask for.

    Returns:
        A function of float32 logits [B, C] and a target ([B] int, or [B, C] float from mixup) that
        gives [B], with gradient to the logits.
    """
    smoothing = 0.0 if mixes(options) else options.smoothing
    if not options.bce_loss:
        return lambda logits, target: F.cross_entropy(
            logits, target, label_smoothing=smoothing, reduction="none"
        )
    criterion = BinaryCrossEntropy(
        smoothing=smoothing,
        target_threshold=options.bce_target_thresh,
        pos_weight=options.bce_pos_weight,
        reduction="none",
    )

    def binary(logits: Tensor, target: Tensor) -> Tensor:
        per_class = criterion.to(logits.device)(logits, target)
        return per_class.sum(dim=1) if options.bce_sum else per_class.mean(dim=1)

    return binary


def hard(target: Tensor) -> Tensor:
    """Return the class of each sample [B]; of a soft target the heaviest one."""
    return target.argmax(dim=1) if target.dim() == 2 else target
