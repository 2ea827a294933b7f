"""What a plan says against what a step takes.

    python benchmarks/planner.py [--batch 8 --repeats 3 --peers NAME NAME ...]

Bytes: planned on fake tensors, measured on a real step on the CPU: what autograd holds at most, and
all tensors beside weights, optimizer and inputs at most. Expected: within 10 %. Seconds: planned
from two samples of each peer alone, against a whole step without its optimizers; no expectation.
"""

from __future__ import annotations

import functools

import torch
from measure import alternate, machine
from step_overhead import asked, growing_groups
from torch import Tensor

from common.costs import measure_peer, measure_transfer
from common.engine import ENGINES
from common.memory import bytes_of, peak_bytes, peak_saved_bytes, tensors_in
from common.planner import TeamCost, engine_costs
from common.transfer import KnowledgeTransfer

CPU = torch.device("cpu")
COMPARED = ("joint", "two-pass")


def draw(samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.randn(samples, 3, 224, 224, device=device)
    return images, torch.randint(1000, (samples,), device=device)


def main() -> None:
    args = asked(__doc__.splitlines()[0], repeats=3)
    torch.set_num_threads(1)
    batch = draw(args.batch, CPU)
    print(f"planned / measured, batch {args.batch}; {machine()}")
    print(f"{'N':>2} {'engine':9} {'saved, MB':>19} {'all tensors, MB':>19} {'ms':>15}   ratios")
    for peers in growing_groups(args.peers):
        costs = [measure_peer(peer, draw, args.batch, CPU) for peer in peers]
        transfer = KnowledgeTransfer("best", names=peers.names)
        inputs = bytes_of(batch)
        team = TeamCost(costs, args.batch, inputs, measure_transfer(transfer, costs, args.batch))
        runs = {
            name: functools.partial(ENGINES[name](peers, transfer, CPU).step, batch, step=0)
            for name in COMPARED
        }
        without = {name: functools.partial(run, update=False) for name, run in runs.items()}
        for name, run in runs.items():
            run()  # the optimizers' states are there
            known = [*batch, *(x for peer in peers for x in tensors_in(peer.module))]
            saved = peak_saved_bytes(run, known)
            known += [x for peer in peers for x in tensors_in(peer.optimizer.state)]
            peak = peak_bytes(run, known)
            cost = engine_costs(team)[name]
            planned = (cost.activations, cost.peak - cost.states - inputs, cost.seconds)
            seconds = alternate({name: without[name]}, args.repeats, warm_up=1)[name]
            ratios = [x / y for x, y in zip(planned, (saved, peak, seconds), strict=True)]
            print(
                f"{len(peers):2} {name:9} {planned[0] / 1e6:9.1f} {saved / 1e6:9.1f} "
                f"{planned[1] / 1e6:9.1f} {peak / 1e6:9.1f} {1e3 * planned[2]:7.0f} "
                f"{1e3 * seconds:7.0f}   {' '.join(f'{x:.3f}' for x in ratios)}",
                flush=True,
            )
            for peer in peers:
                peer.optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
