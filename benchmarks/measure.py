"""What the benchmarks share: saved bytes, alternating timings, the machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def saved_bytes(run: Callable[[], object], known: set[int] | None = None) -> int:
    """Count the bytes that autograd keeps for backward while ``run`` computes; each storage once.

    Args:
        run: Does the forward pass.
        known: Addresses of storages that are not counted, such as parameters and inputs.
    """
    seen: dict[int, int] = {}
    ignored = known or set()

    def pack(x: torch.Tensor) -> torch.Tensor:
        address = x.untyped_storage().data_ptr()
        if address not in ignored:
            seen[address] = x.untyped_storage().nbytes()
            keep.append(x)
        return x

    keep: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(seen.values())


def alternate(
    runs: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 2
) -> dict[str, float]:
    """Time functions in turns, so that a busy machine hurts all alike; return median seconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
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


def peak_saved_bytes(run: Callable[[], object], known: set[int] | None = None) -> int:
    """Count the most bytes that autograd holds for backward at any one time; each storage once.

    Args:
        run: Does whole steps.
        known: Addresses of storages that are not counted, such as parameters and inputs.
    """
    held: dict[int, list[int]] = {}
    ignored = known or set()
    now, most = 0, 0

    class Kept:
        def __init__(self, x: torch.Tensor) -> None:
            nonlocal now, most
            self.x = x
            self.address = x.untyped_storage().data_ptr()
            if self.address in ignored:
                return
            count = held.setdefault(self.address, [0, x.untyped_storage().nbytes()])
            if not count[0]:
                now += count[1]
                most = max(most, now)
            count[0] += 1

        def __del__(self) -> None:
            nonlocal now
            if self.address in ignored:
                return
            count = held[self.address]
            count[0] -= 1
            if not count[0]:
                now -= count[1]
                del held[self.address]

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        run()
    return most
