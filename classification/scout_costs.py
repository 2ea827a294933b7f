"""What teams of classifiers need of memory and time, from each model measured once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from classification.data import View, common_view
from classification.plan import leave_trials_out, measure_peers
from classification.scouting import Candidate, Watch, build
from common.costs import PeerCost
from common.distributed import World
from common.team_costs import OptionTeamCosts


class ClassifierCosts(OptionTeamCosts):
    """Measures every classifier on images as a team has them; see ``OptionTeamCosts``."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        options: argparse.Namespace,
        world: World,
        watch: Watch,
    ) -> None:
        self._inputs: dict[View, int] = {}
        super().__init__(candidates, options, world, watch)

    def setting(self, members: Sequence[int]) -> View:
        """Return how images come where these train together; it decides what is made of them."""
        common = common_view([self.candidates[i].view for i in members])
        return replace(common, interpolation="", crop_pct=1.0, crop_mode="")  # of the files alone

    def measure(self, model: int, setting: View) -> PeerCost:
        """Build a model with its weights, and measure it on such images."""
        spec = self.candidates[model].spec
        module, view = build(spec, self.options)
        leave_trials_out(spec)
        (cost,), inputs = measure_peers(
            self.options, [spec], [module], [view], self.world, common=setting
        )
        self._inputs[setting] = inputs
        return cost

    def inputs(self, members: Sequence[int]) -> int:
        """Return the bytes of a batch of such images, and of their targets."""
        return self._inputs[self.setting(members)]
