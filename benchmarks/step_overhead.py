"""What teaching costs: the joint step against the sum of the peers' own CE-only steps.

    python benchmarks/step_overhead.py [--batch 8 --repeats 9 --peers NAME NAME ...]

Both sides do the same work per peer: own view, forward, cross entropy, backward, fused AdamW step.
The joint step adds roles, KL and the ledger. Timed in turns within one run; expected: at most 1.05.
glibc returns freed memory to the system after a step and faults it in again at the next, the more
the more activations live at once; the script starts itself again with that switched off for both
sides, as a GPU's caching allocator has it.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterator, Sequence

import timm
import torch
import torch.nn.functional as F
from measure import alternate, machine
from timm.optim import create_optimizer_v2

from classification.data import ToView, view_of
from classification.options import parse
from classification.peer import ClassifierPeer
from common.engine import JointEngine
from common.ledger import Ledger
from common.peers import PeerGroup
from common.transfer import KnowledgeTransfer

PEERS = ("pit_xs_224", "coat_lite_mini", "vit_tiny_patch16_224", "resnet18")
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


def make_peer(name: str, number: int) -> ClassifierPeer:
    torch.manual_seed(number)
    module = timm.create_model(name)
    optimizer = create_optimizer_v2(module, "adamw", lr=1e-6, weight_decay=1e-5, fused=True)
    options = parse(["/data", "--peer", "a", "--peer", "b"])[0]
    view = view_of(module, options)
    to_view = ToView(view_of(timm.create_model(PEERS[0]), options), view)
    return ClassifierPeer(
        name,
        module,
        to_view,
        lambda logits, target: F.cross_entropy(logits, target, reduction="none"),
        optimizer=optimizer,
    )


def asked(about: str, repeats: int) -> argparse.Namespace:
    """Read the command line; start the script again where memory would be given back."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--peers", nargs="+", default=PEERS)
    args = parser.parse_args()
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    return args


def growing_groups(names: Sequence[str]) -> Iterator[PeerGroup]:
    """Yield the first two peers, the first three, and so on, in training mode."""
    for count in range(2, len(names) + 1):
        peers = PeerGroup([make_peer(name, i) for i, name in enumerate(names[:count])])
        for peer in peers:
            peer.train()
        yield peers


def alone(peer: ClassifierPeer, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Make one CE-only step, as a plain training script does."""
    images, target = batch
    F.cross_entropy(peer.model(peer.to_view(images)), target).backward()
    peer.optimizer.step()
    peer.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    args = asked(__doc__.splitlines()[0], repeats=9)
    torch.set_num_threads(1)
    batch = torch.randn(args.batch, 3, 224, 224), torch.randint(1000, (args.batch,))
    print(f"joint step over the sum of CE-only steps, batch {args.batch}; {machine()}")
    print(f"{'N':>2} {'sum of CE-only':>15} {'joint':>10} {'ratio':>7}   peers")
    for peers in growing_groups(args.peers):
        names = peers.names
        engine = JointEngine(
            peers, KnowledgeTransfer("best", names=peers.names), torch.device("cpu")
        )
        ledger = Ledger(peers.names)
        runs = {peer.name: functools.partial(alone, peer, batch) for peer in peers}
        runs["joint"] = lambda engine=engine, ledger=ledger: ledger.add(engine.step(batch, step=0))
        seconds = alternate(runs, args.repeats)
        total = sum(seconds[name] for name in names)
        print(
            f"{len(peers):2} {1e3 * total:12.1f} ms {1e3 * seconds['joint']:7.1f} ms "
            f"{seconds['joint'] / total:7.3f}   {', '.join(names)}"
        )


if __name__ == "__main__":
    main()
