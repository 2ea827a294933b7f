"""The objective: N task losses, and the KL from each sample's teachers to its students."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.roles import SELF, assign_roles, check_rule, with_own

SCORES = ("loss", "confidence")
CLASSES = ("all", "non-target")
TEACHERS = ("peers", "ema", "ema+own")
_STRETCH = 2**17  # numbers of one peer, half a megabyte


@dataclass
class PeerOutput:
    """What one peer says of one batch.

    Attributes:
        task_loss: Its own supervised loss, a scalar with gradient.
        score: How well it does on each sample [B] or position [B, S*]; higher is better; no
            gradient.
        logits: Class scores before softmax [B, C, S*], with gradient.
        mask: Which positions count [B, S*], bool; None: all. Padding and ignored pixels are False.
            A position takes part in the transfer where every peer's mask is True.
        correct: Whether its prediction is right, bool, in the shape of the score; for the ledger.
        target: The true class [B, S*], int; the same for all peers. Only a transfer over the
            non-target classes needs it.
    """

    task_loss: Tensor
    score: Tensor
    logits: Tensor
    mask: Tensor | None = None
    correct: Tensor | None = None
    target: Tensor | None = None


@dataclass
class TransferResult:
    """The objective of one batch, and its parts.

    Attributes:
        total: What to call backward on, a scalar.
        task_loss: Each peer's own loss [N], no gradient.
        transfer_loss: Each student's mean over samples of its role-weighted KL [N], before the
            weight; no gradient.
        roles: Weight with which peer t teaches peer s [N(t), N(s), B, (S*)].
        score: What the roles were made from [N, B, (S*)].
        kl: KL(p_t || p_s) [N(t), N(s), B, (S*)], with the roles' shape; no gradient.
        correct: [N, B, (S*)] bool, or None where a peer does not tell.
        mask: Which positions count [B, S*], bool, where the roles are per position; None: all.
    """

    total: Tensor
    task_loss: Tensor
    transfer_loss: Tensor
    roles: Tensor
    score: Tensor
    kl: Tensor
    correct: Tensor | None
    mask: Tensor | None = None


class KnowledgeTransfer:
    """For every sample, let the peers that do better teach the others.

    ``total = sum_i task_i + weight * mean_b sum_{t != s} R[t, s, b] * KL(p_t(b) || p_s(b))``, with
    p = softmax(logits / T) over dim 1, and the KL times T^2, in float32 or wider. Where there are
    spatial axes it is averaged over the valid positions of each sample first.

    Gradient reaches every student's logits; with ``detach_teacher=False`` the teacher's too, which
    pulls it towards its students (as the published classification and saliency scripts do). A
    frozen peer teaches, but learns nothing: its task loss and the KL towards it stay out of the
    total.

    Args:
        rule: See ``common.roles.assign_roles``.
        temperature: T, > 0.
        weight: Of the transfer against the task losses, >= 0.
        detach_teacher: Treat the teacher's distribution as a constant.
        margin, gap_power: See ``common.roles.assign_roles``.
        classes: ``all``, or ``non-target``: the KL is between distributions over all but the true
            class, so that it does not pull at the probability that the task loss is about.
        teachers: ``peers`` as they are; ``ema``: copies of them with averaged weights give scores
            and targets; ``ema+own``: whoever teaches a sample teaches its own peer too. Rule
            ``self`` is the control: each copy teaches its own peer, and no peer another.
        warmup_steps: The weight grows linearly from 0 and is full after this many steps.
        names: The peers' names, for ``one_way:NAME``, ``frozen`` and errors.
        frozen: Names of the peers that learn nothing.
        seed: Of the draws of ``random``; differs by rank under data parallelism.

    Attributes:
        frozen, untaught: Numbers of the peers that learn nothing, and of those that nobody teaches
            but who learn from their own task loss; both may grow between steps.

    Raises:
        ValueError: An argument out of its range; the message names it.

    Source: Jain, Karthik, Gandhi, "Simplifying Knowledge Transfer in Pretrained Models", TMLR 2025.
    ``non-target``: NCKD of Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, alone.
    ``ema``: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017.
    """

    def __init__(
        self,
        rule: str = "best",
        temperature: float = 1.0,
        weight: float = 1.0,
        detach_teacher: bool = True,
        *,
        margin: float | None = None,
        gap_power: float = 0.0,
        classes: str = "all",
        teachers: str = "peers",
        warmup_steps: int = 0,
        names: Sequence[str] | None = None,
        frozen: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected more than 0")
        if not weight >= 0:
            raise ValueError(f"weight is {weight}; expected 0 or more")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}; expected 0 or more")
        if margin is not None and not margin >= 0:
            raise ValueError(f"margin is {margin}; expected 0 or more")
        if not gap_power >= 0:
            raise ValueError(f"gap_power is {gap_power}; expected 0 or more")
        if classes not in CLASSES:
            raise ValueError(f"classes is {classes!r}; choose from {', '.join(CLASSES)}")
        if teachers not in TEACHERS:
            raise ValueError(f"teachers is {teachers!r}; choose from {', '.join(TEACHERS)}")
        if teachers == "peers" and rule == SELF:
            raise ValueError("rule 'self' needs copies that teach: take teachers 'ema'")
        if teachers != "peers" and not detach_teacher:
            raise ValueError(
                f"teachers {teachers!r} are averages, which no gradient moves; leave "
                "detach_teacher on"
            )
        if names is not None:
            check_rule(rule, names)
        unknown = [name for name in frozen if name not in (names or ())]
        if unknown:
            raise ValueError(f"frozen peers {unknown} are not among the names {list(names or ())}")
        self.rule = rule
        self.temperature = temperature
        self.weight = weight
        self.detach_teacher = detach_teacher
        self.margin = margin
        self.gap_power = gap_power
        self.classes = classes
        self.teachers = teachers
        self.warmup_steps = warmup_steps
        self.names = list(names) if names is not None else None
        self.frozen = [list(names or ()).index(name) for name in frozen]
        self.untaught: list[int] = []
        self.seed = seed
        self._generator: torch.Generator | None = None

    @property
    def wants_copies(self) -> bool:
        """Whether outputs of the peers' averaged copies are needed for each batch."""
        return self.teachers != "peers" and self.rule != "none"

    def __call__(
        self,
        outputs: Sequence[PeerOutput],
        step: int | None = None,
        copies: Sequence[PeerOutput] | None = None,
        check_finite: bool = True,
    ) -> TransferResult:
        """Build the objective of one batch.

        Args:
            outputs: One a peer, of the same batch: equal shapes of score and of logits.
            step: Optimizer steps made so far, for the warm-up of the weight; None: after it.
            copies: Outputs of the averaged copies for the same batch, where ``wants_copies``: the
                scores, the teachers' logits, and what the ledger counts as right are theirs.
            check_finite: See ``common.roles.assign_roles``.

        Raises:
            ValueError: Shapes that differ (names the peers), or copies that are missing.
            NonFiniteError: A score that is not finite, on the CPU, where that is looked for.
        """
        _check_shapes(outputs, self.names)
        if self.wants_copies and copies is None:
            raise ValueError(f"teachers {self.teachers!r} need the outputs of the averaged copies")
        teaching = outputs if copies is None else copies
        task_losses = [output.task_loss for output in outputs]
        learning = [i for i in range(len(outputs)) if i not in self.frozen]
        score = torch.stack([output.score.detach() for output in teaching])
        roles = self._roles(score, check_finite)
        mask, at_positions = _common_mask(outputs), score.dim() > 2
        total = torch.stack([task_losses[i] for i in learning]).sum() if learning else 0.0
        if self.rule == "none":
            kl = torch.zeros_like(roles)
            per_student = torch.zeros(len(outputs), device=score.device, dtype=score.dtype)
        else:
            kl = self._kl(outputs, copies)
            if not at_positions:
                kl = _over_positions(kl, mask, axes=3)
            lessons = (roles.to(kl.dtype) * kl).sum(dim=0)
            per_student = _over_positions(lessons, mask, axes=2).mean(dim=1)
            total = total + self.weight_at(step) * per_student.sum()
            kl = kl.detach()
            if mask is not None and at_positions:
                roles = roles * mask
        return TransferResult(
            total=torch.as_tensor(total),
            task_loss=torch.stack([loss.detach() for loss in task_losses]),
            transfer_loss=per_student.detach(),
            roles=roles,
            score=score,
            kl=kl,
            correct=_stack_correct(teaching),
            mask=mask if at_positions else None,
        )

    def _roles(self, score: Tensor, check_finite: bool) -> Tensor:
        roles = assign_roles(
            score,
            self.rule,
            names=self.names,
            margin=self.margin,
            gap_power=self.gap_power,
            generator=self._generator_on(score.device),
            check_finite=check_finite,
        )
        if self.teachers == "ema+own" and self.rule != SELF:
            roles = with_own(roles)
        for i in (*self.frozen, *self.untaught):
            roles[:, i] = 0
        return roles

    def _kl(self, outputs: Sequence[PeerOutput], copies: Sequence[PeerOutput] | None) -> Tensor:
        logits = self._compared(outputs)
        if copies is None:
            return pairwise_kl(logits, self.temperature, self.detach_teacher)
        return teacher_kl(self._compared(copies), logits, self.temperature)

    def _compared(self, outputs: Sequence[PeerOutput]) -> list[Tensor]:
        """Return the logits that the KL is between."""
        logits = [output.logits for output in outputs]
        if self.classes == "all":
            return logits
        target = outputs[0].target
        if target is None:
            raise ValueError(
                "the transfer over the non-target classes needs one true class a sample, and these "
                "peers give none (soft targets, as of mixup, or no classes); take classes 'all'"
            )
        return [without_target(z, target) for z in logits]

    def weight_at(self, step: int | None) -> float:
        """Return the weight of the transfer after ``step`` optimizer steps."""
        if step is None or step >= self.warmup_steps:
            return self.weight
        return self.weight * step / self.warmup_steps

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the draws, for an exact resume."""
        state = None if self._generator is None else self._generator.get_state()
        return {"generator": state}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Take up the draws of ``random`` where ``state_dict`` left them."""
        if state["generator"] is not None:
            self._generator = torch.Generator(device=device)
            self._generator.set_state(state["generator"])

    def _generator_on(self, device: torch.device) -> torch.Generator | None:
        if self.rule != "random":
            return None
        if self._generator is None:
            self._generator = torch.Generator(device=device).manual_seed(self.seed)
        return self._generator


