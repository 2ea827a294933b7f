"""Per-sample losses between saliency maps, with finite gradients on constant and empty maps too."""

from __future__ import annotations

import torch
from torch import Tensor

# as the published code writes it; keeps the logarithm of 0 and the division by 0 finite
EPS = 2.2204e-16
_PIXELS = (1, 2)


def kldiv(pred: Tensor, target: Tensor, *, eps: float = EPS) -> Tensor:
    """Measure how far a map is from another one: KL(target || pred) of the maps over their sums.

    Args:
        pred: Approximating maps [B, H, W], not negative, any positive scale; a float dtype.
        target: Approximated maps [B, H, W], not negative, any positive scale.
        eps: Floor under the logarithm and the division.

    Returns:
        Nats [B], in float32 or wider. 0 where the target is empty (sums to 0): nothing to learn
        from. Where only ``pred`` is empty, about ``-log(eps)`` less the target's entropy, and no
        gradient to ``pred``. Gradient reaches both maps, so that two models can be compared. It is
        about 1 / eps where ``pred`` is 0 and ``target`` is not: more than float16 holds, so a model
        should end in a float32 activation.

    Raises:
        ValueError: Shapes that differ or are not [B, H, W], or a ``pred`` that is not float.

    Source: KLdiv of the MIT Saliency Benchmark.
    """
    p, g = _pair(pred, target)
    ours, theirs = _over_sum(p), _over_sum(g)
    return (theirs * (eps + theirs / (ours + eps)).log()).sum(_PIXELS)


def cc(pred: Tensor, target: Tensor) -> Tensor:
    """Correlate maps, pixel by pixel.

    Args:
        pred: Maps [B, H, W] of a float dtype.
        target: Maps [B, H, W].

    Returns:
        Pearson's r [B] in [-1, 1] up to rounding, higher is better, in float32 or wider. 0, without
        gradient, where either map is constant. Gradient reaches both maps.

    Raises:
        ValueError: As ``kldiv``.
    """
    p, g = _pair(pred, target)
    flat = constant(p) | constant(g)
    p, g = _centred(p), _centred(g)
    power = p.square().sum(_PIXELS) * g.square().sum(_PIXELS)
    r = (p * g).sum(_PIXELS) / power.masked_fill(flat, 1.0).sqrt()
    return r.masked_fill(flat, 0.0)


def similarity(pred: Tensor, target: Tensor) -> Tensor:
    """Intersect maps as histograms: both from their minimum, over their sum.

    Args:
        pred: Maps [B, H, W] of a float dtype.
        target: Maps [B, H, W].

    Returns:
        Share in common [B] in [0, 1], higher is better, in float32 or wider. 0, without gradient,
        where either map is constant. Gradient reaches both maps.

    Raises:
        ValueError: As ``kldiv``.

    Source: similarity of the MIT Saliency Benchmark. Unlike the published trainer's, not averaged
    over the batch, so that samples can be told apart.
    """
    p, g = _pair(pred, target)
    flat = constant(p) | constant(g)
    shared = torch.minimum(_histogram(p), _histogram(g)).sum(_PIXELS)
    return shared.masked_fill(flat, 0.0)


def nss(pred: Tensor, fixations: Tensor) -> Tensor:
    """Average the standardised map over the fixations (normalised scanpath saliency).

    Args:
        pred: Maps [B, H, W] of a float dtype.
        fixations: How often each pixel was looked at [B, H, W], any dtype; a weight, so that any
            positive value does for a binary map.

    Returns:
        Standard deviations (of the sample, n - 1) above the mean [B], higher is better, in float32
        or wider. 0, without gradient, where the map is constant or nobody looked. Gradient reaches
        ``pred``.

    Raises:
        ValueError: As ``kldiv``.

    Source: NSS of the MIT Saliency Benchmark. Unlike the published trainer's, it has a gradient.
    """
    p, weight = _pair(pred, fixations, "fixations")
    undefined = constant(p) | empty(weight)
    z = _centred(p)
    spread = z.square().sum(_PIXELS) / max(z.shape[1] * z.shape[2] - 1, 1)
    scale = spread.masked_fill(undefined, 1.0).sqrt()
    looks = weight.sum(_PIXELS).masked_fill(undefined, 1.0)
    return ((z * weight).sum(_PIXELS) / (scale * looks)).masked_fill(undefined, 0.0)


def l1(pred: Tensor, target: Tensor) -> Tensor:
    """Average the absolute difference over the pixels [B]; gradient reaches both maps.

    Raises:
        ValueError: As ``kldiv``.
    """
    p, g = _pair(pred, target)
    return (p - g).abs().mean(_PIXELS)


_TERMS = {"kl": kldiv, "cc": cc, "similarity": similarity, "l1": l1}


