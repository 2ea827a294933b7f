"""Turn ADE20K's own annotations into those that Detectron2 registers.

    python -m segmentation.prepare_ade20k [--root DETECTRON2_DATASETS]

Reads ADEChallengeData2016/annotations, where 0 is what nobody labelled and 1 to 150 are classes;
writes ADEChallengeData2016/annotations_detectron2, where 0 to 149 are classes and 255 is ignored.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.checkpoint import atomic_write
from segmentation.data import dataset_root, read_labels
from segmentation.errors import DataError

CLASSES = 150
SPLITS = ("training", "validation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare both splits; files that are there already are left as they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="holds ADEChallengeData2016")
    root = (parser.parse_args(arguments).root or dataset_root()) / "ADEChallengeData2016"
    try:
        for split in SPLITS:
            prepare(root / "annotations" / split, root / "annotations_detectron2" / split)
    except DataError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def prepare(source: Path, to: Path) -> None:
    """Convert one split's annotations.

    Raises:
        DataError: The folder is missing or empty, or a file is broken or of another data set.
    """
    files = sorted(source.glob("*.png"))
    if not files:
        raise DataError(
            f"{source}: no annotations there; unpack ADEChallengeData2016.zip of "
            "http://sceneparsing.csail.mit.edu, and give its parent folder as --root or "
            "DETECTRON2_DATASETS"
        )
    for file in tqdm(files, desc=source.name, unit="image"):
        done = to / file.name
        if not done.exists():
            image = Image.fromarray(shifted(read_labels(str(file)), file))
            atomic_write(done, lambda path, image=image: image.save(path, format="png"))


def shifted(labels: np.ndarray, file: Path) -> np.ndarray:
    """Return labels less 1, and 255 where they were 0.

    Raises:
        DataError: A label above 150.
    """
    if labels.max() > CLASSES:
        raise DataError(f"{file}: holds the label {labels.max()}; ADE20K has {CLASSES} classes")
    return (labels.astype(np.int16) - 1).astype(np.uint8)  # -1 becomes 255


if __name__ == "__main__":
    sys.exit(main())
