"""Corrupted images: how far accuracy falls where images are worse than those trained on.

What the corruptions are is in ``common.corrupt``; those that need an image library are made by
torchvision.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, IterableDataset

from classification.images import read_image
from common import corrupt as corruptions
from common.options import OptionError

_CELL = 0.1  # of elastic: between corners that are shifted at random, a share of the shorter side


def corrupt(image: Image.Image, name: str, severity: int, number: int) -> Image.Image:
    """Spoil an image.

    Args:
        image: Grey or RGB, 8 bits a channel.
        name: Of ``common.corrupt.SEVERITIES``.
        severity: From 1 on.
        number: Of the image, >= 0; what is drawn depends on it, the name and the severity alone.

    Returns:
        An image of the same size and mode.

    Raises:
        OptionError: Another mode.
    """
    if image.mode not in ("L", "RGB"):
        raise OptionError(
            f"corruptions need grey or RGB images, got mode {image.mode}; give --input-img-mode"
        )
    spoilt = corruptions.corrupt(F.pil_to_tensor(image), name, severity, number, own=_OWN)
    return F.to_pil_image(spoilt, image.mode)


def _jpeg(pixels: Tensor, quality: float) -> Tensor:
    return F.jpeg(pixels, quality=int(quality))


def _elastic(pixels: Tensor, share: float) -> Tensor:
    height, width = pixels.shape[-2:]
    side = min(height, width)
    corners = [math.ceil(length / (_CELL * side)) + 1 for length in (height, width)]
    shifts = interpolate(torch.rand(1, 2, *corners) * 2 - 1, (height, width), mode="bicubic")
    shifts *= share * side / shifts.abs().amax()  # in pixels
    shifts *= torch.tensor([2 / width, 2 / height]).view(1, 2, 1, 1)  # an image is 2 wide and high
    return F.elastic(pixels, shifts.movedim(1, -1))


_OWN: Mapping[str, corruptions.Spoil] = {"jpeg": _jpeg, "elastic": _elastic}


class Corrupted(Dataset):
    """A dataset whose images are spoilt before its transform sees them.

    Args:
        dataset: From ``classification.data.open_dataset``, without a transform; left as it is.
        name: Of ``common.corrupt.SEVERITIES``.
        severity: From 1 on.

    Raises:
        OptionError: A stream, whose images have no number.
    """

    def __init__(self, dataset: Any, name: str, severity: int) -> None:
        if isinstance(dataset, IterableDataset):
            raise OptionError(
                "corruptions need data that can be indexed, such as image folders or tar files, "
                "and this is a stream"
            )
        self.dataset = copy.copy(dataset)
        self.dataset.transform = None
        self.name = name
        self.severity = severity
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        image, target = read_image(self.dataset, index)
        image = corrupt(image, self.name, self.severity, index)
        return image if self.transform is None else self.transform(image), target
