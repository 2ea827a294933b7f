"""Which memory layout a peer is faster in: tried before training, kept for the run."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from classification.data import ToView, View, common_view
from classification.losses import sample_loss
from classification.options import PeerSpec
from classification.peer import ClassifierPeer
from common import distributed
from common.distributed import World
from common.probe import time_in_turns

_logger = logging.getLogger("train")

MARGIN = 0.03
"""By what share of the time a choice must be faster to be taken."""

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
    asking = {i: spec for i, spec in enumerate(specs) if spec.options.auto_layout}

    def faster(i: int) -> bool:
        seconds = time_layouts(specs[i], modules[i], views, i, run, world.device)
        return is_faster(specs[i].name, seconds)

    run.layouts = decided(asking, faster, world, chosen)
    for spec in asking.values():
        spec.options.channels_last = run.layouts[spec.name]


def decided(
    asking: Mapping[int, PeerSpec],
    faster: Callable[[int], bool],
    world: World,
    chosen: Mapping[str, bool] | None,
) -> dict[str, bool]:
    """Return by the peers' names what is taken; all ranks must call it.

    Args:
        asking: The peers that ask, by their numbers.
        faster: Tries one peer here.
        world: Where this process stands; the first one that holds a peer decides for all.
        chosen: What a resumed run had chosen; such peers are not tried again.
    """
    known = dict(chosen or {})
    mine = {
        spec.name: faster(i)
        for i, spec in asking.items()
        if spec.name not in known and world.holds(i)
    }
    for found in reversed(distributed.gather_objects(mine)):
        known |= found
    return {spec.name: known[spec.name] for spec in asking.values()}


def is_faster(who: str, seconds: Mapping[str, float]) -> bool:
    """Whether the second of two ways is faster by the margin; logs both.

    Args:
        who: Name of the peer.
        seconds: Of each way by its name, the usual one first.
    """
    (usual, before), (other, now) = seconds.items()
    faster = now < (1 - MARGIN) * before
    _logger.info(
        "%s: forward and backward %.1f ms %s, %.1f ms %s: %s is taken",
        who, 1e3 * before, usual, 1e3 * now, other, other if faster else usual,
    )  # fmt: skip
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
    amp = getattr(torch, run.amp_dtype) if run.amp else None
    trials = {
        name: trial(spec, module, views, number, run, device, channels_last)
        for name, channels_last in (("contiguous", False), ("channels_last", True))
    }
    return time_in_turns(trials, device, amp, repeats=repeats)


def trial(
    spec: PeerSpec,
    module: nn.Module,
    views: Sequence[View],
    number: int,
    run: argparse.Namespace,
    device: torch.device,
    channels_last: bool,
) -> tuple[ClassifierPeer, Any]:
    """Build a peer of a model's copy to be timed, and a batch of noise, on the device.

    Args:
        spec: Of the peer.
        module: Its model, which stays as it is.
        views: Of all peers.
        number: Which of them it is.
        run: The run's options.
        device: Where it is tried.
        channels_last: The copy's memory layout.
    """
    common = common_view(views)
    dtype = getattr(torch, spec.options.model_dtype or "float32")
    samples = run.batch_size if device.type == "cuda" else min(run.batch_size, _ON_CPU)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, *common.size, generator=generator).to(device)
    target = torch.zeros(samples, dtype=torch.long, device=device)
    tried: Any = copy.deepcopy(module).to(device=device, dtype=dtype)
    if channels_last:
        tried.to(memory_format=torch.channels_last)
    to_view = ToView(common, views[number], channels_last, dtype).to(device)
    rest: dict[str, Any] = {"frozen": True}
    if not spec.frozen:
        rest = {"optimizer": torch.optim.SGD(tried.parameters(), lr=0.0)}  # never steps
    peer = ClassifierPeer(spec.name, tried, to_view, sample_loss(run), run.score, **rest)
    return peer, (images, target)
