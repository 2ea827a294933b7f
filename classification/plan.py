"""What a run would need, told before it is made: ``train.py ... --plan``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from classification.data import STREAMS, View, common_view
from classification.options import PeerSpec, mixes
from classification.peer import build_modules, build_peers
from common.costs import PeerCost, measure_peer
from common.distributed import World
from common.memory import bytes_of
from common.options import amp_dtype, wants_copies
from common.outputs import log_plan
from common.planner import Flags, TeamCost, team_of
from common.trials import AUTO


def tell_plan(options: argparse.Namespace, specs: Sequence[PeerSpec], world: World) -> None:
    """Log what each peer and each engine needs, and which engine to take.

    Nothing is downloaded and no data is read: a model needs the same whatever its weights are.

    Args:
        options: The run's.
        specs: Of its peers.
        world: Of this process; only the main one tells.

    Raises:
        OptionError, ModelError, CheckpointError: As the run itself would.
    """
    for spec in specs:
        if spec.takes_published_weights:
            spec.options.pretrained = False
        leave_trials_out(spec)
    modules, views = build_modules(specs, options)
    team = measure_team(options, specs, modules, views, world)
    flags = Flags(launch="torchrun --nproc-per-node={} classification/train.py")
    log_plan(team, options.gpu_mem, flags, world, amp_dtype(options))


def leave_trials_out(spec: PeerSpec) -> None:
    """Take a peer as it is without ``compile=auto``: what a trial will say is not known yet."""
    if spec.options.torchcompile == AUTO:
        spec.options.torchcompile = None


def measure_team(
    options: argparse.Namespace,
    specs: Sequence[PeerSpec],
    modules: Sequence[nn.Module],
    views: Sequence[View],
    world: World,
) -> TeamCost:
    """Measure peers for the run's batches; one at a time is on the device.

    Args:
        options: The run's.
        specs: Of the peers.
        modules: From ``build_modules``, on the CPU, where they are afterwards.
        views: From there too.
        world: Of this process.

    Raises:
        OptionError: An option that does not fit, or only frozen peers.
    """
    costs, inputs = measure_peers(options, specs, modules, views, world)
    return team_of(options, costs, inputs, world, _refused(options))


def measure_peers(
    options: argparse.Namespace,
    specs: Sequence[PeerSpec],
    modules: Sequence[nn.Module],
    views: Sequence[View],
    world: World,
    common: View | None = None,
) -> tuple[list[PeerCost], int]:
    """Measure peers, one or more; see ``measure_team``.

    Args:
        common: How images come; None: as these peers alone would have them.

    Returns:
        What each needs, and the bytes of a batch.
    """
    common = common or common_view(views)
    batch, size = options.batch_size, common.size

    def draw(samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
        images = torch.rand(samples, *size, device=device)
        classes = modules[0].num_classes
        if mixes(options):
            return images, torch.full((samples, classes), 1 / classes, device=device)
        return images, torch.randint(classes, (samples,), device=device)

    costs = []
    for i, module in enumerate(modules):
        seat = World(i, len(specs), 0, world.device, seats=len(specs))  # builds this peer alone
        peer = build_peers(specs, modules, views, options, seat, 1, common)[0][i]
        dtype, copies = amp_dtype(options), wants_copies(options)
        costs.append(measure_peer(peer, draw, batch, world.device, dtype, copies=copies))
        del peer
        module.to("cpu")  # room for the next
    return costs, bytes_of(draw(batch, torch.device("meta")))


def _refused(options: argparse.Namespace) -> dict[str, str]:
    if not options.dataset.lower().startswith(STREAMS):
        return {}
    return {"peer-parallel": f"--dataset {options.dataset} is a stream, which is split by process"}
