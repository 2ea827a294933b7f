"""Ranks under torchrun; every helper is a no-op in a single process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Where this process stands.

    Attributes:
        rank: Among all processes.
        size: How many processes there are.
        local_rank: Among the processes of this machine.
        device: Where this process computes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0


PATIENCE = timedelta(hours=12)
"""How long ranks wait for one another. Some of them read the headers of all files, pack frames or
write checkpoints while the others wait, which takes longer than torch's ten minutes. A rank that
dies ends the others at once all the same: torchrun sees to that. Only where all ranks live and wait
for ever is this what ends the run."""


def start(device: str = "auto", timeout: timedelta = PATIENCE) -> World:
    """Join the process group that torchrun's environment describes, if any.

    Args:
        device: ``auto`` (an accelerator where there is one, else the CPU), or a torch device.
        timeout: How long a collective may take, and how long a rank waits for the others.

    Raises:
        ValueError, RuntimeError: A device that this machine does not have.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _device(device, local_rank)
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return World(rank, size, local_rank, chosen)


def _device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if chosen.index is None else chosen.index
        if index >= count:
            raise ValueError(
                f"device cuda:{index} is not there (this machine has {count}); use --device cpu, "
                "or start no more processes than there are GPUs"
            )
        return torch.device("cuda", index)
    torch.empty(0, device=chosen)
    return chosen


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def active() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if active():
        dist.all_reduce(x)
    return x


def gather_objects(value: Any) -> list[Any]:
    """Collect one small object from every rank, in rank order, on every rank.

    The ranks are this run's own processes; nothing from outside is unpickled.
    """
    if not active():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    if active():
        dist.barrier()
