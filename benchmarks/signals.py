"""What it costs that ranks tell one another after each step whether SIGTERM came.

    python benchmarks/signals.py [--processes 2 4 --step-ms 20 --steps 200]

Processes on this machine, by gloo, whose step is a sleep: with and without the exchange in turns.
CPU time counts gloo's own threads too; wall time is what a step becomes longer by.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch.multiprocessing as mp
from measure import join, machine

from common import distributed
from common.termination import Termination

TURNS = 5


def work(rank: int, size: int, folder: str, seconds: float, steps: int) -> None:
    """Time both ways as one of the ranks; the first prints."""
    world = join(rank, size, folder)
    added: list[tuple[float, float]] = []
    with Termination() as termination:
        termination.agreed_after_step(world)  # makes the group
        for _ in range(TURNS):
            told = []
            for asks in (True, False):
                distributed.barrier()
                cpu, wall = time.process_time(), time.perf_counter()
                for _ in range(steps):
                    time.sleep(seconds)
                    if asks:
                        termination.agreed_after_step(world)
                told.append((time.process_time() - cpu, time.perf_counter() - wall))
            added.append(tuple((a - b) / steps for a, b in zip(*told, strict=True)))
    found = distributed.gather_objects(
        [statistics.median(values) for values in zip(*added, strict=True)]
    )
    if world.is_main:
        cpu, wall = (max(values) for values in zip(*found, strict=True))
        print(
            f"{size} processes, a step of {1e3 * seconds:.0f} ms: CPU {1e6 * cpu:+.0f} us, "
            f"wall {1e6 * wall:+.0f} us, of the slowest"
        )
    distributed.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--step-ms", type=float, default=20)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    print(f"added to a step, median of {TURNS} turns; {machine()}", flush=True)
    for size in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (size, folder, args.step_ms / 1e3, args.steps), nprocs=size)


if __name__ == "__main__":
    main()
