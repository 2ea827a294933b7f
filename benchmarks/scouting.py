"""Does scouting predict who gains from whom? Small models of three or four families.

    python benchmarks/scouting.py --folder .scouting [--task segmentation] [--pairs 15 --seeds 2]

Models are pretrained, each on a part of the data of its own, for more or less long. Pairs of them,
in an order drawn by lot, are fine-tuned together by the task's own ``train`` under the rule
``best``; the control is the same without transfer, for all models in one run: there nobody's
training depends on who is beside. The task's ``scout.py --realised`` scouts the models on samples
that are neither trained nor measured on, and compares what it predicts with what each pair gained.
Every run is done once: started again, the script goes on where it was stopped; ``--report-only``
compares what is there. Models, data and lengths are those of ``scouted_TASK.py``.

What was predicted and gained is kept as a table (``--table``; see ``scouting_table.py``), from
which all that is printed is computed. Anybody can do that without the runs:

    python benchmarks/scouting.py --read benchmarks/results/scouting-classification.csv
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import logging
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import machine
from scouting_table import read_table, write_table

from common.card import markdown_table
from common.demo import once
from common.report.numbers import difference_unit
from common.report.realised import HEAD, correlation_rows

TASKS = ("classification", "segmentation", "saliency")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train what is not trained yet, and compare; return what the scout found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument("--folder", type=Path, default=Path(".scouting"), help="one for each task")
    parser.add_argument("--pairs", type=int, help="the first so many; default: all")
    parser.add_argument("--seeds", type=int, help="of fine-tuning; default: the task's")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--table", type=Path, help="to write; default: pairs.csv in the folder")
    parser.add_argument(
        "--read", type=Path, metavar="TABLE", help="train nothing: tell of this one"
    )
    args = parser.parse_args(arguments)
    if args.read:
        return tell(_read(parser, args.read))
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR)
    task = importlib.import_module(f"scouted_{args.task}")
    folder = args.folder.resolve()
    if not args.report_only:
        train_all(task, folder, args.pairs, args.seeds or task.SEEDS)
    found = task.compare(folder, finished(folder))
    table = args.table or folder / "pairs.csv"
    write_table(table, found)
    tell(read_table(table))
    print(
        f"\n{table}; {machine()}; {time.process_time() / 60:.1f} minutes of CPU time in this call"
    )
    return found


def _read(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        parser.error(f"--read: {error}")


def train_all(task: Any, folder: Path, count: int | None, seeds: int) -> None:
    """Pretrain the models; fine-tune all without transfer, and pairs with it."""
    pairs = list(itertools.combinations(task.NAMES, 2))
    random.Random(0).shuffle(pairs)
    task.make_data(folder)
    for k, name in enumerate(task.NAMES):
        told = once(folder / f"{name}.json", lambda k=k: task.pretrain(folder, k))
        print(f"{name}: {task.METRIC} {told:.4g}", flush=True)
    for seed in range(seeds):
        finetune(task, folder, task.NAMES, "none", seed)
        for names in pairs[:count]:
            finetune(task, folder, names, "best", seed)


def finetune(task: Any, folder: Path, names: Sequence[str], rule: str, seed: int) -> None:
    """Fine-tune some of the models, once."""
    title = f"{rule}-{seed}-" + ("all" if len(names) == len(task.NAMES) else "-".join(names))

    def make() -> Any:
        begun = time.process_time()
        history = task.finetune(folder, names, rule, seed, title)
        print(f"{title}: {time.process_time() - begun:.0f} s of CPU time", flush=True)
        return history

    once(folder / f"{title}.json", make)


def finished(folder: Path) -> list[str]:
    """Find the runs of fine-tuning that are done."""
    done = [path.stem for path in sorted(folder.glob("*.json"))]
    return [str(folder / "runs" / name) for name in done if (folder / "runs" / name).is_dir()]


def tell(found: dict[str, Any]) -> dict[str, Any]:
    """Print what pairs gained, and how well that was predicted, as Markdown; return it."""
    told, unit = found["realised"], difference_unit(found["metric"])
    digits = 2 if unit == "points" else 4
    gains = [row["gain"] for row in told["runs"]]
    print(
        f"{len(gains)} teams of {len(found['names'])} models; gain of {found['metric']} over the "
        f"control, mean over teams: {statistics.mean(gains):+.{digits}f} ({unit}), standard "
        f"deviation {statistics.pstdev(gains):.{digits}f}, from {min(gains):+.{digits}f} to "
        f"{max(gains):+.{digits}f}; {sum(gain > 0 for gain in gains)} gain\n"
    )
    print(markdown_table(HEAD, correlation_rows(found)))
    return found


if __name__ == "__main__":
    main()
