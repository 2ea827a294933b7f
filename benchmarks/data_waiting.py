"""How much of its time each demo's fine-tuning waits for data, in the demo's own configuration.

    python benchmarks/data_waiting.py [--tasks classification saliency segmentation --seeds 3]

Pretrains the demo's peers once a seed, then fine-tunes two of them under the method's rule, one run
at a time, and reads what the run itself says of its waiting: ``data_share``, or Detectron2's
``data_time`` over ``time``. The first steps count like all others.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measure import machine

TASKS = ("classification", "saliency", "segmentation")
Stretches = list[tuple[float, float]]
"""Seconds of a stretch of the run, and how many of them it waited."""


def classification(folder: Path, seed: int) -> Callable[[], Stretches]:
    from classification import demo
    from classification.digits import write_digits, write_splits
    from classification.train import run

    place = folder / f"seed-{seed}"
    if not (place / "tune").exists():
        write_splits(write_digits(folder / "digits"), place, demo.OWN_CLASSES, seed)
    start = {name: demo.pretrain(folder, seed, name) for name in demo.OWN_CLASSES}
    stronger, epochs, title = max(start, key=start.get), demo.QUICK[1], "waiting"

    def work() -> Stretches:
        shutil.rmtree(place / title, ignore_errors=True)
        steps = "--log-interval", "10"  # of an epoch
        run(demo.tuning(place, title, seed, "best", stronger, epochs, *steps), bars=False)
        return read_scalars(place / title, samples=500)

    return work


def saliency(folder: Path, seed: int) -> Callable[[], Stretches]:
    from saliency import demo

    place = folder / f"seed-{seed}"
    if not (place / "tune").exists():
        demo.write_splits(place, seed)
    for name in demo.GROUPS["two"]:
        demo.pretrain(folder, seed, name)
    asked = [*demo.tuning(place, "two", "best"), "--log-interval", "3"]  # steps of an epoch

    def work() -> Stretches:
        shutil.rmtree(place / "waiting", ignore_errors=True)
        demo.train(place, "tune", "waiting", seed, demo.QUICK[1], asked)
        return read_scalars(place / "waiting", samples=2 * demo.VIDEOS["tune"])

    return work


def segmentation(folder: Path, seed: int) -> Callable[[], Stretches]:
    from segmentation import demo, scenes
    from segmentation.cli import train
    from segmentation.config import load_run

    os.environ["DETECTRON2_DATASETS"] = str(folder)
    if not (folder / scenes.FOLDER / f"s{seed}-val").exists():
        demo.write_splits(folder, seed)
    for name in demo.GROUPS["two"]:
        demo.pretrain(folder, seed, name)
    output = folder / f"seed-{seed}" / "waiting"

    def work() -> Stretches:
        shutil.rmtree(output, ignore_errors=True)
        options = demo.tuning(folder, "two", seed, "image", demo.QUICK[1]["two"], output)
        storage = train(load_run([demo.CONFIGS / "two.yaml"], options)).storage
        names = "time", "data_time"
        both = [[value for value, _ in storage.history(name).values()] for name in names]
        return list(zip(*both, strict=False))  # the last iteration's time comes too late

    return work


def read_scalars(folder: Path, samples: int) -> Stretches:
    found: dict[str, list[float]] = {"samples_per_second": [], "data_share": []}
    with (folder / "scalars.csv").open(newline="", encoding="utf-8") as file:
        for _, name, value in csv.reader(file):
            if name in found:
                found[name].append(float(value))
    rows = zip(*found.values(), strict=True)
    return [(samples / rate, share * samples / rate) for rate, share in rows]


def busy_seconds() -> float:
    """Return the CPU seconds that this machine has spent, all processes together."""
    with open("/proc/stat", encoding="utf-8") as file:
        user, nice, system, _, _, irq, soft, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(".demo/waiting"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    print(f"{machine()}, {os.cpu_count()} cores")
    print(f"{'task':16}{'seed':>5}{'seconds':>9}{'waited':>9}{'share':>8}{'most':>7}", end="")
    print(f"{'first':>7}{'others':>8}   (of all, CPUs that others kept busy)")
    for task in args.tasks:
        prepare = getattr(sys.modules[__name__], task)
        for seed in range(args.seeds):
            importlib.import_module(task)
            work = prepare((args.folder / task).resolve(), seed)
            begun, busy, own = time.perf_counter(), busy_seconds(), sum(os.times()[:4])
            stretches = work()
            passed = time.perf_counter() - begun
            others = (busy_seconds() - busy - sum(os.times()[:4]) + own) / passed
            seconds, waited = (sum(column) for column in zip(*stretches, strict=True))
            shares = [waits / lasts for lasts, waits in stretches]
            print(f"{task:16}{seed:5}{seconds:9.2f}{waited:9.2f}{waited / seconds:8.3f}", end="")
            print(f"{max(shares):7.2f}{shares[0]:7.2f}{others:8.2f}", flush=True)


if __name__ == "__main__":
    main()
