"""Who teaches whom: from scores to role weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ONE_WAY = "one_way:"
SELF = "self"


class NonFiniteError(ValueError):
    """A peer's loss or score is NaN or infinite."""


def assign_roles(
    score: Tensor,
    rule: str,
    *,
    names: Sequence[str] | None = None,
    margin: float | None = None,
    gap_power: float = 0.0,
    generator: torch.Generator | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Weigh who teaches whom, for every sample.

    Args:
        score: How well each peer does [N, B, (S*)]; higher is better; finite.
        rule: One of ``RULES``, or ``one_way:NAME`` with a name from ``names``; ``self``: everyone
            its own peer and nobody else, whatever the scores.
        names: The peers' names, in order; ``"0"``, ``"1"``, ... where not given.
        margin: Teach only where the teacher's score exceeds the student's by more than this, in
            the unit of the score (>= 0). None: the rule alone decides.
        gap_power: Multiply each weight by (1 - exp(-gap))^power (>= 0), where the gap is the
            teacher's score minus the student's: it grows with the gap from 0 to at most 1, and is 0
            where the student does better. 0: the rule alone decides.
        generator: Source of the draws of ``random``, on the score's device.
        check_finite: Refuse scores that are not finite, on the CPU, where that costs no
            synchronisation. False: the caller looks at them (``common.finite``); a peer whose score
            is NaN beats nobody.

    Returns:
        Weight with which peer t teaches peer s, [N(t), N(s), B, (S*)], in the score's dtype, zero
        diagonal (but for ``self``). Carries no gradient.

    Raises:
        ValueError: Unknown rule or name, fewer than two peers for a rule that transfers, or a
            negative margin or power.
        NonFiniteError: A score that is not finite (names the peer and the sample).

    Source: Jain et al., TMLR 2025 (``best``); Zhang et al., CVPR 2018 (``mutual``); Hinton et al.,
    2015 (``one_way``); Jacobs et al., "Adaptive mixtures of local experts", 1991 (``mixture``: the
    softmax of all scores; with minus the cross entropy it is how likely each peer is the one that
    the sample is from, and a sample's lessons weigh N - 1 in all, as under ``best``). Unlike the
    published two-model script, a tie at the top teaches nobody.
    Teachers are weighed by their per-sample loss as in Zhang et al., ICASSP 2022 (confidence-aware
    multi-teacher distillation), but against each student's own: with minus the cross entropy as
    score, 1 - exp(-gap) is by what share the student's probability of the true class falls short.
    """
    score = score.detach()
    peers = score.shape[0]
    names = list(names) if names is not None else [str(i) for i in range(peers)]
    check_rule(rule, names)
    if len(names) != peers:
        raise ValueError(f"{len(names)} names for {peers} peers: {', '.join(names)}")
    if margin is not None and not margin >= 0:
        raise ValueError(f"margin is {margin}; expected 0 or more")
    if not gap_power >= 0:
        raise ValueError(f"gap_power is {gap_power}; expected 0 or more")
    if check_finite and score.device.type == "cpu":
        _check_finite(score, names)
    gap = score.unsqueeze(1) - score.unsqueeze(0)
    if rule == SELF:
        return (~_off_diagonal(score)).expand_as(gap).to(score.dtype)
    allowed = _off_diagonal(score).expand_as(gap)
    if margin is not None:
        allowed = allowed & (gap > margin)
    if rule.startswith(ONE_WAY):
        roles = _one_way(score, allowed, names.index(rule.removeprefix(ONE_WAY)))
    elif rule == "random":
        roles = _random(score, allowed, generator)
    else:
        roles = _RULES[rule](score, gap, allowed)
    return roles * shortfall(gap) ** gap_power if gap_power else roles


def with_own(roles: Tensor) -> Tensor:
    """Let whoever teaches a sample teach its own peer too, as much as those it teaches most.

    Args:
        roles: [N(t), N(s), B, (S*)] with a zero diagonal, of teachers that are copies.
    """
    return roles + torch.diag_embed(roles.amax(dim=1).movedim(0, -1)).movedim((-2, -1), (0, 1))


def shortfall(gap: Tensor) -> Tensor:
    """Return 1 - exp(-gap), in [0, 1): how far a student falls short; 0 where it does not."""
    return -torch.expm1(-gap.clamp(min=0))


def check_rule(rule: str, names: Sequence[str]) -> None:
    """Refuse a rule that does not exist or does not fit these peers.

    Raises:
        ValueError: Names the rule, what was expected, and the choices.
    """
    if rule.startswith(ONE_WAY):
        teacher = rule.removeprefix(ONE_WAY)
        if teacher not in names:
            raise ValueError(
                f"rule {rule!r}: no peer is named {teacher!r}; peers: {', '.join(names)}"
            )
    elif rule not in (*RULES, SELF):
        choices = f"{', '.join(RULES)}, {SELF}, {ONE_WAY}NAME"
        raise ValueError(f"unknown rule {rule!r}; choose from {choices}")
    if rule not in ("none", SELF) and len(names) < 2:
        alone = f" ({names[0]})" if names else ""
        raise ValueError(
            f"rule {rule!r} needs two peers or more, got {len(names)}{alone}; give another, or "
            "train one alone under rule 'none'"
        )


def compares_scores(rule: str, margin: float | None = None, gap_power: float = 0.0) -> bool:
    """Whether the roles depend on the scores; see ``assign_roles``."""
    if rule in ("none", SELF):
        return False
    return rule in COMPARING or margin is not None or bool(gap_power)


def _check_finite(score: Tensor, names: Sequence[str]) -> None:
    if bool(torch.isfinite(score).all()):
        return
    peer, sample = (int(i) for i in (~torch.isfinite(score)).nonzero()[0][:2])
    raise NonFiniteError(
        f"the score of peer {names[peer]!r} is not finite at sample {sample} of the batch; "
        "its loss diverged or its input is broken: lower its lr, clip its gradients, or use bf16"
    )


def _off_diagonal(score: Tensor) -> Tensor:
    peers = score.shape[0]
    mask = ~torch.eye(peers, dtype=torch.bool, device=score.device)
    return mask.view(peers, peers, *[1] * (score.dim() - 1))


def _none(score: Tensor, gap: Tensor, allowed: Tensor) -> Tensor:
    return torch.zeros_like(gap)


def _best(score: Tensor, gap: Tensor, allowed: Tensor) -> Tensor:
    beats_all = (gap > 0).sum(dim=1, keepdim=True) == len(score) - 1  # all but itself
    return (beats_all & allowed).to(score.dtype)


def _better_sum(score: Tensor, gap: Tensor, allowed: Tensor) -> Tensor:
    return ((gap > 0) & allowed).to(score.dtype)


def _better(score: Tensor, gap: Tensor, allowed: Tensor) -> Tensor:
    weight = _better_sum(score, gap, allowed)
    return weight / weight.sum(dim=0, keepdim=True).clamp(min=1)


def _mutual(score: Tensor, gap: Tensor, allowed: Tensor) -> Tensor:
    return allowed.to(score.dtype) / (score.shape[0] - 1)


def _mixture(score: Tensor, gap: Tensor, allowed: Tensor) -> Tensor:
    return score.softmax(dim=0).unsqueeze(1) * allowed


def _one_way(score: Tensor, allowed: Tensor, teacher: int) -> Tensor:
    weight = torch.zeros(allowed.shape, dtype=score.dtype, device=score.device)
    weight[teacher] = allowed[teacher].to(score.dtype)
    return weight


def _random(score: Tensor, allowed: Tensor, generator: torch.Generator | None) -> Tensor:
    peers = score.shape[0]
    drawn = torch.randint(peers, score.shape[1:], generator=generator, device=score.device)
    teachers = torch.arange(peers, device=score.device).view(-1, *[1] * (score.dim() - 1))
    return ((teachers == drawn).unsqueeze(1) & allowed).to(score.dtype)


_RULES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "best": _best,
    "better": _better,
    "better_sum": _better_sum,
    "mixture": _mixture,
    "mutual": _mutual,
    "none": _none,
}
RULES = (*_RULES, "random")
COMPARING = ("best", "better", "better_sum", "mixture")
"""Those that look at the scores; others do so only with a margin or a power of the gap."""
