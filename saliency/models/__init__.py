"""Video saliency models by name: clips in, maps out, with the published weights' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.options import near
from saliency.models.base import ModelError, SaliencyModel
from saliency.models.tmfi_net import TMFINet
from saliency.models.vinet_a import ViNetA
from saliency.models.vinet_s import ViNetS
from saliency.models.weights import (
    load_backbone,
    load_files,
    load_published,
    published_state_dict,
)

__all__ = [
    "MODELS",
    "ModelError",
    "SaliencyModel",
    "check_name",
    "create_model",
    "load_backbone",
    "load_published",
    "published_state_dict",
]

MODELS: dict[str, type[SaliencyModel]] = {model.name: model for model in (ViNetS, ViNetA, TMFINet)}


def check_name(name: str) -> None:
    """Refuse a name that is none of ``MODELS``.

    Raises:
        ModelError: Names it.
    """
    if name not in MODELS:
        hint = near(name, MODELS)
        raise ModelError(f"model {name!r}, expected one of {', '.join(MODELS)}{hint}")


def create_model(
    name: str,
    checkpoint: Path | str | None = None,
    *,
    backbone: Path | str | None = None,
    **options: Any,
) -> SaliencyModel:
    """Build a saliency model, with the weights asked for.

    Args:
        name: ``vinet_s``, ``vinet_a`` or ``tmfi_net``.
        checkpoint: File with published weights of the whole model. Never executes code.
        backbone: File with a pretrained backbone (see ``load_backbone``), or ``kinetics`` to
            download torchvision's; the decoder is then untrained.
        options: For the model's constructor.

    Returns:
        The model in train mode. ``view`` is what its clips must look like.

    Raises:
        ModelError: An unknown name, or weights that cannot be had.
        CheckpointError: A file that is missing, broken, unsafe or of another model.
    """
    check_name(name)
    model = MODELS[name](**options)
    load_files(model, checkpoint, backbone)
    return model