def confidence(logits: Tensor) -> Tensor:
    """Score a peer by its largest softmax probability: needs no labels.

    Args:
        logits: [B, C, S*].

    Returns:
        [B, S*] in (0, 1], float32 or wider, no gradient.

    Source: Roth et al., "Fantastic Gains and Where to Find Them", ICLR 2024.
    """
    logits = _wide(logits.detach())
    return (logits.amax(dim=1) - logits.logsumexp(dim=1)).exp()


def without_target(logits: Tensor, target: Tensor) -> Tensor:
    """Leave out each position's true class; the last class takes its place.

    Args:
        logits: [B, C, S*], C of 3 or more.
        target: [B, S*] int; values outside of the classes (ignored positions) count as class 0.

    Returns:
        [B, C - 1, S*], the other classes' logits; gradient reaches them alone.

    Raises:
        ValueError: Fewer than 3 classes: what is left of 2 is the same for all peers.
    """
    classes = logits.shape[1]
    if classes < 3:
        raise ValueError(
            f"{classes} classes; a transfer over the non-target classes needs 3 or more"
        )
    index = torch.where((target >= 0) & (target < classes), target, 0).unsqueeze(1)
    return logits.scatter(1, index, logits[:, -1:])[:, :-1]


def pairwise_kl(
    logits: Sequence[Tensor], temperature: float = 1.0, detach_teacher: bool = True
) -> Tensor:
    """Compute KL(p_t || p_s) for every ordered pair, from N softmaxes.

    Only the N log-probabilities are kept for the backward pass; no copy per pair is made. Where
    there are positions, all else is as small as one stretch of them.

    Args:
        logits: N tensors [B, C, S*] of one shape, in any floating dtype.
        temperature: T; the KL is multiplied by T^2.
        detach_teacher: No gradient reaches the teacher's logits.

    Returns:
        [N(t), N(s), B, S*] in nats, float32 or wider, zero diagonal. Differentiable once.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (temperature).
    """
    with torch.autocast(logits[0].device.type, enabled=False):
        if logits[0].dim() == 2:
            return _PairwiseKL.apply(temperature, detach_teacher, *logits)
        flat = [z.flatten(2) for z in logits]
        kl = _PairwiseKLAtPositions.apply(temperature, detach_teacher, *flat)
        return kl.unflatten(3, logits[0].shape[2:])


