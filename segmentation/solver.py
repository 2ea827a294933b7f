"""Optimizers, clipping and schedules, from the keys that Detectron2 and Mask2Former share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)
from torch import nn

from segmentation.errors import ConfigError

__all__ = ["build_clip", "build_lr_scheduler", "build_optimizer"]

_POSITIONS = ("relative_position_bias_table", "absolute_pos_embed")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build a peer's optimizer over the parameters that learn.

    ``SGD`` is Detectron2's own. ``ADAMW`` has Mask2Former's groups: the backbone's rate times
    SOLVER.BACKBONE_MULTIPLIER, no weight decay on tables of positions, and
    SOLVER.WEIGHT_DECAY_NORM and _EMBED on norms and embeddings.

    Raises:
        ConfigError: Another SOLVER.OPTIMIZER, or nothing that learns.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("every parameter of this model is frozen; give the peer FROZEN: True")
    solver = cfg.SOLVER
    builders: dict[str, Callable[[], Any]] = {
        "SGD": lambda: _class(cfg, torch.optim.SGD)(
            _sgd_groups(cfg, model),
            lr=solver.BASE_LR,
            momentum=solver.MOMENTUM,
            nesterov=solver.NESTEROV,
            weight_decay=solver.WEIGHT_DECAY,
            **_kernels(cfg),
        ),
        "ADAMW": lambda: _class(cfg, torch.optim.AdamW)(
            _adamw_groups(cfg, model),
            lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            **_kernels(cfg),
        ),
    }
    if solver.OPTIMIZER not in builders:
        raise ConfigError(
            f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; choose from {', '.join(builders)}"
        )
    return builders[solver.OPTIMIZER]()


def build_clip(cfg: CfgNode, model: nn.Module) -> Callable[[], object] | None:
    """Return what clips all gradients of a model together, or None.

    Detectron2 itself clips parameter by parameter, inside the optimizer; Mask2Former's
    ``full_model`` type is clipped here.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not _clips_whole(cfg):
        return None
    learning = [p for p in model.parameters() if p.requires_grad]
    return functools.partial(
        nn.utils.clip_grad_norm_, learning, clip.CLIP_VALUE, norm_type=clip.NORM_TYPE
    )


def _clips_whole(cfg: CfgNode) -> bool:
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return clip.ENABLED and clip.CLIP_TYPE == "full_model" and clip.CLIP_VALUE > 0


def _kernels(cfg: CfgNode) -> dict[str, bool]:
    """Choose the quickest kernels for a step.

    Fused ones also unscale float16's gradients and skip a step by themselves, on the device, where
    others make the GradScaler wait for it. What clips inside the optimizer must see gradients that
    are unscaled before.
    """
    return {"foreach": True} if _clips_inside(cfg) else {"fused": True}


def _clips_inside(cfg: CfgNode) -> bool:
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return clip.ENABLED and clip.CLIP_TYPE != "full_model"


def _class(cfg: CfgNode, kind: type[torch.optim.Optimizer]) -> Any:
    if cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model":
        return kind
    return maybe_add_gradient_clipping(cfg, kind)


def _sgd_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    solver = cfg.SOLVER
    return get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )


def _adamw_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        lr_factor_func=lambda name: solver.BACKBONE_MULTIPLIER if "backbone" in name else 1.0,
        overrides={name: {"weight_decay": 0.0} for name in _POSITIONS},
    )
    embeddings = [
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    ]
    # the same parameter again: what comes later replaces the values it names
    other = {"params": embeddings, "weight_decay": solver.WEIGHT_DECAY_EMBED}
    return reduce_param_groups([*groups, other])
