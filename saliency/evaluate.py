"""Measure saliency models by the benchmark's metrics: every video, and the whole split.

    python saliency/evaluate.py --dataset dhf1k --data-root DHF1K \\
        --peer vinet_s,checkpoint=vinet_s.pt --peer vinet_a,checkpoint=out/run/vinet_a/best.pth

Writes OUTPUT/metrics.csv (the means over frames), OUTPUT/videos.csv (every video's),
OUTPUT/report.html, and with ``--predictions`` the maps themselves as OUTPUT/PEER/VIDEO/FRAME.png,
the layout in which DHF1K takes submissions.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import distributed
from common.disk import write_csv
from common.distributed import World
from common.options import OptionError, check_least
from common.outputs import (
    log_table,
    make_writable,
    on_main,
    progress_bars,
    run_command,
    start_world,
)
from saliency.check import check_data
from saliency.errors import DataError
from saliency.evaluation import ENSEMBLE, flatten
from saliency.layouts import VideoSet, open_dataset
from saliency.metrics import METRICS, Scores, draw_frames
from saliency.options import (
    add_data_options,
    add_machine_options,
    add_peer_options,
    check_data_options,
    read_peers,
)
from saliency.peer import build_modules, warn_of_random_weights
from saliency.pictures import to_bytes, write_png
from saliency.report import write_evaluation_report
from saliency.train import FAULTS, build_evaluator, pack

_logger = logging.getLogger("evaluate")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = argparse.ArgumentParser(
        prog="saliency/evaluate.py",
        description="Measure video saliency models by the benchmark's metrics.",
        allow_abbrev=False,
    )
    add_data_options(parser, None)
    add_peer_options(parser)
    add_machine_options(parser)
    add = parser.add_argument_group("evaluation").add_argument
    add("--split", default="val", choices=("train", "val"))
    add("--output", default="output/evaluate", metavar="DIR")
    add("--predictions", action="store_true", help="also write every predicted map as a PNG")
    add("--exact-auc", action="store_true", help="shuffled AUC as the expectation over all draws")
    add(
        "--interpolation",
        default="bilinear",
        choices=("bilinear", "bicubic"),
        help="how maps come to the ground truth's size; bicubic, with antialias, is the official "
        "evaluation's, which blurs nothing (--blur 0)",
    )
    add(
        "--max-frames",
        type=int,
        metavar="N",
        help="score only N frames, drawn by --seed (official: 50000); all unless given",
    )
    add("--jitter", action="store_true", help="break ties in AUC-Judd with seeded noise")
    parser.set_defaults(val_stride=1)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    return run_command(lambda: evaluate(arguments), FAULTS)


def evaluate(arguments: Sequence[str] | None = None, bars: bool = True) -> dict[str, Scores]:
    """Measure every ``--peer``, and their ensemble where there are several.

    Returns:
        By name; empty with ``--check-data``.

    Raises:
        OptionError, ModelError, DataError, CheckpointError: Bad input.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    check_data_options(options)
    check_least(options, {"max_frames": 1})
    torch.manual_seed(options.seed)
    specs = [] if options.check_data and not options.peers else read_peers(parser, options)
    world = start_world(options.device)
    videos = open_dataset(options.dataset, options.data_root, options.split)
    shown = bars and sys.stderr.isatty()
    on_main(
        world,
        lambda: check_data(
            videos,
            depth=options.check_depth,
            progress=shown,
            most_broken=options.max_bad_samples,
        ),
        (DataError,),
    )
    if options.check_data:
        return {}
    modules, views = build_modules(specs)
    if world.is_main:
        warn_of_random_weights(specs)
    for module in modules:
        module.to(world.device)
    folder = _folder(options, world)
    evaluator = build_evaluator(
        options,
        videos,
        views,
        world,
        pack(options, (videos,), views, world, bars),
        progress_bars(bars and world.is_main),
        shuffled=True,
        flags=_flags(options),
        interpolation=options.interpolation,
        on_maps=_writer(folder, videos) if options.predictions else None,
    )
    if options.max_frames is not None:
        evaluator.loader.choose(_chooser(options))
    scores = evaluator.score(modules, views, [spec.name for spec in specs])
    if world.is_main:
        write_tables(folder, scores)
        report = write_evaluation_report(folder / "report.html", videos, scores, vars(options))
        _tell(videos, scores)
        _logger.info("report: %s", report)
    distributed.barrier()
    return scores


def _folder(options: argparse.Namespace, world: World) -> Path:
    folder = Path(options.output)
    on_main(world, lambda: make_writable(folder), (OptionError,))
    return folder


def _chooser(options: argparse.Namespace) -> Callable[[int], list[int]]:
    """Return what draws the frames to score; alike on all ranks."""
    generator = torch.Generator().manual_seed(options.seed)
    return lambda total: draw_frames(total, options.max_frames, generator)


def _flags(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what differs from the official definitions, of the metrics that are measured."""
    flags: dict[str, dict[str, Any]] = {}
    names = options.metrics or tuple(METRICS)
    if options.exact_auc and "auc_shuffled" in names:
        flags["auc_shuffled"] = {"splits": None, "step": None}
    if options.jitter and "auc_judd" in names:
        flags["auc_judd"] = {"jitter": True}
    return flags


def _writer(
    folder: Path, videos: VideoSet
) -> Callable[[str, Sequence[tuple[int, int]], Tensor], None]:
    def write(name: str, targets: Sequence[tuple[int, int]], maps: Tensor) -> None:
        for (number, frame), map_ in zip(targets, maps.float().cpu().numpy(), strict=True):
            video = videos.videos[number]
            stem = Path(video.frames[frame]).stem
            write_png(folder / name / video.name / f"{stem}.png", to_bytes(map_))

    return write


def write_tables(folder: Path, scores: Mapping[str, Scores]) -> None:
    """Write metrics.csv, a row a model, and videos.csv, a row a model and video."""
    rows, each = [], []
    for name, its in scores.items():
        undefined = {f"{metric}_undefined": count for metric, count in its.undefined.items()}
        loss = flatten({name: its})[f"{name}/loss"]
        rows.append({"peer": name, "frames": its.frames, "loss": loss, **its.mean, **undefined})
        each += [{"peer": name, "video": video, **mean} for video, mean in its.videos.items()]
    write_csv(folder / "metrics.csv", rows)
    write_csv(folder / "videos.csv", each)


def _tell(videos: VideoSet, scores: Mapping[str, Scores]) -> None:
    log_table(
        [
            {
                "peer": name,
                "loss": f"{flatten({name: its})[f'{name}/loss']:.4f}",
                **{metric: f"{value:.4f}" for metric, value in its.mean.items()},
            }
            for name, its in scores.items()
        ]
    )
    first = next(iter(scores.values()))
    left = {name: count for name, count in first.undefined.items() if count}
    told = "".join(f"; {name} not defined for {count}" for name, count in left.items())
    _logger.info("%s: %d frames%s", videos, first.frames, told)
    for name, flags in first.flags.items():
        if flags:
            settings = ", ".join(f"{key} {value}" for key, value in flags.items())
            _logger.info("%s: %s", name, settings)
    if len(scores) > 1:
        _logger.info("%s: the mean of all maps, each divided by its sum", ENSEMBLE)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # see saliency/train.py
    sys.exit(main())
