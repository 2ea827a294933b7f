"""Losses, gradients and weights that are not finite: found on the device, told by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from common import distributed
from common.distributed import gather_objects
from common.peers import Peer, PeerGroup
from common.roles import NonFiniteError
from common.transfer import TransferResult

_logger = logging.getLogger(__name__)

ON_NONFINITE = ("stop", "skip")
MOST_SKIPS = 10
DIVERGED = (
    "lower that peer's lr, clip its gradients, or train in bfloat16; resume from the last run "
    "file, if any"
)
_SKIP = "--on-nonfinite skip, or TRANSFER.ON_NONFINITE"
_CAUSES = "look at these samples; " + DIVERGED
_NAMED = 8  # samples of a message; the rest is counted
_MOST_STEPS = 512  # that are remembered before they are looked at

Names = Callable[[], Sequence[str]]
"""Tells the samples of a batch, in order; called only where one of them is to be named."""


@dataclass(frozen=True)
class _Batch:
    """What is remembered of a batch: on the device but for its names.

    Attributes:
        losses: Whose task loss is not finite, bool [N].
        samples: At which samples whose score is not, bool [N, B].
    """

    names: Names | None
    losses: Tensor
    samples: Tensor

    def bad(self) -> Tensor:
        """Whose fault it is, bool [N]."""
        return self.losses | self.samples.any(dim=1)

    def told(self, rows: Tensor) -> list[str]:
        """Name the samples that are true in a bool [B]."""
        names = [] if self.names is None else list(self.names())
        return [
            names[i] if i < len(names) else f"sample {i} of its batch"
            for i in rows.nonzero().flatten().tolist()
        ]


@dataclass
class _Step:
    """An optimizer step and its batches; ``bad`` is whose fault it is, bool [N]."""

    number: int
    batches: list[_Batch] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    bad: Tensor | None = None


@dataclass(frozen=True)
class Finding:
    """What was not finite.

    Attributes:
        step: The optimizer step, counted from 1.
        what: ``loss`` or ``gradients``.
        peers: Whose.
        samples: At which samples; of a batch that has no such one, all of it.
    """

    step: int
    what: str
    peers: tuple[str, ...]
    samples: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.samples[:_NAMED])
        if len(self.samples) > _NAMED:
            shown += f" and {len(self.samples) - _NAMED} more"
        verb, where = ("was", "in") if self.what == "loss" else ("were", "in the batch of")
        return (
            f"the {self.what} of {', '.join(self.peers)} {verb} not finite at optimizer step "
            f"{self.step}, {where} {shown}"
        )


class FiniteCheck:
    """Watches over every optimizer step of a group.

    ``stop``: the run ends, before any weight is saved. In a single process on the CPU that is at
    once; elsewhere nothing waits for the device until ``check``.

    ``skip``: an optimizer step of which one batch, on any rank, was not finite is made by no peer,
    and the buffers (statistics of batch norm) are put back to where they were before it. On an
    accelerator each step waits for the device once. A step that was skipped counts for schedules
    and the position in the data.

    In float16 the overflow of scaled gradients is the GradScaler's: it skips that peer's step, and
    ``check`` tells it.

    Args:
        peers: The group.
        policy: One of ``ON_NONFINITE``.
        most: So many steps may be skipped in a row; one more stops the run.

    Attributes:
        skipped: Steps that were skipped on account of each peer.
        total: Steps that were skipped.

    Raises:
        ValueError: Another policy, or a negative number.
    """

    def __init__(self, peers: PeerGroup, policy: str = "stop", most: int = MOST_SKIPS) -> None:
        if policy not in ON_NONFINITE:
            raise ValueError(f"policy is {policy!r}; choose from {', '.join(ON_NONFINITE)}")
        if most < 0:
            raise ValueError(f"most is {most}; expected 0 or more")
        self.peers = peers
        self.policy = policy
        self.most = most
        self.skipped = dict.fromkeys(peers.names, 0)
        self.total = 0
        self.in_a_row = 0
        self._open: _Step | None = None
        self._closed: list[_Step] = []
        self._overflows: list[Tensor] = []
        self._kept: list[tuple[Tensor, Tensor]] = []

    def begin(self, step: int) -> None:
        """Begin a batch, before any forward; the first of a step keeps what can be undone."""
        if self._open is None:
            self._open = _Step(step)
            if self.policy == "skip":
                self._kept = [
                    (buffer, buffer.clone())
                    for peer in self.peers.here
                    if not peer.frozen
                    for buffer in peer.module.buffers()
                ]

    def note(self, result: TransferResult, names: Names | None) -> None:
        """Remember a batch's losses and scores, before the backward.

        Raises:
            NonFiniteError: One is not finite, where that is known without waiting.
        """
        assert self._open is not None
        score = result.score.flatten(2) if result.score.dim() > 2 else result.score[..., None]
        batch = _Batch(names, ~torch.isfinite(result.task_loss), ~torch.isfinite(score).all(dim=2))
        self._open.batches.append(batch)
        if self._at_once(batch.losses) and bool(batch.bad().any()):
            raise self._stopped(self._find(self._open))

    def note_gradients(self, peer: Peer) -> None:
        """Remember a peer's gradients, as they are before its optimizer step."""
        assert self._open is not None
        if peer.optimizer is None or peer.frozen:
            return
        learning = (p for group in peer.optimizer.param_groups for p in group["params"])
        found = [p.grad for p in learning if p.grad is not None]
        if found:
            self._open.gradients[peer.name] = ~_all_finite(found)

    def passes(self, scaler: GradScaler) -> bool:
        """Whether the optimizer step may be made, once all gradients are noted.

        With several ranks all must call it. Where it may not, gradients are cleared and buffers
        put back.

        Raises:
            NonFiniteError: The run is to stop.
        """
        step = self._close(scaler)
        assert step.bad is not None
        if self.policy == "skip":
            agreed = distributed.max_over_ranks(step.bad.to(torch.int32))
            if bool(agreed.any()):
                self._skip(step)
                return False
            self.in_a_row = 0
        elif self._at_once(step.bad):
            if bool(step.bad.any()):
                raise self._stopped(self._find(step))
        else:
            self._closed.append(step)
            if len(self._closed) >= _MOST_STEPS:
                self.check(scaler)
        return True

    def check(self, scaler: GradScaler) -> None:
        """Look at all steps since the last call; waits for the device. All ranks must call it.

        Raises:
            NonFiniteError: The run is to stop; on all ranks, with what was found first.
        """
        steps, self._closed = self._closed, []
        if steps:
            rows = torch.stack([step.bad for step in steps if step.bad is not None])
            if bool(distributed.max_over_ranks(rows.any(dim=1).to(torch.int32)).any()):
                bad = rows.any(dim=1).tolist()
                found = [self._find(s) for s, is_bad in zip(steps, bad, strict=True) if is_bad]
                raise self._stopped(*found[:1])
        if scaler.is_enabled():
            self._tell_overflows(scaler)

    def scalars(self) -> dict[str, float]:
        """Return ``PEER/skipped`` up to now, where steps are skipped."""
        if self.policy == "stop":
            return {}
        return {f"{name}/skipped": float(count) for name, count in self.skipped.items()}

    def summary(self) -> str:
        """Say how many steps were skipped on whose account; nothing where none was."""
        if not self.total:
            return ""
        blamed = ", ".join(f"{name} {count}" for name, count in self.skipped.items() if count)
        return (
            f"{self.total} optimizer steps were skipped by all peers, because of losses or "
            f"gradients that were not finite ({blamed})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts; equal on all ranks."""
        return {"skipped": dict(self.skipped), "total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved counts."""
        self.skipped |= state["skipped"]
        self.total, self.in_a_row = state["total"], state["in_a_row"]

    def _at_once(self, flags: Tensor) -> bool:
        """Whether to stop needs neither the device nor the other ranks."""
        alone = flags.device.type == "cpu" and not distributed.active()
        return self.policy == "stop" and alone

    def _close(self, scaler: GradScaler) -> _Step:
        assert self._open is not None
        step, self._open = self._open, None
        losses = torch.stack([batch.bad() for batch in step.batches]).any(dim=0)
        none = torch.zeros_like(losses[0])
        gradients = torch.stack([step.gradients.get(n, none) for n in self.peers.names])
        if scaler.is_enabled():
            self._overflows.append(gradients & ~losses.any())
        step.bad = losses if scaler.is_enabled() else losses | gradients
        return step

    def _skip(self, step: _Step) -> None:
        for buffer, old in self._kept:
            buffer.copy_(old)
        for peer in self.peers.here:
            if peer.optimizer is not None:
                peer.optimizer.zero_grad(set_to_none=True)
        found = self._agreed(self._find(step))
        self.total += 1
        self.in_a_row += 1
        for name in found.peers:
            self.skipped[name] += 1
        if self.in_a_row > self.most:
            raise NonFiniteError(
                f"{self.in_a_row} optimizer steps in a row would be skipped, {self.most} may be; "
                f"{found}; {_CAUSES}"
            )
        if distributed.is_first():
            _logger.warning("skipped by all peers: %s", found)

    def _find(self, step: _Step) -> Finding | None:
        """Say what was wrong here; None: nothing on this rank."""
        peers: dict[str, None] = {}
        samples: list[str] = []
        for batch in step.batches:
            bad = batch.bad().tolist()
            if any(bad):
                rows = batch.samples.any(dim=0)
                samples += batch.told(rows if bool(rows.any()) else torch.ones_like(rows))
                peers |= {
                    n: None for n, is_bad in zip(self.peers.names, bad, strict=True) if is_bad
                }
        if peers:
            return Finding(step.number + 1, "loss", tuple(peers), tuple(samples))
        named = tuple(name for name, is_bad in step.gradients.items() if bool(is_bad))
        if not named:
            return None
        for batch in step.batches:
            samples += batch.told(torch.ones_like(batch.samples[0]))
        return Finding(step.number + 1, "gradients", named, tuple(samples))

    def _agreed(self, own: Finding | None = None) -> Finding:
        """Join what the ranks found first. All ranks must call it."""
        found = [finding for finding in gather_objects(own) if finding is not None]
        order = [(finding.step, finding.what != "loss") for finding in found]
        first = [f for f, place in zip(found, order, strict=True) if place == min(order)]
        return Finding(
            first[0].step,
            first[0].what,
            tuple(dict.fromkeys(name for f in first for name in f.peers)),
            tuple(dict.fromkeys(name for f in first for name in f.samples)),
        )

    def _stopped(self, own: Finding | None = None) -> NonFiniteError:
        return NonFiniteError(f"{self._agreed(own)}; {_CAUSES}; or skip such steps ({_SKIP})")

    def _tell_overflows(self, scaler: GradScaler) -> None:
        rows, self._overflows = self._overflows, []
        if not rows:
            return
        counts = distributed.max_over_ranks(torch.stack(rows).sum(dim=0).to(torch.int32)).tolist()
        told = {n: count for n, count in zip(self.peers.names, counts, strict=True) if count}
        scale = min(gather_objects(scaler.get_scale()))
        if told and max(told.values()) == len(rows) and scale < 1:
            raise NonFiniteError(
                f"gradients of {', '.join(told)} overflow float16 in every step, though the loss "
                f"scale fell to {scale:g}; {DIVERGED}"
            )
        if told and distributed.is_first():
            _logger.warning("overflow in float16, steps skipped: %s", told)


def _all_finite(tensors: list[Tensor]) -> Tensor:
    """Whether all values are finite, a bool on the device; reads each once."""
    if tensors[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(tensors, float("inf")).isfinite()
    # the largest value would do without the second look, but takes ten times as long here
    finite = torch.stack(torch._foreach_norm(tensors)).isfinite().all()
    if finite:
        return finite
    # squares overflow where values do not yet
    return torch.stack([x.isfinite().all() for x in tensors]).all()


def refuse_broken_weights(peers: Iterable[Peer], step: int) -> None:
    """Keep the last sound checkpoint: one of NaNs could only be thrown away.

    Args:
        peers: To look at, their buffers too; waits for the device. All ranks must call it.
        step: Optimizer steps made so far.

    Raises:
        NonFiniteError: Names the peers; on all ranks, whichever holds them.
    """
    broken = [peer.name for peer in peers if not _sound(peer)]
    names = dict.fromkeys(name for part in gather_objects(broken) for name in part)
    if names:
        raise NonFiniteError(
            f"weights of {', '.join(names)} are not finite at step {step}; {DIVERGED}"
        )


def _sound(peer: Peer) -> bool:
    values = [*peer.module.parameters(), *_statistics(peer)]
    return all(bool(x.isfinite().all()) for x in values)


def _statistics(peer: Peer) -> list[Tensor]:
    """Return batch norm's running statistics; other buffers may hold infinities by design."""
    return [
        buffer
        for name, buffer in peer.module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    ]
