"""Does a long run grow: memory, open files, threads?

    python benchmarks/soak.py [--minutes 30 --workers 2 --folder DIR --limit 10]

Trains three small classifiers on the demo's digits through ``classification/train.py``, in a
process of its own, with workers, averaged weights, an evaluation about every minute, a run file
every epoch (the newest three stay) and TensorBoard; looks at the process and its workers from
outside (/proc, so Linux alone); and ends it by SIGTERM. After the warm-up, a line is fitted through
the medians of one minute each: neighbouring samples are alike, so single ones would tell too small
an interval, and an evaluation has workers of its own for some seconds. Expected: no slope of more
than ``--limit`` MiB an hour.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measure import machine
from scipy import stats

from classification.digits import write_digits, write_splits
from common.checkpoint import list_runs
from common.termination import EXIT_STATUS

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
PEERS = [
    {
        "model": "resnet18",
        "name": "resnet",
        "channels_last": True,
        "kwargs": {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]},
    },
    {
        "model": "vit_tiny_patch16_224",
        "name": "vit",
        "kwargs": {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
    },
    {"model": "mobilenetv3_small_050", "name": "mobilenet"},
]
COLUMNS = ("seconds", "main", "workers", "handles", "threads", "cuda", "folder", "run_files")


def main() -> None:
    args = _parser().parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="soak-"))
    data = _write_data(folder)
    interval = _epochs_a_minute(data, folder / "calibration", args)
    run = _start(data, folder / "out", args, interval, epochs=10**6)
    try:
        rows = _watch(run, folder, args)
    finally:
        run.send_signal(signal.SIGTERM)
        status = run.wait()
    _tell(rows, args, interval, status, list_runs(folder / "out" / "run"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--warm-up", type=float, default=5, help="minutes left out of the fit")
    parser.add_argument("--every", type=float, default=2, help="seconds between samples")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=10, help="MiB an hour that are no leak")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="of data, run and samples.csv; default: a temporary one")
    return parser


def _write_data(folder: Path) -> Path:
    digits = write_digits(folder / "digits")
    write_splits(digits, folder / "seed-0", {"any": range(10)}, seed=0)
    return folder / "seed-0" / "pretrain-any"


def _start(
    data: Path, output: Path, args: argparse.Namespace, val_interval: int, epochs: int
) -> subprocess.Popen[bytes]:
    output.mkdir(parents=True, exist_ok=True)
    config = output / "peers.yaml"
    config.write_text(json.dumps({"peers": PEERS}), encoding="utf-8")
    fixed = (
        "--no-pretrained --num-classes 10 --in-chans 1 --img-size 32 --opt adamw --lr 1e-3 "
        "-b 50 --scale 0.8 1 --hflip 0 --mixup 0.2 --model-ema --log-interval 5 --experiment run "
        "--checkpoint-hist 3 --sched cosine --warmup-epochs 0"
    ).split()
    own = f"--val-interval {val_interval} --epochs {epochs} -j {args.workers} --device".split()
    command = [
        sys.executable,
        ROOT / "classification" / "train.py",
        data,
        "-c",
        config,
        *fixed,
        *own,
    ]
    command += [args.device, "--output", output]
    with (output / "log.txt").open("wb") as log:
        return subprocess.Popen(
            list(map(str, command)),
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )


def _epochs_a_minute(data: Path, output: Path, args: argparse.Namespace) -> int:
    """Train a few epochs, and see from its run files how long one takes."""
    if _start(data, output, args, val_interval=99, epochs=5).wait():
        raise SystemExit((output / "log.txt").read_text())
    second, _, last = (path.stat().st_mtime for path in list_runs(output / "run"))
    return max(1, round(60 / max((last - second) / 2, 1e-3)))


def _watch(run: subprocess.Popen[bytes], folder: Path, args: argparse.Namespace) -> np.ndarray:
    """Sample until the time is over; the samples are written as they come."""
    rows: list[list[float]] = []
    begun = time.monotonic()
    with (folder / "samples.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        while (passed := time.monotonic() - begun) < 60 * args.minutes and run.poll() is None:
            rows.append([passed, *_sample(run.pid, folder / "out" / "run")])
            writer.writerow(rows[-1])
            file.flush()
            time.sleep(args.every)
    if run.poll() is not None:
        raise SystemExit((folder / "out" / "log.txt").read_text()[-2000:])
    return np.array(rows)


def _sample(pid: int, output: Path) -> list[float]:
    """Look at a process and its children; memory in MiB."""
    main, children = _process(pid), [_process(child) for child in _children(pid)]
    everyone = [main, *children]
    files = [path for path in output.rglob("*") if path.is_file()] if output.is_dir() else []
    return [
        main[0],
        sum(child[0] for child in children),
        sum(one[1] for one in everyone),
        sum(one[2] for one in everyone),
        _cuda_memory(),
        sum(_size(path) for path in files) / MIB,
        len(list_runs(output)) if output.is_dir() else 0,
    ]


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(word) for task in tasks for word in (task / "children").read_text().split()]
    except OSError:
        return []


def _process(pid: int) -> tuple[float, int, int]:
    """Return resident MiB, open handles and threads; zeros where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        told = dict(line.split(":", 1) for line in lines)
        handles = len(os.listdir(f"/proc/{pid}/fd"))
        return int(told["VmRSS"].split()[0]) / 1024, handles, int(told["Threads"])
    except (OSError, KeyError):
        return 0.0, 0, 0


