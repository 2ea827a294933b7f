"""Who taught whom, how often and how well: counted on the device, read at log time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.distributed import sum_over_ranks
from common.transfer import TransferResult

COLLAPSE = 0.95
_PAIR = ("taught", "gap", "kl", "teacher_right", "student_right")
_PEER = ("teaches", "task_loss", "transfer_loss", "not_finite")
_ALL = ("samples", "taught_samples", "batches")
_TOGETHER = 16  # batches that are counted in a row
_SMALL = 2**16  # numbers of a batch's KL; larger ones are counted at once


@dataclass(frozen=True)
class Pair:
    """One teacher and one student over a stretch of training.

    Attributes:
        share: Of all samples, how many this teacher taught this student, in [0, 1].
        gap: Mean of the teacher's score minus the student's, over those.
        kl: Mean KL(p_t || p_s) over those, in nats.
        teacher_right: Share of those where the teacher was right and the student wrong; NaN where
            the task does not tell.
        student_right: Share of those where the student was right; NaN where the task does not tell.
    """

    teacher: str
    student: str
    share: float
    gap: float
    kl: float
    teacher_right: float
    student_right: float


@dataclass(frozen=True)
class Lessons:
    """What a stretch of training taught.

    Attributes:
        samples: Seen, over all ranks.
        batches: Of all ranks.
        taught: Share of samples on which somebody taught.
        teaches: Each peer's share of the taught samples, weighted by nothing; sums to 1 for rules
            with one teacher a sample.
        entropy: Of ``teaches``, normalised to 1 for equal shares; 0 where one peer always teaches.
        task_loss: Each peer's mean.
        transfer_loss: Each student's mean, before the weight.
        not_finite: Batches in which a peer's task loss was not finite; nothing else of them counts.
        pairs: Every ordered pair.
    """

    samples: int
    batches: int
    taught: float
    teaches: dict[str, float]
    entropy: float
    task_loss: dict[str, float]
    transfer_loss: dict[str, float]
    not_finite: dict[str, int]
    pairs: list[Pair]

    def collapsed(self) -> str | None:
        """Name the peer that teaches nearly all of the taught samples, if there is one."""
        if len(self.teaches) < 2 or self.taught == 0:
            return None
        name = max(self.teaches, key=lambda peer: self.teaches[peer])
        return name if self.teaches[name] > COLLAPSE else None

    def scalars(self) -> dict[str, float]:
        """Flatten to names for writers: ``peer/...`` and ``transfer/TEACHER->STUDENT/...``."""
        row: dict[str, float] = {"transfer/taught": self.taught, "transfer/entropy": self.entropy}
        for name in self.teaches:
            row[f"{name}/task_loss"] = self.task_loss[name]
            row[f"{name}/transfer_loss"] = self.transfer_loss[name]
            row[f"{name}/teaches"] = self.teaches[name]
        for pair in self.pairs:
            prefix = f"transfer/{pair.teacher}->{pair.student}"
            for what in ("share", "gap", "kl", "teacher_right", "student_right"):
                value = getattr(pair, what)
                if not math.isnan(value):
                    row[f"{prefix}/{what}"] = value
        return row


class Ledger:
    """Counts lessons on the device; nothing is read before ``read``.

    Args:
        names: The peers' names, in order.
        device: Where results come from.
        ranks: Whose counts are summed; None: all ranks'. Ranks that see the same samples must not
            count them twice.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device | str = "cpu",
        ranks: dist.ProcessGroup | None = None,
    ) -> None:
        self.ranks = ranks
        self.names = list(names)
        size = len(self.names)
        self._size = len(_PAIR) * size * size + len(_PEER) * size + len(_ALL)
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self._interval = torch.zeros(self._size, dtype=dtype, device=device)
        self._epoch = torch.zeros_like(self._interval)
        self._tells = True
        self._waiting: list[TransferResult] = []

    def add(self, result: TransferResult) -> None:
        """Count one batch, without waiting for the device.

        Of one whose losses or scores are not finite, only that is counted. Small ones are kept and
        counted several at a time: between large models' steps a CPU has lost these operations from
        its caches, and the first of a row takes five times as long as the others.
        """
        self._waiting.append(result)
        if len(self._waiting) == _TOGETHER or result.kl.numel() > _SMALL:
            self._count_waiting()

    @torch.no_grad()
    def _count_waiting(self) -> None:
        for result in self._waiting:
            self._count(result)
        self._waiting = []

    def _count(self, result: TransferResult) -> None:
        dtype = self._interval.dtype
        taught = (result.roles > 0).to(dtype)
        gap = result.score.unsqueeze(1) - result.score.unsqueeze(0)
        batch = taught.shape[2]
        share = _share_of_sample(result).to(dtype)
        weight = taught * share
        somebody = taught.amax(dim=1)

        def pairs(x: Tensor) -> Tensor:
            return x.flatten(2).sum(dim=2).flatten()

        if result.correct is None:
            self._tells = False
            right = student = weight.new_zeros(len(self.names) ** 2)
        else:
            correct = result.correct.to(dtype)
            student = weight * correct.unsqueeze(0)
            right = pairs((weight - student) * correct.unsqueeze(1))
            student = pairs(student)
        row = [
            pairs(weight),
            pairs(weight * gap),
            pairs(weight * result.kl),
            right,
            student,
            (somebody * share).flatten(1).sum(dim=1),
            batch * result.task_loss,
            batch * result.transfer_loss,
            weight.new_zeros(len(self.names)),
            weight.new_full((1,), batch),
            (somebody.amax(dim=0) * share).sum().unsqueeze(0),
            weight.new_ones(1),
        ]
        counts = torch.cat([x.to(self._interval.dtype) for x in row])
        counts = torch.where(counts.isfinite().all(), counts, torch.zeros_like(counts))
        place = slice(-len(_ALL) - len(self.names), -len(_ALL))
        counts[place] = (~result.task_loss.isfinite()).to(counts.dtype)
        self._interval += counts

    def read(self) -> Lessons:
        """Sum the interval over all ranks, fold it into the epoch, start a new interval."""
        self._count_waiting()
        self._epoch += self._interval
        total = sum_over_ranks(self._interval.clone(), self.ranks)
        self._interval.zero_()
        return self._lessons(total)

    def read_epoch(self) -> Lessons:
        """Sum the epoch over all ranks, including the running interval; start a new epoch."""
        self._count_waiting()
        self._epoch += self._interval
        self._interval.zero_()
        total = sum_over_ranks(self._epoch.clone(), self.ranks)
        self._epoch.zero_()
        return self._lessons(total)

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's running counts."""
        self._count_waiting()
        return {"interval": self._interval.cpu(), "epoch": self._epoch.cpu(), "tells": self._tells}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up running counts."""
        self._waiting = []
        self._interval.copy_(state["interval"])
        self._epoch.copy_(state["epoch"])
        self._tells = state["tells"]

    def _lessons(self, total: Tensor) -> Lessons:
        values = total.cpu()
        size = len(self.names)
        pair = values[: len(_PAIR) * size**2].view(len(_PAIR), size, size)
        rest = values[len(_PAIR) * size**2 :]
        peer = dict(zip(_PEER, rest[: len(_PEER) * size].view(len(_PEER), size), strict=True))
        samples, taught_samples, batches = rest[len(_PEER) * size :].tolist()
        shares = peer["teaches"] / max(taught_samples, 1e-12)
        return Lessons(
            samples=round(samples),
            batches=round(batches),
            taught=taught_samples / max(samples, 1),
            teaches=self._named(shares),
            entropy=_entropy(shares),
            task_loss=self._named(peer["task_loss"] / max(samples, 1)),
            transfer_loss=self._named(peer["transfer_loss"] / max(samples, 1)),
            not_finite={name: round(x) for name, x in self._named(peer["not_finite"]).items()},
            pairs=[
                self._pair(pair[:, t, s], t, s, samples)
                for t in range(size)
                for s in range(size)
                if t != s
            ],
        )

    def _named(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.names, values.tolist(), strict=True))

    def _pair(self, sums: Tensor, teacher: int, student: int, samples: float) -> Pair:
        taught, gap, kl, right, student_right = sums.tolist()
        mean = 1 / taught if taught else 0.0
        tells = mean if self._tells else math.nan
        return Pair(
            teacher=self.names[teacher],
            student=self.names[student],
            share=taught / max(samples, 1),
            gap=gap * mean,
            kl=kl * mean,
            teacher_right=right * tells,
            student_right=student_right * tells,
        )


def _share_of_sample(result: TransferResult) -> Tensor:
    """Return what part of its sample each entry of the score is [B, S*]: valid positions share."""
    like = result.score[0]
    if result.mask is None:
        return torch.full_like(like, len(like) / like.numel())
    valid = result.mask.flatten(1).sum(dim=1).clamp(min=1)
    return result.mask / valid.view(-1, *[1] * (like.dim() - 1))


def _entropy(shares: Tensor) -> float:
    """Entropy of who teaches, 1 for equal shares, 0 where one peer always does."""
    p = shares[shares > 0] / shares.sum().clamp(min=1e-12)
    if len(shares) < 2 or not len(p):
        return 0.0
    return abs(float(-(p * p.log()).sum()) / math.log(len(shares)))
