"""Corrupted images: spoilt as they were read, before any peer's resizing; the labels stay.

What the corruptions are is in ``common.corrupt``; here are those that move nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from common.corrupt import STILL, corrupt, number_of

SEVERITIES = {name: len(amounts) for name, amounts in STILL.items()}


def spoil(image: np.ndarray, corruption: tuple[str, int], file: str) -> np.ndarray:
    """Spoil an image.

    Args:
        image: uint8 RGB [H, W, 3].
        corruption: A name of ``SEVERITIES``, and the severity from 1 on.
        file: Of the image; what is drawn depends on its name, without the folder, and the
            corruption alone.

    Returns:
        uint8 RGB [H, W, 3].
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    name, severity = corruption
    spoilt = corrupt(pixels, name, severity, number_of(Path(file).name), own={"jpeg": _jpeg})
    return np.ascontiguousarray(spoilt.permute(1, 2, 0).numpy())


def _jpeg(pixels: Tensor, quality: float) -> Tensor:
    return F.jpeg(pixels, quality=int(quality))
