"""Does scouting predict who gains from whom? Small models of four families, on real digits.

    python benchmarks/scouting.py --folder .scouting [--pairs 66 --seeds 1]

Twelve models (ResNet, ViT, LeViT, ConvNeXt; three of each) are pretrained, each on five classes of
its own and a few images of the others, for more or less long. Pairs of them, in an order drawn by
lot, are fine-tuned together by ``classification/train.py`` under ``--rule best``; the control is
the same without transfer. ``classification/scout.py --realised`` scouts the twelve on images that
are neither trained nor measured on, and compares what it predicts with what each pair gained.
Every run is done once: started again, the script goes on where it was stopped; ``--report-only``
compares what is there.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import machine

from classification.digits import write_digits, write_splits
from classification.scout import scout
from classification.train import run
from common.demo import once
from common.report.realised import HEAD, correlation_rows

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
NAMES = [f"{family}{k}" for family in FAMILIES for k in range(EACH)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".scouting"))
    parser.add_argument("--pairs", type=int, default=66)
    parser.add_argument("--seeds", type=int, default=1, help="of fine-tuning")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR)
    pairs = list(itertools.combinations(NAMES, 2))
    random.Random(0).shuffle(pairs)
    if not args.report_only:
        make_data(args.folder)
        for k, name in enumerate(NAMES):
            told = once(args.folder / f"{name}.json", lambda k=k: pretrain(args.folder, k))
            print(f"{name}: top-1 {told:.1f}", flush=True)
        for seed in range(args.seeds):
            finetune(args.folder, NAMES, "none", seed)
        for (one, two), seed in itertools.product(pairs[: args.pairs], range(args.seeds)):
            finetune(args.folder, [one, two], "best", seed)
    report(args.folder)


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


def finetune(folder: Path, names: Sequence[str], rule: str, seed: int) -> None:
    """Fine-tune some of the models on few images of all classes, once."""
    title = f"{rule}-{seed}-" + ("all" if len(names) == len(NAMES) else "-".join(names))

    def make() -> Any:
        begun = time.process_time()
        peers = [f"{folder}/pretrained/{name}/{name}/last.safetensors" for name in names]
        config = {**SETTING, "peers": [{"model": peer} for peer in peers], "rule": rule}
        config |= {"epochs": FINETUNE_EPOCHS, "seed": seed}
        history = train(folder, folder / "data" / "tune", "runs", title, config)
        print(f"{title}: {time.process_time() - begun:.0f} s of CPU time", flush=True)
        return history

    once(folder / f"{title}.json", make)


def train(
    folder: Path, data: Path, where: str, title: str, config: Mapping[str, Any]
) -> list[dict[str, float]]:
    """Run train.py's own code; a run that was cut off starts again."""
    shutil.rmtree(folder / where / title, ignore_errors=True)
    file = folder / f"{title}.yaml"
    file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    arguments = [str(data), "-c", str(file), "--output", str(folder / where)]
    return run([*arguments, "--experiment", title], bars=False).history


def report(folder: Path) -> None:
    """Compare predictions with finished runs, and print what was found."""
    done = [path.stem for path in sorted(folder.glob("*.json"))]
    runs = [str(folder / "runs" / name) for name in done if (folder / "runs" / name).is_dir()]
    found = scout(
        [
            *(str(folder / "data" / "scouted"), "--realised", *runs),
            *("--output", str(folder), "--experiment", "report", "--cache", str(folder / "cache")),
        ],
        bars=False,
    )
    told = found["realised"]
    members = [gain for row in told["runs"] for gain in row["gains"]]
    print(f"{len(told['runs'])} teams; {machine()}")
    print(f"gain over the control, mean over teams: {sum(members) / len(members):+.2f} points")
    for row in (HEAD, *correlation_rows(found)):
        print(" | ".join(row))


if __name__ == "__main__":
    main()
