"""Which memory layout a classifier is faster in, and whether compiled."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from classification.data import ToView, View, common_view
from classification.losses import sample_loss
from classification.options import PeerSpec
from classification.peer import ClassifierPeer
from common import trials
from common.distributed import World
from common.trials import to_layout

_ON_CPU = 8  # samples of a trial there


def choose_ways(
    specs: Sequence[PeerSpec],
    modules: Sequence[nn.Module],
    views: Sequence[View],
    run: argparse.Namespace,
    world: World,
    kept: Mapping[str, Any],
) -> None:
    """Settle layout and compilation of the peers that leave them to us; all ranks must call it.

    Args:
        specs, run, world, kept: See ``common.trials.choose_ways``.
        modules: Of the peers; they stay as they are.
        views: Of the peers.
    """

    def build(i: int, channels_last: bool) -> trials.Trial:
        return trial(specs[i], modules[i], views, i, run, world.device, channels_last)

    trials.choose_ways(specs, build, run, world, kept, "torchcompile", "torchcompile_mode")


def trial(
    spec: PeerSpec,
    module: nn.Module,
    views: Sequence[View],
    number: int,
    run: argparse.Namespace,
    device: torch.device,
    channels_last: bool,
) -> trials.Trial:
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
    to_layout(tried, channels_last)
    to_view = ToView(common, views[number], channels_last, dtype).to(device)
    rest: dict[str, Any] = {"frozen": True}
    if not spec.frozen:
        rest = {"optimizer": torch.optim.SGD(tried.parameters(), lr=0.0)}  # never steps
    peer = ClassifierPeer(spec.name, tried, to_view, sample_loss(run), run.score, **rest)
    return peer, (images, target)
