"""Which memory layout a peer is faster in: tried before training, kept for the run."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from classification.data import ToView, View, common_view
from classification.losses import sample_loss
from classification.options import PeerSpec
from classification.peer import ClassifierPeer
from common import distributed
from common.distributed import World
from common.peers import Peer
from common.probe import time_in_turns

_logger = logging.getLogger("train")

MARGIN = 0.03
"""By what share channels_last must be faster to be taken."""

_ON_CPU = 8  # samples of a trial there


def choose_layouts(
    specs: Sequence[PeerSpec],
    modules: Sequence[nn.Module],
    views: Sequence[View],
    run: argparse.Namespace,
    world: World,
    chosen: Mapping[str, bool] | None = None,
) -> None:
    """Set ``channels_last`` of the peers that ask for the faster layout; all ranks must call it.

    Forward and backward are timed on copies and on noise, so models and generators stay as they
    are. The first process that holds a peer decides for all.

    Args:
        specs: Of the peers; their options are changed.
        modules: Of the peers.
        views: Of the peers.
        run: The run's options; ``layouts`` becomes what was chosen, by the peers' names.
        world: Where this process stands.
        chosen: What a resumed run had chosen; such peers are not tried again.
    """
    known = dict(chosen or {})
    mine = {
        spec.name: _is_channels_last_faster(spec, module, views, i, run, world)
        for i, (spec, module) in enumerate(zip(specs, modules, strict=True))
        if spec.options.auto_layout and spec.name not in known and world.holds(i)
    }
    for found in reversed(distributed.gather_objects(mine)):
        known |= found
    asking = [spec for spec in specs if spec.options.auto_layout]
    for spec in asking:
        spec.options.channels_last = known[spec.name]
    run.layouts = {spec.name: known[spec.name] for spec in asking}


def _is_channels_last_faster(
    spec: PeerSpec,
    module: nn.Module,
    views: Sequence[View],
    number: int,
    run: argparse.Namespace,
    world: World,
) -> bool:
    seconds = time_layouts(spec, module, views, number, run, world.device)
    ratio = seconds["channels_last"] / seconds["contiguous"]
    faster = ratio < 1 - MARGIN
    _logger.info(
        "%s: forward and backward %.1f ms contiguous, %.1f ms channels_last: %s",
        spec.name,
        1e3 * seconds["contiguous"],
        1e3 * seconds["channels_last"],
        "channels_last is taken" if faster else "contiguous is taken",
    )
    return faster


def time_layouts(
    spec: PeerSpec,
    module: nn.Module,
    views: Sequence[View],
    number: int,
    run: argparse.Namespace,
    device: torch.device,
    repeats: int = 5,
) -> dict[str, float]:
    """Return the median seconds of copies' forward and backward in both layouts, in turns."""
    common = common_view(views)
    dtype = getattr(torch, spec.options.model_dtype or "float32")
    amp = getattr(torch, run.amp_dtype) if run.amp else None
    samples = run.batch_size if device.type == "cuda" else min(run.batch_size, _ON_CPU)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, *common.size, generator=generator).to(device)
    target = torch.zeros(samples, dtype=torch.long, device=device)
    trials: dict[str, tuple[Peer, Any]] = {}
    for name, layout in (
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ):
        tried: Any = copy.deepcopy(module).to(device=device, dtype=dtype)
        if layout is torch.channels_last:
            tried.to(memory_format=layout)
        to_view = ToView(common, views[number], layout is torch.channels_last, dtype).to(device)
        rest: dict[str, Any] = {"frozen": True}
        if not spec.frozen:
            rest = {"optimizer": torch.optim.SGD(tried.parameters(), lr=0.0)}  # never steps
        peer = ClassifierPeer(spec.name, tried, to_view, sample_loss(run), run.score, **rest)
        trials[name] = (peer, (images, target))
    return time_in_turns(trials, device, amp, repeats=repeats)
