"""Corrupted images: how far accuracy falls where images are worse than those trained on.

A corruption is applied to the decoded image, before any model's own resizing and cropping, so every
model sees the same spoilt picture. Noise and warps depend on the image's number alone.

Kinds of corruption as in Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", ICLR 2019; made by torchvision, at severities of our own, so
that numbers here are not comparable with theirs.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms.v2 import InterpolationMode

from classification.images import read_image
from common.options import OptionError
from common.seeding import generators_kept, seed_generators

# What severities 1 to 5 of each corruption mean. Widths are shares of the image's shorter side, so
# that small and large images are spoilt alike.
SEVERITIES: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation, of pixels in [0, 1]
    "gaussian_blur": (
        0.005,
        0.01,
        0.016,
        0.025,
        0.04,
    ),  # standard deviation, a share, and _LEAST_BLUR more
    "jpeg": (50, 30, 20, 12, 7),  # quality, of 100
    "pixelate": (0.7, 0.5, 0.4, 0.3, 0.2),  # size that is left
    "elastic": (0.01, 0.02, 0.03, 0.045, 0.06),  # largest shift of a pixel, a share
    "contrast": (0.7, 0.5, 0.35, 0.25, 0.15),  # what is left of it
    "brighter": (1.25, 1.5, 1.8, 2.2, 2.7),  # factor
    "darker": (0.8, 0.65, 0.5, 0.35, 0.2),  # factor
    "posterize": (5, 4, 3, 2, 1),  # bits a channel
}
_LEAST_BLUR = 0.3  # pixels; below that nothing is seen of it
_CELL = 0.1  # of elastic: between corners that are shifted at random, a share of the shorter side


def corrupt(image: Image.Image, name: str, severity: int, number: int) -> Image.Image:
    """Spoil an image.

    Args:
        image: Grey or RGB, 8 bits a channel.
        name: Of ``SEVERITIES``.
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
    pixels, amount = F.pil_to_tensor(image), SEVERITIES[name][severity - 1]
    with generators_kept():
        seed_generators(zlib.crc32(name.encode()), severity, number)
        return F.to_pil_image(_DO[name](pixels, amount), image.mode)


def _noise(pixels: Tensor, sigma: float) -> Tensor:
    return _whole(F.gaussian_noise(pixels / 255, sigma=sigma, clip=True))


def _blur(pixels: Tensor, share: float) -> Tensor:
    side = min(pixels.shape[-2:])
    sigma = share * side + _LEAST_BLUR
    reach = min(math.ceil(3 * sigma), side - 1)  # reflected, so no further than the image
    return _whole(F.gaussian_blur(pixels / 255, [2 * reach + 1] * 2, [sigma] * 2))


def _jpeg(pixels: Tensor, quality: float) -> Tensor:
    return F.jpeg(pixels, quality=int(quality))


def _pixelate(pixels: Tensor, share: float) -> Tensor:
    size = list(pixels.shape[-2:])
    small = [max(1, round(share * side)) for side in size]
    image = F.resize(F.to_pil_image(pixels), small, interpolation=InterpolationMode.BOX)
    return F.pil_to_tensor(F.resize(image, size, interpolation=InterpolationMode.NEAREST))


def _elastic(pixels: Tensor, share: float) -> Tensor:
    height, width = pixels.shape[-2:]
    side = min(height, width)
    corners = [math.ceil(length / (_CELL * side)) + 1 for length in (height, width)]
    shifts = interpolate(torch.rand(1, 2, *corners) * 2 - 1, (height, width), mode="bicubic")
    shifts *= share * side / shifts.abs().amax()  # in pixels
    shifts *= torch.tensor([2 / width, 2 / height]).view(1, 2, 1, 1)  # an image is 2 wide and high
    return F.elastic(pixels, shifts.movedim(1, -1))


def _contrast(pixels: Tensor, factor: float) -> Tensor:
    return F.adjust_contrast(pixels, factor)


def _brightness(pixels: Tensor, factor: float) -> Tensor:
    return F.adjust_brightness(pixels, factor)


def _posterize(pixels: Tensor, bits: float) -> Tensor:
    return F.posterize(pixels, int(bits))


def _whole(x: Tensor) -> Tensor:
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


_DO: dict[str, Callable[[Tensor, float], Tensor]] = {
    "gaussian_noise": _noise,
    "gaussian_blur": _blur,
    "jpeg": _jpeg,
    "pixelate": _pixelate,
    "elastic": _elastic,
    "contrast": _contrast,
    "brighter": _brightness,
    "darker": _brightness,
    "posterize": _posterize,
}


class Corrupted(Dataset):
    """A dataset whose images are spoilt before its transform sees them.

    Args:
        dataset: From ``classification.data.open_dataset``, without a transform; left as it is.
        name: Of ``SEVERITIES``.
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
