"""ViNet-S: an S3D encoder, and a decoder of grouped convolutions that joins skips in time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.video import S3D_Weights, s3d

from saliency.clips import VIEWS, ClipView
from saliency.models.base import Run, SaliencyModel
from saliency.models.layers import Enlarge, fold


class S3DBackbone(nn.Module):
    """torchvision's S3D up to the classifier, in four stages, with the published names.

    Attributes:
        pretrained: Where torchvision publishes weights of it.
        left_out: Prefixes of torchvision's names that have no place here.

    Source: Xie et al., ECCV 2018.
    """

    pretrained: ClassVar[WeightsEnum | None] = S3D_Weights.KINETICS400_V1
    left_out: ClassVar[tuple[str, ...]] = ("classifier.",)

    def __init__(self, trunk: nn.Module | None = None) -> None:
        super().__init__()
        layers = (self.make_trunk() if trunk is None else trunk).features
        # Sizes for 32 frames of H x W, without batch:         channels, frames, height, width
        self.base1 = _stage(layers[:4])  # ................... 192       16      H/4     W/4
        self.pool1 = layers[4]
        self.base2 = _stage(layers[5:7])  # .................. 480       16      H/8     W/8
        self.pool2 = layers[7]
        self.base3 = _stage(layers[8:13])  # ................. 832       8       H/16    W/16
        self.pool3 = layers[13]
        self.base4 = _stage(layers[14:16])  # ................ 1024      4       H/32    W/32

    @staticmethod
    def make_trunk() -> nn.Module:
        """Build torchvision's network without its classifier."""
        trunk = s3d(weights=None)
        trunk.classifier = nn.Identity()
        return trunk

    def forward(self, x: Tensor, run: Run) -> list[Tensor]:
        """Compute the features of the four stages, finest first."""
        y1 = run(self.base1, x)
        y2 = run(self.base2, self.pool1(y1))
        y3 = run(self.base3, self.pool2(y2))
        y4 = run(self.base4, self.pool3(y3))
        return [y1, y2, y3, y4]


def _stage(layers: Sequence[nn.Module]) -> nn.Sequential:
    """Give the units of a stage the names that published checkpoints have."""
    return nn.Sequential(*(_named(layer) for layer in layers))


def _named(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.MaxPool3d):
        return layer
    if hasattr(layer, "branch0"):  # Inception: one unit, twice two, pool and one
        layer.branch0 = nn.Sequential(_named(layer.branch0))
        for name in ("branch1", "branch2", "branch3"):
            setattr(layer, name, _stage(getattr(layer, name)))
        return layer
    if isinstance(layer[0], nn.Conv3d):
        names, parts = "conv bn relu", [*layer]
    else:  # separable: height and width first, then time
        names, parts = "conv_s bn_s relu_s conv_t bn_t relu_t", [*layer[0], *layer[1]]
    return nn.Sequential(OrderedDict(zip(names.split(), parts, strict=True)))


class Decoder(nn.Module):
    """Fold time and enlarge space step by step; each skip is joined as further frames."""

    def __init__(self) -> None:
        super().__init__()

        def step(c_in: int, c_out: int, frames: int, groups: int) -> list[nn.Module]:
            return [fold(c_in, c_out, frames, groups=groups), nn.ReLU(True), Enlarge(2, True)]

        #                                 in    out  fold  groups     frames
        self.convtsp1 = nn.Sequential(*step(1024, 832, 1, 32))  #     4 -> 4, + 8 of the skip
        self.convtsp2 = nn.Sequential(*step(832, 480, 3, 16))  #     12 -> 4, + 16
        self.convtsp3 = nn.Sequential(*step(480, 192, 5, 8))  #      20 -> 4, + 16
        self.convtsp4 = nn.Sequential(
            *step(192, 64, 5, 4),  #                                 20 -> 4
            *step(64, 32, 2, 2),  #                                   4 -> 2
            fold(32, 32, 2, space=1),  #                              2 -> 1
            nn.ReLU(True),
            fold(32, 1, 1, space=1, bias=True),
        )

    def forward(self, y1: Tensor, y2: Tensor, y3: Tensor, y4: Tensor, run: Run) -> Tensor:
        z = run(self.convtsp1, y4)
        for step, skip in ((self.convtsp2, y3), (self.convtsp3, y2), (self.convtsp4, y1)):
            z = run(lambda z, skip, step=step: step(torch.cat([z, skip], dim=2)), z, skip)
        return z


class ViNetS(SaliencyModel):
    """ViNet-S: 9.5 M parameters.

    Frames are enlarged bilinearly with corners aligned, as in training of the published weights
    (where the option for it is named BiCubic).

    Source: Girmaji et al., "Minimalistic Video Saliency Prediction via Efficient Decoder &
    Spatio Temporal Action Cues", 2025.
    """

    name: ClassVar[str] = "vinet_s"
    view: ClassVar[ClipView] = VIEWS["vinet_s"]
    multiple: ClassVar[int] = 32

    def __init__(self) -> None:
        super().__init__()
        self.backbone = S3DBackbone()
        self.decoder = Decoder()

    def predict(self, x: Tensor, run: Run) -> Tensor:
        return self.decoder(*self.backbone(x, run), run)