def teacher_kl(
    teachers: Sequence[Tensor], students: Sequence[Tensor], temperature: float = 1.0
) -> Tensor:
    """Compute KL(p_t || p_s) of every teacher and student that are models of their own.

    2 N softmaxes and one contraction. Gradient reaches the students alone.

    Args:
        teachers: N tensors [B, C, S*] of one shape, in any floating dtype.
        students: N tensors of the same shape.
        temperature: T; the KL is multiplied by T^2.

    Returns:
        [N(t), N(s), B, S*] in nats, float32 or wider; the diagonal is what a teacher tells the
        student of its own number.
    """
    with torch.autocast(students[0].device.type, enabled=False):
        log_q = torch.stack([_wide(z) for z in students]).div(temperature).log_softmax(dim=2)
        with torch.no_grad():
            log_p = torch.stack([_wide(z) for z in teachers]).div(temperature).log_softmax(dim=2)
            p = log_p.exp()
            own = (p * log_p).sum(dim=2)
        with _full_precision(log_q.device):
            cross = torch.einsum("tbc...,sbc...->tsb...", p, log_q)
        return (own.unsqueeze(1) - cross) * temperature**2


class _PairwiseKL(torch.autograd.Function):
    """KL of all pairs; d KL(p_t||p_s) / d z_s = p_s - p_t, at temperature 1."""

    @staticmethod
    def forward(ctx: Any, temperature: float, detach_teacher: bool, *logits: Tensor) -> Tensor:
        log_p = torch.stack([_wide(z) for z in logits])
        if temperature != 1.0:
            log_p /= temperature
        log_p = torch.log_softmax(log_p, dim=2)
        with _full_precision(log_p.device):
            cross = torch.einsum("tbc,sbc->tsb", log_p.exp(), log_p)
        own = torch.stack([cross[t, t] for t in range(len(logits))])
        kl = own.unsqueeze(1) - cross
        ctx.save_for_backward(log_p, kl if not detach_teacher else None)
        ctx.temperature = temperature
        ctx.dtypes = [z.dtype for z in logits]
        return kl * temperature**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_p, kl = ctx.saved_tensors
        grad = grad * ctx.temperature
        p = log_p.exp()
        with _full_precision(log_p.device):
            # student s: sum_t grad[t, s] * (p_s - p_t)
            weight = _minus_off_diagonal(grad.transpose(0, 1))
            grads = torch.einsum("stb,tbc->sbc", weight, p)
            if kl is not None:
                # teacher t: p_t * sum_s grad[t, s] * (log p_t - log p_s - KL_ts)
                surprise = torch.einsum("tsb,sbc->tbc", _minus_off_diagonal(grad), log_p)
                grads += p * (surprise - (grad * kl).sum(dim=1).unsqueeze(2))
        given = [
            grads[i].to(dtype) if ctx.needs_input_grad[i + 2] else None
            for i, dtype in enumerate(ctx.dtypes)
        ]
        return None, None, *given


