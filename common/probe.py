"""Try a peer's step without leaving a trace: how long it takes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from common.memory import buffers_kept
from common.peers import Peer
from common.seeding import Draws


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return the context in which a run's forwards are made; None: full precision."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def untouched(peer: Peer, device: torch.device) -> Iterator[None]:
    """Let a peer's forwards and backwards be tried; weights are not to be changed inside.

    Afterwards its buffers, gradients, training mode and the generators are as before.

    Args:
        peer: Not in the middle of accumulating gradients that matter.
        device: Of the peer; its generator is kept too.
    """
    draws = Draws(device)
    modes = [(part, part.training) for part in peer.module.modules()]
    gradients = [(p, p.grad) for p in peer.module.parameters()]
    for p, _ in gradients:
        p.grad = None
    try:
        with buffers_kept(peer.module), peer.alone():
            peer.train()
            yield
    finally:
        draws.restore()
        for part, training in modes:
            part.training = training
        for p, gradient in gradients:
            p.grad = gradient


def time_forward(
    peer: Peer,
    batch: Any,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    backward: bool = True,
    repeats: int = 3,
    warm_up: int = 1,
    patience: float = 10.0,
) -> float:
    """Return the median seconds of a peer's forward, with its backward where it learns.

    Args:
        peer: Left as it was.
        batch: On the device.
        device: Of the peer.
        dtype: See ``autocast``.
        backward: Without it, no graph is made.
        repeats: How often, at most.
        warm_up: Untimed ones before.
        patience: Seconds after which no more repeats are begun; one is always made.
    """
    backward = backward and not peer.frozen

    def once() -> None:
        with torch.set_grad_enabled(backward), autocast(device, dtype):
            loss = peer.forward(batch).task_loss
        if backward:
            loss.backward()
            for p in peer.module.parameters():
                p.grad = None

    with untouched(peer, device):
        for _ in range(warm_up):
            once()
        begun, found = time.perf_counter(), [_seconds(once, device)]
        while len(found) < repeats and time.perf_counter() - begun < patience:
            found.append(_seconds(once, device))
    return statistics.median(found)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    _wait_for(device)
    begun = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - begun


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
