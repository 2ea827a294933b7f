"""An average of a model's weights over optimizer steps (EMA)."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of weights and statistics, begun at the start's.

    Whole numbers (tables of positions, counters) are not averaged but copied. The average is in
    evaluation mode.

    Args:
        module: What is averaged. Hooks that are on it already are copied with it.
        decay: Weight of the past, in [0, 1).

    Attributes:
        module: The average.

    Raises:
        ValueError: A decay out of its range.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; expected 0 or more, and less than 1")
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Move the average towards the model, without waiting for the device."""
        pairs = list(zip(_values(self.module), _values(model), strict=True))
        moving = [(mine, new) for mine, new in pairs if mine.is_floating_point()]
        torch._foreach_lerp_(
            [mine for mine, _ in moving], [new for _, new in moving], 1 - self.decay
        )
        for mine, new in pairs:
            if not mine.is_floating_point():
                mine.copy_(new)


def chosen_decay(decay: float | None, span: float, updates: int) -> float:
    """Return the decay that is given, or where there is none that of a span.

    Args:
        decay: None: not given.
        span, updates: See ``decay_of_span``.
    """
    return decay_of_span(span, updates) if decay is None else decay


def decay_of_span(span: float, updates: int) -> float:
    """Return the decay of an average that reaches back over a share of a run.

    Args:
        span: The share, in (0, 1].
        updates: Optimizer steps of the run.
    """
    return 1 - 1 / max(1.0, span * updates)


def _values(module: nn.Module) -> list[Tensor]:
    """Return parameters and buffers, those that several names share once."""
    return list(chain(module.parameters(), module.buffers()))
