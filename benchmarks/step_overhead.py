"""What teaching costs: the joint step against the sum of the peers' own steps, for every task.

    python benchmarks/step_overhead.py [--task classification] [--repeats 9] [--parts]

Both sides do the same work per peer: own view, forward, the task's own loss, backward, step of the
same optimizer. The joint step adds roles, KL, the check that all is finite and the ledger. Measured
in CPU seconds of one thread, in turns within one run, every second one backwards, as the machine
may be busy; the ratio is that of a turn, its median with quartiles and a 95 % interval (binomial).
Expected: at most 1.02 times the sum. ``fixed`` are linear models, whose steps are nearly nothing:
what is added shows there in microseconds. ``--pixels`` is the side of segmentation's images.
``--parts`` tells what each part costs that only the joint step has, between steps of all peers, and
each peer's optimizer step as a loop over its parameters, as foreach and fused.
glibc returns freed memory to the system after a step and faults it in again at the next, the more
the more activations live at once; the script starts itself again with that switched off for both
sides, as a GPU's caching allocator has it.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from measure import machine, turns
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from classification.data import ToView, view_of
from classification.options import parse
from classification.peer import ClassifierPeer
from common.engine import JointEngine
from common.ledger import Ledger
from common.peers import Peer, PeerGroup
from common.transfer import KnowledgeTransfer

PEERS = ("pit_xs_224", "coat_lite_mini", "vit_tiny_patch16_224", "resnet18")
SALIENCY, CLIP = ("vinet_s", "vinet_a", "tmfi_net"), (64, 96)
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
SEGMENTORS = Path(__file__).parents[1] / "segmentation" / "configs" / "demo" / "three.yaml"
CPU = torch.device("cpu")
# A peer, what makes a batch of a step, and a plain training step of that peer on it.
Alone = Callable[[Any, Any], None]


def make_peer(name: str, number: int) -> ClassifierPeer:
    torch.manual_seed(number)
    module = timm.create_model(name)
    optimizer = create_optimizer_v2(module, "adamw", lr=1e-6, weight_decay=1e-5, fused=True)
    options = parse(["/data", "--peer", "a", "--peer", "b"])[0]
    view = view_of(module, options)
    to_view = ToView(view_of(timm.create_model(PEERS[0]), options), view)
    return ClassifierPeer(name, module, to_view, _cross_entropy, optimizer=optimizer)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def asked(about: str, repeats: int, tasks: Sequence[str] = ()) -> argparse.Namespace:
    """Read the command line; start the script again where memory would be given back."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--peers", nargs="+", default=PEERS, help="classifiers")
    if tasks:
        parser.add_argument("--pixels", type=int, default=64, help="segmentation")
        parser.add_argument("--parts", action="store_true", help="what each part of a step costs")
        parser.add_argument("--task", choices=["all", *tasks], default="all")
    args = parser.parse_args()
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    return args


def growing_groups(names: Sequence[str]) -> Iterator[PeerGroup]:
    """Yield the first two classifiers, the first three, and so on, in training mode."""
    yield from _growing([functools.partial(make_peer, name, i) for i, name in enumerate(names)])


def _growing(makers: Sequence[Callable[[], Peer]]) -> Iterator[PeerGroup]:
    for count in range(2, len(makers) + 1):
        peers = PeerGroup([make() for make in makers[:count]])
        for peer in peers:
            peer.train()
        yield peers


def _finish(peer: Peer) -> None:
    peer.optimizer.step()
    peer.optimizer.zero_grad(set_to_none=True)


def classification(args: argparse.Namespace) -> tuple[Iterator[PeerGroup], Any, Alone]:
    batch = torch.randn(args.batch, 3, 224, 224), torch.randint(1000, (args.batch,))

    def alone(peer: ClassifierPeer, batch: tuple[Tensor, Tensor]) -> None:
        images, target = batch
        F.cross_entropy(peer.model(peer.to_view(images)), target).backward()
        _finish(peer)

    return growing_groups(args.peers), lambda: batch, alone


def fixed(args: argparse.Namespace) -> tuple[Iterator[PeerGroup], Any, Alone]:
    batch = torch.randn(16, 8), torch.randint(5, (16,))

    def make(number: int) -> ClassifierPeer:
        module = nn.Linear(8, 5)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
        name = f"linear{number}"
        return ClassifierPeer(name, module, nn.Identity(), _cross_entropy, optimizer=optimizer)

    def alone(peer: ClassifierPeer, batch: tuple[Tensor, Tensor]) -> None:
        F.cross_entropy(peer.model(batch[0]), batch[1]).backward()
        _finish(peer)

    return _growing([functools.partial(make, i) for i in range(4)]), lambda: batch, alone


