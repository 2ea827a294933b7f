"""TMFI-Net: a Video Swin encoder, and a decoder that sees all its scales at each scale."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.video import Swin3D_S_Weights
from torchvision.models.video.swin_transformer import PatchEmbed3d, SwinTransformer3d

from saliency.clips import VIEWS, ClipView
from saliency.models.base import Run, SaliencyModel
from saliency.models.layers import Enlarge, fold


def _embed_without_norm(norm_layer: object, **options: Any) -> nn.Module:
    return PatchEmbed3d(norm_layer=None, **options)


class _Stage(nn.Module):
    """Blocks at one scale, and the merging of patches that leads to the next."""

    def __init__(self, blocks: nn.Sequential, downsample: nn.Module | None) -> None:
        super().__init__()
        for block in blocks:
            names = ("fc1", "act", "drop1", "fc2", "drop2")
            block.mlp = nn.Sequential(OrderedDict(zip(names, block.mlp, strict=True)))
        self.blocks = blocks
        self.downsample = downsample


class VideoSwin(nn.Module):
    """torchvision's Swin3D-S in four stages, with the published names.

    Unlike torchvision's ``swin3d_s`` it has no norm after the patch embedding.

    Attributes:
        pretrained: Where torchvision publishes weights of it.
        left_out: Prefixes of torchvision's names that have no place here.

    Source: Liu et al., CVPR 2022.
    """

    pretrained: ClassVar[WeightsEnum | None] = Swin3D_S_Weights.KINETICS400_V1
    left_out: ClassVar[tuple[str, ...]] = ("head.", "patch_embed.norm.")

    def __init__(self, trunk: nn.Module | None = None, drop_path: float = 0.2) -> None:
        super().__init__()
        trunk = self.make_trunk(drop_path) if trunk is None else trunk
        parts = [*trunk.features, None]
        self.patch_embed = trunk.patch_embed
        # Scales 1/4, 1/8, 1/16, 1/32 with 96, 192, 384, 768 channels; half as many frames.
        self.layers = nn.ModuleList(map(_Stage, parts[0::2], parts[1::2]))
        self.norm = trunk.norm

    @staticmethod
    def make_trunk(drop_path: float = 0.2) -> nn.Module:
        """Build torchvision's network without its classifier."""
        trunk = SwinTransformer3d(
            patch_size=[2, 4, 4],
            embed_dim=96,
            depths=[2, 2, 18, 2],
            num_heads=[3, 6, 12, 24],
            window_size=[8, 7, 7],
            stochastic_depth_prob=drop_path,
            patch_embed=_embed_without_norm,
        )
        trunk.head = nn.Identity()
        return trunk

    def forward(self, x: Tensor, run: Run) -> list[Tensor]:
        """Compute the features of the four stages, finest first; the last are normalised."""
        x = self.patch_embed(x)  # [B, T/2, H/4, W/4, C], and channels stay last in all stages
        features = []
        for stage in self.layers:
            for block in stage.blocks:
                x = run(block, x)
            features.append(x)
            if stage.downsample is not None:
                x = run(stage.downsample, x)
        features[-1] = self.norm(x)
        return [y.permute(0, 4, 1, 2, 3) for y in features]


class Gate(nn.Module):
    """Strengthen features where the gate is open: x + x * sigmoid(conv(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = fold(channels, channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x)) + x


def _head(level: int) -> nn.Sequential:
    """Make the head that turns features of scale 1/2**(level + 1) into a map of full size.

    Time goes 8 -> 4 -> 2 -> 1. What enlarging is left after the third step comes behind the last
    convolution.
    """
    layers: list[nn.Module] = []
    for c_in, c_out in ((192, 96), (96, 48), (48, 24)):
        layers += [fold(c_in, c_out, 2), nn.ReLU(True), Enlarge(2)]
    if level == 1:
        layers.pop()
    layers.append(fold(24, 1, 1))
    if level > 2:
        layers.append(Enlarge(2 ** (level - 2)))
    return nn.Sequential(*layers, nn.Sigmoid())


class Decoder(nn.Module):
    """Bring four scales to one width, mix each with the coarser ones, and weigh four maps."""

    def __init__(self) -> None:
        super().__init__()
        for level, channels in enumerate((96, 192, 384, 768), 1):
            self.add_module(f"conv{level}", fold(channels, 192, 2, space=1, bias=True))
        for level in (1, 2, 3):
            self.add_module(f"convs{level}", fold(192, 192, 1))
        for level in (1, 2, 3, 4):
            self.add_module(f"convtsp{level}", _head(level))
        self.convout = nn.Sequential(fold(4, 1, 1, bias=True))
        for level in (1, 2, 3, 4):
            self.add_module(f"gate{level}", Gate(192))
        self.up2, self.up4, self.up8 = Enlarge(2), Enlarge(4), Enlarge(8)

    def forward(self, y1: Tensor, y2: Tensor, y3: Tensor, y4: Tensor, run: Run) -> Tensor:
        top = run(self.conv4, y4)
        t3 = self.up2(top) + run(self.conv3, y3)
        t2 = self.up2(t3) + run(self.conv2, y2) + self.up4(top)
        t1 = self.up2(t2) + run(self.conv1, y1) + self.up8(top)
        maps = [
            run(lambda t: self.convtsp1(self.gate1(self.convs1(t))), t1),
            run(lambda t: self.convtsp2(self.gate2(self.convs2(t))), t2),
            run(lambda t: self.convtsp3(self.gate3(self.convs3(t))), t3),
            run(lambda t: self.convtsp4(self.gate4(t)), top),
        ]
        return self.convout(torch.cat(maps, dim=1))


class TMFINet(SaliencyModel):
    """TMFI-Net: 54.1 M parameters.

    Source: Zhou et al., "Transformer-Based Multi-Scale Feature Integration Network for Video
    Saliency Prediction", IEEE TCSVT 2023.
    """

    name: ClassVar[str] = "tmfi_net"
    view: ClassVar[ClipView] = VIEWS["tmfi_net"]
    multiple: ClassVar[int] = 32

    def __init__(self, drop_path: float = 0.2) -> None:
        """Build the model.

        Args:
            drop_path: How often the last block is skipped in training; earlier ones less, in
                proportion. The only random part.
        """
        super().__init__()
        self.backbone = VideoSwin(drop_path=drop_path)
        self.decoder = Decoder()

    def predict(self, x: Tensor, run: Run) -> Tensor:
        return self.decoder(*self.backbone(x, run), run)
