"""What a run would need, told before it is made: ``train_net.py ... --plan``."""

from __future__ import annotations

from typing import Any

import torch

from common.costs import measure_peer, measure_transfer
from common.distributed import World
from common.memory import bytes_of
from common.outputs import log_plan
from common.peers import PeerGroup, RemotePeer
from common.planner import Flags, TeamCost
from segmentation.config import AMP_DTYPES, PeerConfig, RunConfig
from segmentation.data import check_classes, class_masks
from segmentation.errors import ConfigError, told_of
from segmentation.models import build_module
from segmentation.peer import STRIDE, Batch, SegmentorPeer
from segmentation.trainer import build_peer, build_transfer, per_rank_batch, refuse_talk

_CLASSES = 10  # of an image, where masks are learned; ADE20K's have about as many
_BLOCK = 16


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
    log_plan(measure_team(run, processes), memory, flags, world, amp_dtype(run))


def measure_team(run: RunConfig, processes: int = 1) -> TeamCost:
    """Measure a run's peers; one at a time is on the device.

    Raises:
        ConfigError, SegmentorError, DataError: As the run itself would.
    """
    ignore = check_classes({peer.name: peer.cfg for peer in run.peers})
    device = torch.device(run.cfg.MODEL.DEVICE)
    shards = shards_of(run, processes)
    batch = per_rank_batch(run.cfg.SOLVER.IMS_PER_BATCH, shards)
    costs, masks = [], False
    refused: dict[str, str] = {}
    for config in run.peers:
        peer = _peer(config, run)
        refused |= _refused(run, peer)
        masks = masks or not peer.dense

        def draw(samples: int, device: torch.device, masks: bool = not peer.dense) -> Batch:
            return random_batch(run, samples, device, ignore, masks)

        with told_of(f"peer {config.name!r}"):
            costs.append(measure_peer(peer, draw, batch, device, amp_dtype(run)))
        del peer
    try:
        PeerGroup([RemotePeer(peer.name, peer.frozen) for peer in run.peers])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with told_of("TRANSFER"):
        transfer = measure_transfer(build_transfer(run, seed=0), costs, batch)
    return TeamCost(
        costs,
        batch,
        batch * bytes_of(random_batch(run, 1, torch.device("cpu"), ignore, masks)),
        transfer,
        run.transfer.ACCUMULATE,
        reduced=shards > 1,
        refused=refused,
    )


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


def amp_dtype(run: RunConfig) -> torch.dtype | None:
    """Return what forwards are autocast to."""
    return AMP_DTYPES[run.transfer.AMP_DTYPE] if run.cfg.SOLVER.AMP.ENABLED else None


def image_size(run: RunConfig) -> tuple[int, int]:
    """Return height and width of the training images: of the crop, or of the largest image.

    Without an absolute crop, an image is taken to be at most twice as wide as it is high.
    """
    settings = run.cfg.INPUT
    if settings.CROP.ENABLED and settings.CROP.TYPE == "absolute":
        height, width = settings.CROP.SIZE
        return int(height), int(width)
    short = int(max(settings.MIN_SIZE_TRAIN))
    return short, min(2 * short, max(int(settings.MAX_SIZE_TRAIN), short))


def random_batch(
    run: RunConfig, samples: int, device: torch.device, ignore: int, masks: bool
) -> Batch:
    """Return a batch of noise, with blocks of ten classes an image.

    Args:
        run: Its images' size, and its classes.
        samples: How many.
        device: Of the batch.
        ignore: The ignore label.
        masks: Also give one mask a class.
    """
    height, width = image_size(run)
    classes = min(_CLASSES, run.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    rows = torch.arange(height, device=device)[:, None] // _BLOCK
    labels = (rows + torch.arange(width, device=device) // _BLOCK) % classes
    made: list[dict[str, Any]] = []
    for _ in range(samples):
        image = torch.randint(256, (3, height, width), dtype=torch.uint8, device=device)
        sample = {"image": image, "sem_seg": labels.clone(), "height": height, "width": width}
        if masks:
            sample["instances"] = class_masks(sample["sem_seg"], ignore)
        made.append(sample)
    padded = [STRIDE * -(-side // STRIDE) for side in (height, width)]
    target = torch.full((samples, *padded), ignore, device=device)
    target[:, :height, :width] = labels
    batch = Batch(made, target, ignore)
    _ = batch.labels, batch.labelled  # made once for all peers
    return batch
