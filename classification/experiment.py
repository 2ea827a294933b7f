"""Experiments on classifiers: arms over seeds, chosen on held-out data, told with tests.

python classification/experiment.py classification/configs/experiments/digits.yaml --jobs 2
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
import yaml
from timm.utils import random_seed
from torch import Tensor, nn
from torch.utils.data import Dataset

from classification import outputs
from classification.cards import files_of, start_files
from classification.corruptions import Corrupted
from classification.data import View, check_folder, classes_of, open_dataset
from classification.evaluation import PeerEvaluator, Scores
from classification.options import PEER_ALIASES, PeerSpec, parse, read_yaml
from classification.peer import build_modules, check_sources
from classification.train import (
    FAULTS,
    check_apart,
    check_classes,
    check_same_classes,
    open_both,
    run,
)
from classification.train import start as begin
from common import experiment
from common.broken import BadSamples
from common.calibration import TemperatureFit, expected_calibration_error
from common.card import file_sum, names_sum
from common.checkpoint import atomic_write, read_file, save_weights
from common.corrupt import SEVERITIES
from common.distributed import World
from common.experiment import (
    RECALIBRATED,
    TEMPERATURE,
    Measured,
    Trained,
    hidden_by,
    refuse_frozen,
    unchanged,
)
from common.options import OptionError

# what a start's file tells by itself
TOLD_BY_FILE = (
    "checkpoint pretrained kwargs model_kwargs num_classes gp img_size input_size in_chans mean "
    "std interpolation crop_pct bn_eps head_init_scale head_init_bias"
).split()


class Classification:
    """How ``common.experiment`` runs ``train.py``."""

    module = "classification.experiment"
    metric = "top1"
    lower_is_better = False
    suffix = ".safetensors"
    hosts: ClassVar = {"timm": timm.__version__}
    severities: ClassVar = {name: len(amounts) for name, amounts in SEVERITIES.items()}

    def read(self, path: Path) -> Any:
        """Read a YAML file; see ``common.experiment.Task``."""
        return read_yaml(path)

    def check(self, options: Mapping[str, Any]) -> list[str]:
        """Refuse options that cannot be used; return the peers' names."""
        asked, specs = _parsed(options)
        if asked.push_to_hub:
            raise OptionError(
                f"push_to_hub {asked.push_to_hub}: the runs of an experiment are not pushed, their "
                "files would replace one another; push one of them with classification/push.py"
            )
        check_folder(asked)
        check_sources(specs)
        refuse_frozen(specs)
        return [spec.name for spec in specs]

    def hidden(
        self, peer: Mapping[str, Any], train: Mapping[str, Any], own: Mapping[str, Any]
    ) -> dict[str, str]:
        """Say which options of an arm a peer's own would hide; see ``common.experiment.Task``."""
        return hidden_by(peer, own, PEER_ALIASES)

    def sources(self, options: Mapping[str, Any]) -> dict[str, str]:
        """Say what a run rests on; see ``common.experiment.Task``."""
        asked, specs = _parsed(options)
        train, test = (
            open_dataset(asked, training, asked.in_chans or 3) for training in (True, False)
        )
        check_apart(train, test, asked, "make two split folders")
        found = {str(file): file_sum(file) for spec in specs for file in start_files(spec) or ()}
        for what, dataset in ((asked.train_split, train), (asked.val_split, test)):
            found[f"{asked.data}, {what}"] = names_sum(files_of(dataset))
        return found

    def start(self, options: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Measured]:
        """Write each peer's weights as they are before training; measure them."""
        asked, specs = _parsed(options)
        world = begin(asked)
        random_seed(asked.seed, 0)
        modules, views = build_modules(specs, asked)
        for spec, module, view in zip(specs, modules, views, strict=True):
            about = outputs.metadata(spec, module, view)
            save_weights(files[spec.name], module.state_dict(), about)
        channels, count = views[0].size[0], modules[0].num_classes
        train_set, held_out = open_both(asked, channels, count)
        test = _test_set(asked, channels, count)
        check_same_classes(train_set, test)
        names, classes = [spec.name for spec in specs], _class_names(test, count)
        scores, temperatures = _calibrate(asked, modules, views, held_out, world)
        found = {"held_out": measured(scores, names, None, classes)}
        scores = _scores(asked, modules, views, test, world, temperatures=temperatures)
        found["test"] = measured(scores, names, None, classes, temperatures=temperatures)
        for name, right in zip(names, scores.correct, strict=True):
            told = {"right": right, "valid": scores.valid}
            atomic_write(_right(files[name]), lambda to, told=told: torch.save(told, to))
        return found

    def started(self, peer: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
        """Return a peer's entry that starts from a file of ``start``, its options kept."""
        kept = {key: x for key, x in peer.items() if key.replace("-", "_") not in TOLD_BY_FILE}
        return {**kept, "model": str(file), "name": name}

    def train(self, options: Mapping[str, Any], folder: Path) -> Trained:
        """Train, or go on with the run of that folder."""
        specs = _parsed(options)[1]
        if all(spec.frozen for spec in specs):
            starts = {spec.name: Path(str(spec.checkpoint)) for spec in specs}
            return unchanged(starts, folder, self.suffix)
        where = ["--output", str(folder.parent), "--experiment", folder.name]
        arguments = [*_arguments(options, folder / "options.yaml"), *where, "--resume", "auto"]
        progress = run(arguments, bars=False)
        chosen = {name: (best.epoch, best.value) for name, best in progress.best.items()}
        return Trained(progress.history, progress.lessons, chosen, progress.updates)

    def measure(
        self, options: Mapping[str, Any], files: Mapping[str, Path], start: Mapping[str, Path]
    ) -> Measured:
        """Measure exported weights on the test set."""
        asked, modules, views, test = _exported(options, files)
        held_out = open_both(asked, views[0].size[0], modules[0].num_classes)[1]
        world = begin(asked)
        temperatures = _calibrate(asked, modules, views, held_out, world)[1]
        scores = _scores(asked, modules, views, test, world, temperatures=temperatures)
        told = [read_file(_right(start[name])) for name in files]
        before = torch.stack([one["right"] for one in told])
        classes = _class_names(test, modules[0].num_classes)
        valid = told[0].get("valid")
        return measured(scores, list(files), before, classes, valid, temperatures)

    def measure_corrupted(
        self,
        options: Mapping[str, Any],
        files: Mapping[str, Path],
        corruptions: Sequence[tuple[str, int]],
        temperatures: Mapping[str, float],
    ) -> list[dict[str, float]]:
        """Measure exported weights on the test set, under one corruption after the other."""
        asked, modules, views, test = _exported(options, files)
        world, classes = begin(asked), _class_names(test, modules[0].num_classes)
        fitted = [temperatures[name] for name in files] if temperatures else []
        rows = []
        for one in corruptions:
            spoilt = Corrupted(test, *one)
            scores = _scores(asked, modules, views, spoilt, world, temperatures=fitted)
            found = measured(scores, list(files), None, classes, temperatures=fitted)
            rows.append(found.metrics)
        return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    logging.getLogger("timm").setLevel(logging.WARNING)
    return experiment.main(Classification(), FAULTS, arguments)


def _parsed(options: Mapping[str, Any]) -> tuple[argparse.Namespace, list[PeerSpec]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "options.yaml"
        try:
            return parse(_arguments(options, file))
        except OptionError as error:  # which names a file that nobody wrote
            raise OptionError(str(error).removeprefix(f"{file}: ")) from error


def _exported(
    options: Mapping[str, Any], files: Mapping[str, Path]
) -> tuple[argparse.Namespace, list[nn.Module], list[View], Dataset]:
    """Read weights that were exported, and open the test set."""
    of_roles = ("peers", "rule", "calibrate_scores")
    plain = {key: x for key, x in options.items() if key not in of_roles}
    peers = [{"model": str(file), "name": name} for name, file in files.items()]
    asked, specs = _parsed({**plain, "rule": "none", "peers": peers})
    modules, views = build_modules(specs, asked)
    return asked, modules, views, _test_set(asked, views[0].size[0], modules[0].num_classes)


def _arguments(options: Mapping[str, Any], file: Path) -> list[str]:
    text = yaml.safe_dump(dict(options), sort_keys=False)
    atomic_write(file, lambda to: to.write_text(text, encoding="utf-8"))
    return ["-c", str(file)]


def _test_set(options: argparse.Namespace, channels: int, num_classes: int) -> Dataset:
    test = open_dataset(options, False, channels)
    check_classes(test, num_classes)
    return test


def _scores(
    options: argparse.Namespace,
    modules: Sequence[nn.Module],
    views: Sequence[View],
    dataset: Dataset,
    world: World,
    fits: Sequence[TemperatureFit] = (),
    temperatures: Sequence[float] = (),
) -> Scores:
    amp_dtype = getattr(torch, options.amp_dtype) if options.amp else None
    for module in modules:
        module.to(world.device)
    bad = BadSamples(options.max_bad_samples)
    evaluator = PeerEvaluator(dataset, views, options, world, amp_dtype, bad=bad)
    return evaluator.score(modules, fits, temperatures)


def _calibrate(
    options: argparse.Namespace,
    modules: Sequence[nn.Module],
    views: Sequence[View],
    held_out: Dataset,
    world: World,
) -> tuple[Scores, list[float]]:
    """Score the held-out part, and fit each peer's temperature on it in the same pass."""
    fits = [TemperatureFit(world.device) for _ in modules]
    scores = _scores(options, modules, views, held_out, world, fits)
    return scores, [fit.temperature() for fit in fits]


def measured(
    scores: Scores,
    names: Sequence[str],
    before: Tensor | None,
    classes: Sequence[str],
    was_valid: Tensor | None = None,
    temperatures: Sequence[float] = (),
) -> Measured:
    """Turn scores into what the report wants: metrics, flips, calibration, every class.

    Args:
        scores: Of all peers on one set of data.
        names: The peers', in order.
        before: Which samples were right at the start [N, n]; None: no flips.
        classes: Names of the classes, by number.
        was_valid: Which samples could be read at the start [n]; None: all.
        temperatures: Of each peer, that ``scores.calibrated`` is of; none: it is not told.
    """
    found = Measured(scores.metrics(names, before, was_valid))
    target = scores.target[scores.valid]
    confidence, correct = (x[:, scores.valid] for x in (scores.confidence, scores.correct))
    present = target.unique().tolist()
    for i, name in enumerate(names):
        found.metrics[f"{name}/ece"] = 100 * expected_calibration_error(confidence[i], correct[i])
        if temperatures and scores.calibrated is not None:
            sure = scores.calibrated[i, scores.valid]
            error = 100 * expected_calibration_error(sure, correct[i])
            found.metrics[f"{name}/{RECALIBRATED}"] = error
            found.metrics[f"{name}/{TEMPERATURE}"] = temperatures[i]
        found.classes[name] = {
            classes[k]: 100 * correct[i][target == k].double().mean().item() for k in present
        }
    return found


def _class_names(dataset: Dataset, count: int) -> list[str]:
    numbered = {number: str(name) for name, number in (classes_of(dataset) or {}).items()}
    return [numbered.get(k, str(k)) for k in range(count)]


def _right(start: Path) -> Path:
    """Say where a start's right answers lie, beside its weights."""
    return start.with_suffix(".right.pt")


if __name__ == "__main__":
    sys.exit(main())
