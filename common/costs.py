"""What one peer needs of memory and time, and what the transfer between several needs.

Bytes are counted on fake tensors: shapes, types and devices of a real step, without memory or
arithmetic. Where a model's forward looks at values, a small real step on its device is counted and
scaled.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.memory import bytes_of, peak_bytes, peak_saved_bytes, saved_bytes, tensors_in
from common.options import OptionError
from common.peers import Peer
from common.probe import autocast, time_step, untouched
from common.transfer import KnowledgeTransfer, PeerOutput

_logger = logging.getLogger(__name__)

# What operators without a fake counterpart raise, and models that look at values.
_NOT_FAKE = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError)

_ROOM = 0.8  # of a GPU's free memory that a timed step may take
_ENOUGH = 2**26  # bytes of one peer's output on which the transfer is measured
_HEAVY = 2**28  # bytes of a sample, from which on one is enough for a timing on a CPU

Draw = Callable[[int, torch.device], Any]


@dataclass(frozen=True)
class Activations:
    """Bytes of one peer's step.

    Attributes:
        saved: What autograd keeps for backward after the forward, each storage once; weights and
            inputs are not counted.
        peak: The most that forward and backward hold at any one time beside weights and inputs:
            activations, gradients, temporaries, and what gradient checkpointing makes again.
    """

    saved: int
    peak: int

    def scaled(self, share: float, gradients: int = 0) -> Activations:
        """Return what another batch takes; its gradients, of as many bytes, stay as large.

        Where a forward's end is the peak, before there are gradients, it is what is saved at least.
        """
        fixed, saved = min(self.peak, gradients), math.ceil(self.saved * share)
        peak = fixed + math.ceil((self.peak - fixed) * share)
        return Activations(saved, max(peak, saved))


@dataclass(frozen=True)
class PeerCost:
    """What one peer needs. Bytes, and seconds of one batch.

    Attributes:
        name: Of the peer.
        frozen: It learns nothing.
        parameters: How many.
        weights: Of parameters and buffers.
        gradients: Of the parameters that learn.
        optimizer: Its state after one step.
        update: What the optimizer's step holds for a moment beside it.
        average: The EMA, where it is on the device.
        copy: The most that the EMA's own forward holds, where that teaches; 0: it does not.
        step: Of forward and backward.
        checkpointed: The same under gradient checkpointing; None: on already, or not offered.
        output: What is handed to the transfer.
        shapes: Of that, by name, with the batch first.
        forward: Seconds of the forward; None: not timed.
        train: Seconds with backward.
        scaled_from: Samples of the real steps that the bytes are of; None: of the whole batch, on
            fake tensors.
        timed_on: Samples that the seconds were measured on; None: the whole batch.
    """

    name: str
    frozen: bool
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    update: int
    average: int
    step: Activations
    checkpointed: Activations | None
    output: int
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]]
    forward: float | None = None
    train: float | None = None
    scaled_from: int | None = None
    timed_on: int | None = None
    copy: int = 0

    @property
    def state(self) -> int:
        """What stays for the whole run: weights, optimizer, average."""
        return self.weights + self.optimizer + self.average


def measure_peer(
    peer: Peer,
    draw: Draw,
    batch: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    timed: bool = True,
    few: int = 2,
    copies: bool = False,
) -> PeerCost:
    """Measure one peer; afterwards it is as it was before.

    Args:
        peer: On the device.
        draw: Makes a batch of as many samples on a device, of what ``peer.forward`` takes.
        batch: Samples of the run's batches.
        device: Of the peer.
        dtype: What the run autocasts to; None: full precision. On a CPU bfloat16 stands in for
            float16.
        timed: Also time it.
        few: Samples of real steps where the bytes cannot be had from fake ones, and of timings
            on a CPU.
        copies: The peers' averaged copies teach.
    """
    few = min(few, batch)
    if device.type == "cpu" and dtype is torch.float16:
        dtype = torch.bfloat16  # of as many bytes; a CPU's float16 is slower by orders
    _logger.info("%s: counting the bytes of a step of %d", peer.name, batch)
    state, update = (0, 0) if peer.optimizer is None else _optimizer_bytes(peer.optimizer)
    measured = _measure(peer, draw, batch, few, device, dtype)
    cost = PeerCost(
        name=peer.name,
        frozen=peer.frozen,
        parameters=sum(p.numel() for p in peer.module.parameters()),
        weights=bytes_of(peer.module),
        gradients=_gradients(peer),
        optimizer=state,
        update=update,
        average=0 if peer.average is None else bytes_of(peer.average.module, device),
        step=measured.step,
        checkpointed=_checkpointed(peer, draw, batch, few, device, dtype),
        output=measured.output,
        shapes=measured.shapes,
        scaled_from=measured.real,
        copy=_copy(peer, draw, batch, few, device, dtype) if copies else 0,
    )
    return _timed(cost, peer, draw, batch, few, device, dtype) if timed else cost


def _timed(
    cost: PeerCost,
    peer: Peer,
    draw: Draw,
    batch: int,
    few: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> PeerCost:
    """Time a whole batch where the device is no CPU and has room, else few samples."""
    samples = few
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        samples = max(1, min(batch, int(_ROOM * batch * free / max(cost.step.peak, 1))))
    elif cost.step.peak > _HEAVY * batch:
        samples = 1
    try:
        return _timed_on(samples, cost, peer, draw, batch, device, dtype)
    except ValueError:  # of a batch norm after pooling, which cannot learn from one sample
        if samples > 1 or few == 1:
            raise
        return _timed_on(few, cost, peer, draw, batch, device, dtype)


def _timed_on(
    samples: int,
    cost: PeerCost,
    peer: Peer,
    draw: Draw,
    batch: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> PeerCost:
    _logger.info("%s: timing a step of %d on %s", peer.name, samples, device.type)
    with untouched(peer, device):
        found = time_step(peer, draw(samples, device), device, dtype)
    return replace(
        cost,
        forward=found.forward * batch / samples,
        train=found.whole * batch / samples,
        timed_on=samples if samples < batch else None,
    )


def measure_transfer(
    transfer: KnowledgeTransfer, peers: Sequence[PeerCost], batch: int
) -> Activations:
    """Count the bytes of the objective on random outputs of the peers' shapes, on the CPU.

    Where they are large, few samples are taken and scaled.

    Args:
        transfer: Its draws are used up.
        peers: In the transfer's order.
        batch: Samples.

    Raises:
        ValueError: The peers' outputs have different shapes (names them).
    """
    most = max(peer.output for peer in peers)
    samples = max(1, min(batch, _ENOUGH * batch // max(most, 1)))
    outputs = [_random_output(peer, samples) for peer in peers]
    known = list(tensors_in(outputs))

    copies = outputs if transfer.wants_copies else None

    def both() -> None:
        total = transfer(outputs, copies=copies).total
        if total.requires_grad:
            total.backward()

    kept: list[Any] = []
    saved = saved_bytes(lambda: kept.append(transfer(outputs, copies=copies)), known)
    kept.clear()
    return Activations(saved, peak_bytes(both, known)).scaled(batch / samples)


def _random_output(peer: PeerCost, samples: int) -> PeerOutput:
    made: dict[str, Tensor] = {}
    for name, (shape, dtype) in peer.shapes.items():
        size = (samples, *shape[1:])
        counts = dtype == torch.bool or not dtype.is_floating_point
        made[name] = torch.ones(size, dtype=dtype) if counts else torch.rand(size)
    made["logits"].requires_grad_(not peer.frozen)
    return PeerOutput(task_loss=torch.zeros((), requires_grad=not peer.frozen), **made)


def _gradients(peer: Peer) -> int:
    return bytes_of([p for p in peer.module.parameters() if p.requires_grad and not peer.frozen])


@dataclass(frozen=True)
class _Measured:
    step: Activations
    output: int
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]]
    real: int | None


def _measure(
    peer: Peer, draw: Draw, batch: int, few: int, device: torch.device, dtype: torch.dtype | None
) -> _Measured:
    with untouched(peer, device):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, _faked(peer, mode):
                return _count(peer, draw(batch, device), device, dtype)
        except _NOT_FAKE as error:  # of a fault in the model the real step below tells
            told = str(error).strip().splitlines() or [type(error).__name__]
            _logger.info(
                "%s: measured by a real step on %d of %d samples: its forward cannot be made on "
                "fake tensors (%s)",
                *(peer.name, few, batch, told[0][:120]),
            )
        found = _count(peer, draw(few, device), device, dtype)
    scale = batch / few
    step = found.step.scaled(scale, _gradients(peer))
    shapes = {
        name: (torch.Size([batch, *shape[1:]]), dtype)
        for name, (shape, dtype) in found.shapes.items()
    }
    return _Measured(step, int(found.output * scale), shapes, few)


def _count(
    peer: Peer,
    data: Any,
    device: torch.device,
    dtype: torch.dtype | None,
) -> _Measured:
    known = [*tensors_in(peer.module), *tensors_in(data)]
    found: list[PeerOutput] = []

    def forward() -> None:
        with torch.set_grad_enabled(not peer.frozen), autocast(device, dtype):
            found[:] = [peer.forward(data)]

    saved: list[int] = []

    def step() -> None:
        saved.append(peak_saved_bytes(forward, known))
        if not peer.frozen:
            found[0].task_loss.backward()

    peak = peak_bytes(step, known)
    parts = {
        name: x
        for name, x in vars(found[0]).items()
        if name in ("score", "logits", "mask", "correct") and x is not None
    }
    shapes = {name: (x.shape, x.dtype) for name, x in parts.items()}
    output = sum(x.numel() * x.element_size() for x in parts.values())
    return _Measured(Activations(saved[0], peak), output, shapes, None)


@contextmanager
def _faked(peer: Peer, mode: FakeTensorMode) -> Iterator[None]:
    """Put fake tensors in the place of a module's own, and afterwards these back."""
    kinds: list[dict[str, Any]] = [
        held for part in peer.module.modules() for held in (part._parameters, part._buffers)
    ]
    before = [dict(held) for held in kinds]
    whole, peer.model = peer.model, peer.module
    try:
        for held in kinds:
            for name, x in held.items():
                held[name] = None if x is None else mode.from_tensor(x)
        yield
    finally:
        peer.model = whole
        for held, own in zip(kinds, before, strict=True):
            held.update(own)


