"""MAE ViT-B/16, fine-tuned on ImageNet-1k: a stock ViT with its own pooling and its own view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from classification.heads import OFFICIAL_VIEW, ModelError, load_classifier
from classification.hub import fetch
from classification.timm_models import build_stock
from common.checkpoint import read_weights

NAME = "mae_vit_base_ft"
URL = "https://dl.fbaipublicfiles.com/mae/finetune/mae_finetuned_vit_base.pth"


def create_mae(
    checkpoint: Path | str | None = None,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    **model_kwargs: Any,
) -> nn.Module:
    """Build the classifier; the mean of the patch tokens is normalised and classified.

    Args:
        checkpoint: The official file (weights under ``model``) or an export of ours; both have the
            names of timm's ViT.
        pretrained: Fetch the official file, where no checkpoint is given.
        num_classes: None: those of the file, else 1000.
        img_size: 224; the official model takes no other.
        model_kwargs: For ``timm.models.VisionTransformer``.

    Raises:
        ModelError: Another size, or the official file cannot be fetched.
        CheckpointError: A broken file, or one of another model.

    Source: facebookresearch/mae, models_vit.py and its fine-tuning recipe.
    """
    if img_size not in (None, 224, (224, 224), [224, 224]):
        raise ModelError(f"{NAME}: img_size {img_size}, but the official model takes 224 alone")

    def build(classes: int | None) -> nn.Module:
        options = {"drop_path_rate": 0.1, **model_kwargs, "global_pool": "avg"}
        classes = 1000 if classes is None else classes
        module = build_stock(NAME, "vit_base_patch16_224", num_classes=classes, **options)
        # The stock name's view is another one: mean and std 0.5, crop 0.9.
        module.pretrained_cfg = module.default_cfg = {
            "architecture": NAME,
            "url": URL,
            "input_size": (module.in_chans, 224, 224),
            **OFFICIAL_VIEW,
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        return module

    if checkpoint is None and pretrained:
        checkpoint = fetch(URL, NAME, f"/path/to/{Path(URL).name}", md5="1b25e9")
    if checkpoint is None:
        return build(num_classes)
    return load_classifier(build, read_weights(checkpoint), checkpoint, num_classes)
