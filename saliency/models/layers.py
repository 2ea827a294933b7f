"""What the decoders are made of: convolutions that fold frames, and resizing frame by frame."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def fold(
    c_in: int, c_out: int, frames: int, *, space: int = 3, groups: int = 1, bias: bool = False
) -> nn.Conv3d:
    """Make a convolution that turns every ``frames`` frames into one; height and width stay.

    Args:
        c_in: Channels that go in.
        c_out: Channels that come out.
        frames: Kernel and stride in time, so that no frame is read twice.
        space: Kernel in height and width, odd; padded with zeros.
        groups: Of channels that do not see each other.
        bias: Whether it has one.
    """
    return nn.Conv3d(
        c_in,
        c_out,
        kernel_size=(frames, space, space),
        stride=(frames, 1, 1),
        padding=(0, space // 2, space // 2),
        groups=groups,
        bias=bias,
    )


def resize_frames(x: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Resize every frame bilinearly.

    Trilinear resizing by 1 in time is the same, but slower, and has no deterministic backward on
    CUDA.

    Args:
        x: Features [B, C, T, h, w].
        size: H and W.
        align_corners: As in ``torch.nn.functional.interpolate``.

    Returns:
        Features [B, C, T, H, W].
    """
    frames = F.interpolate(x.flatten(1, 2), size, mode="bilinear", align_corners=align_corners)
    return frames.unflatten(1, x.shape[1:3])


class Enlarge(nn.Module):
    """Make every frame ``scale`` times as high and as wide, bilinearly."""

    def __init__(self, scale: int, align_corners: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.align_corners = align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2] * self.scale, x.shape[-1] * self.scale)
        return resize_frames(x, size, self.align_corners)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, align_corners={self.align_corners}"
