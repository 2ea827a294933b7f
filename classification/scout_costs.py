"""What teams of classifiers need of memory and time, from each model measured once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from classification.plan import measure_team
from classification.scouting import Candidate, Watch, build
from common.costs import Activations, measure_transfer
from common.distributed import World
from common.options import transfer_of
from common.planner import TeamCost, engine_costs
from common.scouting import Team


class TeamCosts:
    """Fills in what a team needs, and says whether it fits.

    Args:
        candidates: Each is measured once, in its own view, with the batch of the run.
        options: Of the runs to come; their engine is tried first, then two-pass.
        budget: Bytes of one GPU; None: everything fits.
        world: Where this process stands.
        watch: Wraps the models, for instance in a progress bar.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        options: argparse.Namespace,
        budget: int | None,
        world: World,
        watch: Watch,
    ) -> None:
        self.options = options
        self.budget = budget
        self._alone = [
            _measure(one, options, world) for one in watch(candidates, "measuring models")
        ]
        self._transfer: dict[int, Activations] = {}

    def __call__(self, team: Team) -> bool:
        """Fill in engine, memory and seconds; return whether it fits under some engine."""
        costs = engine_costs(self._of(team.members))
        chosen = costs[self.options.engine]
        fits = self.budget is None or chosen.fits(self.budget)
        if self.budget is not None and not fits:
            chosen = costs["two-pass"]
            fits = chosen.fits(self.budget)
        team.engine, team.memory, team.step_seconds = chosen.engine, chosen.peak, chosen.seconds
        return fits

    def _of(self, members: Sequence[int]) -> TeamCost:
        alone = [self._alone[i] for i in members]
        peers = [
            replace(cost.peers[0], name=str(i)) for i, cost in zip(members, alone, strict=True)
        ]
        size = len(peers)
        if size not in self._transfer:  # depends on batch and classes alone
            names = [peer.name for peer in peers]
            simple = argparse.Namespace(**{**vars(self.options), "rule": "best"})
            transfer = transfer_of(simple, names)
            self._transfer[size] = measure_transfer(transfer, peers, alone[0].batch)
        return replace(
            alone[0],
            peers=peers,
            inputs=max(cost.inputs for cost in alone),
            transfer=self._transfer[size],
        )


def _measure(candidate: Candidate, options: argparse.Namespace, world: World) -> TeamCost:
    module, view = build(candidate.spec, options)
    alone = argparse.Namespace(**{**vars(options), "rule": "none"})
    return measure_team(alone, [candidate.spec], [module], [view], world)
