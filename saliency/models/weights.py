"""Weights of the saliency models: published checkpoints, and pretrained backbones."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from common.checkpoint import CheckpointError, load_weights, read_weights
from saliency.models.base import ModelError, SaliencyModel

KINETICS = "kinetics"

_logger = logging.getLogger(__name__)

Weights = Mapping[str, Tensor]

# Names that one kind of published checkpoint alone has.
_MARKS = {
    "vinet_s": "backbone.base1.",
    "vinet_a": "backbone.slow_res1.",
    "tmfi_net": "backbone.patch_embed.",
}
# In files with a backbone: what comes after it, in published checkpoints and in Video Swin's.
_BEHIND_BACKBONE = ("neck.", "decoder.", "cls_head.")


def published_state_dict(model: SaliencyModel) -> OrderedDict[str, Tensor]:
    """Return a model's weights as the published checkpoints have them: names, order, shapes.

    The same as ``model.state_dict()``; tensors are shared with the model.
    """
    return OrderedDict(model.state_dict())


def load_published(
    model: SaliencyModel, weights: Weights, source: Path | str = "these weights"
) -> None:
    """Load a published checkpoint, all of it and nothing else.

    Args:
        model: To be changed.
        weights: Published names to tensors; the prefix ``module.`` of DataParallel is removed.
        source: The file, for messages.

    Raises:
        CheckpointError: Names that are missing, left over or of another shape, or values that are
            not finite; says which, and which of our models the file seems to be of. The model is
            unchanged.
    """
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    own = model.state_dict()
    try:
        _check_positions(own, weights, source)
        load_weights(model, weights, source)
    except CheckpointError as error:
        found = _recognise(weights)
        if found in (None, model.name):
            raise
        raise CheckpointError(
            f"{error}. It seems to be of {found}: give it to create_model({found!r}, ...)"
        ) from error


def _check_positions(own: Weights, weights: Weights, source: Path | str) -> None:
    """Refuse tables of positions, which are facts and not learned, that are not the model's."""
    for name in own:
        if not name.endswith("relative_position_index") or name not in weights:
            continue
        mine, other = own[name], weights[name]
        if mine.shape == other.shape and not torch.equal(mine.to(other.device), other):
            raise CheckpointError(f"{source}: {name} is not that of this model's windows")


def _recognise(weights: Weights) -> str | None:
    for model, mark in _MARKS.items():
        if any(name.startswith(mark) for name in weights):
            return model
    return None


def load_backbone(
    model: SaliencyModel, weights: Weights, source: Path | str = "these weights"
) -> None:
    """Load a pretrained backbone, all of it; the decoder stays as it is.

    Args:
        model: To be changed.
        weights: Of torchvision's ``s3d`` (ViNet-S) or ``swin3d_s`` (TMFI-Net), or those of a
            published checkpoint, named ``backbone.*``. What the model has no place for is dropped
            by its name: torchvision's classifier, the norm after Swin's patch embedding, and in
            files with ``backbone.*`` the parts behind it.
        source: The file, for messages.

    Raises:
        CheckpointError: As ``load_published``.
    """
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    backbone = model.backbone
    prefix = "backbone." if any(name.startswith("backbone.") for name in weights) else ""
    outside = tuple(prefix + name for name in backbone.left_out)
    outside += _BEHIND_BACKBONE if prefix else ()
    dropped = [part for part in outside if any(name.startswith(part) for name in weights)]
    kept = {n.removeprefix(prefix): x for n, x in weights.items() if not n.startswith(outside)}
    if prefix:
        _check_positions(backbone.state_dict(), kept, source)
        load_weights(backbone, kept, source)
    elif backbone.pretrained is None:
        raise CheckpointError(f"{source}: no backbone of {model.name}; {_no_hub_weights(model)}")
    else:
        with torch.random.fork_rng(devices=[]):  # its own start is overwritten
            trunk = backbone.make_trunk()
        load_weights(trunk, kept, source)
        backbone.load_state_dict(type(backbone)(trunk).state_dict())
    if dropped:
        parts = ", ".join(part.removesuffix(".") for part in dropped)
        _logger.warning("%s: %s has no place for %s; dropped", source, model.name, parts)


def fetch_backbone(model: SaliencyModel) -> dict[str, Tensor]:
    """Download torchvision's Kinetics-400 weights of a model's backbone, once.

    Raises:
        ModelError: None are published, or they cannot be reached; says what to do instead.
    """
    pretrained = model.backbone.pretrained
    if pretrained is None:
        raise ModelError(f"{model.name}: backbone={KINETICS!r}, but {_no_hub_weights(model)}")
    try:
        return dict(pretrained.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (OSError, RuntimeError, UnpicklingError) as error:  # no connection, a broken file
        raise ModelError(
            f"{model.name}: cannot fetch {pretrained.url} ({error}); fetch it elsewhere and give "
            f"backbone='/path/to/{Path(pretrained.url).name}'"
        ) from error


def _no_hub_weights(model: SaliencyModel) -> str:
    return (
        "torchvision has no weights of this network; give backbone= a file with its backbone.* "
        "names, such as a published checkpoint of "
        f"{model.name}, or checkpoint= to load all of one"
    )


def load_files(
    model: SaliencyModel, checkpoint: Path | str | None, backbone: Path | str | None
) -> None:
    """Load a model from a published checkpoint, or its backbone alone.

    Raises:
        ModelError: Both are given, or the backbone cannot be fetched.
        CheckpointError: A file that is missing, broken, unsafe or of another model.
    """
    if checkpoint is not None and backbone is not None:
        raise ModelError(
            f"{model.name}: checkpoint and backbone are both given; a checkpoint has its backbone"
        )
    if checkpoint is not None:
        load_published(model, read_weights(checkpoint), checkpoint)
    elif backbone == KINETICS:
        load_backbone(model, fetch_backbone(model), KINETICS)
    elif backbone is not None:
        load_backbone(model, read_weights(backbone), backbone)
