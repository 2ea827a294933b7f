"""Model cards of saliency models: written beside each learning peer's files at a run's end.

    python -m saliency.cards OUTPUT/RUN/PEER --analysis analysis.json

writes the card anew, with what an experiment showed of a peer of that name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2

from common.card import (
    Card,
    Evidence,
    Files,
    chosen_row,
    data_rows,
    file_sum,
    kind_of,
    rewrite_main,
    shares_taught,
    soup_evidence,
    start_title,
    told_sum,
    versions,
    write_each,
)
from common.trainer import Trainer
from saliency.evaluation import SaliencyEvaluator
from saliency.layouts import VideoSet
from saliency.options import LOSS_TERMS, LOWER_IS_BETTER, PeerSpec

FILES = {"best": "best.pth", "last": "last.pth", "soup": "soup.pth"}
_METRICS = {
    "cc": "CC",
    "similarity": "SIM",
    "nss": "NSS",
    "auc_judd": "AUC-Judd",
    "auc_shuffled": "shuffled AUC",
    "kldiv": "KL (less is better)",
    "loss": "KL less CC (less is better)",
}
_MADE = (
    "recipe rule score margin transfer_weight transfer_warmup_steps temperature detach_teacher "
    "teachers engine guard held_out epochs batch_size clips_per_video grad_accum_steps map_size "
    "sched amp amp_dtype seed val_stride blur"
).split()
_OWN = "opt lr weight_decay clip_grad model_ema model_ema_span model_ema_decay".split()
_OURS = """from saliency.models import create_model  # of peer-transfer

model = create_model({model!r}, "{{file}}"{kwargs})"""
_USERS = """from {place} import {function}

from common.checkpoint import load_weights, read_weights  # of peer-transfer

