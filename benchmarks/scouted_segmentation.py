"""Six segmentors of three architectures, on composed scenes; see ``scouting.py``.

Semantic FPN, Mask2Former and DeepLabV3+, two of each, pretrained on scenes in which three of the
five digits, drawn by lot for each, are seen five times as often as the others; the first of two for
half as long. Fine-tuning is that of ``segmentation/configs/experiments/scenes.yaml``.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segmentation import scenes
from segmentation.cli import begin, configs_of, end_logging, write_configs
from segmentation.config import load_content
from segmentation.demo import CONFIGS, PRETRAINING
from segmentation.scouting import scout
from segmentation.trainer import METRIC, TransferTrainer

ITERATIONS = {"fpn": (120, 240), "mask2former": (200, 400), "deeplab": (120, 240)}
OWN, SELDOM = 3, 0.2  # digits that a model sees often, and how often it sees the others
SCENES = {"pretrain": 200, "tune": 32, "test": 60, "scouted": 60}
HELD_OUT = ("test", "scouted")  # of digits and parts of the photographs that no training sees
FINETUNING = ["SOLVER.MAX_ITER", 30, "SOLVER.IMS_PER_BATCH", 4]
PIXELS = 256  # of each scene that is scouted on
SEEDS = 1  # of fine-tuning
NAMES = [f"{family}{k}" for family in ITERATIONS for k in range(2)]


def make_data(folder: Path) -> None:
    """Write each model's scenes; what is tuned on, measured on and scouted on."""
    draw = random.Random(1)
    place = folder / scenes.FOLDER
    for i, name in enumerate(NAMES):
        own = draw.sample(range(scenes.DIGITS), OWN)
        often = {digit: 1.0 if digit in own else SELDOM for digit in range(scenes.DIGITS)}
        scenes.write_scenes(place, f"pretrain-{name}", SCENES["pretrain"], seed=i, digits=often)
    for i, split in enumerate(("tune", *HELD_OUT), 100):
        held_out = split in HELD_OUT
        scenes.write_scenes(place, split, SCENES[split], seed=i, held_out=held_out)


def pretrain(folder: Path, number: int) -> float:
    """Train one model on its own scenes; return its mIoU on scenes of all digits alike."""
    name = NAMES[number]
    family, length = name[:-1], int(name[-1])
    options = [*PRETRAINING[family], "SOLVER.MAX_ITER", ITERATIONS[family][length], "SEED", number]
    output = folder / "pretrained" / name
    history = train(folder, {name: ""}, "none", f"pretrain-{name}", output, options)
    return history[-1][f"{name}/{METRIC}"]


def finetune(folder: Path, names: Sequence[str], rule: str, seed: int, title: str) -> Any:
    """Fine-tune some of the models on few scenes of all digits alike."""
    files = {name: str(folder / "pretrained" / name / name / "model_final.pth") for name in names}
    options = [*FINETUNING, "SEED", seed]
    return train(folder, files, rule, "tune", folder / "runs" / title, options)


def train(
    folder: Path,
    files: Mapping[str, str],
    rule: str,
    split: str,
    output: Path,
    options: Sequence[Any],
) -> list[dict[str, float]]:
    """Train as ``train_net.py`` does, without its report; a run that was cut off starts again."""
    _at(folder)
    shutil.rmtree(output, ignore_errors=True)
    peers = [
        {"NAME": name, "CONFIG": str(CONFIGS / f"{name[:-1]}.yaml"), "WEIGHTS": weights}
        for name, weights in files.items()
    ]
    fixed = [
        *("DATASETS.TRAIN", f"('{scenes.PREFIX}{split}',)"),
        *("DATASETS.TEST", f"('{scenes.PREFIX}test',)"),
        *("DATALOADER.NUM_WORKERS", 0, "TEST.EVAL_PERIOD", 0, "OUTPUT_DIR", str(output)),
    ]
    content = {"TRANSFER": {"RULE": rule, "PEERS": peers}}
    run = load_content(content, folder / "scouting.yaml", [*fixed, *options])
    begin(run)
    write_configs(configs_of(run))
    try:
        trainer = TransferTrainer(run)
        trainer.train()
    finally:
        end_logging()
    return trainer.history


def compare(folder: Path, runs: Sequence[str]) -> dict[str, Any]:
    """Scout the models, and compare with what runs gained."""
    _at(folder)
    return scout(
        [
            *("--realised", *runs, "--pixels", str(PIXELS), "--output", str(folder / "report")),
            *("--cache", str(folder / "cache"), "DATASETS.TEST", f"('{scenes.PREFIX}scouted',)"),
        ],
        bars=False,
    )


def _at(folder: Path) -> None:
    os.environ["DETECTRON2_DATASETS"] = str(folder)
    logging.disable(logging.WARNING)  # Detectron2 tells every run of the same few things
