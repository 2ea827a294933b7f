"""Model cards of segmentors: written beside each learning peer's files at a run's end.

    python -m segmentation.cards OUTPUT_DIR/PEER --analysis analysis.json

writes the card anew, with what an experiment showed of a peer of that name.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import detectron2

from common.card import (
    Card,
    Evidence,
    Files,
    chosen_row,
    data_rows,
    rewrite_main,
    shares_taught,
    soup_evidence,
    start_title,
    versions,
    write_each,
)
from segmentation import checkpoints
from segmentation.config import PeerConfig, RunConfig
from segmentation.data import classes_of, load_datasets
from segmentation.held_out import part_of, sources
from segmentation.keys import value_at
from segmentation.trainer import METRIC, TransferTrainer

CONFIG = "config.yaml"
FILES = {"best": checkpoints.BEST, "last": checkpoints.FINAL, "soup": checkpoints.SOUP}

Row = Mapping[str, float]

_METRICS = {
    METRIC: "mIoU (%)",
    "fwIoU": "fwIoU (%)",
    "mACC": "mean accuracy of classes (%)",
    "pACC": "pixel accuracy (%)",
}
_TRANSFER = (
    "RULE SCORE GRANULARITY WEIGHT TEMPERATURE MARGIN DETACH_TEACHER TEACHERS MODEL_EMA "
    "MODEL_EMA_SPAN MODEL_EMA_DECAY WARMUP_ITERS ENGINE GUARD ACCUMULATE HELD_OUT"
).split()
_OWN = (
    "SOLVER.MAX_ITER SOLVER.IMS_PER_BATCH SOLVER.OPTIMIZER SOLVER.BASE_LR "
    "SOLVER.BACKBONE_MULTIPLIER SOLVER.WEIGHT_DECAY SOLVER.LR_SCHEDULER_NAME SOLVER.AMP.ENABLED "
    "INPUT.CROP.SIZE INPUT.MIN_SIZE_TRAIN SEED"
).split()
_LOADING = """from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from segmentation.config import base_config  # of peer-transfer

cfg = base_config()
cfg.merge_from_file("config.yaml")
model = build_model(cfg)
DetectionCheckpointer(model).load("{file}")"""


def write_cards(trainer: TransferTrainer) -> None:
    """Write ``README.md`` and ``card.json`` of every learning peer that this process leads.

    Args:
        trainer: After ``train``, and ``make_soups`` where it is asked for.
    """
    files = files_told(trainer) if trainer.world.leads else {}
    write_each(
        trainer, trainer.run.peers, lambda config: describe(trainer, config, files), FILES["best"]
    )


def files_told(trainer: TransferTrainer) -> dict[str, str]:
    """Return the lineage's rows of the images and annotations, of training and evaluation."""
    measured = load_datasets([trainer.run.cfg.DATASETS.TEST[0]])
    return data_rows(files_of(trainer.dataset), files_of(measured))


def files_of(records: Iterable[Mapping[str, Any]]) -> Files:
    """Return the images and annotations of records."""
    return Files([record[key] for record in records for key in ("file_name", "sem_seg_file_name")])


def describe(trainer: TransferTrainer, config: PeerConfig, files: Mapping[str, str]) -> Card:
    """Collect all that the card of one peer tells; ``files`` is what ``files_told`` did."""
    run, name = trainer.run, config.name
    others = ", ".join(f"`{other.name}`" for other in run.peers if other is not config) or "nobody"
    made = {key.lower(): run.transfer[key] for key in _TRANSFER}
    made |= {key: value_at(config.cfg, key) for key in _OWN}
    kind = config.cfg.MODEL.META_ARCHITECTURE
    return Card(
        peer=name,
        model=kind,
        about=(
            f"A semantic segmentor of {len(classes_of(run.cfg.DATASETS.TEST[0])[0])} classes, "
            f"fine-tuned on {_names(run.cfg.DATASETS.TRAIN)} side by side with {others} by peer "
            f"transfer: for every {run.transfer.GRANULARITY} the rule below says which of the "
            "peers teaches which."
        ),
        front={
            "library_name": "detectron2",
            "pipeline_tag": "image-segmentation",
            "tags": ["image-segmentation", "detectron2", "peer-transfer"],
        },
        made={key: str(value) for key, value in made.items()},
        evidence=_evidence(trainer, name),
        lineage={
            **{_title(other, name): _start(trainer, other) for other in run.peers},
            "data": f"{_names(run.cfg.DATASETS.TRAIN)}, {len(trainer.dataset)} images to train on",
            **files,
            f"configuration (`{CONFIG}`)": f"sha256 `{_config_sum(run, config)}`",
        },
        versions=versions(detectron2=detectron2.__version__),
        loading=_LOADING,
        loading_hub="",
    )


def _names(datasets: Sequence[str]) -> str:
    told = ", ".join(f"`{name}`" for dataset in datasets for name in sources(dataset))
    part = part_of(datasets[0])
    if part is None:
        return told
    share = f"{100 * part.share:g} %"
    return f"{told} without {share} held out" if part.kind == "rest" else f"{share} of {told}"


def _title(other: PeerConfig, name: str) -> str:
    return start_title(other.name, other.cfg.MODEL.META_ARCHITECTURE, other.frozen, name)


def _start(trainer: TransferTrainer, config: PeerConfig) -> str:
    return trainer.origins.get(config.name, "not recorded")


def _evidence(trainer: TransferTrainer, name: str) -> dict[str, Evidence]:
    value, iteration = trainer.best[name]
    chosen = chosen_row(trainer.history, "iteration", iteration, f"{name}/{METRIC}", value)
    dataset = trainer.run.cfg.DATASETS.TEST[0]
    where = f"{len(load_datasets([dataset]))} images of {_names([dataset])}"
    start = " (0: the start itself, which no later one beat)" if iteration == 0 else ""
    kind = "average of the weights" if trainer.run.transfer.MODEL_EMA else "weights"
    about = f"The {kind} after iteration {int(iteration)} of {trainer.max_iter}, the best by mIoU"
    optimistic = f"{where}, which also chose it: what they say of this file is optimistic"
    last = trainer.history[-1]
    found = {
        "best": _of_row(trainer, name, chosen, f"{about}{start}.", optimistic),
        "last": _of_row(trainer, name, last, f"The {kind} after the last iteration.", where),
    }
    for soup in trainer.soups:
        if soup.peer == name:
            half = f"every second one of {where}; the others chose the average"
            found["soup"] = soup_evidence(soup, _METRICS[soup.metric], half, found["best"])
    return found


def _of_row(trainer: TransferTrainer, name: str, row: Row, about: str, where: str) -> Evidence:
    start = trainer.history[0]
    lessons = [x for x in trainer.lessons if x["iteration"] <= row["iteration"]]
    return Evidence(
        about,
        where,
        before={title: start[f"{name}/{key}"] for key, title in _METRICS.items()},
        after={title: row[f"{name}/{key}"] for key, title in _METRICS.items()},
        teachers=shares_taught(lessons, trainer.peers.names, name),
    )


def _config_sum(run: RunConfig, config: PeerConfig) -> str:
    path = run.output_dir / config.name / CONFIG
    text = path.read_bytes() if path.is_file() else config.cfg.dump().encode()
    return hashlib.sha256(text).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    return rewrite_main("python -m segmentation.cards", "OUTPUT_DIR/PEER", FILES, arguments)


if __name__ == "__main__":
    sys.exit(main())
