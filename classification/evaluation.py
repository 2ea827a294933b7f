"""Every peer on the validation set in its own view, and the group as an ensemble."""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.loader import PrefetchLoader
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from classification.data import ToView, View, eval_loader
from common import distributed
from common.broken import BadSamples
from common.calibration import TemperatureFit
from common.checkpoint import CheckpointError
from common.distributed import World
from common.guard import FLIPS
from common.peers import PeerGroup
from common.score_temperatures import ScoreTemperatures
from common.shapes import TENSOR, Kind, OrNone, fault_of
from common.transfer import confidence

_STATE = {  # of the evaluator, in a run file
    "baseline": OrNone(Kind("a table", lambda x: isinstance(x, Tensor) and x.dim() == 2)),
    "valid?": OrNone(TENSOR),
    "temperatures?": OrNone({"values": OrNone(TENSOR)}),
}
Watch = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass
class Scores:
    """What one pass over the data gives, for each of N peers.

    Attributes:
        correct: Top-1 right [N, n], bool.
        correct5: Among the five best [N, n], bool.
        loss: Cross entropy [N, n].
        ensemble: Whether the mean of the peers' probabilities is right [n], bool.
        confidence: Largest probability [N, n].
        target: The true classes [n]; -1 where an image could not be read.
        calibrated: Largest probability at each peer's temperature [N, n]; None: none was given.
    """

    correct: Tensor
    correct5: Tensor
    loss: Tensor
    ensemble: Tensor
    confidence: Tensor
    target: Tensor
    calibrated: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """Which samples could be read [n], bool; the others count for no metric."""
        return self.target >= 0

    def part(self, which: slice) -> Scores:
        """Return the same of some samples."""
        return Scores(**{k: x if x is None else x[..., which] for k, x in vars(self).items()})

    def metrics(
        self, names: Sequence[str], baseline: Tensor | None, was_valid: Tensor | None = None
    ) -> dict[str, float]:
        """Name the numbers: percentages, and flips against a baseline.

        Args:
            names: Of the peers.
            baseline: Its ``correct``.
            was_valid: Its ``valid``; None: all.
        """
        found: dict[str, float] = {}
        table = (self.correct, self.correct5, self.loss)
        correct, correct5, loss = (x[:, self.valid].double() for x in table)
        both = self.valid if was_valid is None else self.valid & was_valid
        for i, name in enumerate(names):
            found[f"{name}/top1"] = 100 * correct[i].mean().item()
            found[f"{name}/top5"] = 100 * correct5[i].mean().item()
            found[f"{name}/loss"] = loss[i].mean().item()
            if baseline is not None:
                broken = (~self.correct[i] & baseline[i])[both]
                found[f"{name}/fixed"] = int((self.correct[i] & ~baseline[i])[both].sum())
                found[f"{name}/broken"] = int(broken.sum())
                found[f"{name}/{FLIPS}"] = 100 * broken.double().mean().item()
        found["mean/top1"] = 100 * correct.mean().item()
        found["ensemble/top1"] = 100 * self.ensemble[self.valid].double().mean().item()
        found["oracle/top1"] = 100 * (correct > 0).any(dim=0).double().mean().item()
        return found


