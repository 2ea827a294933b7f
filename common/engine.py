"""How one step runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.amp import GradScaler

from common.peers import Peer, PeerGroup
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

    def _forward(self, peer: Peer, batch: Any) -> PeerOutput:
        with torch.set_grad_enabled(not peer.frozen), self._autocast():
            return peer.forward(batch)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)
