"""Reading of single images: what is broken is told by its file, never passed over in silence."""

from __future__ import annotations

import struct
import zlib
from typing import Any

from PIL import Image
from timm.data import ImageDataset

# What PIL and the readers raise on files that are missing, cut off, no images, or that would unpack
# to far more pixels than a photograph has.
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


class BrokenImageError(ValueError):
    """An image that cannot be read; its message begins with the file."""


def name_of(dataset: Any, index: int) -> str:
    """Return the file of an image, or its number where the dataset has no file names."""
    if hasattr(getattr(dataset, "reader", None), "samples"):  # of folders and tars
        return str(dataset.filename(index, absolute=True))
    return f"sample {index}"


def read_image(dataset: Any, index: int) -> tuple[Any, Any]:
    """Return an image as the dataset's transform leaves it, and its target.

    timm's own dataset takes the next image in the place of a broken one, in evaluation too; so its
    reader is asked here.

    Raises:
        BrokenImageError: It cannot be read, or is far too large.
    """
    try:
        if not isinstance(dataset, ImageDataset):
            return dataset[index]
        file, target, *_ = dataset.reader[index]
        image = Image.open(file)
        mode = dataset.input_img_mode or image.mode
        if image.mode == mode:
            image.load()  # convert() would copy it, for a tenth of the decoding's time
        else:
            image = image.convert(mode)
    except BrokenImageError:
        raise  # told already, by a part of a dataset
    except _BROKEN as error:
        reason = str(error) or type(error).__name__
        raise BrokenImageError(f"{name_of(dataset, index)}: {reason}") from error
    if dataset.transform is not None:
        image = dataset.transform(image)
    if target is not None and dataset.target_transform is not None:
        target = dataset.target_transform(target)
    return image, -1 if target is None else target
