"""What teams need of memory and time, from each model measured once: ``scout.py --costs``."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from common.costs import Activations, PeerCost, measure_transfer
from common.distributed import World
from common.options import transfer_of
from common.planner import TeamCost, engine_costs, read_size, shown_bytes
from common.roles import ONE_WAY
from common.scouting import Team
from common.transfer import KnowledgeTransfer

_FALL_BACK = "two-pass"  # the engine for what does not fit under the run's own

Watch = Callable[[Iterable[Any], str], Iterable[Any]]


def add_cost_options(add: Callable[..., Any]) -> None:
    """Add ``--costs`` and ``--budget-gpu-mem`` to a parser or a group of it.

    Args:
        add: Its ``add_argument``.
    """
    add("--costs", action="store_true", help="tell each team's memory and step time, as --plan")
    add(
        "--budget-gpu-mem",
        type=read_size,
        metavar="SIZE",
        help="leave out teams that need more than a GPU of this memory, such as 24G, under both "
        "the run's engine and two-pass",
    )


class TeamCosts(ABC):
    """Fills in what a team needs, and says whether it fits.

    A task says how one model is measured. Each is once, and again where the team it is in changes
    what it needs by itself, such as the size of what all of them are given.

    Args:
        models: How many there are.
        batch: Samples of the run's batches.
        accumulate: Batches an optimizer step.
        engine: Of the runs to come; it is tried first, then two-pass.
        budget: Bytes of one GPU; None: everything fits.
        watch: Wraps the models, for instance in a progress bar.
    """

    def __init__(
        self,
        models: int,
        batch: int,
        accumulate: int,
        engine: str,
        budget: int | None,
        watch: Watch,
    ) -> None:
        self.batch, self.accumulate = batch, accumulate
        self.engine, self.budget = engine, budget
        self._peers: dict[tuple[int, Hashable], PeerCost] = {}
        self._transfers: dict[Any, Activations] = {}
        for i in watch(range(models), "measuring models"):
            self._peer(i, self.setting((i,)))

    @abstractmethod
    def measure(self, model: int, setting: Any) -> PeerCost:
        """Measure one model as a peer of the runs to come.

        Args:
            model: Its number.
            setting: From ``setting``.
        """

    @abstractmethod
    def inputs(self, members: Sequence[int]) -> int:
        """Return the bytes of a team's batch."""

    @abstractmethod
    def transfer(self, names: Sequence[str], frozen: Sequence[str]) -> KnowledgeTransfer:
        """Build the objective of a run of such peers."""

    def setting(self, members: Sequence[int]) -> Hashable:
        """Return what of a team changes what its members need by themselves; None: nothing."""
        return None

    def __call__(self, team: Team) -> bool:
        """Fill in engine, memory and seconds; return whether it fits under some engine."""
        costs = engine_costs(self.of(team.members))
        chosen = costs[self.engine]
        fits = self.budget is None or chosen.fits(self.budget)
        if self.budget is not None and not fits:
            chosen = costs[_FALL_BACK]
            fits = chosen.fits(self.budget)
        team.engine, team.memory, team.step_seconds = chosen.engine, chosen.peak, chosen.seconds
        return fits

    def of(self, members: Sequence[int]) -> TeamCost:
        """Join the costs of a team's members, as ``--plan`` does."""
        setting = self.setting(members)
        peers = [self._peer(i, setting) for i in members]
        frozen = [peer.name for peer in peers if peer.frozen]
        kind = len(peers), len(frozen), setting  # outputs are of one shape: all that counts
        if kind not in self._transfers:
            transfer = self.transfer([peer.name for peer in peers], frozen)
            self._transfers[kind] = measure_transfer(transfer, peers, self.batch)
        return TeamCost(
            peers, self.batch, self.inputs(members), self._transfers[kind], self.accumulate
        )

    def _peer(self, model: int, setting: Hashable) -> PeerCost:
        key = model, setting
        if key not in self._peers:
            self._peers[key] = self.measure(model, setting)
        return self._peers[key]


class OptionTeamCosts(TeamCosts):
    """What teams need where the runs to come are told by options; see ``TeamCosts``.

    Args:
        candidates: The models.
        options: Of the runs to come, and the budget.
        world: Where this process stands.
        watch: Wraps the models, for instance in a progress bar.
    """

    def __init__(
        self,
        candidates: Sequence[Any],
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

    def transfer(self, names: Sequence[str], frozen: Sequence[str]) -> KnowledgeTransfer:
        """Build the run's objective for other peers."""
        rule = rule_of(self.options.rule, names)
        return transfer_of(
            argparse.Namespace(**{**vars(self.options), "rule": rule}), names, frozen
        )


def rule_of(rule: str, names: Sequence[str]) -> str:
    """Return a rule that needs as much and fits any team: a teacher that is named may be absent."""
    return f"{ONE_WAY}{names[0]}" if rule.startswith(ONE_WAY) else rule


def shown_costs(team: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns of a table that tell what a team needs; none where it is not known.

    Args:
        team: One of ``teams`` of ``common.scout_outcome.describe_ranking``.
    """
    if team["memory"] is None:
        return {}
    step = team["step_seconds"]
    return {
        "engine": team["engine"],
        "memory": shown_bytes(team["memory"]),
        "step": "-" if step is None else f"{1e3 * step:.0f} ms",
    }
