"""What a run would need, told before it is made: ``train_*.py ... --plan``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from common.costs import PeerCost, measure_peer
from common.distributed import World
from common.memory import bytes_of
from common.options import amp_dtype, wants_copies
from common.outputs import log_plan
from common.planner import Flags, TeamCost, team_of
from common.trials import AUTO
from saliency.clips import ClipView
from saliency.data import ClipBatch
from saliency.options import PeerSpec
from saliency.peer import build_modules, build_peers


def tell_plan(
    options: argparse.Namespace, specs: Sequence[PeerSpec], world: World, script: str
) -> None:
    """Log what each peer and each engine needs, and which engine to take.

    Nothing is downloaded and no data is read: a model needs the same whatever its weights are.

    Args:
        options: The run's.
        specs: Of its peers.
        world: Of this process; only the main one tells.
        script: Its name.

    Raises:
        OptionError, ModelError: As the run itself would.
    """
    dtype = amp_dtype(options)
    specs = [to_measure(spec) for spec in specs]
    team = measure_team(options, specs, world, dtype)
    flags = Flags(launch=f"torchrun --nproc-per-node={{}} saliency/{script}.py")
    log_plan(team, options.gpu_mem, flags, world, dtype)


def to_measure(spec: PeerSpec) -> PeerSpec:
    """Return a peer without its weights, and without ``compile=auto``: no trial has been made."""
    bare = spec.without_weights()
    if bare.options.compile == AUTO:
        bare.options.compile = None
    return bare


def measure_team(
    options: argparse.Namespace,
    specs: Sequence[PeerSpec],
    world: World,
    dtype: torch.dtype | None,
) -> TeamCost:
    """Measure peers for the run's batches; one at a time is on the device.

    Args:
        options: The run's.
        specs: Of the peers.
        world: Of this process.
        dtype: What forwards are autocast to.

    Raises:
        OptionError, ModelError: As the run itself would.
    """
    modules, views = build_modules(specs)
    costs = measure_peers(options, specs, modules, views, world, dtype)
    inputs = batch_bytes(views, options)
    return team_of(options, costs, inputs, world)


def measure_peers(
    options: argparse.Namespace,
    specs: Sequence[PeerSpec],
    modules: Sequence[nn.Module],
    views: Sequence[ClipView],
    world: World,
    dtype: torch.dtype | None,
) -> list[PeerCost]:
    """Measure peers, one or more; see ``measure_team``.

    Args:
        modules: Of the peers, on the CPU, where they are afterwards.
        views: Of the peers.
    """
    batch, alone = options.batch_size, World(0, 1, 0, world.device)

    def draw(samples: int, device: torch.device) -> ClipBatch:
        return random_batch(views, options, samples, device)

    costs = []
    for spec, module, view in zip(specs, modules, views, strict=True):
        (peer,) = build_peers([spec], [module], [view], options, alone, updates=1)
        copies = wants_copies(options)
        costs.append(measure_peer(peer, draw, batch, world.device, dtype, copies=copies))
        del peer
        module.to("cpu")  # room for the next
    return costs


def batch_bytes(views: Sequence[ClipView], options: argparse.Namespace) -> int:
    """Count the bytes of a run's batch, with the clips of all views."""
    return bytes_of(random_batch(views, options, options.batch_size, torch.device("meta")))


def grid_of(views: Sequence[ClipView], options: argparse.Namespace) -> tuple[int, ...]:
    """Return the size of ground truth and transfer: as asked for, else of the largest view."""
    largest = max((view.size for view in views), key=lambda size: size[0] * size[1])
    return tuple(options.map_size or largest)


def random_batch(
    views: Sequence[ClipView], options: argparse.Namespace, samples: int, device: torch.device
) -> ClipBatch:
    """Return a batch of noise, with the clips of all views made, as they are while peers learn.

    Args:
        views: Of all peers.
        options: The run's: size of the maps, and whether the loss needs fixations.
        samples: How many.
        device: Of the batch.
    """
    length = {size: 0 for size in (view.size for view in views)}
    for view in views:
        length[view.size] = max(length[view.size], view.frames)
    size = grid_of(views, options)
    looked = torch.ones(samples, *size, device=device) if options.nss else None
    batch = ClipBatch(
        frames={
            size: torch.randint(256, (samples * frames, *size, 3), dtype=torch.uint8, device=device)
            for size, frames in length.items()
        },
        rows={
            view: torch.arange(samples * view.frames, device=device).view(samples, -1)
            for view in views
        },
        maps=torch.rand(samples, *size, device=device),
        fixations=looked,
        video=torch.zeros(samples, dtype=torch.long),
        target=torch.zeros(samples, dtype=torch.long),
    )
    for view in views:
        batch.clips(view)
    return batch
