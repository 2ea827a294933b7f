"""timm's models: names, published weights, and files in any layout that timm itself reads."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models import (
    get_deprecated_models,
    get_pretrained_cfg,
    is_model,
    is_model_pretrained,
    model_entrypoint,
    split_model_name_tag,
)
from torch import nn

from classification.heads import ModelError, Weights, has_same_trunk, load_classifier
from classification.hub import NETWORK_ERRORS, find_cached, is_hub_reachable
from common.checkpoint import CheckpointError, read_file, read_weights

_ELSEWHERE = ("hf-hub:", "local-dir:")  # names that timm resolves without its own list
# What timm takes of a folder: the first that is there, else the first file of the first ending.
_TIMMS = (
    "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
)  # fmt: skip
_ENDINGS = (".safetensors", ".pth", ".pth.tar", ".bin")
# What timm's filters do with files that they were not written for.
_FOREIGN = (LookupError, AttributeError, TypeError, ValueError, AssertionError, RuntimeError)


def create_timm(
    name: str,
    checkpoint: Path | str | None = None,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    others: Iterable[str] = (),
    **options: Any,
) -> nn.Module:
    """Build one of timm's models.

    Args:
        name: With or without a pretrained tag; timm's ``hf-hub:`` and ``local-dir:`` are passed on.
        checkpoint: An export, a training checkpoint of timm, or a file that timm's own filter for
            this architecture translates (other layouts, other image sizes).
        pretrained: Fetch the published weights, where no checkpoint is given.
        num_classes: None: those of the weights; another count: a new head.
        others: Names of models that are not timm's, for messages.
        options: For the model's constructor, ``img_size`` and ``in_chans`` among them. A model that
            takes any size, as most convolutional ones do, gets ``img_size`` as its view alone.

    Raises:
        ModelError: An unknown name, options that do not fit, or weights that cannot be had.
        CheckpointError: A file that is missing, broken, unsafe or of another model.
    """
    if name.startswith("hf-hub:"):
        _check_repository(name)
    check_timm(name, others, pretrained and checkpoint is None)
    if checkpoint is not None:
        return load_classifier(
            lambda classes: _build(name, num_classes=classes, **options),
            read_weights(checkpoint),
            checkpoint,
            num_classes,
            _translate,
        )
    if pretrained:
        options |= _published(name)
    return _build(name, num_classes=num_classes, **options)


def check_timm(name: str, others: Iterable[str] = (), pretrained: bool = False) -> None:
    """Refuse what timm's own list refuses, with no network; names of a hub or folder pass.

    Args:
        name, others: See ``create_timm``.
        pretrained: Its published weights are wanted.

    Raises:
        ModelError: An unknown name, or one without published weights.
    """
    if name.startswith(_ELSEWHERE):
        return
    _check_name(name, others)
    if pretrained:
        _check_published(_current(name))


def _check_name(name: str, others: Iterable[str]) -> None:
    """Refuse names that timm does not know, with the nearest that it knows."""
    architecture, tag = split_model_name_tag(name)
    if not is_model(architecture):
        near = difflib.get_close_matches(architecture, [*timm.list_models(), *others], n=5)
        nearest = f"did you mean {', '.join(near)}? " if near else ""
        raise ModelError(
            f"{name}: unknown model; {nearest}timm.list_models() has timm's names; the others are "
            f"{', '.join([*others, 'hf:org/name'])}"
        )
    tags = _tags(architecture)
    if tag and name not in tags and architecture not in get_deprecated_models():
        known = (
            f"its tags: {', '.join(t.split('.', 1)[1] for t in tags)}" if tags else "it has none"
        )
        raise ModelError(f"{name}: unknown pretrained tag {tag!r} of {architecture}; {known}")


def _check_repository(name: str) -> None:
    repository = name.removeprefix("hf-hub:").split("@")[0]
    if not is_hub_reachable() and find_cached(repository, "config.json") is None:
        raise ModelError(
            f"{name}: the Hugging Face hub is not reachable and {repository} is not in its local "
            "cache; fetch it elsewhere and give the folder: local-dir:/path/to/folder"
        )


def _tags(architecture: str) -> list[str]:
    names = timm.list_models(architecture, include_tags=True)
    return [name for name in names if "." in name]


def _published(name: str) -> dict[str, Any]:
    """Say how timm shall get a name's published weights, with no long wait where it cannot.

    Raises:
        ModelError: There is no way to them.
    """
    if name.startswith(_ELSEWHERE):
        return {"pretrained": True}
    name = _current(name)
    cfg = get_pretrained_cfg(name)
    if not cfg.hf_hub_id or is_hub_reachable():
        return {"pretrained": True}
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else []
    cached = find_cached(cfg.hf_hub_id, *files, "model.safetensors", "pytorch_model.bin")
    if cached is None:
        raise ModelError(
            f"{name}: the Hugging Face hub is not reachable and {cfg.hf_hub_id} is not in its "
            f"local cache; {_give_file(name)}"
        )
    overlay = {"file": cached, "custom_load": bool(cfg.custom_load)}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


def _current(name: str) -> str:
    """Return the name that timm has for an older one."""
    return get_deprecated_models().get(name) or name


def _check_published(name: str) -> None:
    architecture, _ = split_model_name_tag(name)
    if not is_model_pretrained(name):
        tags = [tag for tag in _tags(architecture) if is_model_pretrained(tag)]
        other = f", or take one of {', '.join(tags)}" if tags else ""
        raise ModelError(f"{name}: timm has no weights for it; {_give_file(name)}{other}")


def _give_file(name: str) -> str:
    return f"give a local file: --peer {name},checkpoint=/path/to/file.safetensors"


def _build(name: str, img_size: int | tuple[int, int] | None = None, **options: Any) -> nn.Module:
    """Build a timm model whose ``pretrained_cfg`` says what it takes."""
    try:
        module = build_stock(name, name, img_size=img_size, **options)
    except ModelError as error:
        if img_size is None or "'img_size'" not in str(error.__cause__):
            raise
        module = build_stock(name, name, **options)  # has no size of its own
        _refuse_fixed_size(module, name, img_size)
        module.takes_img_size = False
    cfg = module.pretrained_cfg
    size = cfg["input_size"][1:] if img_size is None else _pair(img_size)
    if img_size is not None:
        cfg.pop("test_input_size", None)
    cfg["input_size"] = (options.get("in_chans", cfg["input_size"][0]), *size)
    return module


def _check_folder(folder: Path) -> None:
    """Read the file that timm takes of a folder as all others are, before timm does: it reads torch
    files with fewer checks.

    Raises:
        ModelError: It is refused.
    """
    named = (folder / name for name in _TIMMS if (folder / name).exists())
    others = (path for ending in _ENDINGS for path in sorted(folder.glob(f"*{ending}")))
    path = next(named, None) or next(others, None)
    if path is None or path.suffix == ".safetensors":
        return
    try:
        read_file(path)
    except CheckpointError as error:
        raise ModelError(str(error)) from error


def build_stock(name: str, stock: str, **options: Any) -> nn.Module:
    """Call ``timm.create_model`` for the model ``stock``; errors speak of ``name``.

    Raises:
        ModelError: Options that the constructor refuses, or weights that cannot be fetched.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if stock.startswith("local-dir:") and options.get("pretrained"):
        _check_folder(Path(stock.removeprefix("local-dir:").split("?")[0]))
    try:
        return timm.create_model(stock, **options)
    except NETWORK_ERRORS as error:
        raise ModelError(f"{name}: weights cannot be had ({error}); {_give_file(name)}") from error
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ModelError(f"{name}: timm cannot build it with {options} ({error})") from error


def _refuse_fixed_size(module: nn.Module, name: str, img_size: int | tuple[int, int]) -> None:
    cfg = module.pretrained_cfg
    own = tuple(cfg["input_size"][1:])
    if cfg.get("fixed_input_size") and _pair(img_size) != own:
        raise ModelError(
            f"{name}: takes no img_size ({img_size}), only images of {own[0]} x {own[1]}; leave "
            "img_size out"
        )


def _pair(size: int | Sequence[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _translate(weights: Weights, module: nn.Module) -> Weights:
    """Bring a file of another layout or image size to that of the model, by timm's own filter."""
    if has_same_trunk(module, weights):
        return weights
    architecture = module.pretrained_cfg["architecture"]
    home = sys.modules[model_entrypoint(architecture).__module__]
    translate = getattr(home, "checkpoint_filter_fn", None)
    if translate is None:
        return weights
    try:
        return translate(dict(weights), module)
    except _FOREIGN:
        return weights  # loading them says what does not fit
