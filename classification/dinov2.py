"""DINOv2 ViT-S/14 with the official linear head on the last four blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.heads import OFFICIAL_VIEW, ModelError, Weights, load_classifier
from classification.hub import fetch
from classification.timm_models import build_stock
from common.checkpoint import CheckpointError, read_weights

NAME = "dinov2_vits14_lc"
FOLDER = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14"
BACKBONE_FILE = "dinov2_vits14_pretrain.pth"
HEAD_FILE = "dinov2_vits14_linear4_head.pth"
FILES = f"[/path/to/{BACKBONE_FILE},/path/to/{HEAD_FILE}]"
PATCH = 14
STORED_GRID = 37  # patches a side of the published position table: 518 pixels
BLOCKS = 4  # whose class tokens the head reads


class DINOv2Classifier(nn.Module):
    """A ViT-S/14 and a linear layer on four class tokens and the mean patch token.

    The state dict has the official wrapper's names, ``backbone.*`` and ``linear_head.*``, without
    ``backbone.mask_token``, which only masked training reads. The position table is that of
    ``img_size``; fine-tuning trains this table, not the published one of 37 x 37.

    Args:
        num_classes: > 0.
        img_size: Pixels, (height, width), multiples of 14.
        backbone_kwargs: For ``timm.models.VisionTransformer``.

    Source: facebookresearch/dinov2, hub/classifiers.py (layers=4).
    """

    def __init__(self, num_classes: int, img_size: tuple[int, int], **backbone_kwargs: Any) -> None:
        super().__init__()
        self.backbone = build_stock(
            NAME,
            "vit_small_patch14_dinov2",
            img_size=img_size,
            num_classes=0,
            **{"init_values": 1.0, **backbone_kwargs},
        )
        # The view of the linear head; the backbone's own name says 518 pixels, crop 1.0.
        self.pretrained_cfg = self.default_cfg = {
            "architecture": NAME,
            "url": f"{FOLDER}/{BACKBONE_FILE}",
            "input_size": (self.backbone.in_chans, *img_size),
            **OFFICIAL_VIEW,
            "first_conv": "backbone.patch_embed.proj",
            "classifier": "linear_head",
        }
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new linear layer in place of the head, on the backbone's device and dtype."""
        like = self.backbone.cls_token
        width = (BLOCKS + 1) * self.backbone.embed_dim
        self.linear_head = nn.Linear(width, num_classes, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(self.linear_head.weight, std=0.01)
        nn.init.zeros_(self.linear_head.bias)
        self.num_classes = self.pretrained_cfg["num_classes"] = num_classes

    def forward_features(self, images: Tensor) -> Tensor:
        """Images, normalised [B, 3, H, W] -> what the head reads [B, 1920].

        Class tokens of the last four blocks, earliest first, then the mean patch token of the last
        one; all behind the final norm.
        """
        blocks = self.backbone.forward_intermediates(
            images,
            indices=BLOCKS,
            norm=True,
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        classes = [prefix[:, 0] for _, prefix in blocks]
        return torch.cat([*classes, blocks[-1][0].mean(dim=1)], dim=1)

    def forward_head(self, features: Tensor) -> Tensor:
        """Features [B, 1920] -> logits [B, C]."""
        return self.linear_head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Images, normalised [B, 3, H, W] -> logits [B, C]."""
        return self.forward_head(self.forward_features(images))


def create_dinov2(
    checkpoint: Path | str | Sequence[Path | str] | None = None,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    **model_kwargs: Any,
) -> nn.Module:
    """Build the classifier.

    Args:
        checkpoint: The two official files, backbone first; or one file: an export of ours, the
            official wrapper's state dict, or with ``num_classes`` the backbone alone.
        pretrained: Fetch the official files, where no checkpoint is given.
        num_classes: None: those of the head, else 1000.
        img_size: Pixels, one number or (height, width), multiples of 14; None: 224.
        model_kwargs: For ``timm.models.VisionTransformer``.

    Raises:
        ModelError: A size that is no multiple of 14, or the official files cannot be fetched.
        CheckpointError: Broken files, of another model, another head or in the wrong order.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size or (224, 224))
    if len(size) != 2 or any(side <= 0 or side % PATCH for side in size):
        raise ModelError(
            f"{NAME}: img_size {img_size} is no multiple of {PATCH}; the nearest are "
            f"{[max(1, round(side / PATCH)) * PATCH for side in size]}"
        )

    def build(classes: int | None) -> DINOv2Classifier:
        return DINOv2Classifier(1000 if classes is None else classes, size, **model_kwargs)

    if checkpoint is None and pretrained:
        checkpoint = [fetch(f"{FOLDER}/{file}", NAME, FILES) for file in (BACKBONE_FILE, HEAD_FILE)]
    if checkpoint is None:
        return build(num_classes)
    files = [checkpoint] if isinstance(checkpoint, (str, Path)) else list(checkpoint)
    source = " + ".join(str(file) for file in files)
    return load_classifier(
        build,
        _read(files),
        source,
        num_classes,
        lambda weights, module: _fit_position_table(weights, module, files[0]),
    )


def _read(files: Sequence[Path | str]) -> Weights:
    """Read one or two files into one state dict with the official wrapper's names."""
    if len(files) not in (1, 2):
        raise CheckpointError(f"{NAME}: {len(files)} files; give {BACKBONE_FILE} and {HEAD_FILE}")
    weights = read_weights(files[0])
    if set(weights) == {"weight", "bias"}:
        raise CheckpointError(
            f"{files[0]}: a head, where the backbone is expected; give the backbone's file first, "
            f"then the head's: checkpoint={FILES}"
        )
    if any("register_tokens" in name for name in weights):
        raise CheckpointError(
            f"{files[0]}: the variant with register tokens; take {FOLDER}/{BACKBONE_FILE}"
        )
    if "cls_token" in weights:
        weights = {f"backbone.{name}": x for name, x in weights.items()}
    weights.pop("backbone.mask_token", None)
    if len(files) == 2:
        weights.update(_read_head(files[1]))
    return weights


def _read_head(file: Path | str) -> Weights:
    head = read_weights(file)
    if set(head) != {"weight", "bias"}:
        raise CheckpointError(
            f"{file}: no linear head (entries: {', '.join(list(head)[:4])}); expected weight and "
            f"bias as in {HEAD_FILE}, after the backbone's file"
        )
    if head["weight"].shape[1:] != (1920,):
        raise CheckpointError(
            f"{file}: head of shape {list(head['weight'].shape)}, expected [classes, 1920]; "
            f"take {HEAD_FILE} (dinov2_vits14_linear_head.pth reads one block, this one four)"
        )
    return {f"linear_head.{name}": x for name, x in head.items()}


def _fit_position_table(weights: Weights, module: nn.Module, file: Path | str) -> Weights:
    """Resample a published table to the model's grid; leave one of the model's own grid alone."""
    name = "backbone.pos_embed"
    grid = module.backbone.patch_embed.grid_size
    table = weights.get(name)
    if table is None or table.shape == module.backbone.pos_embed.shape:
        return weights
    if table.shape[1] != 1 + STORED_GRID**2:
        raise CheckpointError(
            f"{file}: position table for {table.shape[1] - 1} patches, expected {grid[0]} x "
            f"{grid[1]} (img_size {grid[0] * PATCH} x {grid[1] * PATCH}) or the published "
            f"{STORED_GRID} x {STORED_GRID}; give the img_size that the checkpoint was trained at"
        )
    return {**weights, name: resample_position_table(table, grid)}


def resample_position_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample the published 37 x 37 table as the official code does.

    Bicubic, without antialias, by a scale factor with an offset of 0.1 patch that also moves the
    sampling positions. timm resamples to an output size with antialias: another result.

    Args:
        table: [1, 1 + 37 * 37, D], the class token's row first.
        grid: Rows and columns of patches.

    Returns:
        [1, 1 + rows * columns, D].

    Source: facebookresearch/dinov2, models/vision_transformer.py (interpolate_offset=0.1).
    """
    if grid == (STORED_GRID, STORED_GRID):
        return table
    first, rest = table[:, :1].float(), table[:, 1:].float()
    rest = rest.reshape(1, STORED_GRID, STORED_GRID, -1).permute(0, 3, 1, 2)
    scale = tuple((side + 0.1) / STORED_GRID for side in grid)
    rest = F.interpolate(rest, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([first, rest.flatten(2).transpose(1, 2)], dim=1)