def _checkpointed(
    peer: Peer, draw: Draw, batch: int, few: int, device: torch.device, dtype: torch.dtype | None
) -> Activations | None:
    """Measure once more with gradient checkpointing, where the module offers it and has it not."""
    module: Any = peer.module
    on = any(getattr(part, "grad_checkpointing", False) is True for part in module.modules())
    if peer.frozen or on or not hasattr(module, "set_grad_checkpointing"):
        return None
    try:
        module.set_grad_checkpointing(True)
    except (AssertionError, NotImplementedError):  # how timm's models say that they have none
        return None
    try:
        return _measure(peer, draw, batch, few, device, dtype).step
    finally:
        module.set_grad_checkpointing(False)


def _copy(
    peer: Peer, draw: Draw, batch: int, few: int, device: torch.device, dtype: torch.dtype | None
) -> int:
    """Count what the averaged copy's forward holds: as the peer's own would, were it frozen."""
    if peer.average is None:
        return 0
    frozen, peer.frozen = peer.frozen, True
    try:
        return _measure(peer, draw, batch, few, device, dtype).step.peak
    finally:
        peer.frozen = frozen


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Count an optimizer's state after one step, and what the step holds for a moment beside it.

    The step is made on fake tensors; where the optimizer cannot, on real copies on the CPU, whose
    momentary bytes are not counted.

    Raises:
        OptionError: An optimizer that cannot step.
    """
    with _optimizer_kept(optimizer):
        try:
            with FakeTensorMode() as mode:
                for group in optimizer.param_groups:
                    group["params"] = [mode.from_tensor(p) for p in group["params"]]
                return _step_bytes(optimizer)
        except _NOT_FAKE as error:
            _logger.info(
                "%s: its state was measured by a real step on the CPU (%s)",
                *(type(optimizer).__name__, str(error).strip().split("\n")[0][:120]),
            )
    with _optimizer_kept(optimizer):
        for group in optimizer.param_groups:
            group["params"] = [
                nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad)
                for p in group["params"]
            ]
        _with_gradients(optimizer)
        _step(optimizer)
        return bytes_of(optimizer.state), 0


def _step_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    known = _with_gradients(optimizer)
    peak = peak_bytes(optimizer.step, known)
    state = bytes_of(optimizer.state)
    return state, max(0, peak - state)


def _with_gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Give the parameters gradients of zeros; return both."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    return [*parameters, *(p.grad for p in parameters if p.grad is not None)]


def _step(optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.step()
    except _NOT_FAKE as error:
        raise OptionError(f"{type(optimizer).__name__}: its step fails: {error}") from error


@contextmanager
def _optimizer_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let a step be tried on other parameters; afterwards groups and state are as before."""
    groups = [dict(group) for group in optimizer.param_groups]
    state, optimizer.state = optimizer.state, defaultdict(dict)
    try:
        yield
    finally:
        optimizer.state = state
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
