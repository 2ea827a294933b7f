"""What ``common.experiment`` asks of segmentation: starts, runs and measurements.

An experiment file has Detectron2's keys, nested or dotted, under ``train`` and in every arm, and
the peers as under TRANSFER.PEERS.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.utils.env import seed_all_rng

from common import experiment
from common.broken import BadSamples
from common.card import file_sum, names_sum
from common.checkpoint import atomic_write, read_file
from common.claimed import claim, claims_end
from common.disk import remove_leftovers
from common.experiment import (
    RECALIBRATED,
    TEMPERATURE,
    Measured,
    Trained,
    refuse_frozen,
    unchanged,
)
from common.options import OptionError
from segmentation import checkpoints
from segmentation.cards import files_of
from segmentation.cli import begin, configs_of, end_logging, hush, train, write_configs
from segmentation.config import PEER_PREFIX, RunConfig, load_content, read_yaml, recipe_keys
from segmentation.corruptions import SEVERITIES
from segmentation.data import allowed, check_apart, check_classes, classes_of, load_datasets
from segmentation.errors import FAULTS
from segmentation.evaluation import ENSEMBLE, METRICS, evaluate_group
from segmentation.held_out import hold_out
from segmentation.models import build_with_weights
from segmentation.peer import SegmentorPeer
from segmentation.pixels import PixelRecord, PixelTemperatures, flips
from segmentation.trainer import METRIC, TransferTrainer, current_world

_RULE = "TRANSFER.RULE"
_RECIPE = "TRANSFER.RECIPE"
# Keys that the experiment itself gives, by what it calls them.
_GIVEN = {
    "rule": _RULE,
    "recipe": _RECIPE,
    "seed": "SEED",
    "device": "MODEL.DEVICE",
    "held_out": "TRANSFER.HELD_OUT",
    "peers": "TRANSFER.PEERS",
}
# What an experiment must say elsewhere.
_ELSEWHERE = {
    "SEED": "list them under seeds",
    "OUTPUT_DIR": "give output, beside train",
    "TRANSFER.PEERS": "list them under peers",
    "TRANSFER.HELD_OUT": "give held_out, beside train",
    "MODEL.WEIGHTS": "give WEIGHTS of each peer",
}
_NAMED = {_RULE: "rule", _RECIPE: "recipe"}
_BAD = "TRANSFER.MAX_BAD_SAMPLES"
_CONFIG = "config.yaml"  # beside the weights of a run


class Segmentation:
    """How ``common.experiment`` runs ``train_net.py``.

    Attributes:
        path: Of the experiment; configs and weights are looked for beside it.
    """

    module = "segmentation.experiment"
    metric = METRIC
    lower_is_better = False
    suffix = ".pth"
    hosts: Mapping[str, str] = {"detectron2": detectron2.__version__}
    others: Mapping[str, bool] = {"pACC": False}
    severities: Mapping[str, int] = SEVERITIES
    flips = "labelled pixels of the test images that turned right, and wrong"

    def __init__(self) -> None:
        self.path = Path()
        self._seen: set[str] = set()

    def read(self, path: Path) -> Any:
        """Read a YAML file, and write nested keys as dotted ones."""
        self.path = path
        content = read_yaml(path)
        for key in ("train", "tune"):
            if isinstance(content.get(key), Mapping):
                content[key] = _flat(content[key])
        arms = content.get("arms")
        if isinstance(arms, Mapping):
            content["arms"] = {
                arm: _with_recipe(_flat(own), path) if isinstance(own, Mapping) else own
                for arm, own in arms.items()
            }
        return content

    def check(self, options: Mapping[str, Any]) -> list[str]:
        """Refuse options that cannot be used; return the peers' names."""
        try:
            run = self._run(options)
            check_classes({peer.name: peer.cfg for peer in run.peers})
            self._check_data(run)
            for peer in run.peers:
                _check_weights(peer.name, peer.cfg.MODEL.WEIGHTS)
            refuse_frozen(run.peers)
        except OptionError:
            raise
        except FAULTS as error:
            raise OptionError(str(error)) from error
        return run.names

    def hidden(
        self, peer: Mapping[str, Any], train: Mapping[str, Any], own: Mapping[str, Any]
    ) -> dict[str, str]:
        """Say which options of an arm a peer's own would hide; see ``common.experiment.Task``."""
        alone = f"{PEER_PREFIX}{_name_of(peer)}."
        places = {str(key): "OPTS of its entry" for key in list(peer.get("OPTS") or ())[::2]}
        places |= {
            key.removeprefix(alone): f"train's {key}" for key in train if key.startswith(alone)
        }
        return {
            key: f"{places[key]} goes before it; give {alone}{key} in the arm too, or take it out "
            "there"
            for key in own
            if key in places and f"{alone}{key}" not in own
        }

    def sources(self, options: Mapping[str, Any]) -> dict[str, str]:
        """Say what a run rests on; see ``common.experiment.Task``."""
        run = self._run(options)
        sets = run.cfg.DATASETS
        given = [Path(peer.cfg.MODEL.WEIGHTS).expanduser() for peer in run.peers]
        found = {str(file): file_sum(file) for file in given if file.is_file()}
        for key, names in (("TRAIN", sets.TRAIN), ("TEST", sets.TEST)):
            found[f"DATASETS.{key} {', '.join(names)}"] = names_sum(files_of(load_datasets(names)))
        return found

    def start(self, options: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Measured]:
        """Write each peer's weights as they are before training; measure them."""
        run = self._run(options)
        seed_all_rng(run.cfg.SEED)  # of weights that no file gives
        peers = []
        for config in run.peers:
            module, cfg = build_with_weights(config)
            content = {"model": module.state_dict()}
            atomic_write(files[config.name], functools.partial(torch.save, content))
            peers.append(SegmentorPeer(config.name, module, cfg, frozen=True))
        bad = allowed(run.transfer.MAX_BAD_SAMPLES)
        part = hold_out(run).cfg.DATASETS.TEST[0]
        held_out, _ = measured(peers, part, bad)
        temperatures = fit_temperatures(peers, part, bad)
        test, pixels = measured(peers, run.cfg.DATASETS.TEST[0], bad, temperatures)
        for name, file in files.items():
            content = {"right": pixels.right(name)}
            atomic_write(_right(file), functools.partial(torch.save, content))
        return {"held_out": held_out, "test": test}

    def started(self, peer: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
        """Return a peer's entry that starts from a file of ``start``, its options kept."""
        return {**peer, "NAME": name, "WEIGHTS": str(file)}

    @claims_end()
    def train(self, options: Mapping[str, Any], folder: Path) -> Trained:
        """Train, or go on with the run of that folder."""
        run = self._run(options, folder)
        folder.mkdir(parents=True, exist_ok=True)
        claim(folder)
        remove_leftovers(folder)
        files = {
            which: Path(file).stem
            for which, file in (("chosen", checkpoints.BEST), ("last", checkpoints.FINAL))
        }
        try:
            begin(run)
            if all(peer.frozen for peer in run.peers):
                write_configs(configs_of(run))
                starts = {peer.name: Path(peer.cfg.MODEL.WEIGHTS) for peer in run.peers}
                return unchanged(starts, folder, self.suffix, files)
            resumed = (folder / checkpoints.RECORD).is_file()
            trainer = train(run, resume=True)
        finally:
            end_logging()
        keep_frozen(trainer)
        chosen = {name: (int(when), value) for name, (value, when) in trainer.best.items()}
        updates = trainer.max_iter
        return Trained(trainer.history, trainer.lessons, chosen, updates, resumed, files)

    def measure(
        self, options: Mapping[str, Any], files: Mapping[str, Path], start: Mapping[str, Path]
    ) -> Measured:
        """Measure exported weights on the test set."""
        peers = [self._exported(options, name, file) for name, file in files.items()]
        bad = allowed(int(options.get(_BAD, 0)))
        part = hold_out(self._run(options)).cfg.DATASETS.TEST[0]
        temperatures = fit_temperatures(peers, part, bad)
        found, pixels = measured(peers, peers[0].cfg.DATASETS.TEST[0], bad, temperatures)
        for name in files:
            before = read_file(_right(start[name]))["right"]
            fixed, broken = flips(before, pixels.right(name))
            found.metrics |= {f"{name}/fixed": float(fixed), f"{name}/broken": float(broken)}
        return found

    def measure_corrupted(
        self,
        options: Mapping[str, Any],
        files: Mapping[str, Path],
        corruptions: Sequence[tuple[str, int]],
        temperatures: Mapping[str, float],
    ) -> list[dict[str, float]]:
        """Measure weights on the test set, under one corruption after the other."""
        hush()
        if all((file.parent / _CONFIG).is_file() for file in files.values()):
            peers = [self._exported(options, name, file) for name, file in files.items()]
        else:
            peers = self._started(options, files)
        dataset, most = peers[0].cfg.DATASETS.TEST[0], int(options.get(_BAD, 0))
        return [
            measured(peers, dataset, allowed(most), temperatures or None, one)[0].metrics
            for one in corruptions
        ]

    def _started(
        self, options: Mapping[str, Any], files: Mapping[str, Path]
    ) -> list[SegmentorPeer]:
        """Build peers from the files of ``start``, which have no config beside them."""
        names = [_name_of(peer) for peer in options["peers"]]
        peers = [
            self.started(peer, name, files[name])
            for peer, name in zip(options["peers"], names, strict=True)
        ]
        return [
            SegmentorPeer(config.name, build_with_weights(config)[0], config.cfg, frozen=True)
            for config in self._run({**options, "peers": peers}).peers
        ]

    def _exported(self, options: Mapping[str, Any], name: str, file: Path) -> SegmentorPeer:
        """Build a peer of a run by the config beside its file, which has all the run gave it."""
        spec = {"NAME": name, "CONFIG": str(file.parent / _CONFIG), "WEIGHTS": str(file)}
        content: dict[str, Any] = {"TRANSFER": {"RULE": "none", "PEERS": [spec]}}
        if "device" in options:
            content["MODEL"] = {"DEVICE": options["device"]}
        config = load_content(content, self.path).peers[0]
        return SegmentorPeer(name, build_with_weights(config)[0], config.cfg, frozen=True)

    def _run(self, options: Mapping[str, Any], folder: Path | None = None) -> RunConfig:
        own = {key: value for key, value in options.items() if key not in _GIVEN}
        _refuse_elsewhere(own, options["peers"])
        given = {_GIVEN[key]: value for key, value in options.items() if key in _GIVEN}
        if folder is not None:
            given["OUTPUT_DIR"] = str(folder)
        of_peers = {key: value for key, value in own.items() if key.startswith(PEER_PREFIX)}
        shared = {key: value for key, value in own.items() if key not in of_peers}
        if len(options["peers"]) == 1:  # alone, what is for others is none of its business
            mine = f"{PEER_PREFIX}{_name_of(options['peers'][0])}."
            of_peers = {key: value for key, value in of_peers.items() if key.startswith(mine)}
        pairs = [word for pair in of_peers.items() for word in pair]
        return load_content(_nested({**shared, **given}, self.path), self.path, pairs)

    def _check_data(self, run: RunConfig) -> None:
        """Look for the files of data sets, once of each."""
        held = hold_out(run).cfg.DATASETS
        for name in {*run.cfg.DATASETS.TEST, *held.TRAIN, *held.TEST} - self._seen:
            load_datasets([name])
            self._seen.add(name)
        check_apart(run.cfg.DATASETS.TRAIN, run.cfg.DATASETS.TEST, "name different ones")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    return experiment.main(Segmentation(), FAULTS, arguments)


def fit_temperatures(
    peers: Sequence[SegmentorPeer], dataset: str, bad: BadSamples
) -> dict[str, float]:
    """Fit each peer's temperature, and the ensemble's, on a dataset; see ``PixelTemperatures``."""
    hush()
    pixels = PixelTemperatures(dataset)
    world = current_world(peers[0].cfg.MODEL.DEVICE)
    evaluate_group(peers, dataset, world, bad=bad, watch=pixels)
    return pixels.values()


def measured(
    peers: Sequence[SegmentorPeer],
    dataset: str,
    bad: BadSamples,
    temperatures: Mapping[str, float] | None = None,
    corruption: tuple[str, int] | None = None,
) -> tuple[Measured, PixelRecord]:
    """Measure peers and their ensemble on a dataset; broken files are left out, and counted.

    Args:
        peers: As they are.
        dataset: A registered name.
        bad: Counts broken files.
        temperatures: By peer, and of the ensemble; the calibration error is told at them too.
        corruption: Spoils every image; see ``evaluate_group``.

    Returns:
        mIoU and its like, in percent, each class's IoU where there is one, and the calibration
        error over pixels; and which pixels are right.
    """
    hush()
    world = current_world(peers[0].cfg.MODEL.DEVICE)
    pixels = PixelRecord(dataset, temperatures)
    rows = evaluate_group(peers, dataset, world, bad=bad, watch=pixels, corruption=corruption)
    names = [peer.name for peer in peers]
    found = Measured({k: v for k, v in rows.items() if k.split("/")[1] in METRICS})
    for name in names:
        of_class = {kind: rows[f"{name}/IoU-{kind}"] for kind in classes_of(dataset)[0]}
        found.classes[name] = {k: value for k, value in of_class.items() if math.isfinite(value)}
    for name in (*names, ENSEMBLE) if len(names) > 1 else names:
        found.metrics[f"{name}/ece"] = pixels.calibration_error(name)
        if temperatures is not None:
            found.metrics[f"{name}/{RECALIBRATED}"] = pixels.recalibrated_error(name)
            found.metrics[f"{name}/{TEMPERATURE}"] = temperatures[name]
    return found, pixels


def keep_frozen(trainer: TransferTrainer) -> None:
    """Write the files of the peers that learn nothing, as they are at the start and at the end."""
    for peer in trainer.peers:
        if peer.frozen and peer.optimizer is None:
            for file in (checkpoints.BEST, checkpoints.FINAL):
                checkpoints.save_plain(trainer.folder, peer, 0, file)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested keys as dotted ones, so that an arm's overlay the experiment's one by one."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{name}.")
        else:
            found[_NAMED.get(name, name)] = value
    return found


