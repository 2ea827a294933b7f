"""What teams of saliency models need of memory and time, from each model measured once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common.costs import PeerCost
from common.distributed import World
from common.options import amp_dtype, transfer_of
from common.team_costs import TeamCosts, rule_of
from common.transfer import KnowledgeTransfer
from saliency.peer import build_modules
from saliency.plan import batch_bytes, grid_of, measure_peers, to_measure
from saliency.scouting import Candidate, Watch


class SaliencyCosts(TeamCosts):
    """Measures every model with its clips, and maps of the size that a team has them in.

    Args:
        candidates: The models.
        options: Of the runs to come, and the budget.
        world: Where this process stands.
        watch: Wraps the models, for instance in a progress bar.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        options: argparse.Namespace,
        world: World,
        watch: Watch,
    ) -> None:
        self.candidates, self.options, self.world = candidates, options, world
        super().__init__(
            len(candidates),
            options.batch_size,
            options.grad_accum_steps,
            options.engine,
            options.budget_gpu_mem,
            watch,
        )

    def setting(self, members: Sequence[int]) -> tuple[int, ...]:
        """Return the size of the maps where these train together."""
        return grid_of([self.candidates[i].view for i in members], self.options)

    def measure(self, model: int, setting: tuple[int, ...]) -> PeerCost:
        """Measure a model with random weights, which need as much, on maps of a size."""
        spec = to_measure(self.candidates[model].spec)
        options = argparse.Namespace(**{**vars(self.options), "map_size": setting})
        modules, views = build_modules([spec])
        dtype = amp_dtype(options)
        (cost,) = measure_peers(options, [spec], modules, views, self.world, dtype)
        return cost

    def inputs(self, members: Sequence[int]) -> int:
        """Return the bytes of a batch, with the clips of all members."""
        return batch_bytes([self.candidates[i].view for i in members], self.options)

    def transfer(self, names: Sequence[str], frozen: Sequence[str]) -> KnowledgeTransfer:
        """Build the run's objective for other peers."""
        rule = rule_of(self.options.rule, names)
        return transfer_of(
            argparse.Namespace(**{**vars(self.options), "rule": rule}), names, frozen
        )
