"""The method on composed scenes: every arm from the same checkpoints, over seeds, in two reports.

    make demo TASK=segmentation           3 seeds, 7 to 10 minutes on two cores: proves nothing
    make demo TASK=segmentation FULL=1    10 seeds, and longer fine-tuning

Each seed pretrains small segmentors of different architectures on scenes in which each sees other
digits often, then fine-tunes two of them, and all three, under every rule, through
``segmentation/train_net.py``'s own code.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.demo import once, outcome, own_cache, parser, side_by_side, write_json
from common.disk import OutputError
from common.outputs import run_command
from common.report import comparison_text, write_comparison
from common.statistics import compared
from segmentation import scenes
from segmentation.cli import train
from segmentation.config import load_run
from segmentation.pictures import teaching_pictures

HERE = Path(__file__).parent
CONFIGS = HERE / "configs" / "demo"
OWN_DIGITS = {
    "fpn": {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.2, 4: 0.2},
    "mask2former": {0: 0.2, 1: 0.2, 2: 1.0, 3: 1.0, 4: 1.0},
    "deeplab": {0: 1.0, 1: 0.2, 2: 0.2, 3: 0.2, 4: 1.0},
}
GROUPS = {"two": ("fpn", "mask2former"), "three": ("fpn", "mask2former", "deeplab")}
ARMS = {
    "none": ("none", "image", "the control: fine-tuned side by side, nothing transferred"),
    "image": ("best", "image", "for every image, who does better on it teaches (the paper)"),
    "pixel": ("best", "pixel", "for every pixel, who does better there teaches"),
    "random": (
        "random",
        "image",
        "a teacher drawn by lot for every image: does the choice matter?",
    ),
}
ARMS_OF = {"two": tuple(ARMS), "three": ("none", "image")}
QUICK = (3, {"two": 50, "three": 30})  # seeds, and iterations of fine-tuning
FULL = (10, {"two": 80, "three": 80})
SCENES = {"pretrain": 400, "tune": 16, "val": 60}
PRETRAINING = {
    "fpn": ["SOLVER.MAX_ITER", 320, "SOLVER.BASE_LR", 1e-3],
    "deeplab": [
        *("SOLVER.MAX_ITER", 240, "SOLVER.BASE_LR", 1e-2),
        *("SOLVER.BACKBONE_MULTIPLIER", 0.2),  # its head's last layer starts near zero
    ],
    "mask2former": ["SOLVER.MAX_ITER", 400, "SOLVER.BASE_LR", 1.5e-3],
}
METRIC = "mIoU"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and say where its reports are."""
    about = __doc__.splitlines()[0]
    asked = parser(about, QUICK[0], FULL[0], "demo_report/segmentation").parse_args(arguments)
    seeds, iterations = FULL if asked.full else QUICK
    seeds = asked.seeds or seeds
    begun = time.monotonic()
    folder = own_cache(asked.cache, HERE).resolve()
    os.environ["DETECTRON2_DATASETS"] = str(folder)
    for seed in range(seeds):
        write_splits(folder, seed)
    results = run_all(folder, seeds, iterations, max(1, min(asked.jobs or 1, 6 * seeds)))
    for group, names in GROUPS.items():
        report = write_report(asked.output, folder, group, results[group], iterations[group])
        summary = compared(
            results[group],
            list(names),
            "none",
            arms=ARMS_OF[group],
            metric=METRIC,
            chosen="image",
        )
        sys.stdout.write(f"{comparison_text(summary)}\n\nReport: {report}\n\n")
    sys.stdout.write(f"{(time.monotonic() - begun) / 60:.1f} minutes.\n")
    return 0


def write_splits(folder: Path, seed: int) -> None:
    """Write a seed's scenes, each split with other draws; those of ``val`` of held-out digits."""
    place = folder / scenes.FOLDER
    write_pretraining(place, seed)
    scenes.write_scenes(place, f"s{seed}-tune", SCENES["tune"], seed=10 * seed + 9)
    scenes.write_scenes(place, f"s{seed}-val", SCENES["val"], seed=10 * seed, held_out=True)


def write_pretraining(folder: Path, seed: int) -> None:
    """Write the scenes that each peer is pretrained on."""
    for i, (peer, digits) in enumerate(OWN_DIGITS.items()):
        name = f"s{seed}-pretrain-{peer}"
        scenes.write_scenes(folder, name, SCENES["pretrain"], seed=10 * seed + i, digits=digits)


def run_all(
    folder: Path, seeds: int, iterations: Mapping[str, int], jobs: int
) -> dict[str, list[dict[str, Any]]]:
    """Pretrain and fine-tune every seed, several runs side by side, each on one core."""
    pairs = [(seed, name) for seed in range(seeds) for name in OWN_DIGITS]
    order = [
        (group, seed, arm)
        for group, arms in reversed(ARMS_OF.items())  # the longest first
        for seed in range(seeds)
        for arm in arms
    ]
    with side_by_side(jobs, len(pairs) + len(order)) as workers:
        workers.run("pretraining", pretrain, {pair: (folder, *pair) for pair in pairs})
        found = workers.run(
            "fine-tuning", finetune, {key: (folder, *key, iterations[key[0]]) for key in order}
        )
    return {group: [found[key] for key in order if key[0] == group] for group in GROUPS}


