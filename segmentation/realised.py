"""Finished runs of train_net.py, read back; see ``common.finished``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.finished import (
    ReadRun,
    as_text,
    as_texts,
    place_of,
    read_ends,
    require_ends,
    require_files,
)
from segmentation import checkpoints
from segmentation.config import SHARED_KEYS, PeerConfig, RunConfig, flat, load_content, read_yaml
from segmentation.held_out import hold_out, part_of, sources
from segmentation.trainer import METRIC

CONFIG = "config.yaml"
_RUN, _SUMMARY = "transfer.yaml", "summary.csv"
_TRANSFER = frozenset("WEIGHT TEMPERATURE DETACH_TEACHER WARMUP_ITERS TEACHERS".split())
# Of TRANSFER and of what peers share: the transfer's own, or what changes nothing that is learned.
_NOT_SETTING = _TRANSFER | frozenset(
    (
        "RECIPE RULE SCORE GRANULARITY MARGIN ENGINE KEEP LAYOUT PEERS SOUP "
        "DATALOADER.NUM_WORKERS SOLVER.CHECKPOINT_PERIOD TEST.EVAL_PERIOD MODEL.DEVICE"
    ).split()
)
_REPEATED = ("SEED", "DATASETS.TRAIN", "DATASETS.TEST")  # a mean may go over these
# Of MODEL: how it is trained, without a change of what it predicts before.
_TRAINED = frozenset(
    (
        "DROPOUT DROP_RATE ATTN_DROP_RATE DROP_PATH_RATE DEEP_SUPERVISION NO_OBJECT_WEIGHT "
        "CLASS_WEIGHT MASK_WEIGHT DICE_WEIGHT LOSS_WEIGHT LOSS_TYPE TRAIN_NUM_POINTS "
        "OVERSAMPLE_RATIO IMPORTANCE_SAMPLE_RATIO FREEZE_AT USE_CHECKPOINT"
    ).split()
)
_VIEW = ("INPUT.FORMAT", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST")


def read_run(folder: Path) -> ReadRun:
    """Read the configs and ``summary.csv`` of a finished run.

    Raises:
        OptionError: No such run, one that did not finish, or one whose files do not fit.
        ConfigError: Its configs cannot be read.
    """
    require_files(folder, (_RUN, _SUMMARY))
    run = _load(folder)
    require_ends(folder, run.learning, checkpoints.FINAL)
    before, after = read_ends(folder / _SUMMARY, run.names, METRIC)
    node = run.transfer
    told = {**{key: value for key, value in flat(run.cfg) if is_shared(key)}, **dict(node.items())}
    setting = {key: value for key, value in told.items() if key not in _NOT_SETTING}
    transfer = {key: value for key, value in told.items() if key in _TRANSFER}
    return ReadRun(
        folder,
        run,
        run.peers,
        [
            as_text({k: place_of(value) for k, value in _own(peer).items() if at_start(k)})
            for peer in run.peers
        ],
        [_trained(peer) for peer in run.peers],
        before,
        after,
        node.RULE,
        node.SCORE,
        node.MARGIN or None,
        as_text(setting),
        as_texts({k: value for k, value in (transfer | setting).items() if k not in _REPEATED}),
        node.GRANULARITY,
    )


def read_starts(run: ReadRun, metric: str) -> tuple[float, ...]:
    """Return a metric of every peer at the start of a run."""
    return read_ends(run.folder / _SUMMARY, run.started.names, metric)[0]


def evaluated_on(run: RunConfig) -> list[tuple[tuple[str, ...], bool]]:
    """Name the datasets that a run is evaluated on, and whether it is a part held out of them."""
    return [(sources(name), part_of(name) is not None) for name in hold_out(run).cfg.DATASETS.TEST]


def is_shared(key: str) -> bool:
    """Whether all peers of a run have the same value of a config's key."""
    return any(key == shared or key.startswith(f"{shared}.") for shared in SHARED_KEYS)


def _load(folder: Path) -> RunConfig:
    """Load a run's configs; the peers are those that have a folder with one."""
    transfer = read_yaml(folder / _RUN)["TRANSFER"]
    asked = {
        str(spec.get("NAME") or Path(str(spec["CONFIG"])).stem): spec for spec in transfer["PEERS"]
    }
    names = list(asked) or sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    specs = [
        {
            "NAME": name,
            "CONFIG": str((folder / name / CONFIG).absolute()),
            "FROZEN": asked.get(name, {}).get("FROZEN", False),
        }
        for name in names
    ]
    content = {"TRANSFER": {**transfer, "PEERS": specs}, "OUTPUT_DIR": str(folder)}
    return load_content(content, folder / _RUN)


def at_start(key: str) -> bool:
    """Whether a key of a peer's own decides what it predicts before training."""
    return key in _VIEW or (key.startswith("MODEL.") and key.rpartition(".")[2] not in _TRAINED)


def _own(peer: PeerConfig) -> dict[str, Any]:
    return {
        key: value for key, value in flat(peer.cfg) if key != "OUTPUT_DIR" and not is_shared(key)
    }


def _trained(peer: PeerConfig) -> dict[str, str]:
    own = {key: value for key, value in _own(peer).items() if not at_start(key)}
    return as_texts({**own, "FROZEN": peer.frozen})


def run_of(
    run: ReadRun, peers: Sequence[PeerConfig], names: Sequence[str], options: Sequence[Any]
) -> RunConfig:
    """Make one run of models that come from several.

    Args:
        run: Whose data, and all else that peers share, it takes.
        peers: The models.
        names: Theirs.
        options: KEY VALUE pairs that go before.

    Raises:
        ConfigError: An option that does not fit.
    """
    configs = []
    for peer, name in zip(peers, names, strict=True):
        configs.append({"NAME": name, "CONFIG": f"{Path(peer.cfg.OUTPUT_DIR).absolute()}/{CONFIG}"})
    shared = [
        word for key, value in flat(run.started.cfg) if is_shared(key) for word in (key, value)
    ]
    transfer = {**dict(run.started.transfer.items()), "RULE": "best", "PEERS": configs}
    content = {"TRANSFER": transfer, "OUTPUT_DIR": str(run.folder)}
    return load_content(content, run.folder / _RUN, [*shared, *options])
