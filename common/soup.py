"""Averages of a peer's weights before and after: at times better than either."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.checkpoint import atomic_write
from common.distributed import World, sum_over_ranks
from common.peers import Peer, PeerGroup
from common.seeding import drawn_for

_logger = logging.getLogger(__name__)

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the best weights in an average; the rest are the start's."""
STATISTICS_BATCHES = 100

Weights = Mapping[str, Tensor]
Metrics = Mapping[str, float]
Halves = Callable[[PeerGroup], tuple[Metrics, Metrics]]
"""Measures a group on two halves of the held-out data; equal on every rank."""


@dataclass
class Soup:
    """A peer's averages, as they did on held-out data.

    Attributes:
        peer: Its name.
        metric: What was measured.
        alphas: Shares of the best weights; 0 is the start itself, 1 the best itself.
        chosen_by: The metric of each, on the half of the held-out data that chooses.
        measured: On the other half.
        alpha: Of the average that does best on the half that chooses; of equals the largest.
    """

    peer: str
    metric: str
    alphas: list[float] = field(default_factory=list)
    chosen_by: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)
    alpha: float = 1.0

    def add(self, alpha: float, halves: tuple[Metrics, Metrics], lower_is_better: bool) -> bool:
        """Enter an average; return whether it is the best so far."""
        chosen, measured = (float(half[f"{self.peer}/{self.metric}"]) for half in halves)
        sign = -1 if lower_is_better else 1
        known = [sign * value for value in self.chosen_by if not math.isnan(value)]
        best = not math.isnan(chosen) and all(sign * chosen >= value for value in known)
        self.alphas.append(alpha)
        self.chosen_by.append(chosen)
        self.measured.append(measured)
        if best or not self.alphas[:-1]:
            self.alpha = alpha
        return self.alpha == alpha

    def measured_at(self, alpha: float) -> float:
        """Return the metric of an average on the half that did not choose."""
        return self.measured[self.alphas.index(alpha)]

    def metadata(self) -> dict[str, str]:
        """Return all of it as text, for the file's header."""
        return {f"soup_{key}": json.dumps(value) for key, value in asdict(self).items()}


def average_weights(start: Weights, best: Weights, alpha: float) -> dict[str, Tensor]:
    """Average two state dicts of one model.

    Args:
        start, best: Names to tensors of the same shapes.
        alpha: The share of ``best``, in [0, 1]; at the ends the result is exact.

    Returns:
        ``(1 - alpha) * start + alpha * best`` in the dtype of ``best``, computed in float32 or
        wider; integers (counters) are those of ``best``.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), CVPR 2022, eq. 1.
    """
    found = {}
    for name, end in best.items():
        wide = torch.promote_types(end.dtype, torch.float32)
        found[name] = (
            torch.lerp(start[name].to(wide), end.to(wide), alpha).to(end.dtype)
            if end.is_floating_point()
            else end.clone()
        )
    return found


def make_soups(
    peers: PeerGroup,
    world: World,
    names: Sequence[str],
    *,
    read: Callable[[str, str], Weights],
    write: Callable[[Peer, Weights, Soup], None],
    halves: Halves,
    batches: Callable[[], Iterator[Any]],
    metric: str,
    lower_is_better: bool = False,
) -> list[Soup]:
    """Try averages of the start and the best of every peer, and write the best one of each.

    Running statistics of batch norm do not average; where a peer has such, they are estimated anew
    for each average on the first training batches. The peers are left as they were.

    Args:
        peers: The group; all ranks must call.
        world: Where this process stands.
        names: Of the peers that learned.
        read: Returns weights by a peer's name and ``start`` or ``best``.
        write: Called for each peer that this process leads.
        halves: Measures the group on two halves of the held-out data: the first one chooses.
        batches: Returns training batches from the beginning.
        metric: Which metric of a peer chooses.
        lower_is_better: Of it.

    Source: Wortsman et al., CVPR 2022 (see ``average_weights``); "Model soups", ICML 2022.
    """
    soups = {name: Soup(name, metric) for name in names}
    here = [peer for peer in peers.here if peer.name in names]
    ends = {peer.name: (read(peer.name, "start"), read(peer.name, "best")) for peer in here}
    found: dict[str, Weights] = {}
    with _all_kept(here):
        for alpha in ALPHAS:
            for peer in here:
                start, best = ends[peer.name]
                peer.module.load_state_dict(average_weights(start, best, alpha))
            if alpha not in (0.0, 1.0):
                estimate_statistics(here, world, batches)
            parts = halves(peers)
            for soup in soups.values():
                if soup.add(alpha, parts, lower_is_better):
                    found |= {p.name: p.snapshot()["module"] for p in here if p.name == soup.peer}
    for peer in here:
        if world.leads:
            write(peer, found[peer.name], soups[peer.name])
    if world.is_main:
        for soup in soups.values():
            _logger.info("%s", soup_sentence(soup))
    return list(soups.values())


@contextmanager
def _all_kept(peers: Sequence[Peer]) -> Iterator[None]:
    """Let peers hold other weights for a while, their modules alone being evaluated."""
    before = [(peer.snapshot()["module"], peer.average, peer.module.training) for peer in peers]
    for peer in peers:
        peer.average = None
    try:
        yield
    finally:
        for peer, (weights, average, training) in zip(peers, before, strict=True):
            peer.module.load_state_dict(weights)
            peer.average = average
            peer.module.train(training)


@torch.no_grad()
def estimate_statistics(
    peers: Sequence[Peer], world: World, batches: Callable[[], Iterator[Any]]
) -> None:
    """Estimate running statistics of batch norm anew, as means over batches and ranks.

    Args:
        peers: Those without batch norm are left alone.
        world: Where this process stands; ranks that hold the same peer take the mean of theirs.
        batches: Called where a peer has batch norm; what is drawn is the same at every call.

    Source: as ``torch.optim.swa_utils.update_bn``, for peers.
    """
    estimated = [peer for peer in peers if _norms(peer.module)]
    norms = [norm for peer in estimated for norm in _norms(peer.module)]
    if not norms:
        return
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
    for peer in estimated:
        peer.module.train()
    with drawn_for(world.device, 0):
        for batch in batches():
            for peer in estimated:
                with peer.alone():
                    peer.forward(batch)
    for norm, (momentum, counted) in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(counted)
        for statistic in (norm.running_mean, norm.running_var):
            if world.shards > 1:
                statistic.copy_(sum_over_ranks(statistic.clone(), world.replicas) / world.shards)
    for peer in estimated:
        peer.module.eval()


def _norms(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def write_soup(folder: Path, soup: Soup) -> None:
    """Write ``soup.json`` beside the weights, whose own format may have no room for it."""
    text = json.dumps(asdict(soup), indent=1)
    atomic_write(folder / "soup.json", lambda to: to.write_text(text, encoding="utf-8"))


def soup_sentence(soup: Soup) -> str:
    """Say what came of it, in words."""
    start, best, own = (soup.measured_at(alpha) for alpha in (0.0, 1.0, soup.alpha))
    return (
        f"{soup.peer}: {soup.metric} on the half that did not choose the soup: start {start:.3f}, "
        f"best {best:.3f}, soup {own:.3f} ({100 * soup.alpha:g}% best, "
        f"{100 - 100 * soup.alpha:g}% start)"
    )
