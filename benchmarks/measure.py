"""What the benchmarks share: alternating timings, the machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def turns(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time functions in turns, so that a busy machine hurts all alike; return every turn's seconds.

    Args:
        runs: By name.
        repeats: Turns that count.
        warm_up: Turns before them.
        clock: ``time.process_time`` counts what this process computes, not what it waits for.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + repeats):
        for name, run in runs.items():
            start = clock()
            run()
            if turn >= warm_up:
                times[name].append(clock() - start)
    return times


def alternate(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of functions that are timed in turns; see ``turns``."""
    times = turns(runs, repeats, warm_up, clock)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> str:
    """Describe where a benchmark ran."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        cpu = platform.processor() or platform.machine()
    return (
        f"{cpu}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
