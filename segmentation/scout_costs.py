"""What teams of segmentors need of memory and time, from each model measured once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from common.costs import PeerCost
from common.team_costs import TeamCosts, Watch, rule_of
from common.transfer import KnowledgeTransfer
from segmentation.answers import Candidate
from segmentation.config import RunConfig, build_transfer
from segmentation.data import check_classes
from segmentation.errors import told_of
from segmentation.plan import batch_bytes, measure_config
from segmentation.trainer import per_rank_batch


class SegmentorCosts(TeamCosts):
    """Measures every segmentor on images of the run's size; see ``TeamCosts``.

    Args:
        candidates: The models.
        run: Its data, solver and TRANSFER are those of the runs to come.
        budget: Bytes of one GPU; None: everything fits.
        watch: Wraps the models, for instance in a progress bar.
    """

    def __init__(
        self, candidates: Sequence[Candidate], run: RunConfig, budget: int | None, watch: Watch
    ) -> None:
        self.configs, self.run = [candidate.config for candidate in candidates], run
        cfgs = {config.name: config.cfg for config in self.configs}
        self._ignore = check_classes(cfgs, tested=False)
        self._masks: dict[int, bool] = {}
        super().__init__(
            len(candidates),
            per_rank_batch(run.cfg.SOLVER.IMS_PER_BATCH, 1),
            run.transfer.ACCUMULATE,
            run.transfer.ENGINE,
            budget,
            watch,
        )
        self._bytes = {
            masks: batch_bytes(run, self.batch, self._ignore, masks)
            for masks in set(self._masks.values())
        }

    def measure(self, model: int, setting: Any) -> PeerCost:
        """Measure a model with random weights, which need as much."""
        found = measure_config(self.configs[model], self.run, self.batch, self._ignore)
        self._masks[model] = found.masks
        return found.cost

    def inputs(self, members: Sequence[int]) -> int:
        """Return the bytes of a batch, with masks where one of the members learns from them."""
        return self._bytes[any(self._masks[i] for i in members)]

    def transfer(self, names: Sequence[str], frozen: Sequence[str]) -> KnowledgeTransfer:
        """Build the run's objective for other peers."""
        node = self.run.transfer.clone()
        node.defrost()
        node.RULE = rule_of(node.RULE, names)
        peers = [config for config in self.configs if config.name in names]
        with told_of("TRANSFER"):
            return build_transfer(replace(self.run, peers=peers, transfer=node), seed=0)