class _PairwiseKLAtPositions(torch.autograd.Function):
    """The same for logits [B, C, S], a few samples or a stretch of one's positions at a time."""

    @staticmethod
    def forward(ctx: Any, temperature: float, detach_teacher: bool, *logits: Tensor) -> Tensor:
        peers, dtype = len(logits), _wide(logits[0][:0]).dtype
        log_p = [torch.empty(z.shape, dtype=dtype, device=z.device) for z in logits]
        kl = logits[0].new_zeros((peers, peers, len(logits[0]), logits[0].shape[2]), dtype=dtype)
        for b, at in _stretches(logits[0]):
            here = []
            for z, to in zip(logits, log_p, strict=True):
                x = z[b, :, at].to(dtype)
                x = torch.log_softmax(x if temperature == 1.0 else x / temperature, dim=1)
                to[b, :, at] = x
                here.append(x)
            p = [x.exp() for x in here]
            for t, s in itertools.combinations(range(peers), 2):
                ratio = here[t] - here[s]
                kl[t, s, b, at] = torch.linalg.vecdot(p[t], ratio, dim=1)
                kl[s, t, b, at] = -torch.linalg.vecdot(p[s], ratio, dim=1)
        ctx.save_for_backward(*log_p, kl if not detach_teacher else None)
        ctx.temperature = temperature
        ctx.dtypes = [z.dtype for z in logits]
        return kl * temperature**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *log_p, kl = ctx.saved_tensors
        grad = grad * ctx.temperature
        needed = [i for i in range(len(log_p)) if ctx.needs_input_grad[i + 2]]
        grads = {i: torch.empty_like(log_p[i], dtype=ctx.dtypes[i]) for i in needed}
        for b, at in _stretches(log_p[0]):
            weight = grad[:, :, b, at].unsqueeze(3)  # the diagonal does not count
            here = [x[b, :, at] for x in log_p]
            p = [x.exp() for x in here]
            for i in needed:
                others = [j for j in range(len(p)) if j != i]
                g = p[i] * sum(weight[t, i] for t in others)
                for t in others:
                    g.addcmul_(p[t], weight[t, i], value=-1)
                if kl is not None:
                    for s in others:
                        surprise = here[i] - here[s] - kl[i, s, b, at].unsqueeze(1)
                        g.addcmul_(p[i] * weight[i, s], surprise)
                grads[i][b, :, at] = g
        return None, None, *(grads.get(i) for i in range(len(log_p)))


