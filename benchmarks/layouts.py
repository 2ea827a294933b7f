"""What channels_last and torch.compile bring each peer: a step of its own, both ways in turns.

    python benchmarks/layouts.py [--batch 8 --repeats 5 --peers NAME NAME ...]

The trials are those of ``channels_last=auto`` and ``compile=auto``: forward and backward on noise.
"""

from __future__ import annotations

import argparse

import torch
from measure import machine

from classification.compiling import time_both
from classification.layouts import time_layouts
from classification.options import parse
from classification.peer import build_modules

PEERS = ("pit_xs_224", "coat_lite_mini", "vit_tiny_patch16_224", "resnet18")
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="+", default=PEERS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    asked = [item for name in args.peers for item in ("--peer", name)]
    options, specs = parse(["/data", *asked, "--no-pretrained", "-b", str(args.batch)])
    modules, views = build_modules(specs, options)
    print(f"forward and backward, batch {args.batch}; {machine()}")
    print(f"{'peer':24} {'contiguous':>11} {'channels_last':>14} {'ratio':>6}", end="")
    print(f" {'eager':>10} {'compiled':>10} {'ratio':>6}")
    for i, (spec, module) in enumerate(zip(specs, modules, strict=True)):
        given = (spec, module, views, i, options, CPU, args.repeats)
        layout, way = time_layouts(*given), time_both(*given)
        cells = [1e3 * x for x in (*layout.values(), *way.values())]
        print(
            f"{spec.name:24} {cells[0]:8.0f} ms {cells[1]:11.0f} ms {cells[1] / cells[0]:6.2f} "
            f"{cells[2]:7.0f} ms {cells[3]:7.0f} ms {cells[3] / cells[2]:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
