"""Classifier heads: where a model keeps its own, and what becomes of it when classes change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from common.checkpoint import CheckpointError, load_weights

_logger = logging.getLogger(__name__)

Weights = Mapping[str, Tensor]

# How DINOv2 and MAE evaluate their classifiers; timm's configs of those names say otherwise.
OFFICIAL_VIEW = {
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
}


class ModelError(ValueError):
    """A model that is unknown, has no weights or does not fit what is asked; says the way out."""


def head_of(module: nn.Module) -> tuple[str, ...]:
    """Name the classifier layers.

    Args:
        module: With a ``pretrained_cfg`` that names them under ``classifier``.

    Returns:
        State-dict prefixes that end in a dot, fit for ``str.startswith``; distilled models have
        two.

    Raises:
        ModelError: The model has no classifier.
    """
    names = module.state_dict()
    head = tuple(p for p in _head_names(module) if any(name.startswith(p) for name in names))
    if not head:
        name = module.pretrained_cfg.get("architecture", type(module).__name__)
        raise ModelError(
            f"{name}: this model has no classifier; give num_classes for a new one, or take a "
            "model that has one"
        )
    return head


def _head_names(module: nn.Module) -> tuple[str, ...]:
    names = module.pretrained_cfg.get("classifier")
    if not names and hasattr(module, "get_classifier"):  # a model that a user has registered
        layers = module.get_classifier()
        layers = layers if isinstance(layers, tuple) else (layers,)
        names = [n for n, part in module.named_modules() if any(part is x for x in layers)]
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names or ()))


def has_same_trunk(module: nn.Module, weights: Weights) -> bool:
    """Tell whether weights fit a model by name and shape; heads are not compared."""
    head = _head_names(module)
    own = {n: x.shape for n, x in module.state_dict().items() if not n.startswith(head)}
    return own == {n: x.shape for n, x in weights.items() if not n.startswith(head)}


def load_classifier(
    build: Callable[[int | None], nn.Module],
    weights: Weights,
    source: Path | str,
    num_classes: int | None,
    translate: Callable[[Weights, nn.Module], Weights] = lambda weights, module: weights,
) -> nn.Module:
    """Build a model with the classes of a file, or with new ones, and load the file.

    Args:
        build: Makes the model for a class count; None: the model's default.
        weights: The file's state dict.
        source: The file, for messages.
        num_classes: None: as many as the file's head has. Another count than the file's: all but
            the head is loaded, the head is new.
        translate: Brings the file's names and shapes to those of the model.

    Returns:
        The model, every value of it from the file but for a new head.

    Raises:
        CheckpointError: A file of another model, or one without a head where none is asked for.
    """
    module = build(num_classes)
    weights = translate(weights, module)
    prefixes = _head_names(module)
    heads = [weights[f"{p}weight"] for p in prefixes if f"{p}weight" in weights]
    found = len(heads[0]) if heads else None
    if num_classes is None and found not in (None, module.num_classes):
        module = build(found)
    if num_classes is None and found is None and has_same_trunk(module, weights):
        raise CheckpointError(
            f"{source}: holds no classifier; give num_classes for a new one on top of these weights"
        )
    if num_classes in (None, found):
        load_weights(module, weights, source)
        return module
    head = head_of(module)
    fresh = {name: x for name, x in module.state_dict().items() if name.startswith(head)}
    trunk = {name: x for name, x in weights.items() if not name.startswith(prefixes)}
    load_weights(module, {**trunk, **fresh}, source)
    _logger.warning("%s: new head, %d classes; its own: %s", source, num_classes, found or "none")
    return module