def segmentation(args: argparse.Namespace) -> tuple[Iterator[PeerGroup], Any, Alone]:
    from segmentation import solver
    from segmentation.config import PeerConfig, load_run
    from segmentation.data import class_masks
    from segmentation.models import build_with_weights
    from segmentation.peer import SegmentorPeer, make_batch

    def sample() -> dict[str, Any]:
        blocks = torch.randint(6, (args.pixels // 8, args.pixels // 8))
        labels = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
        image = torch.randint(256, (3, args.pixels, args.pixels), dtype=torch.uint8)
        return {"image": image, "sem_seg": labels, "instances": class_masks(labels, 255)}

    batch = make_batch([sample() for _ in range(args.batch)], CPU, 255)

    def make(config: PeerConfig) -> SegmentorPeer:
        module, cfg = build_with_weights(config)
        optimizer = solver.build_optimizer(cfg, module)
        return SegmentorPeer(config.name, module, cfg, optimizer=optimizer)

    def alone(peer: SegmentorPeer, batch: Any) -> None:
        losses = peer.model(peer.inputs(batch.samples, batch.ignore))
        torch.stack(list(losses.values())).sum().backward()
        _finish(peer)

    makers = [functools.partial(make, config) for config in load_run([SEGMENTORS]).peers]
    return _growing(makers), lambda: replace(batch), alone


def saliency(args: argparse.Namespace) -> tuple[Iterator[PeerGroup], Any, Alone]:
    from saliency.data import ClipBatch
    from saliency.losses import saliency_loss
    from saliency.models import create_model
    from saliency.peer import SaliencyPeer, to_size

    size = max(1, args.batch // 4)
    views = {name: replace(create_model(name).view, size=CLIP) for name in SALIENCY}
    frames = torch.randint(256, (32 * size, *CLIP, 3), dtype=torch.uint8)
    rows = {view: torch.arange(32 * size).view(size, 32) for view in views.values()}
    numbers = torch.zeros(size, dtype=torch.long)
    maps = torch.rand(size, *CLIP)

    def make(name: str) -> SaliencyPeer:
        module = create_model(name)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-6, weight_decay=1e-5, fused=True)
        return SaliencyPeer(name, module, views[name], saliency_loss, optimizer=optimizer)

    def alone(peer: SaliencyPeer, batch: ClipBatch) -> None:
        maps = to_size(peer.model(batch.clips(peer.view)), batch.maps.shape[-2:])
        saliency_loss(maps, batch.maps).mean().backward()
        _finish(peer)

    makers = [functools.partial(make, name) for name in SALIENCY]
    return (
        _growing(makers),
        lambda: ClipBatch({CLIP: frames}, rows, maps, None, numbers, numbers),  # no clips made yet
        alone,
    )


TASKS = {
    "fixed": fixed,
    "classification": classification,
    "segmentation": segmentation,
    "saliency": saliency,
}


def compare(peers: PeerGroup, batch: Callable[[], Any], alone: Alone, repeats: int) -> str:
    """Return a row: the sum of the own steps, the joint step, their ratio, what is added."""
    engine = JointEngine(peers, KnowledgeTransfer("best", names=peers.names), CPU)
    ledger = Ledger(peers.names)
    runs: dict[str, Callable[[], object]] = {
        peer.name: lambda peer=peer: alone(peer, batch()) for peer in peers
    }
    runs["joint"] = lambda: ledger.add(engine.step(batch(), step=0))
    seconds = turns(runs, repeats, clock=time.process_time)
    joint = seconds.pop("joint")
    own = [sum(turn) for turn in zip(*seconds.values(), strict=True)]
    ratios = sorted(a / b for a, b in zip(joint, own, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    rank = interval_rank(len(ratios))
    added = 1e6 * statistics.median(a - b for a, b in zip(joint, own, strict=True))
    return (
        f"{len(peers):2} {1e3 * statistics.median(own):10.2f} ms "
        f"{1e3 * statistics.median(joint):10.2f} ms   {middle:.3f} ({low:.3f} to {high:.3f}) "
        f"[{ratios[rank]:.3f}, {ratios[-1 - rank]:.3f}] "
        f"{added:+9.0f} us   {', '.join(peers.names)}"
    )


class Timed:
    """CPU seconds that functions take within one step, by what is told of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def of(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        self.seconds[what] = 0.0

        def timed(*given: Any, **named: Any) -> Any:
            start = time.process_time()
            found = function(*given, **named)
            self.seconds[what] += time.process_time() - start
            return found

        return timed


class TimedTransfer(KnowledgeTransfer):
    """The transfer, its forward timed."""

    def timed_by(self, timed: Timed) -> TimedTransfer:
        self._forward = timed.of("transfer, forward", super().__call__)
        return self

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._forward(*given, **named)


def parts(peers: PeerGroup, batch: Callable[[], Any], repeats: int) -> Iterator[str]:
    """Yield a row for each part that only the joint step has: mean CPU ms a step, and quartiles.

    The mean of a multiple of 16 steps, since the ledger counts so many small batches at a time.
    """
    repeats = 16 * -(-repeats // 16)
    timed = Timed()
    transfer = TimedTransfer("best", names=peers.names).timed_by(timed)
    engine, ledger = JointEngine(peers, transfer, CPU), Ledger(peers.names)
    check = engine.finite
    look = timed.of("look whether gradients are finite", check.note_gradients)
    check.note_gradients = look  # type: ignore[method-assign]
    for name in ("begin", "note", "passes"):
        setattr(check, name, timed.of(f"finite losses and scores: {name}", getattr(check, name)))
    add = timed.of("ledger", ledger.add)
    rows: dict[str, list[float]] = {what: [] for what in timed.seconds}

    def step() -> None:
        timed.seconds.update(dict.fromkeys(timed.seconds, 0.0))
        add(engine.step(batch(), step=0))
        for what, taken in timed.seconds.items():
            rows[what].append(1e3 * taken)

    turns({"joint": step}, repeats, warm_up=2, clock=time.process_time)
    for what, taken in rows.items():
        low, _, high = statistics.quantiles(taken[2:], n=4)
        yield f"   {statistics.fmean(taken[2:]):8.3f} ms ({low:.3f} to {high:.3f})   {what}"


def optimizers(peer: Peer, repeats: int) -> str:
    """Return a row: CPU ms of AdamW's step as a loop, as foreach and fused."""
    learning = [p for p in peer.module.parameters() if p.requires_grad]
    for p in learning:
        p.grad = torch.zeros_like(p)
    ways: dict[str, Any] = {
        "loop": {"foreach": False, "fused": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }
    runs = {way: torch.optim.AdamW(learning, lr=0.0, **how).step for way, how in ways.items()}
    seconds = turns(runs, repeats, clock=time.process_time)
    told = ", ".join(
        f"{way} {1e3 * statistics.median(taken):.2f}" for way, taken in seconds.items()
    )
    return f"   AdamW's step of {peer.name}, {len(learning)} parameters, ms: {told}"


def interval_rank(count: int) -> int:
    """Return r, so that the r-th smallest and largest of values, from 0, hold the median at 95 %.

    Of fewer than 6 values none does: then it is 0, their range.
    """
    below, chance = 0, 0.5**count
    while chance <= 0.025:
        below += 1
        chance += math.comb(count, below) * 0.5**count
    return max(0, below - 1)


def main() -> None:
    args = asked(__doc__.splitlines()[0], repeats=9, tasks=tuple(TASKS))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print(f"CPU seconds, medians; ratio with quartiles and [95 % interval]; {machine()}")
    for task in TASKS if args.task == "all" else [args.task]:
        columns = "CPU ms of a step" if args.parts else "own steps, sum    joint step   ratio"
        print(f"{task}\n N  {columns}", flush=True)
        groups, batch, alone = TASKS[task](args)
        for peers in groups:
            if args.parts:
                print(f"{len(peers):2} {', '.join(peers.names)}")
                print(*parts(peers, batch, args.repeats), sep="\n", flush=True)
                print(*(optimizers(peer, args.repeats) for peer in peers), sep="\n", flush=True)
                continue
            repeats = max(args.repeats, 500) if task == "fixed" else args.repeats  # microseconds
            print(compare(peers, batch, alone, repeats), flush=True)


if __name__ == "__main__":
    main()
