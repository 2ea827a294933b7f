"""A part of the training data, held out to choose by, so that the test set chooses nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from classification.images import read_image
from common.options import OptionError


class Part(Dataset):
    """Some samples of a map-style dataset, with a transform of their own.

    Args:
        dataset: From ``classification.data.open_dataset``; left as it is.
        indices: Which samples, in order.
    """

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset = copy.copy(dataset)
        self.indices = indices
        self.reader = getattr(dataset, "reader", None)
        self.class_to_idx = getattr(dataset, "class_to_idx", None)

    @property
    def transform(self) -> Any:
        """What is made of each image."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        # a copy of this part shares the dataset, and may want another transform
        self.dataset = copy.copy(self.dataset)
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return read_image(self.dataset, int(self.indices[index]))

    def filename(self, index: int, **how: Any) -> str:
        """Return an image's file, as timm's datasets do."""
        return self.dataset.filename(int(self.indices[index]), **how)


def split_held_out(dataset: Any, share: float, seed: int) -> tuple[Part, Part]:
    """Hold a stratified share of the training data out.

    Args:
        dataset: Map-style, with labels that can be read without its images.
        share: Of each class, in (0, 1); at least one sample of a class is held out.
        seed: Of the draw, which depends on nothing else.

    Returns:
        The rest, to train on, and the part held out, both in the dataset's order.

    Raises:
        OptionError: Labels that cannot be read, or a class too small for both parts.
    """
    labels = labels_of(dataset)
    draw = np.random.default_rng([seed, 2])
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        count = max(1, round(share * len(own)))
        if count >= len(own):
            raise OptionError(
                f"--held-out {share}: class {label} has {len(own)} training images; nothing would "
                "be left to train on; take a smaller share"
            )
        held_out[draw.permutation(own)[:count]] = True
    return Part(dataset, np.flatnonzero(~held_out)), Part(dataset, np.flatnonzero(held_out))


def labels_of(dataset: Any) -> np.ndarray:
    """Read every sample's class, without its image.

    Raises:
        OptionError: The dataset does not tell.
    """
    reader = getattr(dataset, "reader", None)
    for owner in (reader, dataset):
        labels = getattr(owner, "targets", None)
        if labels is None and isinstance(getattr(owner, "samples", None), Sequence):
            labels = [sample[1] for sample in owner.samples]
        if labels is not None:
            return np.asarray(labels)
    raise OptionError(
        f"--held-out needs labels that can be read without the images, and {type(dataset).__name__}"
        " does not tell them; take image folders or tar files, or hold a part out yourself and "
        "name it with --val-split"
    )
