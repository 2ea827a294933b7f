"""Pretrained classifiers by name: any of timm, two of Meta's, any of Hugging Face's."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, is_model, list_models
from torch import nn

from classification import dinov2, huggingface, mae
from classification.heads import ModelError, head_of
from classification.timm_models import check_timm, create_timm
from common.checkpoint import require_file

__all__ = [
    "PUBLISHED_TOP1",
    "ModelError",
    "create_classifier",
    "full_name",
    "head_of",
    "models_meant",
]

# ImageNet-1k top-1 in per cent, each at its own size, crop and interpolation. Sources: timm's
# results table at 224 pixels; the READMEs of facebookresearch/dinov2 (ViT-S/14, linear evaluation;
# it does not say of which of its heads) and facebookresearch/mae (ViT-B/16, fine-tuned).
PUBLISHED_TOP1 = {
    "resnext101_32x8d.fb_swsl_ig1b_ft_in1k": 84.276,
    "pit_b_224.in1k": 82.458,
    "senet154.gluon_in1k": 81.258,
    "resmlp_24_224.fb_distilled_in1k": 80.766,
    "resmlp_36_224.fb_in1k": 79.772,
    "coat_lite_mini.in1k": 79.104,
    "pit_xs_224.in1k": 78.196,
    dinov2.NAME: 81.1,
    mae.NAME: 83.664,
}


def full_name(name: str) -> str:
    """Add the default pretrained tag to a timm name that leaves it out; others stay."""
    if "." in name or not is_model(name):
        return name
    tag = get_pretrained_cfg(name).tag
    return f"{name}.{tag}" if tag else name


def models_meant(pattern: str) -> list[str]:
    """List what a name with ``*`` and ``?`` stands for.

    Args:
        pattern: ``pit_*``: timm's models that have published weights, each with its tags; or
            ``runs/*/*/best.safetensors``: files. A name without such signs stands for itself.

    Raises:
        ModelError: Nothing is named so.
    """
    if not any(sign in pattern for sign in "*?"):
        return [pattern]
    if pattern.endswith(".safetensors"):
        found = sorted(glob.glob(pattern))
    else:
        found = fnmatch.filter(list_models(pretrained=True), pattern)
    if not found:
        raise ModelError(
            f"{pattern}: stands for no file and for no model of timm that has published weights"
        )
    return found


_OWN = {dinov2.NAME: dinov2.create_dinov2, mae.NAME: mae.create_mae}

Checkpoint = Path | str | Sequence[Path | str]


def create_classifier(
    name: str,
    checkpoint: Checkpoint | None = None,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    trust_remote_code: bool = False,
    **model_kwargs: Any,
) -> nn.Module:
    """Build a classifier, with the weights asked for.

    Args:
        name: A timm name, with or without a pretrained tag; ``dinov2_vits14_lc``;
            ``mae_vit_base_ft``; ``hf:org/name`` or ``hf:/path/to/folder``.
        checkpoint: File or files with the weights; goes before ``pretrained``. Never executes code.
        pretrained: Fetch the published weights. ``hf:`` models always have their own.
        num_classes: None: as many as the weights have. Another count than theirs: a new head.
        img_size: Pixels, one number or (height, width); None: the model's own.
        in_chans: Channels of the images; None: the model's own.
        trust_remote_code: ``hf:`` alone: run Python code that the repository brings.
        model_kwargs: For the model's constructor; those that are None are left out, as timm does.

    Returns:
        The module in train mode, from normalised images to logits. ``pretrained_cfg`` has its view
        (``timm.data.resolve_model_data_config(module)``), ``num_classes`` its classes,
        ``transfer_name`` is ``name``.

    Raises:
        ModelError: A name, size or class count that does not fit, or weights that cannot be had.
        CheckpointError: A file that is missing, broken, unsafe or of another model.
    """
    if num_classes is not None and num_classes < 1:
        raise ModelError(f"{name}: num_classes {num_classes}; a classifier needs at least one")
    options = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans}
    options = {k: v for k, v in {**options, **model_kwargs}.items() if v is not None}
    if name not in _OWN:
        checkpoint = _one_file(name, checkpoint)
    if name.startswith(huggingface.PREFIX):
        options["trust_remote_code"] = trust_remote_code
        module = huggingface.create_huggingface(name, checkpoint, **options)
    elif trust_remote_code:
        raise ModelError(f"{name}: trust_remote_code is for {huggingface.PREFIX} models alone")
    elif name in _OWN:
        module = _OWN[name](checkpoint, pretrained=pretrained, **options)
    else:
        module = create_timm(name, checkpoint, pretrained=pretrained, others=_OWN, **options)
    head_of(module)
    _fit_statistics(module.pretrained_cfg)
    module.transfer_name = name
    return module


def check_source(name: str, checkpoint: Checkpoint | None = None, pretrained: bool = False) -> None:
    """Refuse a model that is not known, or files that are not there, before one is built.

    Nothing is read and no network is asked, so a model of a hub passes.

    Args:
        name, checkpoint, pretrained: See ``create_classifier``.

    Raises:
        ModelError: An unknown name, or no published weights.
        CheckpointError: A file that is missing.
    """
    if name not in _OWN and not name.startswith(huggingface.PREFIX):
        check_timm(name, _OWN, pretrained and checkpoint is None)
    several = [checkpoint] if isinstance(checkpoint, (str, Path)) else checkpoint or ()
    for file in several:
        require_file(file)


def _fit_statistics(cfg: dict[str, Any]) -> None:
    """Average mean and std where the model takes another number of channels."""
    channels = cfg["input_size"][0]
    for key in ("mean", "std"):
        if len(cfg[key]) != channels:
            cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * channels


def _one_file(name: str, checkpoint: Checkpoint | None) -> Path | str | None:
    if checkpoint is None or isinstance(checkpoint, (str, Path)):
        return checkpoint
    if len(checkpoint) != 1:
        raise ModelError(f"{name}: {len(checkpoint)} checkpoint files, expected one")
    return checkpoint[0]