def _stretches(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut [B, C, S] into a few samples, or a stretch of one's positions: what a CPU's cache holds.

    Elsewhere no sample is cut.
    """
    samples, classes, length = x.shape
    step = max(1, _STRETCH // classes) if x.device.type == "cpu" else max(1, length)
    together = max(1, _STRETCH // max(1, classes * length))
    for b in range(0, samples, together):
        for start in range(0, length, step):
            yield slice(b, min(b + together, samples)), slice(start, min(start + step, length))


def _minus_off_diagonal(weight: Tensor) -> Tensor:
    """Turn [N, N, ...] into its row sums on the diagonal, and minus its entries off it."""
    rows = weight.sum(dim=1)
    weight = -weight
    for i in range(len(weight)):
        weight[i, i] += rows[i]
    return weight


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Keep TF32 out of the contraction: a KL is a small difference of large sums.

    Matrix products ask torch's newer setting alone, where there is one (from 2.9 on). To ask the
    older one fails where somebody set the newer; to set it would make "medium" "high" for good.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    newer = hasattr(matmul, "fp32_precision")
    setting, exact = ("fp32_precision", "ieee") if newer else ("allow_tf32", False)
    before = getattr(matmul, setting)
    setattr(matmul, setting, exact)
    try:
        yield
    finally:
        setattr(matmul, setting, before)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_shapes(outputs: Sequence[PeerOutput], names: Sequence[str] | None) -> None:
    names = names or [str(i) for i in range(len(outputs))]
    if len(names) != len(outputs):
        raise ValueError(f"{len(outputs)} outputs for {len(names)} peers: {', '.join(names)}")
    for what in ("logits", "score"):
        shapes = [tuple(getattr(output, what).shape) for output in outputs]
        if len(set(shapes)) > 1:
            told = ", ".join(
                f"{name}: {list(shape)}" for name, shape in zip(names, shapes, strict=True)
            )
            raise ValueError(f"peers must give {what} of one shape, got {told}")


def _common_mask(outputs: Sequence[PeerOutput]) -> Tensor | None:
    masks = [output.mask for output in outputs if output.mask is not None]
    if all(mask is masks[0] for mask in masks):
        return masks[0] if masks else None
    return torch.stack(masks).all(dim=0)


def _over_positions(x: Tensor, mask: Tensor | None, axes: int) -> Tensor:
    """Take the mean over each sample's valid positions: all after the first ``axes``, if any."""
    if x.dim() == axes:
        return x
    if mask is None:
        return x.flatten(axes).mean(dim=axes)
    valid = mask.flatten(1).sum(dim=1).clamp(min=1)
    return (x * mask).flatten(axes).sum(dim=axes) / valid


def _stack_correct(outputs: Sequence[PeerOutput]) -> Tensor | None:
    correct = [output.correct for output in outputs if output.correct is not None]
    return torch.stack(correct) if len(correct) == len(outputs) else None