model = {function}({kwargs})
load_weights(model, read_weights("{{file}}"), "{{file}}")"""


def origin(spec: PeerSpec) -> str:
    """Tell from what a peer starts: the file and its sum, or the backbone."""
    if spec.checkpoint is not None:
        return told_sum(Path(spec.checkpoint))
    backbone = spec.options.backbone
    if backbone and Path(backbone).is_file():
        return f"backbone {told_sum(Path(backbone))}"
    return f"backbone `{backbone}`" if backbone else "random weights"


def write_cards(
    trainer: Trainer,
    specs: Sequence[PeerSpec],
    options: argparse.Namespace,
    origins: Mapping[str, str],
    train_set: VideoSet,
) -> None:
    """Write ``README.md`` and ``card.json`` of every learning peer that this process leads.

    Args:
        trainer: After its last epoch.
        specs: All peers as asked for.
        options: The run's.
        origins: What ``origin`` told at the run's start, by peer.
        train_set: What was trained on.
    """
    evaluator = trainer.evaluator
    measured = evaluator.videos if isinstance(evaluator, SaliencyEvaluator) else None
    files = data_rows(files_of(train_set), files_of(measured)) if trainer.world.leads else {}
    write_each(
        trainer,
        specs,
        lambda spec: describe(trainer, spec, specs, options, origins, train_set, files),
        FILES["best"],
    )


def files_of(videos: VideoSet | None) -> Files | None:
    """Return the frames, maps and fixations of videos."""
    if videos is None:
        return None
    paths = [
        video.path(file)
        for video in videos.videos
        for file in (*video.frames, *video.maps, *video.fixations)
        if file is not None
    ]
    return Files(paths, videos.root)


def describe(
    trainer: Trainer,
    spec: PeerSpec,
    specs: Sequence[PeerSpec],
    options: argparse.Namespace,
    origins: Mapping[str, str],
    train_set: VideoSet,
    files: Mapping[str, str],
) -> Card:
    """Collect all that the card of one peer tells; see ``write_cards``."""
    others = ", ".join(f"`{other.name}`" for other in specs if other is not spec) or "nobody"
    made = {name: getattr(options, name) for name in _MADE}
    made |= {name: getattr(spec.options, name) for name in _OWN}
    made |= {f"loss: {term}": getattr(options, term) for term in LOSS_TERMS}
    frames = sum(len(video) for video in train_set.videos)
    return Card(
        peer=spec.name,
        model=spec.model,
        about=(
            f"A video saliency model, fine-tuned on `{train_set.name}` side by side with {others} "
            "by peer transfer: for every clip the rule below says which of the peers teaches which."
        ),
        front={"library_name": "pytorch", "tags": ["video-saliency", "peer-transfer"]},
        made={name: str(value) for name, value in made.items() if value is not None},
        evidence=_evidence(trainer, spec.name),
        lineage={
            **{
                start_title(o.name, o.model, o.frozen, spec.name): origins.get(
                    o.name, "not recorded"
                )
                for o in specs
            },
            "data": f"`{train_set.name}`, split `{train_set.split}`"
            + f" without {options.held_out:g} of its videos held out" * bool(options.held_out)
            + f": {len(train_set.videos)} videos, {frames} frames to train on",
            **files,
            "configuration (`args.yaml`)": f"sha256 `{file_sum(trainer.folder / 'args.yaml')}`",
        },
        versions=versions(opencv=cv2.__version__),
        loading=_loading(spec),
        loading_hub="",
    )


def _loading(spec: PeerSpec) -> str:
    told = ", ".join(f"{name}={value!r}" for name, value in spec.options.kwargs.items())
    place, sign, function = spec.model.partition(":")
    if not sign:
        return _OURS.format(model=spec.model, kwargs=f", {told}" if told else "")
    return _USERS.format(place=place, function=function, kwargs=told)


def _evidence(trainer: Trainer, name: str) -> dict[str, Evidence]:
    evaluator = trainer.evaluator
    progress, metric = trainer.progress, trainer.plan.metric
    best = progress.best[name]
    chosen = chosen_row(progress.history, "epoch", best.epoch, f"{name}/{metric}", best.value)
    where = _where(evaluator) if isinstance(evaluator, SaliencyEvaluator) else "the held-out data"
    start = " (0: the start itself, which no later one beat)" if best.epoch == 0 else ""
    least = "lowest" if metric in LOWER_IS_BETTER else "highest"
    kind = kind_of(trainer, name)
    about = f"The {kind} after epoch {best.epoch} of {trainer.plan.epochs}, with the {least}"
    optimistic = f"{where}, which also chose it: what they say of this file is optimistic"
    about = f"{about} {_METRICS[metric].split(' (')[0]}{start}."
    last = f"The {kind} after the last epoch."
    found = {
        "best": _of_row(trainer, name, chosen, about, optimistic),
        "last": _of_row(trainer, name, progress.history[-1], last, where),
    }
    for soup in trainer.soups:
        if soup.peer == name:
            half = f"every second video of {where}; the others chose the average"
            found["soup"] = soup_evidence(soup, _METRICS[soup.metric], half, found["best"])
    return found


def _where(evaluator: SaliencyEvaluator) -> str:
    videos, stride = evaluator.videos, evaluator.loader.stride
    every = f"one frame in {stride} of " if stride > 1 else ""
    return (
        f"{every}{len(videos.videos)} videos of `{videos.name}`, split `{videos.split}` "
        f"({evaluator.loader.targets} frames)"
    )


def _of_row(
    trainer: Trainer, name: str, row: Mapping[str, float], about: str, where: str
) -> Evidence:
    start = trainer.progress.history[0]
    titles = {key: title for key, title in _METRICS.items() if f"{name}/{key}" in row}
    lessons = [x for x in trainer.progress.lessons if x["epoch"] <= row["epoch"]]
    return Evidence(
        about,
        where,
        before={title: start[f"{name}/{key}"] for key, title in titles.items()},
        after={title: row[f"{name}/{key}"] for key, title in titles.items()},
        teachers=shares_taught(lessons, trainer.peers.names, name),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    return rewrite_main("python -m saliency.cards", "OUTPUT/RUN/PEER", FILES, arguments)


if __name__ == "__main__":
    sys.exit(main())
