"""What travels in a step of the engine peer-parallel against data parallelism, and what it costs.

    python benchmarks/exchange.py [--batch 128 --classes 1000 --pairs NAME+NAME ...]

Bytes: two gloo processes make a step of each engine. What the peer-parallel engine hands to
collectives is seen by wrapping ``torch.distributed``; what data parallelism does, by a
communication hook. The exchange depends on a peer's output alone, so small peers with the batch and
the classes asked for give its bytes exactly. The gradients of real models are counted on torch's
meta device, which the hook's count of the small ones proves right.

Times: computed from the assumptions below, not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fvcore.nn import FlopCountAnalysis
from measure import join, machine
from torch import Tensor, nn

from classification.losses import SampleLoss
from classification.peer import ClassifierPeer
from common import distributed
from common.distributed import World
from common.engine import build_engine
from common.peers import Peer, PeerGroup, RemotePeer
from common.transfer import KnowledgeTransfer

PAIRS = ("vit_base_patch16_224+vit_tiny_patch16_224", "vit_base_patch16_224+vit_base_patch16_224")
COLLECTIVES = (
    "all_reduce all_gather all_gather_into_tensor all_gather_single all_gather_object all_to_all "
    "broadcast broadcast_object_list reduce reduce_scatter_tensor gather scatter send recv"
).split()
GATHERS = "all_gather_into_tensor", "all_gather_single"  # one by its names
FEATURES = 16
SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Cluster:
    """Assumptions: GPUs like H100s, 8 a node.

    Attributes:
        name: For the table.
        across: Bytes a second that a node's collectives move over its network.
        flops: Sustained by a GPU in bfloat16, about a third of its peak.
        inside: Bytes a second of a collective inside a node, a GPU.
        memory: Bytes a second that the optimizer moves.
        latency: Of a collective, seconds.
        gpus: A node.
    """

    name: str
    across: float
    flops: float = 300e12
    inside: float = 300e9
    memory: float = 2.5e12
    latency: float = 30e-6
    gpus: int = 8

    def bus(self, processes: int) -> float:
        """Return the bytes a second at which neighbouring processes all-reduce, each."""
        return self.inside if processes <= self.gpus else min(self.inside, self.across)


CLUSTERS = (Cluster("8 x 400 Gb/s a node", 200e9), Cluster("100 Gb/s a node", 10e9))
OPTIMIZER_BYTES = 28  # AdamW in float32, a parameter: four numbers read, three written


@dataclass(frozen=True)
class Model:
    """What the times are computed from.

    Attributes:
        name: Of timm.
        parameters: How many.
        flops: Of a forward, an image: twice fvcore's multiply-adds.
    """

    name: str
    parameters: int
    flops: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128, help="images a peer sees on a GPU")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--pairs", nargs="+", default=PAIRS)
    args = parser.parse_args()
    print(f"bytes seen in two gloo processes; {machine()}")
    exchange = seen_bytes(args.batch, args.classes)
    for pair in args.pairs:
        models = [read_model(name) for name in pair.split("+")]
        print_bytes(models, args, exchange)
        for cluster in CLUSTERS:
            print_times(models, args.batch, exchange["float32"], cluster)


def seen_bytes(batch: int, classes: int) -> dict[str, int]:
    """Return what a process hands to the exchange of a step, by the weights' dtype, as seen.

    Raises:
        RuntimeError: Another collective than expected, or gradients that were counted wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_observe, (folder, batch, classes), nprocs=2)
        seen = torch.load(Path(folder) / "seen.pt", weights_only=True)
    for dtype, (calls, hooked, gradients) in seen.items():
        if len(calls) != 1 or calls[0][0] not in GATHERS:
            raise RuntimeError(f"expected one of {' or '.join(GATHERS)} a step, saw {calls}")
        if hooked != gradients:
            raise RuntimeError(f"DDP reduced {hooked} bytes, the gradients have {gradients}")
        print(
            f"weights in {dtype}: peer-parallel made {calls[0][0]} of {calls[0][1]:,} bytes; DDP "
            f"reduced {hooked:,} bytes, the gradients of the small peers: {gradients:,}"
        )
    return {dtype: calls[0][1] for dtype, (calls, _, _) in seen.items()}


