"""Twelve classifiers of four families, on real digits; see ``scouting.py``.

ResNet, ViT, LeViT, ConvNeXt; three of each, pretrained on five classes of its own and a few images
of the others, for more or less long.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from classification.digits import write_digits, write_splits
from classification.scout import scout
from classification.train import run

FAMILIES: dict[str, dict[str, Any]] = {
    "resnet": {
        "model": "resnet18",
        "kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 48], "stem_width": 8},
    },
    "vit": {
        "model": "vit_tiny_patch16_224",
        "kwargs": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    },
    "levit": {
        "model": "levit_128s",
        "kwargs": {
            "embed_dim": [32],
            "key_dim": 8,
            "depth": [2],
            "num_heads": [3],
            "stem_type": "s8",
        },
    },
    "convnext": {
        "model": "convnext_atto",
        "kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 48], "patch_size": 2},
    },
}
EACH, CLASSES, OWN = 3, 10, 5
SCOUTED = 800  # of the 2500 test images
PRETRAIN_EPOCHS = (4, 7, 10)  # of the three models of a family
FINETUNE_EPOCHS = 12
SETTING: dict[str, Any] = {
    "num_classes": CLASSES,
    "in_chans": 1,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "opt": "adamw",
    "lr": 3e-3,
    "weight_decay": 0.05,
    "warmup_epochs": 0,
    "batch_size": 50,
    "validation_batch_size": 250,
    "smoothing": 0.0,
    "no_aug": True,
    "train_interpolation": "bilinear",
    "val_interval": 1000,
    "checkpoint_hist": 1,
    "workers": 0,
    "device": "cpu",
}
METRIC = "top1"
SEEDS = 1  # of fine-tuning
NAMES = [f"{family}{k}" for family in FAMILIES for k in range(EACH)]


def make_data(folder: Path) -> None:
    """Write the digits; each model's pretraining; what is tuned on, measured on and scouted on."""
    draw = random.Random(1)
    skews = {name: draw.sample(range(CLASSES), OWN) for name in NAMES}
    write_splits(write_digits(folder / "digits"), folder / "data", skews, seed=7)
    scouted = folder / "data" / "scouted" / "validation"
    if scouted.exists():
        return
    test = folder / "data" / "tune" / "validation"
    part = random.Random(2).sample(sorted(test.rglob("*.png")), SCOUTED)
    for path in part:
        to = scouted / path.relative_to(test)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, to)


def pretrain(folder: Path, number: int) -> float:
    """Train one model on its own part of the digits; return its top-1 on all classes."""
    name = NAMES[number]
    family = FAMILIES[name.rstrip("0123456789")]
    config = {
        **SETTING,
        "peers": [{**family, "name": name, "img_size": 32}],
        "rule": "none",
        "pretrained": False,
        "epochs": PRETRAIN_EPOCHS[number % EACH],
        "seed": number,
    }
    history = train(folder, folder / "data" / f"pretrain-{name}", "pretrained", name, config)
    return history[-1][f"{name}/top1"]


def finetune(folder: Path, names: Sequence[str], rule: str, seed: int, title: str) -> Any:
    """Fine-tune some of the models on few images of all classes."""
    peers = [f"{folder}/pretrained/{name}/{name}/last.safetensors" for name in names]
    config = {**SETTING, "peers": [{"model": peer} for peer in peers], "rule": rule}
    config |= {"epochs": FINETUNE_EPOCHS, "seed": seed}
    return train(folder, folder / "data" / "tune", "runs", title, config)


def train(
    folder: Path, data: Path, where: str, title: str, config: Mapping[str, Any]
) -> list[dict[str, float]]:
    """Run train.py's own code; a run that was cut off starts again."""
    shutil.rmtree(folder / where / title, ignore_errors=True)
    file = folder / f"{title}.yaml"
    file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    arguments = [str(data), "-c", str(file), "--output", str(folder / where)]
    return run([*arguments, "--experiment", title], bars=False).history


def compare(folder: Path, runs: Sequence[str]) -> dict[str, Any]:
    """Scout the models, and compare with what runs gained."""
    return scout(
        [
            *(str(folder / "data" / "scouted"), "--realised", *runs),
            *("--output", str(folder), "--experiment", "report", "--cache", str(folder / "cache")),
        ],
        bars=False,
    )
