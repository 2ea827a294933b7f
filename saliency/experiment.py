"""Experiments on video saliency models: arms over seeds, chosen on held-out videos, with tests.

python saliency/experiment.py saliency/configs/experiments/videos.yaml --jobs 2
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
import yaml
from torch import Tensor, nn

from common import experiment
from common.card import file_sum, names_sum
from common.checkpoint import atomic_write, read_file, save_weights
from common.distributed import World
from common.experiment import Measured, Trained, hidden_by, refuse_frozen, unchanged
from common.options import OptionError
from common.outputs import start_world
from common.yaml_files import read_yaml
from saliency.cards import files_of
from saliency.clips import ClipView
from saliency.corruptions import SEVERITIES
from saliency.evaluation import flatten
from saliency.layouts import VideoSet, open_dataset
from saliency.options import PeerSpec, parse
from saliency.peer import build_modules, check_sources
from saliency.train import (
    FAULTS,
    build_evaluator,
    check_apart,
    check_videos,
    open_splits,
    run,
)

SCRIPT = "train"


class Saliency:
    """How ``common.experiment`` runs ``train.py``; the validation split is the test set."""

    module = "saliency.experiment"
    metric = "cc"
    lower_is_better = False
    suffix = ".pth"
    hosts: Mapping[str, str] = {"opencv": cv2.__version__}
    others: Mapping[str, bool] = {
        "kldiv": True,
        "similarity": False,
        "nss": False,
        "auc_judd": False,
    }
    severities: Mapping[str, int] = SEVERITIES
    flips = (
        "frames of the test set, in percent, that a peer predicts better, and worse, than at its "
        "start, by CC"
    )

    def read(self, path: Path) -> Any:
        """Read a YAML file; see ``common.experiment.Task``."""
        return read_yaml(path)

    def check(self, options: Mapping[str, Any]) -> list[str]:
        """Refuse options that cannot be used; return the peers' names."""
        asked, specs = _parsed(options)
        if asked.eval_metric != self.metric:
            raise OptionError(
                f"eval_metric {asked.eval_metric}: the tests of an experiment are about "
                f"{self.metric}, so that chooses the epoch too; leave it out"
            )
        if not Path(asked.data_root).expanduser().is_dir():
            raise OptionError(f"data_root {asked.data_root}: no such folder")
        check_sources(specs)
        refuse_frozen(specs)
        return [spec.name for spec in specs]

    def hidden(
        self, peer: Mapping[str, Any], train: Mapping[str, Any], own: Mapping[str, Any]
    ) -> dict[str, str]:
        """Say which options of an arm a peer's own would hide; see ``common.experiment.Task``."""
        return hidden_by(peer, own, {})

    def sources(self, options: Mapping[str, Any]) -> dict[str, str]:
        """Say what a run rests on; see ``common.experiment.Task``."""
        asked, specs = _parsed(options)
        splits = [open_dataset(asked.dataset, asked.data_root, name) for name in ("train", "val")]
        check_apart(*splits)
        given = [x for spec in specs for x in (spec.checkpoint, spec.options.backbone) if x]
        files = [Path(str(x)) for x in given if Path(str(x)).is_file()]
        found = {str(file): file_sum(file) for file in files}
        for videos in splits:
            found[f"{asked.data_root}, {videos.split}"] = names_sum(files_of(videos))
        return found

    def start(self, options: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Measured]:
        """Write each peer's weights as they are before training; measure them."""
        asked, specs = _parsed(options)
        world = start_world(asked.device)
        torch.manual_seed(asked.seed)
        modules, views = build_modules(specs)
        for spec, module in zip(specs, modules, strict=True):
            save_weights(files[spec.name], module.state_dict())
        names = [spec.name for spec in specs]
        _, held_out = open_splits(asked, world, bars=False)
        test, found = test_videos(asked), {}
        for what, videos in (("held_out", held_out), ("test", test)):
            found[what], frames = measured(asked, videos, modules, views, names, world)
        for name in names:
            atomic_write(_frames(files[name]), lambda to, x=frames[name]: torch.save({"cc": x}, to))
        return found

    def started(self, peer: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
        """Return a peer's entry that starts from a file of ``start``, its options kept."""
        kept = {key: value for key, value in peer.items() if key != "backbone"}
        return {**kept, "name": name, "checkpoint": str(file)}

    def train(self, options: Mapping[str, Any], folder: Path) -> Trained:
        """Train, or go on with the run of that folder."""
        specs = _parsed(options)[1]
        if all(spec.frozen for spec in specs):
            starts = {spec.name: Path(str(spec.checkpoint)) for spec in specs}
            return unchanged(starts, folder, self.suffix)
        where = ["--output", str(folder.parent), "--experiment", folder.name]
        arguments = [*_arguments(options, folder / "options.yaml"), *where, "--resume", "auto"]
        trainer = run(None, SCRIPT, arguments, bars=False)
        if trainer is None:
            raise OptionError("check_data and plan train nothing; leave them out")
        progress = trainer.progress
        chosen = {name: (best.epoch, best.value) for name, best in progress.best.items()}
        return Trained(progress.history, progress.lessons, chosen, progress.updates)

    def measure(
        self, options: Mapping[str, Any], files: Mapping[str, Path], start: Mapping[str, Path]
    ) -> Measured:
        """Measure exported weights on the test set."""
        asked, modules, views, names = _exported(options, files)
        world = start_world(asked.device)
        found, frames = measured(asked, test_videos(asked), modules, views, names, world)
        for name in names:
            before = read_file(_frames(start[name]))["cc"]
            found.metrics |= {f"{name}/{k}": x for k, x in moved(before, frames[name]).items()}
        return found

    def measure_corrupted(
        self,
        options: Mapping[str, Any],
        files: Mapping[str, Path],
        corruptions: Sequence[tuple[str, int]],
        temperatures: Mapping[str, float],
    ) -> list[dict[str, float]]:
        """Measure exported weights on the test set, under each corruption; maps have no ECE."""
        asked, modules, views, names = _exported(options, files)
        asked.metrics = [self.metric]  # no other is told, and some take longer than the models
        videos, world = test_videos(asked), start_world(asked.device)
        return [
            measured(asked, videos, modules, views, names, world, one)[0].metrics
            for one in corruptions
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    return experiment.main(Saliency(), FAULTS, arguments)


def _parsed(options: Mapping[str, Any]) -> tuple[argparse.Namespace, list[PeerSpec]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "options.yaml"
        try:
            return parse(None, SCRIPT, _arguments(options, file))
        except OptionError as error:  # which names a file that nobody wrote
            raise OptionError(str(error).removeprefix(f"{file}: ")) from error


def _exported(
    options: Mapping[str, Any], files: Mapping[str, Path]
) -> tuple[argparse.Namespace, list[nn.Module], list[ClipView], list[str]]:
    """Read weights that were exported; return the models, their views and names too."""
    asked, specs = _parsed(options)
    specs = [spec.loaded_from(files[spec.name]) for spec in specs if spec.name in files]
    modules, views = build_modules(specs)
    return asked, modules, views, [spec.name for spec in specs]


def _arguments(options: Mapping[str, Any], file: Path) -> list[str]:
    text = yaml.safe_dump({"eval_metric": Saliency.metric, **options}, sort_keys=False)
    atomic_write(file, lambda to: to.write_text(text, encoding="utf-8"))
    return ["-c", str(file)]


def test_videos(options: argparse.Namespace) -> VideoSet:
    """List the validation split, after a look at its files; no epoch is chosen on it."""
    videos = open_dataset(options.dataset, options.data_root, "val")
    check_videos(options, [videos], progress=False)
    return videos


def measured(
    options: argparse.Namespace,
    videos: VideoSet,
    modules: Sequence[nn.Module],
    views: Sequence[ClipView],
    names: Sequence[str],
    world: World,
    corruption: tuple[str, int] | None = None,
) -> tuple[Measured, dict[str, Tensor]]:
    """Measure models.

    Args:
        options: Of the run.
        videos: To measure on.
        modules: The models.
        views: What each sees.
        names: How each is called.
        world: Where this process stands.
        corruption: Spoils every frame, by a name and a severity of ``saliency.corruptions``.

    Returns:
        The means, and for each model CC by frame, float [n], NaN where it is not defined; the
        frames come in the split's order.
    """
    found: dict[str, dict[tuple[int, int], Tensor]] = {}

    def keep(name: str, targets: Sequence[tuple[int, int]], values: Tensor) -> None:
        at = evaluator.names.index(Saliency.metric)
        found.setdefault(name, {}).update(zip(targets, values[:, at].cpu(), strict=True))

    evaluator = build_evaluator(
        options, videos, views, world, corruption=corruption, on_scores=keep
    )
    for module in modules:
        module.to(world.device)
    scores = evaluator.score(modules, views, names)
    frames = {name: torch.stack([found[name][k] for k in sorted(found[name])]) for name in names}
    return Measured(flatten(scores)), frames


def moved(before: Tensor, after: Tensor) -> dict[str, float]:
    """Say how many frames a peer predicts better, and worse, than before.

    Args:
        before, after: Scores by frame [n], larger is better; NaN where not defined.

    Returns:
        ``fixed`` and ``broken``, in percent of the frames where both are defined.
    """
    known = ~(before.isnan() | after.isnan())
    gain = (after - before)[known]
    return {
        "fixed": 100 * (gain > 0).double().mean().item(),
        "broken": 100 * (gain < 0).double().mean().item(),
    }


def _frames(start: Path) -> Path:
    """Say where a start's CC by frame lies, beside its weights."""
    return start.with_suffix(".frames.pt")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # see saliency/train.py
    sys.exit(main())