@contextlib.contextmanager
def brought_to(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Bring modules to a device for a while; averaged weights may be kept on the CPU."""
    homes = [next(module.parameters()).device for module in modules]
    away = [(m, home) for m, home in zip(modules, homes, strict=True) if home != device]
    for module, _ in away:
        module.to(device)
    try:
        yield
    finally:
        for module, home in away:
            module.to(home)


class PeerEvaluator:
    """Evaluates the group; peers with the same geometry share one decoding of the data.

    Under the engine peer-parallel each process runs its own peer, and gets the results of all.

    Args:
        dataset: The validation data; each geometry gets a copy with its own transform.
        views: Of the peers that are here, in order.
        options: The run's.
        world: Where this process stands.
        amp_dtype: Autocast the forwards to it.
        channels_last: Of each peer.
        dtypes: Of each peer's weights.
        watch: Wraps the batches, for instance in a progress bar.
        bad: Counts broken images; None: by itself, and none is allowed.
        temperatures: Fitted on this data where they are due; None: none are wanted.
    """

    def __init__(
        self,
        dataset: Dataset,
        views: Sequence[View],
        options: argparse.Namespace,
        world: World,
        amp_dtype: torch.dtype | None = None,
        channels_last: Sequence[bool] | None = None,
        dtypes: Sequence[torch.dtype] | None = None,
        watch: Watch = lambda batches, title: batches,
        bad: BadSamples | None = None,
        temperatures: ScoreTemperatures | None = None,
    ) -> None:
        self.world = world
        self.bad = bad or BadSamples()
        self.temperatures = temperatures
        self.amp_dtype = amp_dtype
        self.watch = watch
        self.count = None if isinstance(dataset, IterableDataset) else len(dataset)
        self.baseline: Tensor | None = None
        self.was_valid: Tensor | None = None
        self.loaders: list[PrefetchLoader] = []
        self.members: list[list[int]] = []
        self.to_view: list[ToView] = []
        geometries: dict[Any, int] = {}
        for i, view in enumerate(views):
            where = geometries.setdefault(view.geometry, len(geometries))
            if where == len(self.loaders):
                self.loaders.append(eval_loader(copy.copy(dataset), view, options, world, self.bad))
                self.members.append([])
            first = views[self.members[where][0]] if self.members[where] else view
            self.members[where].append(i)
            last = channels_last[i] if channels_last else False
            dtype = dtypes[i] if dtypes else torch.float32
            self.to_view.append(ToView(first, view, last, dtype).to(world.device))

    def evaluate(self, peers: PeerGroup) -> dict[str, float]:
        """Measure every peer (its averaged weights, if any); the first call is the baseline."""
        modules = [peer.best_module for peer in peers.here]
        due = self.temperatures is not None and self.temperatures.due
        fits = [TemperatureFit(self.world.device) for _ in modules] if due else []
        with brought_to(self.world.device, *modules):
            scores = self.score(modules, fits)
        metrics = scores.metrics(peers.names, self.baseline, self.was_valid)
        if self.temperatures is not None:
            if due:
                self.temperatures.fit(fits)
            metrics |= self.temperatures.metrics()
        if self.baseline is None:
            self.baseline, self.was_valid = scores.correct, scores.valid
        return metrics

    def halves(self, peers: PeerGroup) -> tuple[dict[str, float], dict[str, float]]:
        """Measure every peer on the samples of even number, and on those of odd number."""
        modules = [peer.best_module for peer in peers.here]
        with brought_to(self.world.device, *modules):
            scores = self.score(modules)
        even, odd = (scores.part(slice(first, None, 2)) for first in (0, 1))
        return even.metrics(peers.names, None), odd.metrics(peers.names, None)

    @torch.inference_mode()
    def score(
        self,
        modules: Sequence[nn.Module],
        fits: Sequence[TemperatureFit] = (),
        temperatures: Sequence[float] = (),
    ) -> Scores:
        """Run the models that are here over the whole split; every rank gets the result of all.

        Args:
            modules: In the order of the views.
            fits: Of each model, fed with what it says of this process's samples; none: nothing.
            temperatures: Of each model, for ``Scores.calibrated``; none: that is None.
        """
        parts: list[list[Tensor]] = [[] for _ in modules]
        summed: list[Tensor] = []
        labels: list[Tensor] = []
        for number, k, logits, target in self.forward(modules):
            together = None
            for i, z in logits:
                rows = _judge(z, target)
                if temperatures:
                    rows = torch.cat([rows, confidence(z / temperatures[i])[None]])
                parts[i].append(rows)
                if fits:
                    fits[i].add(z[target >= 0], target[target >= 0])
                p = z.softmax(dim=1)
                together = p if together is None else together + p
            together = distributed.sum_over_team(together, self.world)
            together = together if len(self.loaders) == 1 else together.cpu()
            if number == 0:
                summed.append(together)
                labels.append(target.to(together.device))  # -1 is nobody's prediction
            else:
                summed[k] += together
                broken = target.to(together.device) < 0  # of one peer, then of none
                labels[k] = labels[k].masked_fill(broken, -1)
        right = [p.argmax(dim=1) == y for p, y in zip(summed, labels, strict=True)]
        table = torch.stack([torch.cat(part, dim=1).cpu() for part in parts])
        return self._gather(table, torch.stack([torch.cat(right), torch.cat(labels)]).cpu())

    @torch.inference_mode()
    def forward(
        self, modules: Sequence[nn.Module]
    ) -> Iterator[tuple[int, int, Iterator[tuple[int, Tensor]], Tensor]]:
        """Run the models that are here over the whole split, in evaluation mode.

        Yields:
            For every batch of every geometry: the geometry's number, the batch's, each model of it
            with its logits [B, C] float32 (one model at a time), and the target [B].
        """
        modes = [module.training for module in modules]
        for module in modules:
            module.eval()
        for number, (loader, members) in enumerate(zip(self.loaders, self.members, strict=True)):
            for k, (images, target) in enumerate(self.watch(loader, "evaluating")):
                yield number, k, self._logits(modules, members, images), target
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)

    @torch.inference_mode()
    def _logits(
        self, modules: Sequence[nn.Module], members: Sequence[int], images: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        for i in members:
            yield i, self._forward(modules[i], self.to_view[i](images))

    def _forward(self, module: nn.Module, images: Tensor) -> Tensor:
        device = self.world.device.type
        with torch.autocast(device, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            return module(images).float()

    def _gather(self, table: Tensor, together: Tensor) -> Scores:
        """Put the shards' samples back in the data's order, and the seats' peers in theirs."""
        rows = distributed.gather_over_team(list(table), self.world)
        parts = distributed.gather_objects((torch.stack(rows), together), self.world.replicas)
        table = parts[0][0]
        count = sum(part[1].shape[1] for part in parts)
        whole = table.new_empty(*table.shape[:2], count)
        shared = together.new_empty(2, count)
        interleaved = all(
            part[1].shape[1] == len(range(rank, count, len(parts)))
            for rank, part in enumerate(parts)
        )
        start = 0
        for rank, (rows, own) in enumerate(parts):
            mine = (
                slice(rank, None, len(parts)) if interleaved else slice(start, start + own.shape[1])
            )
            whole[:, :, mine], shared[:, mine] = rows, own
            start += own.shape[1]
        right, target = shared[0] > 0, shared[1]
        self.bad.share()
        self.bad.tell_evaluation(int((target < 0).sum()), count)
        calibrated = whole[:, 4] if whole.shape[1] > 4 else None
        right5, loss, sure = whole[:, 1] > 0, whole[:, 2], whole[:, 3]
        return Scores(whole[:, 0] > 0, right5, loss, right, sure, target, calibrated)

    def state_dict(self) -> dict[str, Any]:
        """Return the baseline, for flips after a resume, and the temperatures of the scores."""
        state: dict[str, Any] = {"baseline": self.baseline, "valid": self.was_valid}
        if self.temperatures is not None:
            state["temperatures"] = self.temperatures.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a baseline.

        Raises:
            CheckpointError: It is of other validation data, or none.
        """
        fault = fault_of(state, _STATE, "evaluator")
        if fault:
            raise CheckpointError(f"the run file was changed: {fault}; resume from another one")
        baseline = state["baseline"]
        if None not in (baseline, self.count) and baseline.shape[1] != self.count:
            raise CheckpointError(
                f"the run was measured on {baseline.shape[1]} validation images, there are "
                f"{self.count}; give the run's own data, or start another from its weights"
            )
        self.baseline, self.was_valid = baseline, state.get("valid")
        if self.temperatures is not None:
            self.temperatures.load_state_dict(state.get("temperatures"))


def _judge(logits: Tensor, target: Tensor) -> Tensor:
    """Return top-1 right, top-5 right, cross entropy and confidence, [4, B] float32."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == target.unsqueeze(1)
    loss = F.cross_entropy(logits, target, reduction="none", ignore_index=-1)
    return torch.stack([best[:, 0].float(), best.any(dim=1).float(), loss, confidence(logits)])
