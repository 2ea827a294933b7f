"""Ranks under torchrun; every helper is a no-op in a single process."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """Where this process stands: which share of the data it reads, and which peers it holds.

    Data parallelism alone: every process holds all peers, and reads a share of its own. With
    ``seats``, each holds one peer: processes of one seat are replicas, which read different shares
    and average their gradients; those of one shard are a team, which reads the same samples.

    Attributes:
        rank: Among all processes.
        size: How many processes there are.
        local_rank: Among the processes of this machine.
        device: Where this process computes.
        seats: Over how many processes the peers are laid out; 1: each process holds all.
        team: Group of the processes of this one's shard, in the order of seats; None: it is alone.
        replicas: Group of the processes of this one's seat; None: all processes.
        letters: Group over which states travel by way of the CPU, where there are seats.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    seats: int = 1
    team: dist.ProcessGroup | None = field(default=None, repr=False)
    replicas: dist.ProcessGroup | None = field(default=None, repr=False)
    letters: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process logs, and writes what belongs to the whole run."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Into how many shares the data is split."""
        return self.size // self.seats

    @property
    def shard(self) -> int:
        """Which share of the data this process reads."""
        return self.rank % self.shards

    @property
    def seat(self) -> int:
        """Which peer this process holds, where there are seats."""
        return self.rank // self.shards

    def holds(self, peer: int) -> bool:
        """Whether this process holds the peer of that number."""
        return self.seats == 1 or self.seat == peer

    @property
    def leads(self) -> bool:
        """Whether this process writes the files of the peers that it holds."""
        return self.shard == 0


PATIENCE = timedelta(hours=12)
"""How long ranks wait for one another. Some of them read the headers of all files, pack frames or
write checkpoints while the others wait, which takes longer than torch's ten minutes. A rank that
dies ends the others at once all the same: torchrun sees to that. Only where all ranks live and wait
for ever is this what ends the run."""


@dataclass(frozen=True)
class Launched:
    """What torchrun's environment says of this process; ``local``: of this machine's processes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched() -> Launched | None:
    """Return what torchrun's environment says of this process; None: torchrun did not start it."""
    if "WORLD_SIZE" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Launched(*(int(os.environ.get(name, name.endswith("SIZE"))) for name in names))


def start(device: str = "auto", timeout: timedelta = PATIENCE) -> World:
    """Join the process group that torchrun's environment describes, if any.

    Args:
        device: ``auto`` (an accelerator where there is one, else the CPU), or a torch device.
        timeout: How long a collective may take, and how long a rank waits for the others.

    Raises:
        ValueError, RuntimeError: A device that this machine does not have, or one for several
            processes.
        ConnectionError: The torchrun that started this process is gone.
    """
    end_with_torchrun()
    _look_for_torchrun()
    here = launched() or Launched()
    chosen = _device(device, here)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # first, or NCCL could take GPU 0 for all
    if here.size > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    return World(here.rank, here.size, here.local_rank, chosen)


def end_with_torchrun(every: float = 0.5) -> None:
    """End this process when the torchrun that started it is killed.

    torchrun's processes are sessions of their own and outlive it, and a resume would write into the
    folder that they still write into.

    Args:
        every: Seconds after which it is looked for.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun alone
        arguments = (os.getppid(), every)
        threading.Thread(target=_end_without, args=arguments, daemon=True).start()


def _end_without(parent: int, every: float) -> None:
    while os.getppid() == parent:
        time.sleep(every)
    os._exit(1)


def _look_for_torchrun() -> None:
    """Raise where torchrun went while this process imported; its store would be awaited."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(address, timeout=60).close()
    except OSError as error:
        raise ConnectionError(
            f"nobody answers at {address[0]}:{address[1]} ({error}): the torchrun that started "
            "this process is gone; start it again"
        ) from error


def _device(device: str, here: Launched) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if here.local_size > 1 and chosen.index is not None and chosen.type != "cpu":
        raise ValueError(
            f"one device for the {here.local_size} processes of this machine; give --device "
            f"{chosen.type}, and each takes its own (CUDA_VISIBLE_DEVICES says which there are)"
        )
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        index = here.local_rank if chosen.index is None else chosen.index
        if index >= count:
            raise ValueError(
                f"device cuda:{index} is not there (this machine has {count}); use --device cpu, "
                "or start no more processes than there are GPUs"
            )
        return torch.device("cuda", index)
    torch.empty(0, device=chosen)
    return chosen


