"""What an evaluation tells of single pixels: who is right on which, and how sure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.calibration import CalibrationBins, TemperatureFit
from segmentation.data import classes_of, load_datasets, read_labels

EACH = 256  # pixels of an image that a temperature is fitted on; more of one tell little more
_DRAW = 5


class _Labels:
    """Reads the labels of a dataset's images, one file after the other.

    Args:
        dataset: That is evaluated.
    """

    def __init__(self, dataset: str) -> None:
        self.ignore = classes_of(dataset)[1]
        self.files = {
            record["file_name"]: record["sem_seg_file_name"] for record in load_datasets([dataset])
        }
        self._labels: tuple[str, Tensor] = ("", torch.empty(0))

    def _labels_of(self, image: str) -> Tensor:
        file = self.files[image]
        if self._labels[0] != file:  # of one image all peers speak in turn
            self._labels = (file, torch.from_numpy(read_labels(file, dtype=np.int64)))
        return self._labels[1]


class PixelRecord(_Labels):
    """Watches an evaluation, and keeps of every labelled pixel whether each peer is right.

    One bit a pixel is kept, at the file's resolution; each image begins with a byte of its own.

    Args:
        dataset: That is evaluated.
        temperatures: By peer; the calibration is measured at them too. None: as it is alone.
    """

    def __init__(self, dataset: str, temperatures: Mapping[str, float] | None = None) -> None:
        super().__init__(dataset)
        self.temperatures = temperatures or {}
        self._right: dict[str, list[np.ndarray]] = {}
        self._bins: dict[str, CalibrationBins] = {}
        self._mended: dict[str, CalibrationBins] = {}

    def __call__(self, name: str, sample: Mapping[str, Any], probabilities: Tensor) -> None:
        """Take one image in.

        Args:
            name: Of the peer, or ``ensemble``.
            sample: With ``file_name``.
            probabilities: [C, height, width] at the file's resolution; their sum over C may be any.
        """
        labels = self._labels_of(sample["file_name"]).to(probabilities.device)
        sure, answer = probabilities.max(dim=0)
        sure = sure / probabilities.sum(dim=0).clamp_min(torch.finfo(sure.dtype).tiny)
        valid = labels != self.ignore
        right = (answer == labels)[valid]
        self._right.setdefault(name, []).append(np.packbits(right.cpu().numpy()))
        self._bins.setdefault(name, CalibrationBins()).add(sure[valid], right)
        if name in self.temperatures:
            sure = confidence_at(probabilities, self.temperatures[name])
            self._mended.setdefault(name, CalibrationBins()).add(sure[valid], right)

    def right(self, name: str) -> Tensor:
        """Return a peer's bits [n], uint8, eight pixels each."""
        return torch.from_numpy(np.concatenate(self._right[name]))

    def calibration_error(self, name: str) -> float:
        """Return a peer's expected calibration error over all pixels, in percent."""
        return 100 * self._bins[name].error()

    def recalibrated_error(self, name: str) -> float:
        """Return it at the peer's temperature."""
        return 100 * self._mended[name].error()


class PixelTemperatures(_Labels):
    """Watches an evaluation, and fits each peer's temperature on some pixels of every image.

    They are drawn from those with a label, the same for all peers and all runs.

    Args:
        dataset: That is evaluated.
    """

    def __init__(self, dataset: str) -> None:
        super().__init__(dataset)
        self._numbers = {image: i for i, image in enumerate(self.files)}
        self._fits: dict[str, TemperatureFit] = {}

    def __call__(self, name: str, sample: Mapping[str, Any], probabilities: Tensor) -> None:
        """Take one image in; see ``PixelRecord``."""
        labels = self._labels_of(sample["file_name"]).flatten()
        there = torch.nonzero(labels != self.ignore).flatten()
        draw = np.random.default_rng([_DRAW, self._numbers[sample["file_name"]]])
        chosen = there[torch.from_numpy(draw.permutation(len(there))[:EACH])]
        p = probabilities.flatten(1)[:, chosen.to(probabilities.device)].T
        logits = p.clamp_min(torch.finfo(p.dtype).tiny).log()
        self._fits.setdefault(name, TemperatureFit()).add(logits.cpu(), labels[chosen])

    def values(self) -> dict[str, float]:
        """Return the temperatures, by peer.

        Raises:
            ValueError: No pixel has a label.
        """
        return {name: fit.temperature() for name, fit in self._fits.items()}


def confidence_at(probabilities: Tensor, temperature: float) -> Tensor:
    """Return the largest probability [height, width] at a temperature.

    Args:
        probabilities: [C, height, width]; their sum over C may be any.
        temperature: The logarithms are divided by it.
    """
    tiny = torch.finfo(probabilities.dtype).tiny
    largest = probabilities.amax(dim=0).clamp_min(tiny)
    total = torch.zeros_like(largest)
    for p in probabilities:  # by class: a second map of all is more memory than all else
        total += (p.clamp_min(tiny) / largest).pow_(1 / temperature)
    return 1 / total


def flips(before: Tensor, after: Tensor) -> tuple[int, int]:
    """Count the pixels that turned right, and those that turned wrong.

    Args:
        before: Bits of a ``PixelRecord`` [n], uint8.
        after: Of another on the same images.

    Raises:
        ValueError: They are of other images.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"bits of {8 * len(before)} and of {8 * len(after)} pixels cannot be compared; measure "
            "both on the same images"
        )
    return _ones(~before & after), _ones(before & ~after)


def _ones(bits: Tensor) -> int:
    return int(np.unpackbits(bits.numpy()).sum())
