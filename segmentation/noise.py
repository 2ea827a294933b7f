"""Batches of noise, of the size that a run's are of: to try or to measure a segmentor on."""

from __future__ import annotations

from typing import Any

import torch

from segmentation.config import RunConfig
from segmentation.data import class_masks
from segmentation.peer import STRIDE, Batch

_CLASSES = 10  # of an image, where masks are learned; ADE20K's have about as many
_BLOCK = 16


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
