"""ViNet-A: a SlowFast encoder, a neck that narrows it, a decoder of grouped convolutions."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saliency.clips import VIEWS, ClipView
from saliency.models.base import Run, SaliencyModel
from saliency.models.layers import Enlarge, fold, resize_frames
from saliency.models.slowfast import SlowFast


class Neck(nn.Module):
    """Halve the slow path's channels and bring the fast path to its length."""

    def __init__(self) -> None:
        super().__init__()

        def halve(channels: int) -> nn.Sequential:
            return nn.Sequential(fold(channels, channels // 2, 1, space=1), nn.ReLU(True))

        self.conv_slow = halve(2048)
        self.conv_skip1 = halve(80)
        self.conv_skip2 = halve(320)
        self.conv_skip3 = halve(640)
        self.conv_skip4 = halve(1280)

    def forward(self, slow: Tensor, fast: Tensor, skips: list[Tensor]) -> list[Tensor]:
        """Join the paths.

        Returns:
            Features [B, 1536, 8, H/16, W/16], then the four skips with half their channels.
        """
        # The published weights expect the two halves of the clip as channels 2c and 2c + 1, not
        # neighbouring frames; from then on pairs of frames are pooled.
        halves = fast.reshape(fast.shape[0], -1, fast.shape[2] // 2, *fast.shape[3:])
        pooled = F.max_pool3d(halves, (2, 1, 1))
        joined = torch.cat([self.conv_slow(slow), pooled], dim=1)
        narrow = (self.conv_skip1, self.conv_skip2, self.conv_skip3, self.conv_skip4)
        return [joined, *(conv(skip) for conv, skip in zip(narrow, skips, strict=True))]


class Decoder(nn.Module):
    """Join skips channel by channel, enlarge space, and fold time at the end."""

    def __init__(self) -> None:
        super().__init__()

        def look(c_in: int, c_out: int, groups: int) -> nn.Sequential:
            conv = nn.Conv3d(c_in, c_out, 3, padding=1, groups=groups, bias=False)
            return nn.Sequential(conv, nn.ReLU(True))

        #                     in    out  groups     frames, size, channels of the skip
        self.convtsp1 = look(1536, 640, 32)  #      8       1/16  + 640
        self.convtsp2 = look(1280, 320, 16)  #      8       1/8   + 320
        self.convtsp3 = look(640, 160, 8)  #        8       1/4   + 160
        self.convtsp4 = look(320, 40, 8)  #         8       1/4   + 40
        self.convtsp5 = nn.Sequential(  #           4       1/2
            fold(80, 64, 2, groups=4), nn.ReLU(True), Enlarge(2)
        )
        self.convtsp6 = nn.Sequential(  #           2       1
            fold(64, 32, 2, groups=2),
            nn.ReLU(True),
            Enlarge(2),
            fold(32, 16, 2),  #                     1       1
            nn.ReLU(True),
            fold(16, 16, 1, space=1),
            nn.ReLU(True),
            fold(16, 1, 1, space=1, bias=True),
        )

    def forward(
        self, z: Tensor, skip1: Tensor, skip2: Tensor, skip3: Tensor, skip4: Tensor, run: Run
    ) -> Tensor:
        def step2(z: Tensor) -> Tensor:
            z = self.convtsp2(_shuffled(z, skip4, 32))
            return resize_frames(z, skip3.shape[-2:])

        def step3(z: Tensor) -> Tensor:
            z = self.convtsp3(_shuffled(z, skip3, 16))
            return resize_frames(z, skip2.shape[-2:])

        z = run(self.convtsp1, z)
        z = run(step2, z)
        z = run(step3, z)
        z = run(lambda z: self.convtsp4(_shuffled(z, skip2, 8)), z)
        z = run(lambda z: self.convtsp5(torch.cat([z, skip1], dim=1)), z)
        return run(self.convtsp6, z)


def _shuffled(z: Tensor, skip: Tensor, groups: int) -> Tensor:
    """Append a skip's channels and deal all of them out, so that groups see each other."""
    return F.channel_shuffle(torch.cat([z, skip], dim=1), groups)


class ViNetA(SaliencyModel):
    """ViNet-A: 38.7 M parameters.

    Source: Girmaji et al., "Minimalistic Video Saliency Prediction via Efficient Decoder &
    Spatio Temporal Action Cues", 2025.
    """

    name: ClassVar[str] = "vinet_a"
    view: ClassVar[ClipView] = VIEWS["vinet_a"]
    multiple: ClassVar[int] = 8

    def __init__(self) -> None:
        super().__init__()
        self.backbone = SlowFast()
        self.neck = Neck()
        self.decoder = Decoder()

    def predict(self, x: Tensor, run: Run) -> Tensor:
        return self.decoder(*self.neck(*self.backbone(x, run)), run)
