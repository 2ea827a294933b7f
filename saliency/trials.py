"""Which memory layout a saliency model is faster in, and whether compiled."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from common import trials
from common.distributed import World
from common.seeding import generators_kept
from common.trials import to_layout
from saliency.clips import ClipView
from saliency.options import PeerSpec
from saliency.peer import SaliencyPeer, sample_loss
from saliency.plan import random_batch

_ON_CPU = 2  # samples of a trial there


def choose_ways(
    specs: Sequence[PeerSpec],
    modules: Sequence[nn.Module],
    views: Sequence[ClipView],
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
        return trial(specs[i], modules[i], views[i], run, world.device, channels_last)

    trials.choose_ways(specs, build, run, world, kept, "compile")


def trial(
    spec: PeerSpec,
    module: nn.Module,
    view: ClipView,
    run: argparse.Namespace,
    device: torch.device,
    channels_last: bool,
) -> trials.Trial:
    """Build a peer of a model's copy to be timed, and a batch of noise, on the device.

    Args:
        spec: Of the peer.
        module: Its model, which stays as it is.
        view: Of its clips.
        run: The run's options.
        device: Where it is tried.
        channels_last: The copy's memory layout.
    """
    samples = run.batch_size if device.type == "cuda" else min(run.batch_size, _ON_CPU)
    with generators_kept():
        batch = random_batch([view], run, samples, torch.device("cpu")).to(device)
    tried: Any = copy.deepcopy(module).to(device)
    to_layout(tried, channels_last)
    rest: dict[str, Any] = {"frozen": True}
    if not spec.frozen:
        rest = {"optimizer": torch.optim.SGD(tried.parameters(), lr=0.0)}  # never steps
    rest["channels_last"] = channels_last
    return SaliencyPeer(spec.name, tried, view, sample_loss(run), run.score, **rest), batch