def pretrain(folder: Path, seed: int, name: str) -> float:
    """Train one peer alone on its own scenes; return its mIoU. Done once a seed."""
    output = folder / f"seed-{seed}" / name

    def make() -> float:
        shutil.rmtree(output, ignore_errors=True)
        options = ["TRANSFER.RULE", "none", *PRETRAINING[name]]
        options += _options(seed, f"pretrain-{name}", output)
        trainer = train(load_run([CONFIGS / f"{name}.yaml"], options))
        return trainer.history[-1][f"{name}/{METRIC}"]

    return once(output.with_suffix(".json"), make)


def finetune(folder: Path, group: str, seed: int, arm: str, iterations: int) -> dict[str, Any]:
    """Fine-tune a group under one rule; return what the report needs of the last iteration."""
    place = folder / f"seed-{seed}"
    output = place / f"{group}-{arm}-{iterations}"

    def make() -> dict[str, Any]:
        shutil.rmtree(output, ignore_errors=True)
        run = load_run(
            [CONFIGS / f"{group}.yaml"], tuning(folder, group, seed, arm, iterations, output)
        )
        trainer = train(run)
        picture, caption = teaching_pictures(
            trainer.peers, run.cfg.DATASETS.TEST[0], trainer.world, 6
        )
        output.with_suffix(".png").write_bytes(picture)
        told = outcome(arm, seed, GROUPS[group], METRIC, trainer.history, trainer.lessons)
        return {**told, "caption": caption}

    return once(output.with_suffix(".json"), make)


def tuning(
    folder: Path, group: str, seed: int, arm: str, iterations: int, output: Path
) -> list[Any]:
    """Return the keys and values with which a group of a seed is fine-tuned."""
    rule, granularity, _ = ARMS[arm]
    options = ["TRANSFER.RULE", rule, "TRANSFER.GRANULARITY", granularity]
    for name in GROUPS[group]:
        weights = str(folder / f"seed-{seed}" / name / name / "model_final.pth")
        options += [f"PEER.{name}.MODEL.WEIGHTS", weights]
    return [*options, "SOLVER.MAX_ITER", iterations, *_options(seed, "tune", output)]


def _options(seed: int, split: str, output: Path) -> list[Any]:
    return [
        *("DATASETS.TRAIN", f"('{scenes.PREFIX}s{seed}-{split}',)"),
        *("DATASETS.TEST", f"('{scenes.PREFIX}s{seed}-val',)"),
        *("TEST.EVAL_PERIOD", 0, "SEED", seed, "OUTPUT_DIR", str(output)),
    ]


def write_report(
    output: Path,
    folder: Path,
    group: str,
    results: Sequence[Mapping[str, Any]],
    iterations: int,
) -> Path:
    """Write ``GROUP_peers.html`` and the raw ``GROUP_peers.json``."""
    names, arms = GROUPS[group], ARMS_OF[group]
    write_json(output / f"{group}_peers.json", list(results))
    sheet = io.BytesIO()
    scenes.contact_sheet(folder / scenes.FOLDER / "s0-val").save(sheet, "PNG")
    shown = [result for result in results if result["seed"] == 0 and result["arm"] != "random"]
    place = folder / "seed-0"
    return write_comparison(
        output / f"{group}_peers.html",
        title=f"{group.capitalize()} segmentors teach each other: composed scenes",
        names=list(names),
        arms=list(arms),
        results=list(results),
        control="none",
        metric=METRIC,
        chosen="image",
        descriptions={arm: ARMS[arm][2] for arm in arms},
        settings=_settings(names, iterations),
        notes=NOTES,
        data_examples=(sheet.getvalue(), "The data: held-out scenes above their labels."),
        pictures=[
            (
                (place / f"{group}-{result['arm']}-{iterations}.png").read_bytes(),
                f"After fine-tuning, arm {result['arm']}, seed 0. {result['caption']}",
            )
            for result in shown
        ],
    )


NOTES = (
    "The scenes are composed: real handwritten digits (MNIST) in random colours on crops of two "
    "real photographs. Each model was pretrained alone on scenes in which it sees some digits "
    "often and others seldom, a stand-in for checkpoints with different pretraining; then all were "
    f"fine-tuned on {SCENES['tune']} scenes of all five digits.",
    "Within a seed all arms share the scenes, the checkpoints and the order of the images; only "
    "the rule differs. mIoU is that of the last iteration, over the classes background and 0 to 4, "
    f"on {SCENES['val']} scenes of digits and parts of the photographs that no training scene "
    "shows; no checkpoint was selected.",
    "These are small models, far from trained to the end, on small images. What happens with large "
    "pretrained models on ADE20K was not measured here.",
)


def _settings(names: Sequence[str], iterations: int) -> dict[str, Any]:
    run = load_run([CONFIGS / f"{name}.yaml" for name in names], [])
    shown: dict[str, Any] = {
        f"{name}: pretraining": ", ".join(
            f"{key.split('.')[1].lower()} {value}"
            for key, value in zip(PRETRAINING[name][::2], PRETRAINING[name][1::2], strict=True)
        )
        for name in names
    }
    for peer in run.peers:
        shown[f"{peer.name}: fine-tuning"] = f"AdamW, learning rate {peer.cfg.SOLVER.BASE_LR}"
    return {**shown, "batch": run.cfg.SOLVER.IMS_PER_BATCH, "iterations of fine-tuning": iterations}


if __name__ == "__main__":
    sys.exit(run_command(main, (OutputError,)))
