"""The transfer loss against the textbook N(N-1) KLs: time and bytes saved for backward.

    python benchmarks/transfer_loss.py [--peers 4 --batch 128 --classes 1000 --repeats 60]

Expected on any machine: at least 3 times faster forward + backward, at most a third of the bytes.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from measure import alternate, machine
from torch import Tensor

from common.memory import saved_bytes
from common.roles import assign_roles
from common.transfer import KnowledgeTransfer, PeerOutput


def textbook(logits: list[Tensor], roles: Tensor) -> Tensor:
    """Sum the KL of every ordered pair, one at a time, as a textbook writes it."""
    total = torch.zeros(())
    for t, teacher in enumerate(logits):
        for s, student in enumerate(logits):
            if t != s:
                kl = F.kl_div(
                    F.log_softmax(student, dim=1),
                    F.softmax(teacher.detach(), dim=1),
                    reduction="none",
                ).sum(dim=1)
                total = total + (roles[t, s] * kl).mean()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logits = [torch.randn(args.batch, args.classes, requires_grad=True) for _ in range(args.peers)]
    score = torch.randn(args.peers, args.batch)
    transfer = KnowledgeTransfer("best")

    def ours() -> Tensor:
        outputs = [PeerOutput(torch.zeros(()), s, z) for s, z in zip(score, logits, strict=True)]
        return transfer(outputs).total

    def theirs() -> Tensor:
        return textbook(logits, assign_roles(score, "best"))

    torch.testing.assert_close(ours(), theirs())
    memory = {"ours": saved_bytes(ours, logits), "textbook": saved_bytes(theirs, logits)}
    seconds = alternate(
        {"textbook": lambda: theirs().backward(), "ours": lambda: ours().backward()}, args.repeats
    )
    print(f"transfer loss, N = {args.peers}, B = {args.batch}, C = {args.classes}; {machine()}")
    print(f"{'':10} {'ms (forward + backward)':>24} {'MB saved for backward':>22}")
    for name in ("textbook", "ours"):
        print(f"{name:10} {1e3 * seconds[name]:24.2f} {memory[name] / 1e6:22.2f}")
    print(
        f"ratio      {seconds['textbook'] / seconds['ours']:23.1f}x "
        f"{memory['textbook'] / memory['ours']:21.1f}x"
    )


if __name__ == "__main__":
    main()
