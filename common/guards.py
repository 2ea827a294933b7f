"""Refusals of what is not finite, before it costs a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch.amp import GradScaler

from common.distributed import gather_objects
from common.ledger import Lessons
from common.peers import Peer
from common.roles import NonFiniteError

_logger = logging.getLogger(__name__)

DIVERGED = (
    "lower that peer's lr, clip its gradients, or train in bfloat16; resume from the last run file"
)


def refuse_non_finite(lessons: Lessons, scaler: GradScaler, step: int) -> None:
    """Stop where a peer's loss was not finite; some overflows of float16 are only told.

    Args:
        lessons: Of the stretch up to now.
        scaler: Of the run; where it is enabled it skips steps that overflow.
        step: Optimizer steps made so far.

    Raises:
        NonFiniteError: Names the peers.
    """
    bad = {name: count for name, count in lessons.not_finite.items() if count}
    if bad and scaler.is_enabled() and max(bad.values()) < lessons.batches:
        _logger.warning("overflow in float16, steps skipped: %s", bad)
    elif bad:
        raise NonFiniteError(
            f"the loss of {', '.join(bad)} was not finite in {max(bad.values())} batches up to "
            f"step {step}; {DIVERGED}"
        )


def refuse_broken_weights(peers: Iterable[Peer], step: int) -> None:
    """Keep the last sound checkpoint: one of NaNs could only be thrown away.

    Args:
        peers: To look at; waits for the device. All ranks must call it.
        step: Optimizer steps made so far.

    Raises:
        NonFiniteError: Names the peers; on all ranks, whichever holds them.
    """
    broken = [
        peer.name
        for peer in peers
        if not all(bool(p.isfinite().all()) for p in peer.module.parameters())
    ]
    names = dict.fromkeys(name for part in gather_objects(broken) for name in part)
    if names:
        raise NonFiniteError(
            f"weights of {', '.join(names)} are not finite at step {step}; {DIVERGED}"
        )
