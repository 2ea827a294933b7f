"""Corruptions of images: how they look at each severity, and that they repeat.

A corruption is applied to the decoded image, before any model's own resizing and cropping, so that
every model sees the same spoilt picture. What is drawn depends on the sample and the corruption.

Kinds of corruption as in Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", ICLR 2019; with severities of our own, so that numbers here
are not comparable with theirs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from common.seeding import generators_kept, seed_generators

Spoil = Callable[[Tensor, float], Tensor]
"""Of pixels, uint8 [C, H, W], and an amount of ``SEVERITIES``, makes others of the same shape."""

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
STILL = {name: amounts for name, amounts in SEVERITIES.items() if name != "elastic"}
"""Those that leave things where they are, so that the truth about each pixel stays true."""
_LEAST_BLUR = 0.3  # pixels; below that nothing is seen of it
_LUMA = (0.2989, 0.587, 0.114)


def corrupt(
    pixels: Tensor, name: str, severity: int, *numbers: int, own: Mapping[str, Spoil]
) -> Tensor:
    """Spoil an image.

    Args:
        pixels: uint8 [C, H, W], grey or RGB.
        name: Of ``SEVERITIES``.
        severity: From 1 on.
        numbers: Of the sample, each >= 0; what is drawn depends on them, the name and the severity
            alone.
        own: Those corruptions that the caller makes itself; ``jpeg`` and ``elastic`` are not made
            here.

    Returns:
        uint8 [C, H, W].
    """
    do = {**_DO, **own}[name]
    with generators_kept():
        seed_generators(number_of(name), severity, *numbers)
        return do(pixels, SEVERITIES[name][severity - 1])


def number_of(name: str) -> int:
    """Return a number that stands for the name of a sample, on every machine the same."""
    return zlib.crc32(name.encode())


def _noise(pixels: Tensor, sigma: float) -> Tensor:
    x = pixels / 255
    return _whole(x + torch.randn_like(x) * sigma)


def _blur(pixels: Tensor, share: float) -> Tensor:
    side = min(pixels.shape[-2:])
    sigma = share * side + _LEAST_BLUR
    reach = min(math.ceil(3 * sigma), side - 1)  # reflected, so no further than the image
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(len(pixels), 1, -1)
    x = F.pad(pixels[None] / 255, [reach] * 4, mode="reflect")
    # rows, then columns: at once, a wide kernel would take many times as long
    x = F.conv2d(x, kernel[:, :, None], groups=len(pixels))
    return _whole(F.conv2d(x, kernel[..., None], groups=len(pixels))[0])


def _pixelate(pixels: Tensor, share: float) -> Tensor:
    x = pixels.float()
    for dim in (-1, -2):
        x = _in_cells(x, dim, max(1, round(share * x.shape[dim])))
    return x.to(torch.uint8)


def _in_cells(x: Tensor, dim: int, cells: int) -> Tensor:
    """Replace each pixel along a dimension by its cell's mean, a whole number."""
    length = x.shape[dim]
    # in which a pixel's centre is; of two, the first
    cell = ((2 * torch.arange(length) + 1) * cells - 1) // (2 * length)
    shape = list(x.shape)
    shape[dim] = cells
    total = x.new_zeros(shape).index_add_(dim, cell, x).movedim(dim, -1)
    mean = (total / torch.bincount(cell, minlength=cells)).movedim(-1, dim)
    return mean.add_(0.5).floor_().index_select(dim, cell)


def _contrast(pixels: Tensor, factor: float) -> Tensor:
    x = pixels.float()
    if len(x) == 3:
        x = sum(weight * channel for weight, channel in zip(_LUMA, x, strict=True)).floor()
    return _cut(factor * pixels + (1 - factor) * x.mean())


def _brightness(pixels: Tensor, factor: float) -> Tensor:
    return _cut(factor * pixels)


def _posterize(pixels: Tensor, bits: float) -> Tensor:
    return pixels & (256 - (1 << (8 - int(bits))))


def _whole(x: Tensor) -> Tensor:
    """Round [0, 1] to bytes."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def _cut(x: Tensor) -> Tensor:
    """Cut numbers off to bytes, without their fractions."""
    return x.clamp(0, 255).to(torch.uint8)


_DO: dict[str, Spoil] = {
    "gaussian_noise": _noise,
    "gaussian_blur": _blur,
    "pixelate": _pixelate,
    "contrast": _contrast,
    "brighter": _brightness,
    "darker": _brightness,
    "posterize": _posterize,
}
