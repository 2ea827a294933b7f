"""Image classifiers of Hugging Face's transformers, as modules from images to logits."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from classification.heads import ModelError, head_of, load_classifier
from classification.hub import NETWORK_ERRORS, is_hub_reachable
from common.checkpoint import read_weights

PREFIX = "hf:"
_logger = logging.getLogger(__name__)

_PREPROCESSOR = "preprocessor_config.json"
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # PIL's numbers
_WARP_FROM = 384  # ConvNeXt's processor crops below this size and warps from it on


def create_huggingface(
    name: str,
    checkpoint: Path | str | None = None,
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    trust_remote_code: bool = False,
    **config_kwargs: Any,
) -> nn.Module:
    """Build ``AutoModelForImageClassification`` so that ``module(images)`` gives logits.

    The module is the model itself with a forward hook that keeps the logits alone: its state dict
    goes back to transformers as it is, and so does ``module.save_pretrained(folder)``.

    Args:
        name: ``hf:org/name`` on the hub, or ``hf:/path/to/folder``.
        checkpoint: Weights instead of the repository's own: a state dict with transformers' names.
        num_classes: None: those of the weights; another count: a new head.
        img_size: For models that take any size; None: that of the image processor.
        in_chans: Must be what the model takes.
        trust_remote_code: Run Python code that the repository brings.
        config_kwargs: Entries of the model's configuration.

    Raises:
        ModelError: transformers is missing, no such model, no safetensors weights, code that is not
            trusted, or a size, channel or class count that the model does not take.
        CheckpointError: ``checkpoint`` is broken or of another model.
    """
    source = _Source(name, trust_remote_code)
    config = source.config(config_kwargs)
    if checkpoint is None:
        module = source.pretrained(config, num_classes)
    else:
        module = load_classifier(
            lambda classes: source.untrained(config, classes),
            read_weights(checkpoint),
            checkpoint,
            num_classes,
        )
    if num_classes not in (None, module.num_classes):
        raise ModelError(
            f"{name}: has {module.num_classes} classes whatever its configuration says, asked for "
            f"{num_classes}; leave num_classes out"
        )
    channels = module.pretrained_cfg["input_size"][0]
    if in_chans not in (None, channels):
        raise ModelError(f"{name}: takes {channels} channels, not {in_chans}; leave in_chans out")
    if img_size is not None:
        _set_size(module, name, img_size)
    return module


class _Source:
    """A folder or a repository on the hub, and how it may be read."""

    def __init__(self, name: str, trust_remote_code: bool) -> None:
        try:
            import transformers
        except ImportError as error:
            raise ModelError(
                f'{name}: needs transformers; pip install "peer-transfer[huggingface]"'
            ) from error
        self.transformers = transformers
        self.name = name
        self.path = name.removeprefix(PREFIX)
        self.trust = trust_remote_code
        self.is_folder = Path(self.path).is_dir()
        if not self.is_folder and (not self.path or self.path[0] in "/.~"):
            raise ModelError(
                f"{name}: no such folder; expected {PREFIX}org/name, or {PREFIX}/path/to/folder "
                "with config.json and model.safetensors"
            )
        self.local_only = self.is_folder or not is_hub_reachable()

    def config(self, entries: Mapping[str, Any]) -> Any:
        config, unused = self._call(
            self.transformers.AutoConfig.from_pretrained,
            self.path,
            trust_remote_code=self.trust,
            local_files_only=self.local_only,
            return_unused_kwargs=True,
            **entries,
        )
        if unknown := sorted(set(unused) & set(entries)):
            raise ModelError(f"{self.name}: its configuration has no {', '.join(unknown)}")
        return config

    def pretrained(self, config: Any, num_classes: int | None) -> nn.Module:
        if self.is_folder and not self.trust and not list(Path(self.path).glob("*.safetensors")):
            raise ModelError(
                f"{self.name}: no .safetensors file in this folder, and pickled weights are not "
                "read here; write a copy that you trust with save_pretrained()"
            )
        model, report = self._call(
            self.transformers.AutoModelForImageClassification.from_pretrained,
            self.path,
            config=_with_classes(config, num_classes),
            trust_remote_code=self.trust,
            local_files_only=self.local_only,
            use_safetensors=None if self.trust else True,
            ignore_mismatched_sizes=num_classes is not None,
            output_loading_info=True,
        )
        module = self._finish(model)
        new = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
        left_out = sorted(name for name in new if not name.startswith(head_of(module)))
        if left_out or (new and num_classes is None):
            raise ModelError(
                f"{self.name}: no weights for {', '.join((left_out or sorted(new))[:6])}; "
                + (
                    "a file of another model"
                    if left_out
                    else "give num_classes for a new classifier"
                )
            )
        if new:
            _logger.warning("%s: new head for %d classes", self.name, module.num_classes)
        return module

    def untrained(self, config: Any, num_classes: int | None) -> nn.Module:
        model = self._call(
            self.transformers.AutoModelForImageClassification.from_config,
            _with_classes(config, num_classes),
            trust_remote_code=self.trust,
        )
        return self._finish(model)

    def _finish(self, model: nn.Module) -> nn.Module:
        model = model.float().train()
        for name, parameter in model.named_parameters():
            if name.endswith("mask_token"):  # of masked training: without gradient, DDP refuses it
                parameter.requires_grad_(False)
        layers = _classifier_layers(model)
        model.num_classes = model.get_submodule(layers[-1]).weight.shape[0]
        model.pretrained_cfg = {
            "architecture": self.name,
            "num_classes": model.num_classes,
            "classifier": layers,
            "first_conv": None,
            **_view(self._preprocessor(), model.config),
        }
        model.register_forward_hook(_logits_alone)
        return model

    def _preprocessor(self) -> dict[str, Any]:
        path = Path(self.path, _PREPROCESSOR)
        try:
            if not self.is_folder:
                path = Path(
                    huggingface_hub.hf_hub_download(
                        self.path, _PREPROCESSOR, local_files_only=self.local_only
                    )
                )
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, huggingface_hub.errors.EntryNotFoundError):
            _logger.warning("%s: no %s; taking its configuration's view", self.name, _PREPROCESSOR)
            return {}
        except (json.JSONDecodeError, *NETWORK_ERRORS) as error:
            raise ModelError(f"{self.name}: cannot read {_PREPROCESSOR} ({error})") from error

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call transformers; turn its errors into ones that say the way out."""
        try:
            return function(*args, **kwargs)
        except (
            ValueError,
            ImportError,
            RuntimeError,
            KeyError,
            TypeError,
            *NETWORK_ERRORS,
        ) as error:
            raise ModelError(self._explain(error)) from error
        except SafetensorError as error:
            raise ModelError(f"{self.name}: broken safetensors file ({error})") from error

    def _explain(self, error: Exception) -> str:
        if "trust_remote_code" in str(error) and not self.trust:
            return (
                f"{self.name}: brings its own Python code, which would run here with your rights; "
                "read it, and if you trust it pass trust_remote_code=True for this model"
            )
        if self.local_only and not self.is_folder:
            return (
                f"{self.name}: the Hugging Face hub is not reachable and the model is not in the "
                f"local cache; fetch it elsewhere and give the folder: {PREFIX}/path/to/folder"
            )
        reason = " ".join(str(error).split())
        return f"{self.name}: cannot be loaded by transformers ({reason})"


