"""What the two-pass engine saves and costs against the joint one.

    python benchmarks/engines.py [--batch 8 --repeats 5 --peers NAME NAME ...]

Memory: the most bytes that autograd holds for backward at any one time (parameters and inputs not
counted), against the largest peer's own step alone; expected: at most 1.1. Time: of a whole step
against the joint engine's, in turns within one run; expected: at most 1.45.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from measure import alternate, machine
from step_overhead import asked, growing_groups

from classification.peer import ClassifierPeer
from common.engine import ENGINES
from common.memory import peak_saved_bytes, tensors_in
from common.peers import PeerGroup
from common.transfer import KnowledgeTransfer

CPU = torch.device("cpu")
COMPARED = ("joint", "two-pass")


def main() -> None:
    args = asked(__doc__.splitlines()[0], repeats=5)
    torch.set_num_threads(1)
    batch = torch.randn(args.batch, 3, 224, 224), torch.randint(1000, (args.batch,))
    print(f"two-pass against joint, batch {args.batch}; {machine()}")
    print(f"{'N':>2} {'largest':>10} {'joint':>10} {'two-pass':>10} {'of largest':>10}", end="")
    print(f" {'joint':>9} {'two-pass':>10} {'ratio':>6}   peers")
    for peers in growing_groups(args.peers):
        known = [*batch, *(x for peer in peers for x in tensors_in(peer.module))]
        transfer = KnowledgeTransfer("best", names=peers.names)
        runs = {
            name: functools.partial(ENGINES[name](peers, transfer, CPU).step, batch, step=0)
            for name in COMPARED
        }
        bytes_of = {name: peak_saved_bytes(run, known) for name, run in runs.items()}
        largest = max(peak_saved_bytes(_alone(peer, batch), known) for peer in peers)
        seconds = alternate(runs, args.repeats)
        cells = [largest, bytes_of["joint"], bytes_of["two-pass"]]
        print(f"{len(peers):2}", *(f"{cell / 1e6:7.1f} MB" for cell in cells), end=" ")
        print(f"{bytes_of['two-pass'] / largest:10.3f}", end=" ")
        print(*(f"{1e3 * seconds[name]:6.0f} ms" for name in COMPARED), end=" ")
        print(
            f"{seconds['two-pass'] / seconds['joint']:8.3f}   {', '.join(peers.names)}", flush=True
        )


def _alone(peer: ClassifierPeer, batch: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], object]:
    engine = ENGINES["joint"](PeerGroup([peer]), KnowledgeTransfer("none"), CPU)
    return functools.partial(engine.step, batch, step=0)


if __name__ == "__main__":
    main()