def _with_recipe(arm: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Write out what an arm's recipe sets, so that it comes before what is given for all arms."""
    if "recipe" not in arm:
        return dict(arm)
    try:
        keys = recipe_keys(str(arm["recipe"]))
    except ValueError as error:
        raise OptionError(f"{path}: {_RECIPE}: {error}") from error
    return {**_flat({"TRANSFER": keys}), **arm}


def _nested(flat: Mapping[str, Any], path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        node = tree
        *parts, last = key.split(".")
        for part in parts:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise OptionError(f"{path}: {part} is given as a value too, beside {key}; give one")
        node[last] = value
    return tree


def _refuse_elsewhere(own: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> None:
    keys = [*own, *(str(key) for peer in peers for key in list(peer.get("OPTS") or ())[::2])]
    for key in keys:
        bare = key.split(".", 2)[-1] if key.startswith(PEER_PREFIX) else key
        if bare in _ELSEWHERE:
            raise OptionError(f"{key} is the experiment's own to give; {_ELSEWHERE[bare]}")


def _check_weights(name: str, weights: str) -> None:
    local = weights and ":" not in weights
    if local and not Path(weights).expanduser().is_file():
        raise OptionError(f"peer {name!r}: WEIGHTS {weights}: no such file; it is to start from")


def _name_of(peer: Mapping[str, Any]) -> str:
    return str(peer.get("NAME") or Path(str(peer.get("CONFIG"))).stem)


def _right(start: Path) -> Path:
    """Say where a start's right pixels lie, beside its weights."""
    return start.with_suffix(".right.pt")
