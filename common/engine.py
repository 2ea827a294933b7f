"""How one step runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from common import distributed
from common.distributed import World
from common.finite import FiniteCheck, Names
from common.memory import buffers_kept
from common.peers import Peer, PeerGroup
from common.seeding import Draws
from common.transfer import KnowledgeTransfer, PeerOutput, TransferResult


class Engine(Protocol):
    """What a trainer needs of an engine; all engines give the same gradients."""

    scaler: GradScaler
    finite: FiniteCheck

    def step(
        self,
        batch: Any,
        *,
        step: int,
        share: float = 1.0,
        update: bool = True,
        names: Names | None = None,
    ) -> TransferResult:
        """Learn from one batch; see ``JointEngine.step``."""


class JointEngine:
    """N forwards, one backward of the total, N optimizer steps.

    Cost: the sum of the peers' own steps; memory: all peers' activations at once.

    Args:
        peers: The group.
        transfer: The objective.
        device: Where the peers are.
        amp_dtype: Autocast the peers' forwards to it; None: full precision. float16 scales the
            loss with one GradScaler for all peers; each peer's step is skipped by itself where its
            gradients overflow.

    Attributes:
        finite: What becomes of losses and gradients that are not finite; stops, unless it is set.
    """

    def __init__(
        self,
        peers: PeerGroup,
        transfer: KnowledgeTransfer,
        device: torch.device,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        self.peers = peers
        self.transfer = transfer
        self.device = device
        self.amp_dtype = amp_dtype
        self.scaler = GradScaler(device.type, enabled=amp_dtype == torch.float16)
        self.finite = FiniteCheck(peers)
        if transfer.wants_copies:
            bare = [peer.name for peer in peers.here if peer.average is None and not peer.frozen]
            if bare:
                raise ValueError(f"no average of the weights of {', '.join(bare)}; it shall teach")

    def step(
        self,
        batch: Any,
        *,
        step: int,
        share: float = 1.0,
        update: bool = True,
        names: Names | None = None,
    ) -> TransferResult:
        """Learn from one batch. Nothing here waits for the device, but for a check that skips.

        Args:
            batch: Whatever the peers' ``forward`` takes, on the device.
            step: Optimizer steps made so far.
            share: This batch's share of the optimizer step (1 / batches accumulated).
            update: Make the optimizer step; False: only accumulate gradients.
            names: Tells the batch's samples.

        Returns:
            The objective's parts, without graph.

        Raises:
            NonFiniteError: As the check finds it.
        """
        self.finite.begin(step)
        with ExitStack() as stack:
            if not update:
                for peer in self.peers:
                    stack.enter_context(peer.no_sync())
            outputs = [self._forward(peer, batch) for peer in self.peers]
            copies = self._copies(batch, outputs)
            result = self.transfer(outputs, step, copies, check_finite=False)
            self.finite.note(result, names)
            total = result.total * share if share != 1.0 else result.total
            self.scaler.scale(total).backward()
        if update:
            self._update(self.peers, step)
        return replace(result, total=result.total.detach())

    def _update(self, peers: Sequence[Peer], step: int) -> None:
        for peer in peers:
            self.finite.note_gradients(peer)
        if self.finite.passes(self.scaler):
            for peer in peers:
                peer.update(self.scaler, step)
            if any(not peer.frozen for peer in peers):
                self.scaler.update()

    def _forward(self, peer: Peer, batch: Any, graph: bool = True) -> PeerOutput:
        with torch.set_grad_enabled(graph and not peer.frozen), self._autocast():
            return peer.forward(batch)

    def _copies(self, batch: Any, outputs: Sequence[PeerOutput]) -> list[PeerOutput] | None:
        """Forward the averaged copies, where they teach; a peer without one is its own copy."""
        if not self.transfer.wants_copies:
            return None
        return [
            self._copy(peer, batch, output)
            for peer, output in zip(self.peers, outputs, strict=True)
        ]

    def _copy(self, peer: Peer, batch: Any, output: PeerOutput) -> PeerOutput:
        if peer.average is None:
            return _without_graph(output)
        with peer.averaged():
            return self._forward(peer, batch, graph=False)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)


class TwoPassEngine(JointEngine):
    """All forwards without graph first; then forward, backward and step of one peer at a time.

    The first pass gives the scores, the roles, and the transfer's gradient at every peer's logits;
    the second takes that gradient on into each peer. So the gradients are those of the joint
    engine, and only one peer's activations are in memory at a time: the largest one's at most.

    The second forward draws what the first drew (dropout, drop path), and what the first did to
    buffers (running statistics of batch norm) is undone. The largest peer's forward is made once
    and its graph kept, so the cost is that of N - 1 further forwards. A check that skips holds all
    peers' gradients until it is known that no step is to be skipped.

    Args:
        peers, transfer, device, amp_dtype: See ``JointEngine``.
    """

    def __init__(
        self,
        peers: PeerGroup,
        transfer: KnowledgeTransfer,
        device: torch.device,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(peers, transfer, device, amp_dtype)
        self._kept = _largest(peers)

    def step(
        self,
        batch: Any,
        *,
        step: int,
        share: float = 1.0,
        update: bool = True,
        names: Names | None = None,
    ) -> TransferResult:
        """Learn from one batch; see ``JointEngine.step``."""
        if self.peers[self._kept].frozen:  # since the last step
            self._kept = _largest(self.peers)
        self.finite.begin(step)
        at_the_end = self.finite.policy == "skip"
        draws: dict[int, Draws] = {}
        outputs: list[PeerOutput] = []
        for i, peer in enumerate(self.peers):
            if peer.frozen:
                outputs.append(self._forward(peer, batch))
            elif i == self._kept:
                with nullcontext() if update else peer.no_sync():
                    outputs.append(self._forward(peer, batch))
            else:
                draws[i] = Draws(self.device)
                with buffers_kept(peer.module), peer.alone():
                    outputs.append(self._forward(peer, batch, graph=False))
        result, gradients = self._transfer(outputs, step, self._copies(batch, outputs), share)
        self.finite.note(result, names)
        for i in [self._kept, *draws]:
            peer = self.peers[i]
            with nullcontext() if update else peer.no_sync():
                if i != self._kept:
                    with draws[i].again():
                        outputs[i] = self._forward(peer, batch)
                self._backward(outputs[i], gradients[i], share)
            outputs[i] = _without_graph(outputs[i])
            if update and not at_the_end:
                self.finite.note_gradients(peer)
                peer.update(self.scaler, step)
        if update and at_the_end:
            self._update(self.peers, step)
        elif update and self.finite.passes(self.scaler):
            self.scaler.update()
        return replace(result, total=result.total.detach())

    def _transfer(
        self,
        outputs: Sequence[PeerOutput],
        step: int,
        copies: Sequence[PeerOutput] | None,
        share: float,
    ) -> tuple[TransferResult, list[Tensor | None]]:
        """Return the objective, and the gradient of its scaled share at each peer's logits.

        Logits may be float16, in which a gradient that is not scaled is lost.
        """
        leaves = [_without_graph(output) for output in outputs]
        for leaf, peer in zip(leaves, self.peers, strict=True):
            leaf.logits.requires_grad_(not peer.frozen)
        result = self.transfer(leaves, step, copies, check_finite=False)
        gradients: list[Tensor | None] = [None] * len(leaves)
        if result.total.requires_grad:
            learning = [i for i, peer in enumerate(self.peers) if not peer.frozen]
            found = torch.autograd.grad(
                self.scaler.scale(result.total * share),
                [leaves[i].logits for i in learning],
                allow_unused=True,
            )
            for i, gradient in zip(learning, found, strict=True):
                gradients[i] = gradient
        return result, gradients

    def _backward(self, output: PeerOutput, gradient: Tensor | None, share: float) -> None:
        ends: list[Tensor] = [self.scaler.scale(output.task_loss * share)]
        starts: list[Tensor | None] = [None]
        if gradient is not None:
            ends.append(output.logits)
            starts.append(gradient)
        torch.autograd.backward(ends, starts)


def _largest(peers: PeerGroup) -> int:
    """Return which learning peer has the most parameters."""
    return kept_peer(
        [0 if peer.frozen else sum(p.numel() for p in peer.module.parameters()) for peer in peers]
    )


def kept_peer(parameters: Sequence[int]) -> int:
    """Return whose graph the two-pass engine keeps: the largest peer's, the last one of equals.

    Args:
        parameters: How many each peer learns.
    """
    return max((count, i) for i, count in enumerate(parameters))[1]


def _without_graph(output: PeerOutput) -> PeerOutput:
    return replace(output, task_loss=output.task_loss.detach(), logits=output.logits.detach())


@dataclass(frozen=True)
class _Part:
    """One tensor of an output as it travels."""

    shape: torch.Size
    dtype: torch.dtype


_Parts = dict[tuple[int, str], _Part]  # of which output, and which of its tensors


class PeerParallelEngine(JointEngine):
    """Each process holds one peer; the processes of a team exchange scores and logits.

    A team reads the same samples. After the forwards, one collective brings every peer's task
    loss, score, logits, mask and correctness to all of the team, which then make the same roles
    and the same total; each takes the gradient at its own logits back into its own peer. Where
    averaged copies teach, each process asks that of its own peer, and what it says travels along.
    Images, weights and gradients stay where they are. The gradients are those of the joint engine.
    The roles need every peer's forward and the backward needs the roles, so between them nothing is
    left that the exchange could overlap with; where copies teach, one of a peer's two forwards
    could run while what the other one said travels, but one collective waits for both.

    With more processes than peers, those of one peer are data parallel; see
    ``common.distributed.seat_peers``.

    Args:
        peers: The group; the peers of other processes are ``RemotePeer``.
        transfer, device, amp_dtype: See ``JointEngine``. float16 has a GradScaler for each peer.
        team: Processes that hold the group's peers, in their order.

    Raises:
        ValueError: Not one peer here.
    """

    def __init__(
        self,
        peers: PeerGroup,
        transfer: KnowledgeTransfer,
        device: torch.device,
        amp_dtype: torch.dtype | None = None,
        team: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(peers, transfer, device, amp_dtype)
        if len(peers.here) != 1:
            raise ValueError(f"{len(peers.here)} peers in this process; expected one")
        self.own: Peer = peers.here[0]
        self.seat = peers.names.index(self.own.name)
        self.team = team
        self._layouts: dict[tuple[tuple[tuple[int, str], _Part], ...], list[_Parts]] = {}

    def step(
        self,
        batch: Any,
        *,
        step: int,
        share: float = 1.0,
        update: bool = True,
        names: Names | None = None,
    ) -> TransferResult:
        """Learn from one batch, which is the same in all of the team; see ``JointEngine.step``."""
        self.finite.begin(step)
        with nullcontext() if update else self.own.no_sync():
            own = self._forward(self.own, batch)
            if self.transfer.wants_copies:
                outputs, copies = self._exchange(own, self._copy(self.own, batch, own))
            else:
                (outputs,), copies = self._exchange(own), None
            result = self.transfer(outputs, step, copies, check_finite=False)
            self.finite.note(result, names)
            if not self.own.frozen:
                total = result.total * share if share != 1.0 else result.total
                self.scaler.scale(total).backward()
        if update:
            self._update([self.own], step)
        return replace(result, total=result.total.detach())

    def _exchange(self, *own: PeerOutput) -> list[list[PeerOutput]]:
        """Return, for each output given here, those of all peers; the own ones keep their graph."""
        if len(self.peers) == 1:
            return [[output] for output in own]
        # the target is the same in all of the team, and need not travel
        tensors = {
            (i, name): x
            for i, output in enumerate(own)
            for name, x in vars(output).items()
            if x is not None and name != "target"
        }
        layouts = self._layouts_of({key: _Part(x.shape, x.dtype) for key, x in tensors.items()})
        dtype = functools.reduce(
            torch.promote_types, (part.dtype for parts in layouts for part in parts.values())
        )
        sizes = [sum(part.shape.numel() for part in parts.values()) for parts in layouts]
        flat = own[0].logits.new_zeros(max(sizes), dtype=dtype)
        torch.cat(
            [x.detach().reshape(-1).to(dtype) for x in tensors.values()],
            out=flat[: sizes[self.seat]],
        )
        rows = flat.new_empty(len(layouts), len(flat))
        # its newer name, where torch has it
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(rows.view(-1), flat, group=self.team)
        found = [_unpacked(row, parts) for row, parts in zip(rows, layouts, strict=True)]
        outputs = [
            [PeerOutput(**told[i], target=output.target) for told in found]
            for i, output in enumerate(own)
        ]
        for given, output in zip(outputs, own, strict=True):
            given[self.seat] = output
        return outputs

    def _layouts_of(self, parts: _Parts) -> list[_Parts]:
        """Return what each peer sends; asked once for every shape that the own parts take."""
        key = tuple(parts.items())
        if key not in self._layouts:
            self._layouts[key] = distributed.gather_objects(parts, self.team)
        return self._layouts[key]


def _unpacked(row: Tensor, parts: _Parts) -> dict[int, dict[str, Tensor]]:
    """Return the tensors of each output that a process sent, by name."""
    found: dict[int, dict[str, Tensor]] = {}
    start = 0
    for (i, name), part in parts.items():
        end = start + part.shape.numel()
        found.setdefault(i, {})[name] = row[start:end].view(part.shape).to(part.dtype)
        start = end
    return found


ENGINES: dict[str, type[JointEngine]] = {
    "joint": JointEngine,
    "two-pass": TwoPassEngine,
    "peer-parallel": PeerParallelEngine,
}


def build_engine(
    name: str,
    peers: PeerGroup,
    transfer: KnowledgeTransfer,
    world: World,
    amp_dtype: torch.dtype | None = None,
) -> JointEngine:
    """Build an engine of ``ENGINES`` where this process stands; see ``JointEngine``."""
    rest = {"team": world.team} if name == "peer-parallel" else {}
    return ENGINES[name](peers, transfer, world.device, amp_dtype, **rest)
