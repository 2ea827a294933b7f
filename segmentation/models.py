"""The peers' models, as Detectron2 builds them from their configs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ASPP
from detectron2.modeling import build_model
from torch import Tensor, nn

from segmentation.config import PeerConfig
from segmentation.errors import told_of
from segmentation.weights import load_peer_weights

_logger = logging.getLogger(__name__)


def build_with_weights(config: PeerConfig) -> tuple[nn.Module, Any]:
    """Build a peer's model and load MODEL.WEIGHTS into it.

    Raises:
        CheckpointError: No such file, or a checkpoint of another model.
        ConfigError: A setting that Detectron2 refuses; names the peer.
    """
    with told_of(f"peer {config.name!r}"):
        module = build_module(config.cfg)
    if config.cfg.MODEL.WEIGHTS:
        load_peer_weights(module, config.cfg.MODEL.WEIGHTS, f"peer {config.name!r}")
    else:
        _logger.warning("peer %r has no MODEL.WEIGHTS: it starts from random ones", config.name)
    return module, config.cfg


def build_module(cfg: CfgNode) -> nn.Module:
    """Build a segmentor that takes images of any size.

    DeepLab's heads fix the window of their image pooling to INPUT.CROP.SIZE, and refuse every
    image that is no multiple of it. The crop is the mapper's affair here, so they are built
    without one; where their own window fits an image, it is what they pool over.
    """
    crop = cfg.INPUT.CROP
    free = cfg.clone()
    free.defrost()
    free.INPUT.CROP.ENABLED = False
    module = build_model(free)
    poolings = [part for part in module.modules() if isinstance(part, ASPP)]
    if poolings and crop.ENABLED and crop.TYPE == "absolute":
        shapes = module.backbone.output_shape()
        stride = max(shapes[name].stride for name in module.sem_seg_head.in_features)
        if not any(side % stride for side in crop.SIZE):
            for part in poolings:
                part.convs[-1][0] = ImagePooling([side // stride for side in crop.SIZE])
    return module


class ImagePooling(nn.Module):
    """The mean over a sliding window where the window divides the map, else over the whole map.

    Args:
        window: Height and width, in cells of the map.
    """

    def __init__(self, window: Sequence[int]) -> None:
        super().__init__()
        self.window = tuple(window)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, h', w']; h' = w' = 1 where the window is the map's size or does not fit."""
        if any(side % of for side, of in zip(x.shape[-2:], self.window, strict=True)):
            return F.adaptive_avg_pool2d(x, 1)
        return F.avg_pool2d(x, self.window, stride=1)
