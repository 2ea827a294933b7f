"""Model cards of classifiers: written beside each learning peer's files at a run's end."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import nn
from torchvision.datasets import DatasetFolder

from classification import huggingface, outputs
from classification.data import classes_of
from classification.held_out import Part
from classification.options import PeerSpec
from common.card import (
    Card,
    Evidence,
    Files,
    chosen_row,
    data_rows,
    kind_of,
    shares_taught,
    soup_evidence,
    start_title,
    told_sum,
    versions,
    write_each,
)
from common.distributed import World
from common.trainer import Trainer

Origin = dict[str, Any]
Row = Mapping[str, float]

# Licences in timm's list that the hub knows by the same identifier; others are told by name.
_ON_HUB = "apache-2.0 mit bsd-3-clause cc-by-4.0 cc-by-nc-4.0 apple-ascl apple-amlr gemma".split()
_FOLDERS = (huggingface.PREFIX, "local-dir:")
_WEIGHTS = ("*.safetensors", "*.bin")
_METRICS = {"top1": "top-1 (%)", "top5": "top-5 (%)", "loss": "loss (nats)"}
_RUN = (
    "recipe rule score calibrate_scores temperature transfer_weight transfer_warmup_steps margin "
    "detach_teacher teachers gap_power transfer_classes engine guard epochs batch_size "
    "grad_accum_steps amp mixup cutmix smoothing seed"
).split()
_OWN = (
    "opt lr weight_decay sched warmup_epochs clip_grad layer_decay drop_path model_ema "
    "model_ema_decay model_ema_span"
).split()


@dataclass(frozen=True)
class Images:
    """What images a run had.

    Attributes:
        train: How many to train on.
        held_out: How many to measure on.
        files: The lineage's rows of both.
        labels: Names of the classes, by number; empty where the data do not tell them.
    """

    train: int
    held_out: int
    files: Mapping[str, str]
    labels: Sequence[str] = ()


def images_of(train_set: Any, held_out: Any, world: World) -> Images:
    """Count the images; where this process writes cards, also look at their files.

    Args:
        train_set: What was trained on.
        held_out: What was measured on.
        world: Where this process stands.
    """
    files = data_rows(files_of(train_set), files_of(held_out)) if world.leads else {}
    numbers = classes_of(train_set) or {}
    labels = [str(name) for name in sorted(numbers, key=lambda name: numbers[name])]
    return Images(len(train_set), len(held_out), files, labels)


def files_of(dataset: Any) -> Files | None:
    """Return the files of image folders, or of a part of them; None for all other data."""
    if isinstance(dataset, Part):
        whole = files_of(dataset.dataset)
        return whole and Files([whole.paths[i] for i in dataset.indices], whole.root)
    owner = getattr(dataset, "reader", dataset)
    if not isinstance(owner, (ReaderImageFolder, DatasetFolder)):
        return None
    return Files([path for path, *_ in owner.samples], str(owner.root))


def origin(spec: PeerSpec, module: nn.Module) -> Origin:
    """Tell from what a peer starts, as plain data that a run file keeps.

    Returns:
        ``base_model`` (a repository of the hub, or None), ``license`` (or None), ``files`` (each
        with its sum).
    """
    found: Origin = {"base_model": None, "license": None, "files": []}
    files = start_files(spec)
    if files is not None:
        return {**found, "files": [told_sum(file) for file in files]}
    prefix, where = _place(spec)
    if prefix == huggingface.PREFIX or where != spec.model:
        return {**found, "base_model": where.split("@")[0]}
    if not spec.takes_published_weights:
        return found
    cfg = module.pretrained_cfg
    return {**found, "base_model": cfg.get("hf_hub_id"), "license": cfg.get("license")}


def start_files(spec: PeerSpec) -> list[Path] | None:
    """List the files that a peer starts from; None: it starts from none of this machine's own."""
    if spec.checkpoint is not None:
        several = isinstance(spec.checkpoint, (list, tuple))
        return [Path(file) for file in (spec.checkpoint if several else [spec.checkpoint])]
    prefix, where = _place(spec)
    if prefix and Path(where).is_dir():
        return sorted(file for signs in _WEIGHTS for file in Path(where).glob(signs))
    return None


def _place(spec: PeerSpec) -> tuple[str, str]:
    """Split a model's name into what says that it is a folder or a repository, and the rest."""
    prefix = next((prefix for prefix in _FOLDERS if spec.model.startswith(prefix)), "")
    return prefix, spec.model.removeprefix(prefix).removeprefix("hf-hub:")


def write_cards(
    trainer: Trainer,
    specs: Sequence[PeerSpec],
    options: argparse.Namespace,
    origins: Mapping[str, Origin],
    images: Images,
) -> None:
    """Write ``README.md`` and ``card.json`` of every learning peer that this process leads.

    Args:
        trainer: After ``fit``.
        specs: All peers, in order.
        options: The run's.
        origins: What ``origin`` told at the run's start, by peer; empty where it was not kept.
        images: What ``images_of`` told.
    """
    write_each(
        trainer,
        specs,
        lambda spec: describe(trainer, spec, specs, options, origins, images),
        f"best{trainer.plan.export_suffix}",
    )


