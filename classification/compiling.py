"""Whether a peer is faster compiled: tried before training, kept for the run."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from classification.data import View
from classification.layouts import decided, is_faster, trial
from classification.options import PeerSpec
from common.distributed import World
from common.probe import time_in_turns

_logger = logging.getLogger("train")

AUTO = "auto"
BACKEND = "inductor"


def choose_compilation(
    specs: Sequence[PeerSpec],
    modules: Sequence[nn.Module],
    views: Sequence[View],
    run: argparse.Namespace,
    world: World,
    chosen: Mapping[str, bool] | None = None,
) -> None:
    """Set ``torchcompile`` of the peers that leave it to us; all ranks must call it.

    Forward and backward are timed on copies and on noise, after one step that compiles. Models and
    generators stay as they are. The first process that holds a peer decides for all.

    Args:
        specs: Of the peers; their options are changed.
        modules: Of the peers.
        views: Of the peers.
        run: The run's options; ``compiled`` becomes what was chosen, by the peers' names.
        world: Where this process stands.
        chosen: What a resumed run had chosen; such peers are not tried again.
    """
    asking = {i: spec for i, spec in enumerate(specs) if spec.options.torchcompile == AUTO}

    def faster(i: int) -> bool:
        return _is_faster(specs[i], modules[i], views, i, run, world.device)

    run.compiled = decided(asking, faster, world, chosen)
    for spec in asking.values():
        spec.options.torchcompile = BACKEND if run.compiled[spec.name] else None


def _is_faster(
    spec: PeerSpec,
    module: nn.Module,
    views: Sequence[View],
    number: int,
    run: argparse.Namespace,
    device: torch.device,
) -> bool:
    try:
        seconds = time_both(spec, module, views, number, run, device)
    except RuntimeError as error:  # of the compiler: none installed, or a model that it cannot take
        reason = str(error).strip().splitlines()[0]
        _logger.warning("%s: not compiled, the compiler fails here: %s", spec.name, reason)
        return False
    return is_faster(spec.name, seconds)


def time_both(
    spec: PeerSpec,
    module: nn.Module,
    views: Sequence[View],
    number: int,
    run: argparse.Namespace,
    device: torch.device,
    repeats: int = 5,
) -> dict[str, float]:
    """Return the median seconds of copies' forward and backward, eager and compiled, in turns.

    Raises:
        RuntimeError: The compiler fails.
    """
    amp = getattr(torch, run.amp_dtype) if run.amp else None
    trials = {
        name: trial(spec, module, views, number, run, device, spec.options.channels_last)
        for name in ("eager", "compiled")
    }
    peer, mode = trials["compiled"][0], spec.options.torchcompile_mode
    peer.model = torch.compile(peer.module, backend=BACKEND, mode=mode)
    return time_in_turns(trials, device, amp, repeats=repeats)