def _observe(rank: int, folder: str, batch: int, classes: int) -> None:
    world = join(rank, 2, folder)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(batch, FEATURES, generator=draw)
    data = images, torch.randint(classes, (batch,), generator=draw)
    seated, seen = distributed.seat_peers(world, 2), {}
    for dtype in SIZES:
        calls = _peer_parallel_calls(seated, data, classes, dtype)
        seen[dtype] = calls, *_data_parallel_bytes(world, data, classes, dtype)
    if world.is_main:
        torch.save(seen, Path(folder) / "seen.pt")
    dist.barrier()
    distributed.stop()


def _peers(classes: int, dtype: str) -> list[Peer]:
    def to_dtype(x: Tensor) -> Tensor:
        return x.to(getattr(torch, dtype))

    loss: SampleLoss = nn.CrossEntropyLoss(reduction="none")
    peers: list[Peer] = []
    for i in range(2):
        torch.manual_seed(i)
        module = nn.Linear(FEATURES, classes).to(getattr(torch, dtype))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        peers.append(ClassifierPeer(f"p{i}", module, to_dtype, loss, optimizer=optimizer))
    return peers


def _peer_parallel_calls(
    world: World, data: tuple[Tensor, Tensor], classes: int, dtype: str
) -> list[tuple[str, int]]:
    """Return the collectives of a step, with the bytes that this process hands to each."""
    peers = [
        peer if world.holds(i) else RemotePeer(peer.name)
        for i, peer in enumerate(_peers(classes, dtype))
    ]
    group = PeerGroup(peers)
    engine = build_engine(
        "peer-parallel", group, KnowledgeTransfer("best", names=group.names), world
    )
    engine.step(data, step=0)  # the first one also asks for the layouts
    with _watched() as calls:
        engine.step(data, step=1)
    return calls


@contextlib.contextmanager
def _watched() -> Iterator[list[tuple[str, int]]]:
    """Record each call of a collective, and the bytes of what is handed over (the last tensor)."""
    calls: list[tuple[str, int]] = []
    whole = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def watched(name: str) -> Any:
        def call(*handed: Any, **rest: Any) -> Any:
            tensors = [x for x in handed if isinstance(x, Tensor)]
            calls.append((name, tensors[-1].nbytes if tensors else -1))
            return whole[name](*handed, **rest)

        return call

    for name in whole:
        setattr(dist, name, watched(name))
    try:
        yield calls
    finally:
        for name, function in whole.items():
            setattr(dist, name, function)


def _data_parallel_bytes(
    world: World, data: tuple[Tensor, Tensor], classes: int, dtype: str
) -> tuple[int, int]:
    """Return what data parallelism reduces in a joint step, and what the gradients have."""
    group = PeerGroup(_peers(classes, dtype))
    reduced = []

    def hook(state, bucket):  # torch compares annotations as objects, and here they are text
        reduced.append(bucket.buffer().nbytes)
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    for peer in group:
        peer.distribute(world)
        peer.model.register_comm_hook(None, hook)
    transfer = KnowledgeTransfer("best", names=group.names)
    build_engine("joint", group, transfer, world).step(data, step=0)
    return sum(reduced), sum(p.nbytes for peer in group for p in peer.module.parameters())


def read_model(name: str) -> Model:
    """Count a timm model's parameters and FLOPs; without weights."""
    module = timm.create_model(name).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(module, torch.zeros(1, 3, 224, 224))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        flops = 2.0 * analysis.total()
    return Model(name, sum(p.numel() for p in module.parameters()), flops)


def print_bytes(
    models: Sequence[Model], args: argparse.Namespace, exchange: dict[str, int]
) -> None:
    """Print what a GPU sends in a step, on as many GPUs as peers."""
    count = len(models)
    print(f"\n{' + '.join(model.name for model in models)}: sent by each of {count} GPUs a step")
    print(
        f"batch {args.batch}, {args.classes} classes; gathers by {count - 1} x the bytes, rings by"
    )
    print(f"2(n-1)/n = {2 * (count - 1) / count:g} x the bytes")
    print(f"{'':34}{'float32 weights':>18}{'bfloat16 weights':>18}")
    sent = {d: (count - 1) * handed for d, handed in exchange.items()}
    total = sum(model.parameters for model in models)
    reduced = {d: 2 * (count - 1) / count * total * size for d, size in SIZES.items()}
    for title, row in (
        ("peer-parallel: scores and logits", sent),
        ("joint + DDP: gradients", reduced),
    ):
        print(f"{title:34}" + "".join(f"{row[d] / 1e6:15.3f} MB" for d in SIZES))
    print(f"{'ratio':34}" + "".join(f"{reduced[d] / sent[d]:18.0f}" for d in SIZES))


