"""Six small video saliency models of three kinds, on composed videos; see ``scouting.py``.

The demo's stand-ins, each of which sees another clip, two of each, pretrained on videos of two of
the four motions, drawn by lot for each; the first of two for half as long. Fine-tuning is that of
``saliency/configs/experiments/videos.yaml``.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saliency.demo import PRETRAINING
from saliency.scenes import MOTIONS, write_videos
from saliency.scout import scout
from saliency.train import run

METRIC = "cc"
KINDS = ("recent", "around", "pair")
PRETRAIN_EPOCHS = (5, 10)  # of the two models of a kind
OWN = 2  # motions
VIDEOS = {"pretrain": 48, "tune": 16, "test": 48, "scouted": 24, "glance": 4}
TUNING = ["--epochs", "12", "--lr", "3e-4", "--sched", "cosine"]
SETTING = [
    *("--dataset", "dhf1k", "--eval-metric", METRIC, "--batch-size", "8", "--val-batch-size", "8"),
    *("--val-stride", "4", "--val-interval", "1000", "--clips-per-video", "2", "--blur", "0"),
    *("--map-size", "48", "64", "--check-depth", "listing", "--checkpoint-hist", "1"),
    *("--workers", "0", "--device", "cpu"),
]
SEEDS = 3  # of fine-tuning
NAMES = [f"{kind}{k}" for kind in KINDS for k in range(len(PRETRAIN_EPOCHS))]


def make_data(folder: Path) -> None:
    """Write each model's videos; what is tuned on, measured on and scouted on.

    What is measured and scouted on has digits and parts of the photographs that no training sees.
    """
    draw = random.Random(1)
    for i, name in enumerate(NAMES):
        _write(folder / f"pretrain-{name}", "pretrain", "glance", i, draw.sample(MOTIONS, OWN))
    _write(folder / "tune", "tune", "test", 100)
    _write(folder / "scouted", "glance", "scouted", 101)


def _write(place: Path, train: str, test: str, seed: int, own: Sequence[str] = MOTIONS) -> None:
    write_videos(place / "annotation", VIDEOS[train], seed, own)
    write_videos(place / "val", VIDEOS[test], seed, held_out=True, first=601)


def pretrain(folder: Path, number: int) -> float:
    """Train one model on its own videos; return its CC on a few videos of all motions."""
    name = NAMES[number]
    epochs = PRETRAIN_EPOCHS[int(name[-1])]
    asked = ["--peer", f"saliency.standins:{name[:-1]},name={name}", "--rule", "none"]
    asked += ["--epochs", str(epochs), "--lr", str(PRETRAINING["lr"]), "--seed", str(number)]
    history = train(folder, f"pretrain-{name}", "pretrained", name, asked)
    return history[-1][f"{name}/{METRIC}"]


def finetune(folder: Path, names: Sequence[str], rule: str, seed: int, title: str) -> Any:
    """Fine-tune some of the models on few videos of all motions."""
    asked = [*TUNING, "--rule", rule, "--seed", str(seed)]
    for name in names:
        weights = folder / "pretrained" / name / name / "last.pth"
        asked += ["--peer", f"saliency.standins:{name[:-1]},name={name},checkpoint={weights}"]
    return train(folder, "tune", "runs", title, asked)


def train(
    folder: Path, data: str, where: str, title: str, asked: Sequence[str]
) -> list[dict[str, float]]:
    """Run train.py's own code; a run that was cut off starts again."""
    shutil.rmtree(folder / where / title, ignore_errors=True)
    places = ["--data-root", str(folder / data), "--output", str(folder / where)]
    trainer = run(None, "train", [*SETTING, *places, "--experiment", title, *asked], bars=False)
    return trainer.progress.history


def compare(folder: Path, runs: Sequence[str]) -> dict[str, Any]:
    """Scout the models, and compare with what runs gained."""
    return scout(
        [
            *("--realised", *runs, "--data-root", str(folder / "scouted"), "--metric", METRIC),
            *("--output", str(folder), "--experiment", "report", "--cache", str(folder / "cache")),
        ],
        bars=False,
    )
