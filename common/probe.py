"""Try a peer's step without leaving a trace: how long it takes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from common.clock import wait_for
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


@dataclass(frozen=True)
class StepTime:
    """Median seconds of a step: of its forward, and of all of it."""

    forward: float
    whole: float


def time_step(
    peer: Peer,
    batch: Any,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    repeats: int = 3,
    patience: float = 20.0,
) -> StepTime:
    """Time a peer's forward, with its backward where it learns.

    A first step only warms up, unless it takes longer than the patience: then it is what is told.

    Args:
        peer: Left as it was.
        batch: On the device.
        device: Of the peer.
        dtype: See ``autocast``.
        repeats: How often, at most.
        patience: Seconds after which no more repeats are begun.
    """
    with untouched(peer, device):
        begun, found = time.perf_counter(), [_one_step(peer, batch, device, dtype)]
        for i in range(repeats):
            if time.perf_counter() - begun > patience:
                break
            found = [*(found if i else []), _one_step(peer, batch, device, dtype)]
    return StepTime(
        statistics.median(step.forward for step in found),
        statistics.median(step.whole for step in found),
    )


def time_in_turns(
    trials: Mapping[str, tuple[Peer, Any]],
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    repeats: int = 5,
    patience: float = 60.0,
    agreed: Callable[[bool], bool] = bool,
) -> dict[str, float]:
    """Return the median seconds of several peers' steps, made in turns.

    What else the machine does then hits all of them alike.

    Args:
        trials: Of each name a peer, left as it was, and its batch on the device.
        device: Of the peers.
        dtype: See ``autocast``.
        repeats: How often each, at most, after one to warm up.
        patience: Seconds after which no more turns are begun; one is always timed.
        agreed: Given whether this process would go on, says whether all do. Where models talk to
            one another's processes in a step, all must take as many turns.
    """
    begun = time.perf_counter()
    found: dict[str, list[float]] = {name: [] for name in trials}
    for turn in range(1 + repeats):
        if turn > 1 and not agreed(time.perf_counter() - begun <= patience):
            break
        for name, (peer, batch) in trials.items():
            with untouched(peer, device):
                found[name].append(_one_step(peer, batch, device, dtype).whole)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def _one_step(peer: Peer, batch: Any, device: torch.device, dtype: torch.dtype | None) -> StepTime:
    wait_for(device)
    begun = time.perf_counter()
    with torch.set_grad_enabled(not peer.frozen), autocast(device, dtype):
        loss = peer.forward(batch).task_loss
    wait_for(device)
    forward = time.perf_counter() - begun
    if not peer.frozen:
        loss.backward()
        for p in peer.module.parameters():
            p.grad = None
    wait_for(device)
    return StepTime(forward, time.perf_counter() - begun)