def _cuda_memory() -> float:
    """Return what is taken of the GPU, by whomever."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / MIB


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # pruned meanwhile
        return 0


def _tell(
    rows: np.ndarray, args: argparse.Namespace, interval: int, status: int, runs: Sequence[Path]
) -> None:
    """Print what grew, with its interval, and whether that is a leak."""
    last = runs[-1].stem if runs else "no run file"
    print(f"{args.minutes:g} minutes, {args.workers} workers, evaluated every {interval} epochs")
    print(f"{machine()}; ended by SIGTERM with status {status} (expected {EXIT_STATUS}) at {last}")
    steady = rows[rows[:, 0] >= 60 * args.warm_up]
    print(f"{'':12} {'after warm-up':>13} {'at the end':>10} {'most':>8}   slope an hour [95 %]")
    for i, name in enumerate(COLUMNS[1:], start=1):
        slope, reach = _slope(steady[:, 0] / 3600, steady[:, i])
        first, end = _ends(steady[:, i])
        told = f"{name:12} {first:13.1f} {end:10.1f} {steady[:, i].max():8.1f}"
        print(f"{told}   {slope:+.2f} [{slope - reach:+.2f}, {slope + reach:+.2f}]")
        if name in ("main", "workers"):
            print(f"{'':12} {_verdict(slope, reach, args.limit)}")


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Return the medians of the first and of the last tenth."""
    tenth = max(1, len(values) // 10)
    return float(np.median(values[:tenth])), float(np.median(values[-tenth:]))


def _slope(hours: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Fit a line through each minute's medians; return its slope and the interval's half."""
    minutes = (60 * hours).astype(int)
    x, y = (
        np.array([np.median(part[minutes == minute]) for minute in np.unique(minutes)])
        for part in (hours, values)
    )
    if len(x) < 3:
        return float("nan"), float("nan")
    if np.ptp(y) == 0:  # scipy knows no error of a line through equal values
        return 0.0, 0.0
    fit = stats.linregress(x, y)
    return float(fit.slope), float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr)


def _verdict(slope: float, reach: float, limit: float) -> str:
    if slope - reach > limit:
        return f"GROWS by more than {limit:g} MiB an hour"
    if slope + reach <= limit:
        return f"does not grow by {limit:g} MiB an hour"
    return f"cannot be told from {limit:g} MiB an hour; let it run longer"


if __name__ == "__main__":
    main()
