"""What channels_last and torch.compile bring each peer: a step of its own, both ways in turns.

    python benchmarks/layouts.py [--task classification --batch 8 --repeats 5 --peers NAME NAME ...]
    python benchmarks/layouts.py --task saliency --batch 1 --size 64 96 --peers vinet_s tmfi_net
    python benchmarks/layouts.py --task segmentation

The trials are those of ``channels_last=auto`` and ``compile=auto``: forward and backward on noise.
Segmentors are those of the demo, and have no compile. ``--no-compile`` leaves it out.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measure import machine

from common.distributed import World
from common.trials import Trial, time_compiled, time_layouts

PEERS = {
    "classification": ["pit_xs_224", "coat_lite_mini", "vit_tiny_patch16_224", "resnet18"],
    "saliency": ["vinet_s", "vinet_a", "tmfi_net"],
    "segmentation": [],
}
CPU = torch.device("cpu")
SEGMENTORS = Path(__file__).parents[1] / "segmentation" / "configs" / "demo" / "three.yaml"
# A peer's name, and what builds it in either layout.
Built = tuple[str, Callable[[bool], Trial]]


def classification(args: argparse.Namespace) -> Iterator[Built]:
    from classification.options import parse
    from classification.peer import build_modules
    from classification.trials import trial

    asked = [item for name in args.peers for item in ("--peer", name)]
    run, specs = parse(["/data", *asked, "--no-pretrained", "-b", str(args.batch)])
    modules, views = build_modules(specs, run)
    for i, (spec, module) in enumerate(zip(specs, modules, strict=True)):
        given = (spec, module, views, i, run, CPU)
        yield spec.name, lambda last, given=given: trial(*given, last)


def saliency(args: argparse.Namespace) -> Iterator[Built]:
    from saliency.options import parse
    from saliency.peer import build_modules
    from saliency.trials import trial

    asked = [item for name in args.peers for item in ("--peer", name)]
    size = ["--size", *map(str, args.size)] if args.size else []
    words = ["--data-root", "/data", *asked, *size, "-b", str(args.batch)]
    run, specs = parse("dhf1k", "train_dhf1k", words)
    for spec, module, view in zip(specs, *build_modules(specs), strict=True):
        given = (spec, module, view, run, CPU)
        yield spec.name, lambda last, given=given: trial(*given, last)


def segmentation(args: argparse.Namespace) -> Iterator[Built]:
    from segmentation.config import load_run
    from segmentation.models import build_module
    from segmentation.trainer import trial

    run = load_run([SEGMENTORS], ["SOLVER.IMS_PER_BATCH", str(args.batch)])
    for config in run.peers:
        given = (config, build_module(config.cfg), run, World(0, 1, 0, CPU), 255)
        yield config.name, lambda last, given=given: trial(*given, last)


TASKS = {"classification": classification, "saliency": saliency, "segmentation": segmentation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=tuple(TASKS), default="classification")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, help="of saliency's frames")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="+", help="of classification and saliency")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.peers = args.peers or PEERS[args.task]
    torch.set_num_threads(1)
    print(f"forward and backward; {machine()}")
    for name, build in TASKS[args.task](args):
        ways = [time_layouts(build, CPU, repeats=args.repeats)]
        if args.task != "segmentation" and not args.no_compile:
            once = functools.partial(build, False)
            ways.append(time_compiled(once, CPU, repeats=args.repeats))
        for seconds in ways:
            (usual, before), (other, now) = seconds.items()
            print(
                f"{name:24} {usual:>10} {1e3 * before:8.0f} ms {other:>14} {1e3 * now:8.0f} ms "
                f"{now / before:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
