"""SlowFast-R50: one path sees few frames with many channels, one all frames with few."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saliency.models.base import Run

ALPHA = 4  # the slow path sees every fourth frame
BETA = 8  # the fast path has an eighth of the slow path's channels
FUSION = 2  # lateral connections double the fast path's channels
STEM = 64  # channels of the slow path before its first stage

# Kernels in time of the slow path; those of the fast path are 3 everywhere.
#    blocks, inner channels, stride, dilation, kernel in time
STAGES = (
    (3, 64, 1, 1, 1),
    (4, 128, 2, 1, 1),
    (6, 256, 2, 1, 3),
    (3, 512, 1, 2, 3),
)


class Bottleneck(nn.Module):
    """Reduce (and look along time), look around in space, expand to four times ``inner``."""

    def __init__(
        self, c_in: int, inner: int, stride: int, dilation: int, time: int, project: bool
    ) -> None:
        super().__init__()
        c_out = 4 * inner
        self.conv1 = nn.Conv3d(c_in, inner, (time, 1, 1), padding=(time // 2, 0, 0), bias=False)
        self.bn1 = nn.BatchNorm3d(inner)
        self.conv2 = nn.Conv3d(
            inner,
            inner,
            (1, 3, 3),
            stride=(1, stride, stride),
            padding=(0, dilation, dilation),
            dilation=(1, dilation, dilation),
            bias=False,
        )
        self.bn2 = nn.BatchNorm3d(inner)
        self.conv3 = nn.Conv3d(inner, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(c_out)
        if project:
            shortcut = nn.Conv3d(c_in, c_out, 1, stride=(1, stride, stride), bias=False)
            self.downsample = nn.Sequential(shortcut)
            self.downsample_bn = nn.BatchNorm3d(c_out)
        self.project = project

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        shortcut = self.downsample_bn(self.downsample(x)) if self.project else x
        return F.relu(y + shortcut, inplace=True)


def _stage(c_in: int, blocks: int, inner: int, stride: int, dilation: int, time: int) -> nn.Module:
    """Stack blocks; the first alone has the stride, and projects to the new width."""
    first = Bottleneck(c_in, inner, stride, dilation, time, project=True)
    rest = (Bottleneck(4 * inner, inner, 1, dilation, time, False) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class SlowFast(nn.Module):
    """SlowFast-R50 as ViNet-A has it: no norm in the lateral connections, a dilated last stage.

    Its stride in space is 16. Names are the published ones: ``fast_res1`` to ``fast_res4``,
    ``slow_res1`` to ``slow_res4``, lateral ``Tconv1`` to ``Tconv4``.

    Attributes:
        pretrained: None; torchvision has no weights of it.
        left_out: Prefixes of torchvision's names that have no place here.

    Source: Feichtenhofer et al., ICCV 2019.
    """

    pretrained: ClassVar[None] = None
    left_out: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        fast = [STEM // BETA]  # channels that go into each stage
        slow = [STEM]
        for _, inner, *_ in STAGES:
            fast.append(4 * inner // BETA)
            slow.append(4 * inner)
        self._add_path("fast", fast[0], 5)
        for i, (blocks, inner, stride, dilation, _) in enumerate(STAGES):
            stage = _stage(fast[i], blocks, inner // BETA, stride, dilation, 3)
            self.add_module(f"fast_res{i + 1}", stage)
        self._add_path("slow", slow[0], 1)
        for i, (blocks, inner, stride, dilation, time) in enumerate(STAGES):
            stage = _stage(slow[i] + FUSION * fast[i], blocks, inner, stride, dilation, time)
            self.add_module(f"slow_res{i + 1}", stage)
        for i in range(len(STAGES)):
            lateral = nn.Conv3d(
                fast[i], FUSION * fast[i], (5, 1, 1), (ALPHA, 1, 1), (2, 0, 0), bias=False
            )
            self.add_module(f"Tconv{i + 1}", lateral)

    def _add_path(self, path: str, channels: int, time: int) -> None:
        kernel, padding = (time, 7, 7), (time // 2, 3, 3)
        conv = nn.Conv3d(3, channels, kernel, stride=(1, 2, 2), padding=padding, bias=False)
        self.add_module(f"{path}_conv1", conv)
        self.add_module(f"{path}_bn1", nn.BatchNorm3d(channels))

    def _stem(self, path: str, x: Tensor) -> Tensor:
        y = getattr(self, f"{path}_bn1")(getattr(self, f"{path}_conv1")(x))
        return self.pool(F.relu(y, inplace=True))

    def forward(self, x: Tensor, run: Run) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Run both paths.

        Args:
            x: Clips [B, 3, T, H, W]; T a multiple of 4.
            run: How to call a stage.

        Returns:
            The slow path's features [B, 2048, T/4, H/16, W/16]; the fast path's
            [B, 256, T, H/16, W/16]; and what went into the slow path's four stages, with 80, 320,
            640 and 1280 channels at 1/4, 1/4, 1/8 and 1/16 of the size. Odd sizes are rounded up.
        """
        fast = run(lambda x: self._stem("fast", x), x)
        slow = run(lambda x: self._stem("slow", x[:, :, ::ALPHA]), x)
        skips = []
        for i in range(1, len(STAGES) + 1):
            slow = torch.cat([slow, getattr(self, f"Tconv{i}")(fast)], dim=1)
            skips.append(slow)
            slow = run(getattr(self, f"slow_res{i}"), slow)
            fast = run(getattr(self, f"fast_res{i}"), fast)
        return slow, fast, skips
