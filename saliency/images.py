"""Reading of frames, maps and fixations; every error names the file."""

from __future__ import annotations

import io
import os
import struct
import zlib

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from scipy.io import loadmat, whosmat
from scipy.io.matlab import MatReadError
from torch import Tensor

from saliency.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
FIXATION_SUFFIXES = (".mat", ".png")
_PNG_HEAD, _PNG_TAIL = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"
MOST_PIXELS = 2**26  # of a file that is decoded; twice a frame of 8K
MOST_UNPACKED = 2**28  # bytes of a .mat file
_DEFLATE = 1032  # no byte of zlib's format unpacks to more
_MAT_HEAD, _MAT_COMPRESSED = 128, 15
_NUMBERS = ("logical", "single", "double", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32)))
_BROKEN_MAT = (
    MatReadError,
    NotImplementedError,  # HDF5, of MATLAB 7.3
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    zlib.error,
)
_AS_STORED = cv2.IMREAD_UNCHANGED
_COLOUR = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION


def decode(path: str, flags: int) -> np.ndarray:
    """Decode an image file as OpenCV does, channels in its order (BGR).

    Raises:
        DataError: The file is missing, empty or broken, or has more than ``MOST_PIXELS``, which a
            few kilobytes can claim; names it.
    """
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    width, height = _told_size(content)
    if width * height > MOST_PIXELS:
        raise DataError(
            f"{path}: {width} x {height} pixels are more than the {MOST_PIXELS} that are read; "
            "scale it down"
        )
    image = cv2.imdecode(content, flags) if width * height else None
    if image is None:
        raise DataError(
            f"{path}: no image that can be decoded ({content.size} bytes); copy or extract it anew"
        )
    return image


def _told_size(content: np.ndarray) -> tuple[int, int]:
    """Return the width and height that an image's head tells; zeros where it is none."""
    head = content[:24].tobytes()
    if head[:8] == _PNG_HEAD and head[12:16] == b"IHDR" and len(head) == 24:
        width, height = struct.unpack(">II", head[16:24])
        return width, height
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.size
    except Image.DecompressionBombError:
        return MOST_PIXELS, 2
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, struct.error):
        return 0, 0