def print_times(models: Sequence[Model], batch: int, handed: int, cluster: Cluster) -> None:
    """Print computed times of a step, at the same global batch for all engines."""
    print(f"\n{cluster.name}: computed ms a step")
    head = ("GPUs", "images", "joint + DDP", "two-pass + DDP", "peer-parallel", "unequal replicas")
    print(" ".join(f"{name:>16}" for name in head))
    for gpus in (2, 8, 64):
        shards = gpus // len(models)
        share = batch / len(models)  # of the same global batch, on each GPU
        row = (
            joint_time(models, share, gpus, cluster),
            joint_time(models, share, gpus, cluster, two_pass=True),
            peer_parallel_time(models, batch, shards, handed, cluster),
            balanced_time(models, batch * shards, gpus, handed / batch, cluster),
        )
        cells = [f"{gpus:16d}", f"{batch * shards:16d}", *(f"{1e3 * x:16.1f}" for x in row)]
        print(" ".join(cells))


def joint_time(
    models: Sequence[Model], images: float, gpus: int, cluster: Cluster, two_pass: bool = False
) -> float:
    """All peers on every GPU: forward and backward of all, gradients hidden behind the backward."""
    forward = sum(model.flops for model in models) * images / cluster.flops
    again = forward - max(model.flops for model in models) * images / cluster.flops
    parameters = sum(model.parameters for model in models)
    return (
        forward * 3
        + (again if two_pass else 0.0)
        + _exposed(parameters, gpus, 2 * forward, cluster)
        + parameters * OPTIMIZER_BYTES / cluster.memory
    )


def peer_parallel_time(
    models: Sequence[Model], batch: int, shards: int, handed: int, cluster: Cluster
) -> float:
    """One peer a GPU: the slowest seat sets the pace; nothing hides the exchange."""
    return _exchange_time(len(models), shards, handed, cluster) + max(
        _seat_time(model, batch, shards, cluster) for model in models
    )


def balanced_time(
    models: Sequence[Model], images: int, gpus: int, handed: float, cluster: Cluster
) -> float:
    """Let each peer have as many GPUs as suit it, at least one; the code cannot do this.

    Args:
        models: The peers.
        images: Of the global batch.
        gpus: To be shared out.
        handed: Bytes that an image adds to the exchange.
        cluster: The assumptions.
    """
    counts = [1] * len(models)
    for _ in range(gpus - len(models)):
        loads = [model.flops / count for model, count in zip(models, counts, strict=True)]
        counts[loads.index(max(loads))] += 1
    slowest = max(
        _seat_time(model, images / count, count, cluster)
        for model, count in zip(models, counts, strict=True)
    )
    most = int(handed * images / min(counts))  # the smallest peer's GPUs see the most images
    return slowest + _exchange_time(len(models), gpus // len(models), most, cluster)


def _seat_time(model: Model, images: float, replicas: int, cluster: Cluster) -> float:
    forward = model.flops * images / cluster.flops
    reduced = _exposed(model.parameters, replicas, 2 * forward, cluster)
    return 3 * forward + reduced + model.parameters * OPTIMIZER_BYTES / cluster.memory


def _exposed(parameters: int, processes: int, backward: float, cluster: Cluster) -> float:
    """Return what of the gradients' all-reduce in float32 the backward does not hide."""
    if processes == 1:
        return 0.0
    sent = 2 * (processes - 1) / processes * parameters * 4
    return max(0.0, cluster.latency + sent / cluster.bus(processes) - backward)


def _exchange_time(peers: int, shards: int, handed: int, cluster: Cluster) -> float:
    """Return the time of the gather; across nodes a node's GPUs share its network."""
    sent = (peers - 1) * handed
    across = peers * shards > cluster.gpus
    speed = cluster.across / cluster.gpus if across else cluster.inside
    return cluster.latency + sent / speed


if __name__ == "__main__":
    main()
