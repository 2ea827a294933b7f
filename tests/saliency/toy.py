"""Small models of a user's own, for clips of few small frames."""

import torch
from torch import nn

from saliency.clips import IMAGENET_MEAN, IMAGENET_STD, ClipView


class Deep(nn.Module):
    """Convolutions over space and time."""

    def __init__(self, width=4, frames=6, size=(24, 32), stride=1, before=5, norm=True):
        super().__init__()
        self.view = ClipView(size, IMAGENET_MEAN, IMAGENET_STD, frames, stride, before)
        self.body = nn.Sequential(
            nn.Conv3d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm3d(width) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv3d(width, width, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        return torch.sigmoid(self.head(self.body(x).mean(dim=2))[:, 0])


class Flat(nn.Module):
    """Sees one frame, the target."""

    def __init__(self, width=4, size=(16, 24)):
        super().__init__()
        self.view = ClipView(size, IMAGENET_MEAN, IMAGENET_STD, frames=1, before=0)
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 5, padding=2), nn.ReLU(), nn.Conv2d(width, 1, 5, padding=2)
        )

    def forward(self, x):
        return torch.sigmoid(self.body(x[:, :, 0])[:, 0])


def plain():
    """Without batch norm, whose statistics each process has of its own."""
    return Deep(norm=False)


def no_view():
    return nn.Conv3d(3, 1, 1)


class TwoMaps(Flat):
    """Gives two maps a clip."""

    def forward(self, x):
        return super().forward(x).unsqueeze(1).repeat(1, 2, 1, 1)


class Negative(Flat):
    """Forgot its sigmoid."""

    def forward(self, x):
        return self.body(x[:, :, 0])[:, 0]


class Pair(Flat):
    """Gives a pair."""

    def forward(self, x):
        return super().forward(x), x


class Failing(Flat):
    """Refuses everything."""

    def forward(self, x):
        raise AssertionError("not today")


def no_file():
    """Look for weights that are not there."""
    return torch.load("/nowhere.pt", weights_only=True)
