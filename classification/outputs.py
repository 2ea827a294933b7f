"""What a run shows and leaves behind: tables, logs, metadata, checked exports, the report."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from fvcore.nn import FlopCountAnalysis
from torch import nn

from classification.data import View
from classification.models import create_classifier
from classification.options import PeerSpec
from classification.peer import image_channels, image_size
from common import distributed, recipes
from common.disk import write_text
from common.distributed import World, merge_over_seats
from common.options import OptionError
from common.outputs import log_table, plain
from common.outputs import writers as open_writers
from common.peers import Peer, PeerGroup
from common.resumed import FREE
from common.trainer import Trainer, Writer

_logger = logging.getLogger("train")

# Options under which a resumed run is still the same run.
FREE_TO_CHANGE = FREE | frozenset(
    (
        "start_epoch pin_mem wandb_tags data data_dir dataset_download dataset_trust_remote_code "
        "trust_remote_code num_classes resolved_num_classes pretrained validation_batch_size "
        "local_rank torchcompile torchcompile_mode model_ema_force_cpu push_to_hub"
    ).split()
)
EXPORT_TOLERANCE = 0.05


def write_arguments(folder: Path, options: argparse.Namespace) -> None:
    """Keep the arguments as a YAML file that ``--config`` takes."""
    write_text(folder / "args.yaml", arguments_text(options))


def arguments_text(options: argparse.Namespace) -> str:
    """Return the arguments as YAML that ``--config`` takes."""
    hidden = (
        "config",
        "resume",
        "allow_changed_options",
        "local_rank",
        "in_place",
        "data_dir",
        "plan",
        "gpu_mem",
        "layouts",
        "compiled",
        "push_to_hub",
    )
    content = {name: value for name, value in plain(options).items() if name not in hidden}
    return yaml.safe_dump(content, sort_keys=False)


def metadata(spec: PeerSpec, module: nn.Module, view: View) -> dict[str, str]:
    """Describe an exported file, so that ``validate.py`` needs no other argument."""
    options = spec.options
    arguments = {**options.model_kwargs}
    for name, value in (
        ("img_size", image_size(options) if getattr(module, "takes_img_size", True) else None),
        ("in_chans", image_channels(options)),
        ("global_pool", options.gp),
        ("bn_eps", options.bn_eps),
    ):
        if value is not None:
            arguments[name] = value
    return {
        "format": "pt",
        "architecture": spec.model,
        "num_classes": str(module.num_classes),
        "model_args": json.dumps(arguments),
        "input_size": json.dumps(view.size),
        "mean": json.dumps(view.mean),
        "std": json.dumps(view.std),
        "interpolation": view.interpolation,
        "crop_pct": str(view.crop_pct),
        "crop_mode": view.crop_mode,
    }


def describe(spec: PeerSpec, module: nn.Module, view: View) -> dict[str, str]:
    """Return a row of the table of peers: parameters, multiply-adds by fvcore, view."""
    parameters = sum(p.numel() for p in module.parameters())
    return {
        "peer": spec.name + (" (frozen)" if spec.frozen else ""),
        "model": spec.model,
        "parameters": f"{parameters / 1e6:.2f} M",
        "GFLOPs": _gflops(module, view),
        "classes": str(module.num_classes),
        "input": str(view),
        "optimizer": "-" if spec.frozen else spec.options.opt,
    }


def _gflops(module: nn.Module, view: View) -> str:
    probe = copy.deepcopy(module).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(probe, torch.zeros(1, *view.size))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        try:
            return f"{analysis.total() / 1e9:.3g}"
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            _logger.warning("fvcore cannot count this model: %s", str(error).splitlines()[0])
            return "?"


def log_peers(rows: Sequence[dict[str, str]], peers: PeerGroup, world: World) -> None:
    """Log the resolved peers on the main rank; all ranks must call it.

    Args:
        rows: From ``describe``, on the main rank.
        peers: The group.
        world: Where this process stands.
    """
    rates = merge_over_seats({peer.name: _peak_lr(peer) for peer in peers.here}, world)
    if world.is_main:
        log_table([{**row, "lr": rate} for row, rate in zip(rows, rates.values(), strict=True)])


def _peak_lr(peer: Peer) -> str:
    if peer.optimizer is None:
        return "-"
    rates = [group.get("initial_lr", group["lr"]) for group in peer.optimizer.param_groups]
    return f"{max(rates):g}"


def writers(options: argparse.Namespace, folder: Path, world: World, updates: int) -> list[Writer]:
    """Open TensorBoard, the CSV of training scalars, and wandb if asked.

    Raises:
        OptionError: wandb is asked for and not installed.
    """
    found = open_writers(folder, world, updates)
    if options.log_wandb and world.is_main:
        try:
            import wandb
        except ImportError as error:
            raise OptionError("--log-wandb needs wandb: pip install wandb") from error
        wandb.init(
            project=options.wandb_project,
            name=options.experiment or folder.name,
            config=plain(options),
            tags=options.wandb_tags,
        )
        found.append(lambda scalars, step: wandb.log(dict(scalars), step=step))
    return found


def check_exports(trainer: Trainer, specs: Sequence[PeerSpec]) -> None:
    """Load each peer's best file into a fresh plain model and measure it again.

    A timm model is rebuilt by ``timm.create_model(name, checkpoint_path=...)`` alone, as its user
    would. A difference to the accuracy that the run wrote is logged as an error.
    """
    fresh = []
    distributed.barrier()  # other processes' files
    architectures = {spec.name: spec.model for spec in specs}
    for peer in trainer.peers.here:
        path = trainer.folder / peer.name / f"best{trainer.plan.export_suffix}"
        plain_module = reload(architectures[peer.name], path, trainer.metadata[peer.name])
        parameter = next(peer.module.parameters())
        fresh.append(plain_module.to(parameter.device, parameter.dtype))
    scores = trainer.evaluator.score(fresh)
    metrics = scores.metrics([spec.name for spec in specs], None)
    for spec in specs:
        name = f"{spec.name}/{trainer.plan.metric}"
        again, told = metrics[name], trainer.progress.best[spec.name].value
        if abs(again - told) > EXPORT_TOLERANCE:
            _logger.error(
                "%s: the exported file gives %s %.3f, the run had %.3f",
                spec.name,
                name,
                again,
                told,
            )
        else:
            _logger.info("%s: best.safetensors reloaded, %s %.3f", spec.name, name, again)


def reload(model: str, path: Path, described: Mapping[str, str]) -> nn.Module:
    """Build a model from an exported file, by plain timm where timm knows it."""
    arguments = model_arguments(described)
    if timm.is_model(model.split(".")[0]):
        return timm.create_model(model, checkpoint_path=str(path), **arguments)
    return create_classifier(model, str(path), **arguments)


def model_arguments(described: Mapping[str, str]) -> dict[str, Any]:
    """Return what builds the model of an exported file, beside its name."""
    return {"num_classes": int(described["num_classes"]), **json.loads(described["model_args"])}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a reader of the report wants to know of the run."""
    names = (
        "recipe peers data dataset held_out rule score calibrate_scores temperature "
        "transfer_weight transfer_warmup_steps detach_teacher teachers margin gap_power "
        "transfer_classes engine guard opt lr lr_base weight_decay sched epochs batch_size "
        "grad_accum_steps amp amp_dtype mixup cutmix smoothing model_ema "
        "model_ema_decay model_ema_span seed"
    ).split()
    values = {**plain(options), "recipe": recipes.told(options)}
    return {name: values[name] for name in names}
