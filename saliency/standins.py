"""Small models for the demo, in the place of the published ones, which are too slow for two cores.

Each sees another clip, as the published models do. A model of your own joins a run in the same way:
a function that gives a module with a ``view``, named ``--peer MODULE:FUNCTION``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saliency.clips import IMAGENET_MEAN, IMAGENET_STD, KINETICS_MEAN, KINETICS_STD, ClipView


class StandIn(nn.Module):
    """Convolutions over space and time, then over space alone.

    Args:
        view: What its clips look like.
        width: Channels after the first convolution.
    """

    def __init__(self, view: ClipView, width: int) -> None:
        super().__init__()
        self.view = view
        self.encoder = nn.Sequential(
            *_block(3, width, (3, 5, 5), (1, 2, 2)),
            *_block(width, 2 * width, (3, 3, 3), (2, 2, 2)),
            *_block(2 * width, 2 * width, (3, 3, 3), (1, 1, 1)),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Turn clips [B, 3, T, H, W] into maps [B, H, W] in [0, 1]."""
        logits = self.decoder(self.encoder(x).amax(dim=2))
        logits = F.interpolate(logits, size=x.shape[-2:], mode="bilinear")
        return torch.sigmoid(logits[:, 0].float())


def _block(
    channels: int, to: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> list[nn.Module]:
    padding = tuple(k // 2 for k in kernel)
    convolution = nn.Conv3d(channels, to, kernel, stride, padding, bias=False)
    return [convolution, nn.BatchNorm3d(to), nn.ReLU()]


def recent(width: int = 12) -> StandIn:
    """Build a model that sees 8 consecutive frames that end at the target."""
    return StandIn(ClipView((48, 64), IMAGENET_MEAN, IMAGENET_STD, frames=8, before=7), width)


def around(width: int = 12) -> StandIn:
    """Build a model that sees every second frame around the target, smaller."""
    view = ClipView((32, 48), KINETICS_MEAN, KINETICS_STD, frames=8, stride=2, before=8)
    return StandIn(view, width)


def pair(width: int = 10) -> StandIn:
    """Build a model that sees the target and the frame before it."""
    return StandIn(ClipView((48, 64), IMAGENET_MEAN, IMAGENET_STD, frames=2, before=1), width)