def seat_peers(world: World, peers: int) -> World:
    """Give every process one peer. All processes must call it.

    Replicas of a peer have neighbouring ranks, which mostly share a machine: their gradients are
    far larger than the scores and logits that teams exchange.

    Args:
        world: Of all processes.
        peers: How many peers there are.

    Raises:
        ValueError: The processes are no multiple of the peers.
    """
    if world.size < peers or world.size % peers:
        raise ValueError(
            f"{peers} peers in {world.size} processes; expected a multiple of {peers}: each holds "
            "one peer"
        )
    if world.size == 1:
        return world
    seated = replace(world, seats=peers)
    ranks = torch.arange(world.size).view(seated.seats, seated.shards)
    replicas = [_group(row.tolist()) for row in ranks]
    teams = [_group(column.tolist()) for column in ranks.T]
    return replace(
        seated,
        replicas=replicas[seated.seat],
        team=teams[seated.shard],
        letters=_group(list(range(world.size)), backend="gloo"),
    )


def _group(ranks: list[int], backend: str | None = None) -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(ranks, timeout=PATIENCE, backend=backend))


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def active() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe")


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether an error says no more than that another process is gone, as gloo tells it."""
    return active() and bool(_LOST.search(str(error)))


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum a tensor over the ranks of a group, in place.

    Args:
        x: On the device of the group's backend.
        group: None: all ranks.
    """
    if active():
        dist.all_reduce(x, group=group)
    return x


def max_over_ranks(x: Tensor) -> Tensor:
    """Take the largest of all ranks, element by element, in place."""
    if active():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def is_first() -> bool:
    """Whether this is the first of the ranks, or the only one; of torchrun's, before they met."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return (launched() or Launched()).rank == 0


def first_to(act: str) -> bool:
    """Whether no rank asked this before. It waits for no other; where none answers, it is."""
    if not active():
        return True
    store = dist.distributed_c10d._get_default_store()
    try:
        return int(store.add(f"first to {act}", 1)) == 1
    except RuntimeError:  # the process that kept it is gone
        return True


def sum_over_team(x: Tensor, world: World) -> Tensor:
    """Return the sum of a tensor over the processes that hold the other peers."""
    return x if world.seats == 1 else sum_over_ranks(x.contiguous(), world.team)


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Collect one small object from every rank, in rank order, on every rank.

    The ranks are this run's own processes; nothing from outside is unpickled.

    Args:
        value: Of this rank.
        group: None: all ranks.
    """
    if not active():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class Exchange:
    """Numbers that all ranks tell one another over the CPU, while their devices work.

    All ranks must make one, and tell and hear in the same order.
    """

    def __init__(self) -> None:
        self._group = _group(list(range(dist.get_world_size())), backend="gloo")
        self._told: deque[tuple[Tensor, dist.Work]] = deque()

    @property
    def unheard(self) -> int:
        """How often this rank told without hearing."""
        return len(self._told)

    def tell(self, numbers: list[float]) -> None:
        """Begin to tell this rank's numbers; waits for nobody."""
        told = torch.tensor(numbers, dtype=torch.float64)
        work = dist.all_reduce(told, dist.ReduceOp.MAX, self._group, async_op=True)
        self._told.append((told, cast(dist.Work, work)))

    def hear(self) -> list[float]:
        """Return the largest of all ranks, number by number, of the oldest that is not heard."""
        told, work = self._told.popleft()
        work.wait()
        return told.tolist()


def gather_over_team(values: list[Any], world: World) -> list[Any]:
    """Join the lists of all processes of a team, in the order of seats."""
    if world.seats == 1:
        return values
    return [value for part in gather_objects(values, world.team) for value in part]


def merge_over_seats(values: Mapping[str, Any], world: World) -> dict[str, Any]:
    """Join what each seat knows of its own peers, by name. All ranks must call it."""
    if world.seats == 1:
        return dict(values)
    parts = gather_objects(dict(values), world.team)
    return {name: value for part in parts for name, value in part.items()}


def send_to_main(value: Any, world: World) -> list[Any]:
    """Bring one large object of every seat to the main rank, by way of the CPU.

    Args:
        value: Plain containers and tensors, of the process that leads its seat.
        world: Where this process stands; all must call it.

    Returns:
        On the main rank the objects of all seats, in their order, with tensors on the CPU;
        elsewhere nothing.
    """
    if world.seats == 1:
        return [value] if world.is_main else []
    if world.is_main:
        values = [value]
        for seat in range(1, world.seats):
            received = [None]
            dist.recv_object_list(received, seat * world.shards, world.letters, device=_CPU)
            values += received
        return values
    if world.leads:
        dist.send_object_list([_on_cpu(value)], 0, world.letters, device=_CPU)
    return []


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value


def barrier() -> None:
    """Wait for all ranks."""
    if active():
        dist.barrier()
