"""The transfer over a dense prediction against textbook KLs: time and memory.

    python benchmarks/segmentation_loss.py [--peers 2 --batch 2 --classes 150 --side 128]

Against the textbook form at full resolution (the logits enlarged four times, as a segmentor's loss
does it) and on the same grid. Expected: 8 times less memory and 8 times faster than the first; 1.5
times less memory than the second, and not slower.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import alternate, machine
from torch import Tensor
from transfer_loss import textbook

from common.memory import peak_bytes, saved_bytes
from common.roles import assign_roles
from common.transfer import KnowledgeTransfer, PeerOutput

STRIDE = 4


def enlarged(logits: list[Tensor]) -> list[Tensor]:
    return [F.interpolate(z, scale_factor=STRIDE, mode="bilinear") for z in logits]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    grid = (args.batch, args.side, args.side)
    logits = [
        torch.randn(args.batch, args.classes, args.side, args.side, requires_grad=True)
        for _ in range(args.peers)
    ]
    print(
        f"N = {args.peers}, B = {args.batch}, C = {args.classes}, {args.side} x {args.side}; "
        f"{machine()}"
    )
    for granularity in ("image", "pixel"):
        score = torch.randn(args.peers, *(grid if granularity == "pixel" else grid[:1]))
        compare(granularity, logits, score, args.repeats)


def compare(granularity: str, logits: list[Tensor], score: Tensor, repeats: int) -> None:
    """Print one table."""
    roles = assign_roles(score, "best")
    if granularity == "image":
        roles = roles[..., None, None]
    large = roles
    if granularity == "pixel":
        large = roles.repeat_interleave(STRIDE, -2).repeat_interleave(STRIDE, -1)

    def ours() -> Tensor:
        pairs = zip(score, logits, strict=True)
        return transfer([PeerOutput(torch.zeros(()), s, z) for s, z in pairs]).total

    transfer = KnowledgeTransfer("best")
    forms: dict[str, Callable[[], Tensor]] = {
        "textbook, full": lambda: textbook(enlarged(logits), large),
        "textbook, grid": lambda: textbook(logits, roles),
        "ours": ours,
    }
    torch.testing.assert_close(forms["ours"](), forms["textbook, grid"]())

    def step(form: Callable[[], Tensor]) -> None:
        for z in logits:
            z.grad = None
        form().backward()

    saved = {name: saved_bytes(form, logits) for name, form in forms.items()}
    peak = {name: peak_bytes(lambda f=form: step(f), logits) for name, form in forms.items()}
    seconds = alternate({name: lambda f=f: step(f) for name, f in forms.items()}, repeats, 1)
    print(f"{granularity:16} {'ms':>10} {'MB saved':>10} {'MB at peak':>11}")
    for name in forms:
        print(
            f"{name:16} {1e3 * seconds[name]:10.0f} {saved[name] / 1e6:10.1f} "
            f"{peak[name] / 1e6:11.1f}"
        )
    for name in list(forms)[:2]:
        print(
            f"{name + ' / ours':22} {seconds[name] / seconds['ours']:.2f}x time, "
            f"{saved[name] / saved['ours']:.2f}x saved, {peak[name] / peak['ours']:.2f}x peak"
        )


if __name__ == "__main__":
    main()
