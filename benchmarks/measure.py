"""What the benchmarks share: alternating timings, processes that meet, the machine."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from common import distributed
from common.distributed import World


def turns(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time functions in turns, so that a busy machine hurts all alike; return every turn's seconds.

    Every second turn goes backwards: who comes after whom, and a drift, then hurt all alike too.
    Garbage is collected between turns only, as nobody's fault.

    Args:
        runs: By name.
        repeats: Turns that count.
        warm_up: Turns before them.
        clock: ``time.process_time`` counts what this process computes, not what it waits for.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    with _no_garbage():
        for turn in range(warm_up + repeats):
            for name in list(runs)[:: -1 if turn % 2 else 1]:
                start = clock()
                runs[name]()
                if turn >= warm_up:
                    times[name].append(clock() - start)
            gc.collect()
    return times


@contextmanager
def _no_garbage() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what is there by now need not be looked through again
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def alternate(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of functions that are timed in turns; see ``turns``."""
    times = turns(runs, repeats, warm_up, clock)
    return {name: statistics.median(values) for name, values in times.items()}


def join(rank: int, size: int, folder: str) -> World:
    """Join processes of this machine over gloo, each with one thread.

    Args:
        rank: Of this process.
        size: How many there are.
        folder: An empty one, where they meet.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size)
    return distributed.start("cpu")


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