def _with_classes(config: Any, num_classes: int | None) -> Any:
    config = copy.deepcopy(config)
    if num_classes not in (None, config.num_labels):
        config.num_labels = num_classes
    if num_classes is not None and hasattr(config, "num_classes"):  # models with code of their own
        config.num_classes = num_classes
    return config


def _classifier_layers(model: nn.Module) -> tuple[str, ...]:
    """Name the layers that give logits: those beside the backbone, else the last one."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    if not layers:
        raise ModelError(f"{type(model).__name__}: no linear layer, so no classifier")
    backbone = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    found = [
        name
        for name, layer in layers.items()
        if backbone
        and not name.startswith(backbone)
        and layer.weight.shape[0] == model.config.num_labels
    ]
    return tuple(found) or (list(layers)[-1],)


def _logits_alone(module: nn.Module, inputs: Any, output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else output[0]
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"{type(module).__name__}: gives a {type(output).__name__} without logits; not a "
            "classifier"
        )
    return logits


def _set_size(module: nn.Module, name: str, img_size: int | tuple[int, int]) -> None:
    channels, *own = module.pretrained_cfg["input_size"]
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if list(size) == own:
        return
    was_training = module.training
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, channels, *size))
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"{name}: takes no images of {size[0]} x {size[1]} ({error}); leave img_size out, "
            f"its own is {own[0]} x {own[1]}"
        ) from error
    module.train(was_training)
    module.pretrained_cfg["input_size"] = (channels, *size)


def _view(processor: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Turn an image processor's configuration into timm's words.

    timm scales to [0, 1] and then normalises; other scalings are folded into mean and std.
    """
    mean = processor.get("image_mean", getattr(config, "mean", IMAGENET_DEFAULT_MEAN))
    std = processor.get("image_std", getattr(config, "std", IMAGENET_DEFAULT_STD))
    channels = getattr(config, "num_channels", 3)
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * channels, [1.0] * channels
    rescaled = processor.get("do_rescale", True)
    factor = 255 * processor.get("rescale_factor", 1 / 255) if rescaled else 255.0
    offset = 1.0 if processor.get("rescale_offset") else 0.0
    if processor.get("include_top"):  # EfficientNet's processor divides by std twice
        std = [value**2 for value in std]
    return {
        "mean": tuple((value + offset) / factor for value in mean),
        "std": tuple(value / factor for value in std),
        "interpolation": _RESAMPLE[processor.get("resample", 3)],
        **_geometry(processor, config, channels),
    }


def _geometry(processor: Mapping[str, Any], config: Any, channels: int) -> dict[str, Any]:
    size = processor.get("size", getattr(config, "image_size", 224))
    resized = _sides(size)
    crop = _sides(processor.get("crop_size", resized)) if processor.get("do_center_crop") else None
    crop_pct = processor.get("crop_pct", None if processor else getattr(config, "crop_pct", 0.875))
    keeps_ratio = isinstance(size, Mapping) and "shortest_edge" in size
    if crop_pct is not None:
        warps = bool(processor) and resized[0] >= _WARP_FROM
        crop, crop_pct, keeps_ratio = resized, 1.0 if warps else crop_pct, not warps
    elif crop is not None:
        crop_pct = crop[0] / (resized[0] + 1e-6)  # timm floors crop / crop_pct: 25, not 24.99..
    else:
        crop, crop_pct = resized, 1.0
    return {
        "input_size": (channels, *crop),
        "crop_pct": crop_pct,
        "crop_mode": "center" if keeps_ratio else "squash",
    }


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        if {"height", "width"} <= set(size):
            return size["height"], size["width"]
        if "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
        raise ModelError(f"image processor size {dict(size)}; expected height and width")
    return (size, size) if isinstance(size, int) else tuple(size)
