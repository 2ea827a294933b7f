"""What teams of saliency models need of memory and time, from each model measured once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common.costs import PeerCost
from common.options import amp_dtype
from common.team_costs import OptionTeamCosts
from saliency.peer import build_modules
from saliency.plan import batch_bytes, grid_of, measure_peers, to_measure


class SaliencyCosts(OptionTeamCosts):
    """Measures every model with its clips, and maps of the size that a team has them in."""

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