def read_frame(path: str) -> np.ndarray:
    """Decode a frame, uint8 RGB [H, W, 3].

    Raises:
        DataError: See ``decode``.
    """
    image = decode(path, _COLOUR)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def resize_frame(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resize pixels, bilinear with antialias.

    Within 1 of 255 of what PIL, and so the published loaders, give; where a small image is
    enlarged, single pixels may differ by 2.

    Args:
        image: uint8 [H, W, 3].
        size: Height, width.

    Returns:
        uint8 [height, width, 3], contiguous.
    """
    pixels = torch.from_numpy(image)
    if image.shape[:2] == tuple(size):
        return pixels
    # the batch axis comes first: only so torch sees channels last in memory, which is twice as fast
    x = pixels[None].permute(0, 3, 1, 2)
    x = F.interpolate(x, size, mode="bilinear", antialias=True)
    return x[0].permute(1, 2, 0).contiguous()


def read_map(path: str) -> np.ndarray:
    """Decode a saliency map, float32 [H, W]: in [0, 1] where the file holds whole numbers.

    The file's type decides the scale, not its largest value, so that a dark map stays dark.

    Raises:
        DataError: See ``decode``.
    """
    image = _gray(decode(path, _AS_STORED))
    scale = np.iinfo(image.dtype).max if image.dtype.kind in "ui" else 1
    return image.astype(np.float32) / np.float32(scale)


def _gray(image: np.ndarray) -> np.ndarray:
    """Drop transparency; weigh colours as luma."""
    if image.ndim == 2:
        return image
    return cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_BGR2GRAY)


def resize_map(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a float map to (height, width), bilinear without antialias, as OpenCV does."""
    if image.shape == tuple(size):
        return image
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def read_fixations(path: str) -> np.ndarray:
    """Read where people looked, bool [H, W].

    A ``.mat`` file holds the variable ``I``; an image is true where it is above 0.5 as stored.

    Raises:
        DataError: The file is missing, broken, too large unpacked, or without ``I``; names it.
    """
    if not path.lower().endswith(".mat"):
        return _gray(decode(path, _AS_STORED)) > 0.5
    try:
        _refuse_inflated(path)
        _check_variable(path, whosmat(path))
        content = loadmat(path, variable_names=["I"])
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _BROKEN_MAT as error:
        raise DataError(
            f"{path}: no MATLAB file of version 7 or older that can be read: {error}"
        ) from error
    return np.asarray(content["I"]) > 0.5


def _check_variable(path: str, variables: list[tuple[str, tuple[int, ...], str]]) -> None:
    """Refuse a file before its arrays are read, by what their heads tell."""
    found = [(shape, kind) for name, shape, kind in variables if name == "I"]
    if not found:
        names = ", ".join(name for name, *_ in variables) or "nothing"
        raise DataError(f"{path}: holds {names}; expected the variable I, a map of fixations")
    for shape, kind in found:
        if len(shape) != 2 or kind not in _NUMBERS:
            raise DataError(f"{path}: I is {kind} of the shape {shape}; expected height, width")
        if shape[0] * shape[1] > MOST_PIXELS:
            raise DataError(
                f"{path}: I has the shape {shape}, more than the {MOST_PIXELS} values that are read"
            )


def _refuse_inflated(path: str) -> None:
    """Refuse a file of MATLAB 5 to 7 that unpacks to more than ``MOST_UNPACKED`` bytes.

    Raises:
        DataError: It does.
    """
    if os.path.getsize(path) * _DEFLATE <= MOST_UNPACKED:
        return
    with open(path, "rb") as file:
        order = {b"IM": "<", b"MI": ">"}.get(file.read(_MAT_HEAD)[-2:])
        if order is None:
            return  # of MATLAB 4, which compresses nothing
        unpacked = 0
        while len(tag := file.read(8)) == 8:
            kind, size = struct.unpack(f"{order}II", tag)
            end = file.tell() + size
            unpack = zlib.decompressobj()
            while kind == _MAT_COMPRESSED and not unpack.eof:
                part = unpack.unconsumed_tail or file.read(min(2**16, end - file.tell()))
                if not part:
                    break
                unpacked += len(unpack.decompress(part, 2**20))
                if unpacked > MOST_UNPACKED:
                    raise DataError(
                        f"{path}: unpacks to more than {MOST_UNPACKED} bytes; a map of fixations "
                        "does not"
                    )
            file.seek(end)


def scale_fixations(fixations: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bring fixations to another size without losing any.

    Args:
        fixations: bool [H, W].
        size: Height, width.

    Returns:
        float32 [height, width]: how many fixations fall on each pixel; the sum stays.
    """
    counts = np.zeros(size, np.float32)
    y, x = np.nonzero(fixations)
    height, width = fixations.shape
    np.add.at(counts, (_centre(y, height, size[0]), _centre(x, width, size[1])), 1)
    return counts


def _centre(position: np.ndarray, old: int, new: int) -> np.ndarray:
    """Return the pixel of the new axis in which the old pixel's centre lies."""
    return (2 * position + 1) * new // (2 * old)


def size_of(path: str, thorough: bool) -> tuple[int, int]:
    """Return an image's height and width.

    Args:
        path: Of the file.
        thorough: Decode all of it. Else a PNG's first and last bytes are read, which tells its
            size and whether it was cut off; other formats are decoded.

    Raises:
        DataError: Names the file.
    """
    if thorough or not path.lower().endswith(".png"):
        height, width = decode(path, _AS_STORED).shape[:2]
        return height, width
    try:
        with open(path, "rb") as file:
            head = file.read(24)
            file.seek(0, 2)
            file.seek(max(0, file.tell() - len(_PNG_TAIL)))
            tail = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if head[:8] != _PNG_HEAD or head[12:16] != b"IHDR":
        return size_of(path, thorough=True)  # another format under this name
    if tail != _PNG_TAIL:
        raise DataError(f"{path}: the file ends early; copy or extract it anew")
    width, height = struct.unpack(">II", head[16:24])
    return height, width