def saliency_loss(
    pred: Tensor,
    target: Tensor,
    fixations: Tensor | None = None,
    *,
    kl: float = 1.0,
    cc: float = -1.0,
    similarity: float = 0.0,
    nss: float = 0.0,
    l1: float = 0.0,
) -> Tensor:
    """Weigh and add the losses of each sample; KL - CC unless told otherwise.

    Args:
        pred: Predicted maps [B, H, W] of a float dtype.
        target: Ground truth [B, H, W].
        fixations: Fixation maps [B, H, W]; only ``nss`` reads them.
        kl: Weight of ``kldiv``. A term whose weight is 0 is not computed.
        cc: Weight of ``cc``; negative, as more is better.
        similarity: Weight of ``similarity``; negative, as more is better.
        nss: Weight of ``nss``; negative, as more is better.
        l1: Weight of ``l1``.

    Returns:
        Loss [B], lower is better, in float32 or wider, with gradient. A term that is not defined
        for a sample (see there) adds 0: with KL - CC an empty target gives 0 and teaches nothing.

    Raises:
        ValueError: Shapes that differ or are not [B, H, W], ``nss`` without fixations, or every
            weight 0.
    """
    weights = {"kl": kl, "cc": cc, "similarity": similarity, "l1": l1}
    terms = [weight * _TERMS[name](pred, target) for name, weight in weights.items() if weight]
    if nss:
        terms.append(nss * _fixated(pred, fixations))
    if not terms:
        raise ValueError("every weight of the loss is 0; expected one that is not, such as kl=1")
    return torch.stack(terms).sum(dim=0)


def _fixated(pred: Tensor, fixations: Tensor | None) -> Tensor:
    if fixations is None:
        raise ValueError("a weight for nss needs fixation maps; pass fixations=, or nss=0")
    return nss(pred, fixations)


def constant(maps: Tensor) -> Tensor:
    """Say which maps [B, H, W] have one value only [B]; a map with a NaN is not constant."""
    low, high = _limits(maps)
    return high - low <= _tiny(maps)


def empty(maps: Tensor) -> Tensor:
    """Say which maps [B, H, W] sum to 0 [B]; a map with a NaN is not empty."""
    return maps.detach().sum(_PIXELS).abs() <= _tiny(maps)


def check_maps(**maps: Tensor) -> None:
    """Refuse maps that do not belong together.

    Raises:
        ValueError: A shape that is not [B, H, W] or not the first one's, or a first one that is not
            float (names the argument).
    """
    (name, first), *others = maps.items()
    if first.dim() != 3 or 0 in first.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(first.shape)}; expected [B, H, W] with pixels")
    if not first.is_floating_point():
        raise ValueError(
            f"{name} has dtype {first.dtype}; expected a float one, use {name}.float()"
        )
    for other, x in others:
        if x.shape != first.shape:
            raise ValueError(
                f"{other} has shape {tuple(x.shape)}, {name} {tuple(first.shape)}; expected the "
                f"same, resize {name} first"
            )


def _pair(pred: Tensor, target: Tensor, name: str = "target") -> tuple[Tensor, Tensor]:
    """Check two maps; return both in the wider of their dtypes, at least float32."""
    check_maps(**{"pred": pred, name: target})
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    return pred.to(dtype), target.to(dtype)


def _tiny(maps: Tensor) -> float:
    return torch.finfo(maps.dtype).tiny


def _limits(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each map [B], without gradient."""
    maps = maps.detach()
    return maps.amin(_PIXELS), maps.amax(_PIXELS)


def _over_sum(maps: Tensor) -> Tensor:
    """Divide each map by its sum; an empty one becomes zeros, without gradient."""
    void = empty(maps)[:, None, None]
    total = maps.sum(_PIXELS, keepdim=True)
    return (maps / total.masked_fill(void, 1.0)).masked_fill(void, 0.0)


def scale_to_unit(maps: Tensor) -> Tensor:
    """Scale each map to [0, 1]; a constant one becomes zeros.

    Minimum and range are numbers to autograd: whatever follows must not depend on them.
    """
    low, high = _limits(maps)
    extent = (high - low).masked_fill(constant(maps), 1.0)
    return (maps - low[:, None, None]) / extent[:, None, None]


def _centred(maps: Tensor) -> Tensor:
    # scaled first: the mean of a nearly constant map would lose its digits
    unit = scale_to_unit(maps)
    return unit - unit.mean(_PIXELS, keepdim=True)


def _histogram(maps: Tensor) -> Tensor:
    # the minimum is 0 already, but the sum depends on it, so its gradient counts
    unit = scale_to_unit(maps)
    return _over_sum(unit - unit.amin(_PIXELS, keepdim=True))
