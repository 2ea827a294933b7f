"""What a run would need, told before it is made: ``train_net.py ... --plan``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.costs import PeerCost, measure_peer, measure_transfer
from common.distributed import World
from common.memory import bytes_of
from common.outputs import log_plan
from common.peers import PeerGroup, RemotePeer
from common.planner import Flags, TeamCost
from segmentation.config import PeerConfig, RunConfig, build_transfer
from segmentation.data import check_classes
from segmentation.errors import ConfigError, told_of
from segmentation.models import build_module
from segmentation.noise import random_batch
from segmentation.peer import Batch, SegmentorPeer
from segmentation.trainer import build_peer, per_rank_batch, refuse_talk


def tell_plan(run: RunConfig, processes: int, memory: int | None) -> None:
    """Log what each peer and each engine needs, and which engine to take.

    Nothing is downloaded and no data is read: a model needs the same whatever its weights are.

    Args:
        run: The run's config.
        processes: Of the run.
        memory: Bytes of one GPU; None: of the one here, if any.

    Raises:
        ConfigError, SegmentorError, DataError: As the run itself would.
    """
    world = World(0, 1, 0, torch.device(run.cfg.MODEL.DEVICE))
    flags = Flags(
        engine="TRANSFER.ENGINE {}",
        checkpointing="",
        batch="SOLVER.IMS_PER_BATCH {} TRANSFER.ACCUMULATE {}",
        launch="--num-gpus {}",
        processes=shards_of(run, processes),
    )
    log_plan(measure_team(run, processes), memory, flags, world, run.amp_dtype)


def measure_team(run: RunConfig, processes: int = 1) -> TeamCost:
    """Measure a run's peers; one at a time is on the device.

    Raises:
        ConfigError, SegmentorError, DataError: As the run itself would.
    """
    ignore = check_classes({peer.name: peer.cfg for peer in run.peers})
    shards = shards_of(run, processes)
    batch = per_rank_batch(run.cfg.SOLVER.IMS_PER_BATCH, shards)
    measured = [measure_config(config, run, batch, ignore) for config in run.peers]
    costs = [one.cost for one in measured]
    refused = {engine: why for one in measured for engine, why in one.refused.items()}
    try:
        PeerGroup([RemotePeer(peer.name, peer.frozen) for peer in run.peers])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with told_of("TRANSFER"):
        transfer = measure_transfer(build_transfer(run, seed=0), costs, batch)
    return TeamCost(
        costs,
        batch,
        batch_bytes(run, batch, ignore, masks=any(one.masks for one in measured)),
        transfer,
        run.transfer.ACCUMULATE,
        reduced=shards > 1,
        refused=refused,
        skips=run.transfer.ON_NONFINITE == "skip",
    )


@dataclass(frozen=True)
class Measured:
    """One peer of a run.

    Attributes:
        cost: What it needs.
        masks: Whether it learns from one mask a class.
        refused: Engines that cannot hold it, and why.
    """

    cost: PeerCost
    masks: bool
    refused: dict[str, str]


def measure_config(config: PeerConfig, run: RunConfig, batch: int, ignore: int) -> Measured:
    """Measure one peer, with random weights.

    Args:
        config: Of the peer.
        run: Whose images it learns from.
        batch: Images a process.
        ignore: The ignore label.

    Raises:
        ConfigError, SegmentorError: As the run itself would.
    """
    peer = _peer(config, run)
    refused, masks = _refused(run, peer), not peer.dense

    def draw(samples: int, device: torch.device) -> Batch:
        return random_batch(run, samples, device, ignore, masks)

    device = torch.device(run.cfg.MODEL.DEVICE)
    copies = build_transfer(run, seed=0).wants_copies
    with told_of(f"peer {config.name!r}"):
        cost = measure_peer(peer, draw, batch, device, run.amp_dtype, copies=copies)
    return Measured(cost, masks, refused)


def batch_bytes(run: RunConfig, batch: int, ignore: int, masks: bool) -> int:
    """Count the bytes of a batch of training images."""
    return batch * bytes_of(random_batch(run, 1, torch.device("cpu"), ignore, masks))


def _refused(run: RunConfig, peer: SegmentorPeer) -> dict[str, str]:
    """Return the engine that cannot hold a peer, and why.

    Raises:
        ConfigError: The run asks for it.
    """
    try:
        refuse_talk(peer.module, peer.name)
    except ConfigError as error:
        if run.transfer.ENGINE == "peer-parallel":
            raise
        return {"peer-parallel": str(error)}
    return {}


def shards_of(run: RunConfig, processes: int) -> int:
    """Return over how many processes the batch is split: those that hold the same peer."""
    seated = run.transfer.ENGINE == "peer-parallel"
    return max(1, processes // len(run.peers)) if seated else processes


def _peer(config: PeerConfig, run: RunConfig) -> SegmentorPeer:
    with told_of(f"peer {config.name!r}"):
        module = build_module(config.cfg)
    return build_peer(config, module, run.transfer)
