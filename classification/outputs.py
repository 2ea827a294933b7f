"""What a run shows and leaves behind: tables, logs, metadata, checked exports, the report."""

from __future__ import annotations

import argparse
import copy
import csv
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from classification.data import View
from classification.models import create_classifier
from classification.options import OptionError, PeerSpec
from classification.peer import ClassifierPeer, image_channels, image_size
from common import distributed
from common.checkpoint import list_runs
from common.distributed import World
from common.report import write_run_report
from common.trainer import Trainer, Writer

_logger = logging.getLogger("train")

# Options under which a resumed run is still the same run.
FREE_TO_CHANGE = frozenset(
    (
        "resume no_resume_opt output experiment workers pin_mem log_interval log_wandb "
        "wandb_project wandb_tags checkpoint_hist recovery_interval config epochs device data "
        "data_dir num_classes resolved_num_classes pretrained in_place validation_batch_size "
        "local_rank"
    ).split()
)
EXPORT_TOLERANCE = 0.05


def start_logging() -> None:
    """Log plain lines to stderr; of timm's own only warnings."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("timm").setLevel(logging.WARNING)


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options as plain containers, as they go into a run file."""
    return json.loads(json.dumps(vars(options), default=str))


def progress_bars(show: bool) -> Callable[[Iterable[Any], str], Iterable[Any]]:
    """Return a wrapper that shows a bar over an iterable, on a terminal only."""
    show = show and sys.stderr.isatty()
    return lambda batches, title: tqdm(
        batches, desc=title, leave=False, disable=not show, dynamic_ncols=True
    )


def folder_of(options: argparse.Namespace, specs: Sequence[PeerSpec], world: World) -> Path:
    """Make the output folder, one for all ranks; a fresh run never writes into an older run's.

    Raises:
        OptionError: It holds run files and this is no resume, or it cannot be written.
    """
    folder = distributed.gather_objects(_choose_folder(options, specs))[0]
    if list_runs(folder) and not options.resume:
        raise OptionError(
            f"{folder}: holds the run files of an earlier run; give --resume {folder} to go on "
            "with it, or another --experiment"
        )
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OptionError(f"--output: {error}; give a folder that can be written") from error
    return folder


def _choose_folder(options: argparse.Namespace, specs: Sequence[PeerSpec]) -> Path:
    output = Path(options.output or "output/train")
    if getattr(options, "in_place", False):
        return output
    names = "-".join([options.rule.replace(":", "-"), *[spec.name for spec in specs]])[:80]
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return output / (options.experiment or f"{stamp}-{names}")


def write_arguments(folder: Path, options: argparse.Namespace) -> None:
    """Keep the arguments as a YAML file that ``--config`` takes."""
    hidden = ("config", "resume", "local_rank", "in_place", "data_dir")
    content = {name: value for name, value in plain(options).items() if name not in hidden}
    (folder / "args.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


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


def log_table(rows: Sequence[dict[str, str]], peers: Sequence[ClassifierPeer]) -> None:
    """Log the resolved peers."""
    rows = [
        {**row, "lr": "-" if peer.frozen else f"{_peak_lr(peer):g}"}
        for row, peer in zip(rows, peers, strict=True)
    ]
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    for cells in (columns, *([row[column] for column in columns] for row in rows)):
        _logger.info("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip())


def _peak_lr(peer: ClassifierPeer) -> float:
    assert peer.optimizer is not None
    return max(group.get("initial_lr", group["lr"]) for group in peer.optimizer.param_groups)


def writers(options: argparse.Namespace, folder: Path, world: World, updates: int) -> list[Writer]:
    """Open TensorBoard, the CSV of training scalars, and wandb if asked.

    What a killed run wrote of steps after ``updates``, which are made again, is dropped.
    """
    if not world.is_main:
        return []
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=updates + 1 if updates else None)
    _trim(folder / "scalars.csv", updates)

    def to_board(scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            board.add_scalar(name.replace("->", "_to_"), value, step)
        board.flush()

    found: list[Writer] = [to_board, lambda scalars, step: _append(folder, scalars, step)]
    if options.log_wandb:
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


def _trim(path: Path, updates: int) -> None:
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if int(row[0]) <= updates]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def _append(folder: Path, scalars: Mapping[str, float], step: int) -> None:
    with (folder / "scalars.csv").open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([step, name, value] for name, value in scalars.items())


def check_exports(
    trainer: Trainer, specs: Sequence[PeerSpec], modules: Sequence[nn.Module]
) -> None:
    """Load each peer's best file into a fresh plain model and measure it again.

    A timm model is rebuilt by ``timm.create_model(name, checkpoint_path=...)`` alone, as its user
    would. A difference to the accuracy that the run wrote is logged as an error.
    """
    fresh = []
    for spec, module in zip(specs, modules, strict=True):
        path = trainer.folder / spec.name / f"best{trainer.plan.export_suffix}"
        plain_module = reload(spec.model, path, trainer.metadata[spec.name])
        parameter = next(module.parameters())
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
    arguments = json.loads(described["model_args"])
    classes = int(described["num_classes"])
    if timm.is_model(model.split(".")[0]):
        return timm.create_model(model, checkpoint_path=str(path), num_classes=classes, **arguments)
    return create_classifier(model, str(path), num_classes=classes, **arguments)


def finish(trainer: Trainer, options: argparse.Namespace) -> None:
    """Write the report and log the outcome."""
    progress, metric = trainer.progress, trainer.plan.metric
    report = write_run_report(
        trainer.folder / "report.html",
        names=trainer.peers.names,
        history=progress.history,
        lessons=progress.lessons,
        metric=metric,
        settings=_settings(options),
        lower_is_better=trainer.plan.lower_is_better,
    )
    start = progress.history[0]
    for name in trainer.peers.names:
        best = progress.best[name]
        before = start[f"{name}/{metric}"]
        _logger.info(
            "%s: %s %.3f -> %.3f (%+.3f) at epoch %d",
            name,
            metric,
            before,
            best.value,
            best.value - before,
            best.epoch,
        )
    _logger.info("report: %s", report)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = (
        "peers data dataset rule score temperature transfer_weight transfer_warmup_steps "
        "detach_teacher margin opt lr lr_base weight_decay sched epochs batch_size "
        "grad_accum_steps amp amp_dtype mixup cutmix smoothing model_ema seed"
    ).split()
    values = plain(options)
    return {name: values[name] for name in names}
