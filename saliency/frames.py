"""Frames at the sizes that peers want: each decoded once, each size made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from saliency.corruptions import spoil
from saliency.images import read_frame, resize_frame
from saliency.layouts import Video
from saliency.packed import PackedFrames

Size = tuple[int, int]


class FrameReader:
    """Reads frames of a video at several sizes.

    Args:
        packed: Where frames are kept at their sizes; None: decode the files.
        keep: How many frames stay in memory, resized, for the next calls. Evaluation of one target
            after the other asks for almost the same frames again and again.
        corruption: Spoils every frame before it is resized, see ``saliency.corruptions``; packed
            frames, which are resized already, are left alone then.
    """

    def __init__(
        self,
        packed: PackedFrames | None = None,
        keep: int = 0,
        corruption: tuple[str, int] | None = None,
    ) -> None:
        self.packed = None if corruption else packed
        self.keep = keep
        self.corruption = corruption
        self._kept: OrderedDict[str, dict[Size, Tensor]] = OrderedDict()

    def read(self, video: Video, wanted: Mapping[Size, np.ndarray]) -> dict[Size, Tensor]:
        """Return the wanted frames.

        Args:
            video: Whose.
            wanted: Of each size, the numbers of distinct frames.

        Returns:
            Of each size, uint8 RGB [K, height, width, 3] in the order of the numbers.

        Raises:
            DataError: A file that cannot be read; names it.
        """
        found: dict[Size, Tensor] = {}
        missing: dict[Size, np.ndarray] = {}
        for size, numbers in wanted.items():
            if self.packed is not None and self.packed.holds(video, size):
                found[size] = self.packed.read(video, size, numbers)
            else:
                missing[size] = numbers
        return {**found, **self._decode(video, missing)}

    def _decode(self, video: Video, wanted: Mapping[Size, np.ndarray]) -> dict[Size, Tensor]:
        rows = {
            size: {int(number): row for row, number in enumerate(numbers)}
            for size, numbers in wanted.items()
        }
        found = {
            size: torch.empty(len(at), *size, 3, dtype=torch.uint8) for size, at in rows.items()
        }
        for number in sorted({number for at in rows.values() for number in at}):
            asked = [size for size, at in rows.items() if number in at]
            # what is kept is kept at all sizes: a peer's next clip may ask for another one
            sizes = list(rows) if self.keep else asked
            made = self._frame(video, number, sizes)
            for size in asked:
                found[size][rows[size][number]] = made[size]
        return found

    def _frame(self, video: Video, number: int, sizes: list[Size]) -> dict[Size, Tensor]:
        """Return one frame at several sizes, decoding it at most once."""
        path = video.path(video.frames[number])
        made = self._kept.get(path, {})
        missing = [size for size in sizes if size not in made]
        if missing:
            image = read_frame(path)
            if self.corruption is not None:
                image = spoil(image, self.corruption, video.name, number)
            made = {**made, **{size: resize_frame(image, size) for size in missing}}
        if self.keep:
            self._kept[path] = made
            self._kept.move_to_end(path)
            if len(self._kept) > self.keep:
                self._kept.popitem(last=False)
        return made
