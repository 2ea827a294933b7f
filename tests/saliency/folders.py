"""Writes small videos in the layouts of DHF1K, Hollywood-2 and UCF-Sports."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from scipy.io import savemat

Size = tuple[int, int]


def picture(seed: int, frame: int, size: Size) -> np.ndarray:
    """Paint a frame, uint8 RGB [H, W, 3]: a moving disc before smooth colours and fine stripes."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    phase = np.arange(3) + 0.7 * seed
    image = 120 + 70 * np.sin(x[..., None] / 9 + y[..., None] / 13 + phase + 0.1 * frame)
    image += 25 * ((x + 2 * y).astype(int) % 3 - 1)[..., None]
    image[_distance(seed, frame, size) < 0.12] = (250, 240, 20 + frame % 200)
    return image.clip(0, 255).astype(np.uint8)


def attention(seed: int, frame: int, size: Size) -> np.ndarray:
    """Paint the map of a frame, uint8 [H, W]: a blob on the disc."""
    return np.uint8(255 * np.exp(-0.5 * (_distance(seed, frame, size) / 0.15) ** 2))


def looks(seed: int, frame: int, size: Size) -> np.ndarray:
    """Draw where people looked, bool [H, W]: a few pixels of the disc."""
    near = _distance(seed, frame, size) < 0.12
    return near & (np.random.default_rng((seed, frame)).random(size) < 0.2)


def _distance(seed: int, frame: int, size: Size) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    angle = 0.15 * frame + seed
    centre = size[0] * (0.5 + 0.25 * np.sin(angle)), size[1] * (0.5 + 0.3 * np.cos(angle))
    return np.hypot(y - centre[0], x - centre[1]) / size[0]


def write_video(
    folder: Path,
    frames: int | Sequence[str],
    *,
    seed: int = 0,
    size: Size = (36, 64),
    fixations: str | None = None,
    paint: Callable[[int, int, Size], np.ndarray] = picture,
    options: Sequence[int] = (),
) -> Path:
    """Write frames, maps and fixations of one video.

    Args:
        folder: The video's.
        frames: How many, numbered from 0001; or the names, without suffix.
        seed: What tells this video from others.
        size: Height, width.
        fixations: ``mat`` (``fixation/maps``), ``png`` (``fixation``) or None.
        paint: Gives a frame.
        options: Of OpenCV's PNG writer, for the frames.
    """
    names = [f"{k + 1:04d}" for k in range(frames)] if isinstance(frames, int) else frames
    for inner in ("images", "maps"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        write_image(folder / "images" / f"{name}.png", paint(seed, k, size)[..., ::-1], options)
        write_image(folder / "maps" / f"{name}.png", attention(seed, k, size))
        if fixations:
            write_fixations(folder, name, looks(seed, k, size), fixations)
    return folder


def write_fixations(folder: Path, name: str, points: np.ndarray, kind: str) -> None:
    """Write the fixations of a frame."""
    inner = folder / ("fixation/maps" if kind == "mat" else "fixation")
    inner.mkdir(parents=True, exist_ok=True)
    if kind == "mat":
        savemat(inner / f"{name}.mat", {"I": points.astype(np.uint8)}, do_compression=True)
    else:
        write_image(inner / f"{name}.png", points.astype(np.uint8))


def write_image(path: Path, image: np.ndarray, options: Sequence[int] = ()) -> None:
    """Write pixels (BGR where there are three channels)."""
    if not cv2.imwrite(str(path), np.ascontiguousarray(image), list(options)):
        raise OSError(f"{path}: cannot be written")


def write_dataset(root: Path, videos: Mapping[str, int | Sequence[str]], **rest) -> Path:
    """Write videos by their folders under a root, such as ``{"annotation/0001": 40}``."""
    for seed, (name, frames) in enumerate(videos.items()):
        write_video(root / name, frames, seed=seed, **rest)
    return root
