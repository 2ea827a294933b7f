"""The method on real digits: every arm from the same checkpoints, over seeds, in one report.

    make demo           3 seeds, a few minutes on two cores: shows how it works, proves nothing
    make demo FULL=1    10 seeds, and longer fine-tuning

Each seed pretrains two small models of different families on their own classes, then fine-tunes
both together under every rule, through ``classification/train.py``'s own code.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from classification.digits import mosaic, write_digits, write_splits
from classification.train import run
from common.checkpoint import atomic_write
from common.report import comparison_text, write_comparison
from common.statistics import summarise

HERE = Path(__file__).parent
CONFIGS = HERE / "configs" / "demo"
OWN_CLASSES = {"resnet": range(5), "levit": range(5, 10)}
ARMS = {
    "none": "the control: both models fine-tuned side by side, nothing transferred",
    "one_way": "the model that starts stronger teaches the other on every image (classic "
    "distillation)",
    "mutual": "each teaches the other on every image (deep mutual learning)",
    "random": "a teacher drawn by lot for every image: does the choice matter?",
    "best": "on every image the model that does better teaches the other (the method)",
}
QUICK, FULL = (3, 15), (10, 20)  # seeds, and epochs of fine-tuning
METRIC = "top1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and say where its report is."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help=f"{FULL[0]} seeds, not {QUICK[0]}")
    parser.add_argument("--seeds", type=int, help="another number of seeds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--cache", type=Path, default=Path(".demo"), help="data and checkpoints")
    parser.add_argument("--output", type=Path, default=Path("demo_report"))
    asked = parser.parse_args(arguments)
    seeds, epochs = FULL if asked.full else QUICK
    seeds = asked.seeds or seeds
    begun = time.monotonic()
    digits = write_digits(asked.cache / "digits")
    folder = asked.cache / fingerprint()
    for seed in range(seeds):
        write_splits(digits, folder / f"seed-{seed}", OWN_CLASSES, seed)
    results = run_all(folder, seeds, epochs, max(1, min(asked.jobs or 1, seeds * len(ARMS))))
    report = write_report(asked.output, results, digits, epochs)
    minutes = (time.monotonic() - begun) / 60
    sys.stdout.write(
        comparison_text(summarise(results, list(OWN_CLASSES), "none", arms=list(ARMS)))
        + f"\n\n{minutes:.1f} minutes. Report: {report}\n"
    )
    return 0


def fingerprint() -> str:
    """Name the cache after the code and settings that made it, so that no stale result is shown."""
    files = sorted(
        path
        for folder in (HERE, HERE.parent / "common")
        for path in [*folder.rglob("*.py"), *folder.rglob("demo/*.yaml")]
        if path.parent.name != "report" and path.name != "statistics.py"
    )
    digest = hashlib.sha256(torch.__version__.encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run_all(folder: Path, seeds: int, epochs: int, jobs: int) -> list[dict[str, Any]]:
    """Pretrain and fine-tune every seed, several runs side by side, each on one core."""
    pretraining = [(folder, seed, name) for seed in range(seeds) for name in OWN_CLASSES]
    total = len(pretraining) + seeds * len(ARMS)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet) as pool,
        tqdm(total=total, unit="run", desc="pretraining", smoothing=0.1) as bar,
    ):
        start: dict[tuple[int, str], float] = {}
        for job, found in _finished(
            {pool.submit(pretrain, *job): job[1:] for job in pretraining}, bar
        ):
            start[job] = found
        bar.set_description("fine-tuning")
        tuning = {}
        for seed in range(seeds):
            stronger = max(OWN_CLASSES, key=lambda name, seed=seed: start[seed, name])
            for arm in ARMS:
                tuning[pool.submit(finetune, folder, seed, arm, stronger, epochs)] = (seed, arm)
        found = dict(_finished(tuning, bar))
    return [found[seed, arm] for seed in range(seeds) for arm in ARMS]


def _finished(futures: Mapping[Future, Any], bar: tqdm) -> Any:
    for future in as_completed(futures):
        yield futures[future], future.result()
        bar.update()


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)


def pretrain(folder: Path, seed: int, name: str) -> float:
    """Train one peer on its own classes; return its top-1 on all of them. Done once a seed."""
    place, data = folder / f"seed-{seed}", folder / f"seed-{seed}" / f"pretrain-{name}"
    told = place / f"{name}.json"
    if not told.exists():
        shutil.rmtree(place / f"{name}-run", ignore_errors=True)
        progress = run(
            [
                *(str(data), "-c", str(CONFIGS / f"pretrain-{name}.yaml"), "--seed", str(seed)),
                *("--output", str(place), "--experiment", f"{name}-run"),
            ],
            bars=False,
        )
        _write_json(told, progress.history[-1][f"{name}/{METRIC}"])
    return json.loads(told.read_text())


def finetune(folder: Path, seed: int, arm: str, stronger: str, epochs: int) -> dict[str, Any]:
    """Fine-tune both peers under one rule; return what the report needs of the last epoch."""
    place = folder / f"seed-{seed}"
    told = place / f"arm-{arm}-{epochs}.json"
    if not told.exists():
        shutil.rmtree(place / f"arm-{arm}-{epochs}", ignore_errors=True)
        peers = []
        for name in OWN_CLASSES:
            file = place / f"{name}-run" / name / "last.safetensors"
            peers += ["--peer", f"{file},name={name}"]
        rule = f"one_way:{stronger}" if arm == "one_way" else arm
        asked = [str(place / "tune"), "-c", str(CONFIGS / "finetune.yaml"), *peers]
        asked += ["--rule", rule, "--seed", str(seed), "--epochs", str(epochs)]
        asked += ["--output", str(place), "--experiment", f"arm-{arm}-{epochs}"]
        progress = run(asked, bars=False)
        _write_json(told, _result(arm, seed, progress.history, progress.lessons))
    return json.loads(told.read_text())


def _result(
    arm: str,
    seed: int,
    history: Sequence[Mapping[str, float]],
    lessons: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    first, last = history[0], history[-1]
    return {
        "arm": arm,
        "seed": seed,
        "before": {name: first[f"{name}/{METRIC}"] for name in OWN_CLASSES},
        "after": {name: last[f"{name}/{METRIC}"] for name in OWN_CLASSES},
        "fixed": {name: last[f"{name}/fixed"] for name in OWN_CLASSES},
        "broken": {name: last[f"{name}/broken"] for name in OWN_CLASSES},
        "ensemble_before": first[f"ensemble/{METRIC}"],
        "ensemble_after": last[f"ensemble/{METRIC}"],
        "oracle_before": first[f"oracle/{METRIC}"],
        "oracle_after": last[f"oracle/{METRIC}"],
        "lessons": list(lessons),
    }


def _write_json(path: Path, content: Any) -> None:
    atomic_write(path, lambda to: to.write_text(json.dumps(content)))


def write_report(
    folder: Path,
    results: Sequence[Mapping[str, Any]],
    digits: Mapping[int, list[Path]],
    epochs: int,
) -> Path:
    """Write ``index.html`` and the raw ``results.json``."""
    _write_json(folder / "results.json", list(results))
    picture = io.BytesIO()
    mosaic(digits).save(picture, "PNG")
    return write_comparison(
        folder / "index.html",
        title="Two models teach each other: real digits, made harder",
        names=list(OWN_CLASSES),
        arms=list(ARMS),
        results=list(results),
        control="none",
        metric=METRIC,
        descriptions=ARMS,
        settings={**_settings(), "epochs of fine-tuning": epochs},
        notes=NOTES,
        data_examples=(picture.getvalue(), "The data: three digits of every class."),
    )


NOTES = (
    "Each model was pretrained on all images of its own five classes and 6 % of the others, a "
    "stand-in for checkpoints with different pretraining; then both were fine-tuned on 500 images "
    "of all ten classes.",
    "Within a seed all arms share the split, the checkpoints and the order of the images; only the "
    "rule differs. Accuracy is that of the last epoch on 2500 test images; no epoch was selected.",
    "The setting was chosen on other seeds among 8 tried: with and without augmentation, three "
    "pairs of models, two learning rates, two temperatures. The first that let the control settle "
    "and showed a gain was kept, tried on 6 further seeds, and shortened from 20 epochs to 15 "
    "where there are 3 seeds, for time. With augmentation, and too few epochs for it, transfer "
    "gained nothing.",
    "These are small models on small images. What happens with large pretrained models on "
    "ImageNet was not measured here.",
)


def _settings() -> dict[str, str]:
    wanted = "model kwargs opt lr weight_decay epochs batch_size no_aug".split()
    return {
        path.stem: "; ".join(
            line.strip(" -")
            for line in path.read_text().splitlines()
            if line.strip(" -").startswith(tuple(f"{name}:" for name in wanted))
        )
        for path in sorted(CONFIGS.glob("*.yaml"))
    }


if __name__ == "__main__":
    sys.exit(main())
