"""Mask2Former as an architecture of Detectron2, from transformers' modules.

It reads the original's config keys, and its weights carry the original's names, so that a file goes
there and back; nothing has to be compiled.

Source: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from torch import Tensor, nn
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    SwinConfig,
    logging,
)
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from common.distributed import active
from segmentation import mask2former_names as names
from segmentation.errors import ConfigError
from segmentation.keys import value_at

STAGES = ("res2", "res3", "res4", "res5")
_SWIN, _RESNET = "D2SwinTransformer", "build_resnet_backbone"
# What transformers' model does in one way.
_ONLY = {
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder",
    "MODEL.SEM_SEG_HEAD.NORM": "GN",
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": 4,
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": list(STAGES[1:]),
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder",
    "MODEL.MASK_FORMER.PRE_NORM": False,
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": True,
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON": False,
    "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": False,
}
_ONLY_SWIN = {
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.PATCH_NORM": True,
    "MODEL.SWIN.QK_SCALE": None,
    "MODEL.SWIN.USE_CHECKPOINT": False,
    "MODEL.SWIN.OUT_FEATURES": list(STAGES),
}


@META_ARCH_REGISTRY.register()
class Mask2Former(nn.Module):
    """Mask2Former for semantic segmentation.

    Args:
        whole: transformers' model; it is taken apart.
        backbone: Gives a dict of feature maps; None: the Swin of ``whole``.
        pixel_mean, pixel_std: Of each channel.
        size_divisibility: Images are padded to a multiple of it.
        ignore_value: The label that is no class.
        deep_supervision: Learn from the predictions of every layer.

    Attributes:
        sem_seg_head: Its output holds ``pred_logits`` [B, Q, C + 1], the last being no object, and
            ``pred_masks`` [B, Q, h, w] at 1/4 of the padded image, in training and evaluation.
    """

    @configurable
    def __init__(
        self,
        *,
        whole: Mask2FormerForUniversalSegmentation,
        backbone: nn.Module | None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int,
        ignore_value: int,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.config = whole.config
        self.backbone = backbone or Swin(whole.model.pixel_level_module.encoder)
        self.sem_seg_head = Head(whole, ignore_value)
        self.criterion = Criterion(whole.config, whole.weight_dict)
        self.num_queries = whole.config.num_queries
        self.size_divisibility = size_divisibility
        self.deep_supervision = deep_supervision
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.register_state_dict_post_hook(_speak_original)
        self.register_load_state_dict_pre_hook(_hear_original)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the original's keys.

        Raises:
            ConfigError: A value that this model does not have; names it and the way out.
        """
        _check(cfg, _ONLY)
        swin = cfg.MODEL.BACKBONE.NAME == _SWIN
        if swin:
            _check(cfg, _ONLY_SWIN)
        elif cfg.MODEL.BACKBONE.NAME != _RESNET:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME!r}; choose from {_SWIN}, "
                f"{_RESNET}"
            )
        backbone = None if swin else build_backbone(cfg)
        divisibility = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
        with _quiet():  # about backbones it does not know; Detectron2's takes its place
            whole = Mask2FormerForUniversalSegmentation(_config(cfg, backbone))
        return {
            "whole": whole,
            "backbone": backbone,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "size_divisibility": divisibility if divisibility > 0 else 32,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "deep_supervision": cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> Any:
        """Give losses in training, else predictions.

        Args:
            batched_inputs: ``image`` [3, H, W] in INPUT.FORMAT; in training ``instances`` with
                ``gt_classes`` [K] and ``gt_masks`` bool [K, h, w]; in evaluation ``height`` and
                ``width`` of the output, where it shall differ from the image.

        Returns:
            In training the weighted losses by name, scalars with gradient; else for each image
            ``sem_seg`` [C, height, width], sum over queries of class times mask probability.
        """
        images = [x["image"].to(self.device) for x in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        padded = ImageList.from_tensors(images, self.size_divisibility)
        features = self.backbone(padded.tensor)
        outputs = self.sem_seg_head([features[stage] for stage in STAGES])
        if self.training:
            return self._losses(outputs, batched_inputs, padded.tensor.shape[-2:])
        return self._predictions(outputs, batched_inputs, padded)

    def _losses(
        self,
        outputs: Mapping[str, Any],
        batched_inputs: Sequence[Mapping[str, Any]],
        size: torch.Size,
    ) -> dict[str, Tensor]:
        instances = [x["instances"].to(self.device) for x in batched_inputs]
        classes = [found.gt_classes for found in instances]
        masks = [pad_masks(found.gt_masks, size) for found in instances]
        count = sum(len(found) for found in classes)
        self.criterion.masks = mean_over_ranks(count, self.device, self.criterion.process_group)
        others = outputs["aux_outputs"] if self.deep_supervision else []
        with torch.autocast(self.device.type, enabled=False):
            losses = self.criterion(
                outputs["pred_masks"].float(),
                outputs["pred_logits"].float(),
                masks,
                classes,
                [{name: x.float() for name, x in other.items()} for other in others],
            )
        weights = self.criterion.weight_dict
        return {
            name.replace("cross_entropy", "ce"): loss * weights[_term(name, weights)]
            for name, loss in losses.items()
        }

    def _predictions(
        self,
        outputs: Mapping[str, Any],
        batched_inputs: Sequence[Mapping[str, Any]],
        padded: ImageList,
    ) -> list[dict[str, Tensor]]:
        masks = F.interpolate(
            outputs["pred_masks"].float(),
            size=padded.tensor.shape[-2:],
            mode="bilinear",
            align_corners=False,
        )
        classes = outputs["pred_logits"].float().softmax(dim=-1)[..., :-1]
        found = []
        for i, (size, given) in enumerate(zip(padded.image_sizes, batched_inputs, strict=True)):
            scores = torch.einsum("qc,qhw->chw", classes[i], masks[i].sigmoid())
            height, width = given.get("height", size[0]), given.get("width", size[1])
            found.append({"sem_seg": sem_seg_postprocess(scores, size, height, width)})
        return found


class Swin(nn.Module):
    """transformers' Swin with Detectron2's names for its stages.

    Args:
        model: A SwinBackbone of four stages.
    """

    size_divisibility = 0

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        model.swin.layernorm.requires_grad_(False)  # nothing uses it

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of all stages."""
        return dict(zip(STAGES, self.model(images).feature_maps, strict=True))


class Head(nn.Module):
    """Pixel decoder, transformer decoder and classifier.

    Args:
        whole: transformers' model.
        ignore_value: As other heads of Detectron2 tell it.
    """

    _version = 2  # the original's: it takes names of another version for older ones

    def __init__(self, whole: Mask2FormerForUniversalSegmentation, ignore_value: int) -> None:
        super().__init__()
        self.ignore_value = ignore_value
        self.pixel_decoder = whole.model.pixel_level_module.decoder
        self.predictor = whole.model.transformer_module
        self.class_predictor = whole.class_predictor

    def forward(self, features: Sequence[Tensor]) -> dict[str, Any]:
        """Return the last layer's prediction, and those before it as ``aux_outputs``.

        The pixel decoder computes in float32, as the original does under AMP.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            decoded = self.pixel_decoder([feature.float() for feature in features])
        found = self.predictor(decoded.multi_scale_features, decoded.mask_features)
        hidden = found.intermediate_hidden_states
        classes = [self.class_predictor(x.transpose(0, 1)) for x in hidden]
        pairs = list(zip(classes, found.masks_queries_logits, strict=True))
        return {
            "pred_logits": pairs[-1][0],
            "pred_masks": pairs[-1][1],
            "aux_outputs": [
                {"class_queries_logits": c, "masks_queries_logits": m} for c, m in pairs[:-1]
            ],
        }


class Criterion(Mask2FormerLoss):
    """transformers' loss; the number of masks it divides by is given, not asked of accelerate.

    Attributes:
        masks: Their mean number over the ranks, at least 1.
        process_group: Which ranks these are; None: all.
    """

    masks: Tensor
    process_group: dist.ProcessGroup | None = None

    def get_num_masks(self, class_labels: Any, device: Any) -> Tensor:
        """Return what was given."""
        return self.masks


def mean_over_ranks(
    count: int, device: torch.device, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the mean of a count over the ranks of a group, at least 1, on the device."""
    mean = torch.full((), float(count), device=device)  # without waiting for the device
    if active():
        dist.all_reduce(mean, group=group)
        mean /= dist.get_world_size(group)
    return mean.clamp(min=1)


def pad_masks(masks: Any, size: Sequence[int]) -> Tensor:
    """Pad masks [K, h, w], bool or Detectron2's BitMasks, with zeros to [K, H, W] float."""
    masks = getattr(masks, "tensor", masks)
    height, width = masks.shape[-2:]
    return F.pad(masks.float(), (0, size[1] - width, 0, size[0] - height))


def save_transformers(model: Mask2Former, folder: Path | str) -> None:
    """Write a Swin model as a folder that transformers' ``from_pretrained`` reads.

    Raises:
        ConfigError: Another backbone: transformers has no like of Detectron2's ResNet.
    """
    if not isinstance(model.backbone, Swin):
        raise ConfigError(
            "only models with a Swin backbone go to transformers; a ResNet's file loads in "
            "Detectron2 and in the original Mask2Former"
        )
    whole = Mask2FormerForUniversalSegmentation(model.config)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    whole.load_state_dict(
        {name: x for name, x in names.to_transformers(own).items() if name in whole.state_dict()}
    )
    whole.save_pretrained(folder)


def load_transformers(source: str) -> dict[str, Tensor]:
    """Read a Swin model of transformers' hub or of a local folder, in the original's names.

    Raises:
        ConfigError: Another backbone.
        OSError: It cannot be found; transformers tells why.
    """
    whole = Mask2FormerForUniversalSegmentation.from_pretrained(source, use_safetensors=True)
    state = names.from_transformers(whole.state_dict())
    if not any(name.startswith(names.UNUSED) for name in state):
        raise ConfigError(f"{source}: its backbone is no Swin; take the original's .pkl file")
    indices = _position_indices(Swin(whole.model.pixel_level_module.encoder))
    return names.to_original(state) | indices


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _config(cfg: CfgNode, backbone: nn.Module | None) -> Mask2FormerConfig:
    head, settings = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    return Mask2FormerConfig(
        backbone_config=_swin(cfg) if backbone is None else _stand_in(backbone),
        num_labels=head.NUM_CLASSES,
        feature_size=head.CONVS_DIM,
        mask_feature_size=head.MASK_DIM,
        encoder_layers=head.TRANSFORMER_ENC_LAYERS,
        hidden_dim=settings.HIDDEN_DIM,
        num_attention_heads=settings.NHEADS,
        dim_feedforward=settings.DIM_FEEDFORWARD,
        decoder_layers=settings.DEC_LAYERS,
        dropout=settings.DROPOUT,
        enforce_input_projection=settings.ENFORCE_INPUT_PROJ,
        num_queries=settings.NUM_OBJECT_QUERIES,
        no_object_weight=settings.NO_OBJECT_WEIGHT,
        class_weight=settings.CLASS_WEIGHT,
        mask_weight=settings.MASK_WEIGHT,
        dice_weight=settings.DICE_WEIGHT,
        train_num_points=settings.TRAIN_NUM_POINTS,
        oversample_ratio=settings.OVERSAMPLE_RATIO,
        importance_sample_ratio=settings.IMPORTANCE_SAMPLE_RATIO,
        ignore_value=head.IGNORE_VALUE,
    )


def _swin(cfg: CfgNode) -> SwinConfig:
    swin = cfg.MODEL.SWIN
    return SwinConfig(
        image_size=swin.PRETRAIN_IMG_SIZE,
        patch_size=swin.PATCH_SIZE,
        embed_dim=swin.EMBED_DIM,
        depths=list(swin.DEPTHS),
        num_heads=list(swin.NUM_HEADS),
        window_size=swin.WINDOW_SIZE,
        mlp_ratio=swin.MLP_RATIO,
        qkv_bias=swin.QKV_BIAS,
        hidden_dropout_prob=swin.DROP_RATE,
        attention_probs_dropout_prob=swin.ATTN_DROP_RATE,
        drop_path_rate=swin.DROP_PATH_RATE,
        out_features=[f"stage{i}" for i in range(1, 5)],
    )


def _stand_in(backbone: nn.Module) -> ResNetConfig:
    """Describe a small backbone of the same widths: Detectron2's own takes its place."""
    shapes = backbone.output_shape()
    missing = [stage for stage in STAGES if stage not in shapes]
    if missing:
        raise ConfigError(f"MODEL.RESNETS.OUT_FEATURES lacks {', '.join(missing)}")
    widths = [shapes[stage].channels for stage in STAGES]
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=widths,
        depths=[1, 1, 1, 1],
        layer_type="bottleneck",
        out_features=[f"stage{i}" for i in range(1, 5)],
    )


def _check(cfg: CfgNode, only: Mapping[str, Any]) -> None:
    for key, value in only.items():
        node = value_at(cfg, key)
        found = list(node) if isinstance(value, list) else node
        if found != value:
            raise ConfigError(
                f"{key} is {found!r}, and transformers' Mask2Former has {value!r} only; put the "
                "original mask2former on PYTHONPATH for others"
            )


def _term(name: str, weights: Mapping[str, float]) -> str:
    return next(term for term in weights if name.startswith(term))


def _position_indices(swin: Swin) -> dict[str, Tensor]:
    """Return the tables that the original saves and transformers computes anew, by its names."""
    tables = {
        f"backbone.{name}": index.view(math.isqrt(index.numel()), -1)
        for name, index in swin.named_buffers()
        if name.endswith("relative_position_index")
    }
    return names.to_original(tables)


def _speak_original(
    module: Mask2Former, state: dict[str, Tensor], prefix: str, metadata: Any
) -> None:
    """Give the state dict the original's names."""
    theirs = names.to_original(_taken(state, prefix))
    if isinstance(module.backbone, Swin):
        theirs |= _position_indices(module.backbone)
    state.update({prefix + name: x for name, x in theirs.items()})


def _hear_original(module: Mask2Former, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Take a state dict with the original's names."""
    own = names.from_original(_taken(state, prefix))
    own = {name: x for name, x in own.items() if not name.endswith("relative_position_index")}
    if isinstance(module.backbone, Swin):  # not in the original; it stays as it is
        norm = module.backbone.model.swin.layernorm
        own |= {f"{names.UNUSED}{name}": x for name, x in norm.named_parameters()}
    state.update({prefix + name: x for name, x in own.items()})


def _taken(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take one module's entries out of a state dict, without their prefix."""
    found = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state.pop(name) for name in found}
