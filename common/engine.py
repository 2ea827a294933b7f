"""How one step runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from common.peers import Peer, PeerGroup
from common.seeding import Draws
from common.transfer import KnowledgeTransfer, PeerOutput, TransferResult


class Engine(Protocol):
    """What a trainer needs of an engine; all engines give the same gradients."""

    scaler: GradScaler

    def step(
        self, batch: Any, *, step: int, share: float = 1.0, update: bool = True
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

    def step(
        self, batch: Any, *, step: int, share: float = 1.0, update: bool = True
    ) -> TransferResult:
        """Learn from one batch. Nothing here waits for the device.

        Args:
            batch: Whatever the peers' ``forward`` takes, on the device.
            step: Optimizer steps made so far.
            share: This batch's share of the optimizer step (1 / batches accumulated).
            update: Make the optimizer step; False: only accumulate gradients.

        Returns:
            The objective's parts, without graph.
        """
        with ExitStack() as stack:
            if not update:
                for peer in self.peers:
                    stack.enter_context(peer.no_sync())
            result = self.transfer([self._forward(peer, batch) for peer in self.peers], step)
            total = result.total * share if share != 1.0 else result.total
            self.scaler.scale(total).backward()
        if update:
            for peer in self.peers:
                peer.update(self.scaler, step)
            self.scaler.update()
        return replace(result, total=result.total.detach())

    def _forward(self, peer: Peer, batch: Any, graph: bool = True) -> PeerOutput:
        with torch.set_grad_enabled(graph and not peer.frozen), self._autocast():
            return peer.forward(batch)

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
    and its graph kept, so the cost is that of N - 1 further forwards.

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
        self, batch: Any, *, step: int, share: float = 1.0, update: bool = True
    ) -> TransferResult:
        """Learn from one batch; see ``JointEngine.step``."""
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
                with _buffers_kept(peer.module), peer.alone():
                    outputs.append(self._forward(peer, batch, graph=False))
        result, gradients = self._transfer(outputs, step)
        for i in [self._kept, *draws]:
            peer = self.peers[i]
            with nullcontext() if update else peer.no_sync():
                if i != self._kept:
                    with draws[i].again():
                        outputs[i] = self._forward(peer, batch)
                self._backward(outputs[i], gradients[i], share)
            outputs[i] = _without_graph(outputs[i])
            if update:
                peer.update(self.scaler, step)
        if update:
            self.scaler.update()
        return replace(result, total=result.total.detach())

    def _transfer(
        self, outputs: Sequence[PeerOutput], step: int
    ) -> tuple[TransferResult, list[Tensor | None]]:
        """Return the objective, and the transfer's gradient at each peer's logits."""
        leaves = [_without_graph(output) for output in outputs]
        for leaf, peer in zip(leaves, self.peers, strict=True):
            leaf.logits.requires_grad_(not peer.frozen)
        result = self.transfer(leaves, step)
        gradients: list[Tensor | None] = [None] * len(leaves)
        if result.total.requires_grad:
            learning = [i for i, peer in enumerate(self.peers) if not peer.frozen]
            found = torch.autograd.grad(
                result.total, [leaves[i].logits for i in learning], allow_unused=True
            )
            for i, gradient in zip(learning, found, strict=True):
                gradients[i] = gradient
        return result, gradients

    def _backward(self, output: PeerOutput, gradient: Tensor | None, share: float) -> None:
        ends: list[Tensor] = [self.scaler.scale(output.task_loss * share)]
        starts: list[Tensor | None] = [None]
        if gradient is not None:
            ends.append(output.logits)
            starts.append(self.scaler.scale(gradient * share))
        torch.autograd.backward(ends, starts)


def _largest(peers: PeerGroup) -> int:
    """Return which learning peer has the most parameters, the last one of equals."""
    sizes = [
        (0 if peer.frozen else sum(p.numel() for p in peer.module.parameters()), i)
        for i, peer in enumerate(peers)
    ]
    return max(sizes)[1]


def _without_graph(output: PeerOutput) -> PeerOutput:
    return replace(output, task_loss=output.task_loss.detach(), logits=output.logits.detach())


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put a module's buffers back as they were before."""
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)


ENGINES: dict[str, type[JointEngine]] = {"joint": JointEngine, "two-pass": TwoPassEngine}
