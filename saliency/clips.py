"""What each peer sees of a video: which frames, at which size, normalised how."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINETICS_MEAN, KINETICS_STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


@dataclass(frozen=True)
class ClipView:
    """The clip that a peer wants for a target frame.

    Frame k of the clip is frame ``target - before + k * stride`` of the video; what lies outside of
    the video is replaced by its first or last frame, so that every frame of every video can be a
    target.

    Attributes:
        size: Height, width; the aspect ratio is not kept.
        mean: Per channel (RGB), of images in [0, 1].
        std: Per channel.
        frames: Of a clip.
        stride: From one frame of the clip to the next.
        before: How many frames of the video before its target the clip begins.

    Raises:
        ValueError: A number out of its range.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    frames: int = 32
    stride: int = 1
    before: int = 31

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size is {self.size}; expected a height and a width")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"mean is {self.mean}, std is {self.std}; expected three numbers each, std above 0"
            )
        for name, least in (("frames", 1), ("stride", 1), ("before", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")

    @property
    def span(self) -> int:
        """How many frames of the video lie between the clip's first and last, both counted."""
        return (self.frames - 1) * self.stride + 1

    def indices(self, target: int, count: int) -> np.ndarray:
        """Choose the clip's frames.

        Args:
            target: The frame to predict, from 0.
            count: Frames of the video.

        Returns:
            int64 [frames], ascending, each in [0, count).

        Raises:
            IndexError: A target that is not a frame of the video.
        """
        if not 0 <= target < count:
            raise IndexError(f"target frame {target} of a video with {count} frames")
        wanted = target - self.before + self.stride * np.arange(self.frames)
        return wanted.clip(0, count - 1)

    def normalise(self, clips: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Turn pixels into a peer's input, on their device: ``(x / 255 - mean) / std``.

        Args:
            clips: uint8 [B, 3, T, H, W], RGB.
            dtype: Of the result; the arithmetic is float32.

        Returns:
            [B, 3, T, H, W], contiguous.
        """
        x = clips.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            # numbers, not tensors: a tensor made here would wait for the device
            x[:, channel].sub_(255 * mean).div_(255 * std)
        return x.to(dtype)

    def __str__(self) -> str:
        last = self.before - (self.frames - 1) * self.stride
        return (
            f"{self.frames} frames of {self.size[0]}x{self.size[1]}, from {self.before} before the "
            f"target to {abs(last)} {'before' if last > 0 else 'after'} it, every {self.stride}"
        )


_IMAGENET = {"size": (224, 384), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_KINETICS = {"size": (256, 456), "mean": KINETICS_MEAN, "std": KINETICS_STD}

VIEWS: dict[str, ClipView] = {
    "tmfi_net": ClipView(**_IMAGENET, before=31),
    "vinet_s": ClipView(**_IMAGENET, before=31),
    "vinet_a": ClipView(**_KINETICS, stride=2, before=32),
    "vinet_a_original": ClipView(**_KINETICS, stride=2, before=31),
    "vinet_a_consecutive": ClipView(**_KINETICS, stride=1, before=16),
}
"""Views by name.

``tmfi_net`` and ``vinet_s``: 32 consecutive frames that end at the target, on every data set, as
their authors train and evaluate them.

``vinet_a``: every second frame, from 32 before the target to 30 after it; the target is at index
16. It is what the published knowledge transfer feeds on DHF1K. It is used on every data set,
because the weights were trained on every second frame on every data set.

``vinet_a_original``: every second frame, from 31 before to 31 after; the target itself is not among
them. It is what the model's authors feed, so it is for the numbers that they report.

``vinet_a_consecutive``: from 16 before to 15 after, the target at index 16. It is what the
published knowledge transfer feeds on Hollywood-2, to weights trained on every second frame.

Source of the published transfer: Jain et al., TMLR 2025.
"""
