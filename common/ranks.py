"""What each process of a saved run knew of itself, for the one that stands in its place now."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.amp import GradScaler

from common.checkpoint import CheckpointError
from common.distributed import World, gather_objects

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedRanks:
    """One mapping a process, in rank order.

    Attributes:
        ranks: As the processes saved them.
        seats: Over how many processes the peers were laid out; see ``World``.
    """

    ranks: Sequence[Mapping[str, Any]]
    seats: int = 1

    @property
    def shards(self) -> int:
        """Into how many shares the data was split."""
        return len(self.ranks) // self.seats

    def of_share(self, world: World) -> list[Mapping[str, Any]]:
        """Return those of the processes that read this one's share of the data, by seat.

        Nothing, and a warning, where the data was split otherwise.
        """
        if self.shards == world.shards:
            return list(self.ranks[world.shard :: self.shards])
        _logger.warning(
            "the run split its data over %d processes, this one over %d: it goes on, but not bit "
            "for bit",
            self.shards,
            world.shards,
        )
        return []

    def of_place(self, world: World) -> Mapping[str, Any] | None:
        """Return that of this process's own place.

        Nothing, and a warning, where the peers were laid out otherwise.
        """
        if (self.shards, self.seats) == (world.shards, world.seats):
            return self.ranks[world.rank]
        _logger.warning(
            "the run had its peers in %d processes, this one in %d: what they draw (dropout) "
            "differs from here on",
            self.seats,
            world.seats,
        )
        return None

    def load_scaler(self, scaler: GradScaler, world: World, shared: Mapping[str, Any]) -> None:
        """Go on with the run's loss scaling; of a run without one it begins anew, which is told.

        Where each peer had a scale of its own and they now share one, or the reverse: the smallest,
        at which no peer overflowed.

        Args:
            scaler: Takes it up, where it scales at all.
            world: Where this process stands.
            shared: The state of the run's main process.
        """
        if self.seats == world.seats:
            state = self.ranks[world.seat * self.shards].get("scaler", shared)
        else:
            states = [rank.get("scaler", shared) for rank in self.ranks]
            state = min(states, key=lambda state: state.get("scale", 0.0))
        if state:
            scaler.load_state_dict(dict(state))
        elif scaler.is_enabled() and world.is_main:
            _logger.warning(
                "the run did not scale its loss; float16 needs it: the scale begins anew at %g",
                scaler.get_scale(),
            )


def refuse_other_moments(*moment: int) -> None:
    """Refuse ranks that would not go on from one moment of a run. All must call it.

    Args:
        moment: Where this rank would; nothing: it would start the run.

    Raises:
        CheckpointError: On all ranks; names the first that differs.
    """
    moments = gather_objects(moment)
    for rank, its in enumerate(moments):
        if its != moments[0]:
            raise CheckpointError(
                f"process {rank} would {_told(its)}, process 0 {_told(moments[0])}; they must "
                "read the same folder: keep it on a file system that all machines share"
            )


def _told(moment: tuple[int, ...]) -> str:
    if not moment:
        return "start the run anew"
    return f"go on from {'-'.join(map(str, moment))} of the run"