def describe(
    trainer: Trainer,
    spec: PeerSpec,
    specs: Sequence[PeerSpec],
    options: argparse.Namespace,
    origins: Mapping[str, Origin],
    images: Images,
) -> Card:
    """Collect all that the card of one peer tells; see ``write_cards``."""
    mine, data = origins.get(spec.name, {}), Path(options.data).resolve().name
    others = [other.name for other in specs if other.name != spec.name]
    made = {name: getattr(options, name) for name in _RUN}
    made |= {name: getattr(spec.options, name) for name in _OWN}
    return Card(
        peer=spec.name,
        model=spec.model,
        about=(
            f"An image classifier of {trainer.metadata[spec.name]['num_classes']} classes, "
            f"fine-tuned on `{data}` side by side with {_listed(others)} by peer transfer: for "
            "every image the rule below says which of the peers teaches which."
        ),
        front=front(mine),
        made={name: str(value) for name, value in made.items() if value is not None},
        evidence=_evidence(trainer, spec.name, options, f"`{data}`", images),
        lineage={
            **{_title(other, spec): _start(other, origins) for other in specs},
            "data": f"`{data}`, {_many(images.train)} to train on",
            **images.files,
            "configuration (`args.yaml`)": f"sha256 `{_config_sum(options)}`",
        },
        versions=versions(timm=timm.__version__),
        loading=_loading(spec.model, trainer.metadata[spec.name]),
        loading_hub='timm.create_model("hf-hub:{repo}", pretrained=True)'
        if timm_builds(spec.model)
        else "",
        labels=images.labels,
    )


def timm_builds(model: str) -> bool:
    """Whether plain timm builds a model of that name."""
    return timm.is_model(model.split(".")[0]) or model.startswith(("hf-hub:", "local-dir:"))


def front(origin: Origin) -> dict[str, Any]:
    """Return the hub's metadata; the licence is that of the start, where it is known."""
    known = origin.get("license") if origin.get("license") != "unknown" else None
    named = known is not None and known not in _ON_HUB
    return {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "license": "other" if named else known,
        "license_name": known if named else None,
        "base_model": origin.get("base_model"),
        "tags": ["image-classification", "timm", "peer-transfer"],
        "metrics": ["accuracy"],
    }


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nobody"


def _title(other: PeerSpec, spec: PeerSpec) -> str:
    return start_title(other.name, other.model, other.frozen, spec.name)


def _start(spec: PeerSpec, origins: Mapping[str, Origin]) -> str:
    if spec.name not in origins:
        return "not recorded"
    found = origins[spec.name]
    told = [f"published weights `{found['base_model']}`"] if found["base_model"] else []
    told += found["files"]
    told += [f"licence {found['license']}"] if found["license"] else []
    return "; ".join(told) or "no file: weights of its constructor, or published without a name"


def _evidence(
    trainer: Trainer, name: str, options: argparse.Namespace, data: str, images: Images
) -> dict[str, Evidence]:
    history, best = trainer.progress.history, trainer.progress.best[name]
    split = (
        f"{options.held_out:g} of {data}'s training split, which was not trained on"
        if options.held_out
        else f"{data}, split {options.val_split}"
    )
    where = f"{_many(images.held_out)} of {split}"
    metric = f"{name}/{trainer.plan.metric}"
    chosen = chosen_row(history, "epoch", best.epoch, metric, best.value)
    kind = kind_of(trainer, name)
    about = (
        f"The {kind} after epoch {best.epoch} of {trainer.progress.epoch}, the best by "
        f"{trainer.plan.metric}"
    )
    optimistic = f"{where}, which also chose the epoch: what they say of this file is optimistic"
    start = " (epoch 0: the start itself, which no later epoch beat)" if best.epoch == 0 else ""
    found = {
        "best": _of_row(trainer, name, chosen, f"{about}{start}.", optimistic),
        "last": _of_row(trainer, name, history[-1], f"The {kind} after the last epoch.", where),
    }
    for soup in trainer.soups:
        if soup.peer == name:
            half = f"every second one of {where}; the others chose the average"
            found["soup"] = soup_evidence(soup, _METRICS[soup.metric], half, found["best"])
    return found


def _many(images: int) -> str:
    """Say how many; a stream that does not know its length says 0."""
    return f"{images} images" if images else "images that were not counted"


def _of_row(trainer: Trainer, name: str, row: Row, about: str, where: str) -> Evidence:
    start = trainer.progress.history[0]
    lessons = [lesson for lesson in trainer.progress.lessons if lesson["epoch"] <= row["epoch"]]
    return Evidence(
        about,
        where,
        before={title: start[f"{name}/{key}"] for key, title in _METRICS.items()},
        after={title: row[f"{name}/{key}"] for key, title in _METRICS.items()},
        counts={
            f"{title} images": int(row[f"{name}/{title}"])
            for title in ("fixed", "broken")
            if f"{name}/{title}" in row
        },
        teachers=shares_taught(lessons, trainer.peers.names, name),
    )


def _config_sum(options: argparse.Namespace) -> str:
    return hashlib.sha256(outputs.arguments_text(options).encode()).hexdigest()


def _loading(model: str, described: Mapping[str, str]) -> str:
    arguments = outputs.model_arguments(described)
    told = "".join(f", {key}={value!r}" for key, value in arguments.items())
    if timm_builds(model):
        return f'import timm\n\ntimm.create_model({model!r}, checkpoint_path="{{file}}"{told})'
    return (
        "from classification.models import create_classifier  # of peer-transfer\n\n"
        f'create_classifier({model!r}, "{{file}}"{told})'
    )
