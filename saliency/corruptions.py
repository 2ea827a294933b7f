"""Corrupted videos: frames spoilt as they were decoded, before any peer's view; the maps stay.

All frames have the same corruption, and noise of their own. What the corruptions are is in
``common.corrupt``; here are those that move nothing.
"""

from __future__ import annotations

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from common.corrupt import STILL, corrupt, number_of

SEVERITIES = {name: len(amounts) for name, amounts in STILL.items()}


def spoil(image: np.ndarray, corruption: tuple[str, int], video: str, frame: int) -> np.ndarray:
    """Spoil a frame.

    Args:
        image: uint8 RGB [H, W, 3].
        corruption: A name of ``SEVERITIES``, and the severity from 1 on.
        video: Its name; what is drawn depends on it, the frame and the corruption alone.
        frame: Its number, from 0 on.

    Returns:
        uint8 RGB [H, W, 3].
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    name, severity = corruption
    spoilt = corrupt(pixels, name, severity, number_of(video), frame, own={"jpeg": _jpeg})
    return np.ascontiguousarray(spoilt.permute(1, 2, 0).numpy())


def _jpeg(pixels: Tensor, quality: float) -> Tensor:
    return F.jpeg(pixels, quality=int(quality))
