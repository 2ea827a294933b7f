"""Run files: the peers of a run, each with its own Detectron2 config, and how they teach."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.projects.point_rend import add_pointrend_config

from common import recipes
from common.engine import ENGINES
from common.finite import MOST_SKIPS, ON_NONFINITE
from common.guard import POLICIES
from common.options import OptionError
from common.peers import check_names
from common.roles import check_rule
from common.transfer import SCORES, TEACHERS, KnowledgeTransfer
from common.trials import AUTO
from common.yaml_files import FAULTS, fault_told, refuse_large
from segmentation import compat
from segmentation.errors import ConfigError, told_of
from segmentation.keys import choices, value_at
from segmentation.mask2former import Mask2Former
from segmentation.mask2former_config import add_mask2former_config

GRANULARITIES = ("image", "pixel")
AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PEER_KEYS = ("NAME", "CONFIG", "WEIGHTS", "OPTS", "FROZEN", "LAYOUT")
LAYOUTS = ("contiguous", "channels_last", AUTO)
PEER_PREFIX = "PEER."
_MOST_FILES = 50  # that one config may name by _BASE_, directly and by way of others
# What recipes set, by what it is called here; and what they may not set, by how it is here.
OF_RECIPE = {
    "rule": "RULE",
    "score": "SCORE",
    "temperature": "TEMPERATURE",
    "transfer_weight": "WEIGHT",
    "transfer_warmup_steps": "WARMUP_ITERS",
    "detach_teacher": "DETACH_TEACHER",
    "margin": "MARGIN",
    "teachers": "TEACHERS",
    "model_ema": "MODEL_EMA",
    "model_ema_span": "MODEL_EMA_SPAN",
}
_NOT_OFFERED = {"transfer_classes": "all", "gap_power": 0.0, "calibrate_scores": "off"}
# Where the published script of segmentation differs from the two others: its KL moves no teacher
# (nor a student, which would be no transfer at all).
_OF_TASK = {"paper": {"detach_teacher": True}}
# What one data stream and one loop cannot do in two ways.
SHARED_KEYS = (
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING",
    "INPUT.MAX_SIZE_TRAIN",
    "INPUT.CROP",
    "INPUT.RANDOM_FLIP",
    "INPUT.COLOR_AUG_SSD",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.MAX_ITER",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.AMP",
    "TEST.EVAL_PERIOD",
    "MODEL.DEVICE",
    "SEED",
)
# Of models, inputs and solvers, what a run may be resumed with in another value.
MAY_CHANGE = ("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "MODEL.WEIGHTS", "MODEL.DEVICE")
_LASTING = (
    "RULE SCORE GRANULARITY WEIGHT TEMPERATURE DETACH_TEACHER MARGIN WARMUP_ITERS TEACHERS "
    "MODEL_EMA MODEL_EMA_SPAN MODEL_EMA_DECAY ACCUMULATE AMP_DTYPE GUARD GUARD_METRIC_DROP "
    "GUARD_PATIENCE HELD_OUT"
).split()


@dataclass(frozen=True)
class PeerConfig:
    """One peer of a run.

    Attributes:
        name: For folders and metrics.
        cfg: Its whole Detectron2 config; OUTPUT_DIR is its own folder.
        frozen: It teaches, and learns nothing.
        layout: One of ``LAYOUTS``, of its weights and maps in memory.
    """

    name: str
    cfg: CfgNode
    frozen: bool = False
    layout: str = "contiguous"


@dataclass(frozen=True)
class RunConfig:
    """A run.

    Attributes:
        peers: In order.
        transfer: The TRANSFER node.
        output_dir: Of the run; each peer has a folder in it.
    """

    peers: list[PeerConfig]
    transfer: CfgNode
    output_dir: Path

    @property
    def cfg(self) -> CfgNode:
        """The first peer's config: where to read what all peers share (``SHARED_KEYS``)."""
        return self.peers[0].cfg

    @property
    def names(self) -> list[str]:
        """The peers' names."""
        return [peer.name for peer in self.peers]

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """What forwards are autocast to."""
        return AMP_DTYPES[self.transfer.AMP_DTYPE] if self.cfg.SOLVER.AMP.ENABLED else None

    @property
    def learning(self) -> list[str]:
        """Names of the peers that are not frozen from the start."""
        return [peer.name for peer in self.peers if not peer.frozen]


def lasting_settings(run: RunConfig) -> dict[str, str]:
    """Return by name what a run does not change on its way: data, lessons, models, solvers."""
    cfg = run.cfg
    keys = ("DATASETS.TRAIN", "DATASETS.TEST", "SEED")
    found: dict[str, Any] = {key: value_at(cfg, key) for key in keys}
    found |= {f"TRANSFER.{key}": run.transfer[key] for key in _LASTING}
    for peer in run.peers:
        found[f"{PEER_PREFIX}{peer.name}.FROZEN"] = peer.frozen
        for node in ("MODEL", "INPUT", "SOLVER"):
            for key, value in flat(peer.cfg[node], node):
                if key not in MAY_CHANGE:
                    found[key if key in SHARED_KEYS else f"{PEER_PREFIX}{peer.name}.{key}"] = value
    return {key: repr(value) for key, value in found.items()}


def flat(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names of all that a node holds, each with its value."""
    for key, value in node.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, CfgNode):
            yield from flat(value, name)
        else:
            yield name, value


def transfer_defaults() -> CfgNode:
    """Return the TRANSFER node of a run file with its defaults."""
    node = CfgNode()
    node.RECIPE = ""  # of common.recipes, "paper" or "best-known": defaults of what follows
    node.RULE = "best"  # common.roles.RULES, or one_way:NAME
    node.SCORE = "loss"  # or "confidence", which needs no labels
    node.GRANULARITY = "image"  # one teacher an image (the paper), or one a "pixel"
    node.WEIGHT = 1.0
    node.TEMPERATURE = 1.0
    node.DETACH_TEACHER = True
    node.MARGIN = 0.0  # by how much a teacher's score must be higher
    node.WARMUP_ITERS = 0  # the weight grows linearly from 0 over these
    node.TEACHERS = "peers"  # or "ema", "ema+own": the peers' averages score and teach
    node.MODEL_EMA = False  # average each learning peer's weights: evaluated, chosen, exported
    node.MODEL_EMA_SPAN = 0.25  # the average reaches back over this share of SOLVER.MAX_ITER
    node.MODEL_EMA_DECAY = 0.0  # instead of what the span gives
    node.ENGINE = "joint"  # or "two-pass", "peer-parallel": see the README
    node.ACCUMULATE = 1  # batches of SOLVER.IMS_PER_BATCH in one iteration
    node.AMP_DTYPE = "float16"  # with SOLVER.AMP.ENABLED
    node.GUARD = "warn"  # of a peer that gets worse than at its start; or "off", "rollback"
    node.GUARD_METRIC_DROP = 1.0  # by how much mIoU must be lower, in points
    node.GUARD_PATIENCE = 2  # in so many evaluations in a row
    node.ON_NONFINITE = "stop"  # or "skip" the iteration; common.finite
    node.MAX_SKIPS_IN_A_ROW = MOST_SKIPS
    node.MAX_BAD_SAMPLES = 0  # broken files that the run may do without; common.broken
    node.HELD_OUT = 0.0  # share of the training data to evaluate on, in the place of DATASETS.TEST
    node.SOUP = False  # at the end also try averages of each peer's start and best weights
    node.LAYOUT = "contiguous"  # or "channels_last", or "auto": tried; peers may have their own
    node.KEEP = 3  # resumable checkpoints that stay on disk; 0: all
    node.PEERS = []
    return node


def base_config() -> CfgNode:
    """Return Detectron2's defaults, with the keys of DeepLab, PointRend and Mask2Former.

    The device's default is the GPU where there is one, else the CPU.
    """
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_pointrend_config(cfg)
    add_mask2former_config(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if compat.available("mask2former"):
        importlib.import_module("mask2former")  # registers the original's architectures
    return cfg


def load_run(
    files: Sequence[str | Path], options: Sequence[str] = (), allow_unsafe: bool = False
) -> RunConfig:
    """Read a run.

    Later wins: Detectron2's defaults, the peer's CONFIG, the run file's own keys, the peer's
    WEIGHTS and OPTS, the command line's ``KEY VALUE``, and its ``PEER.NAME.KEY VALUE``. What
    TRANSFER.RECIPE sets comes before the keys of TRANSFER that are given, wherever they are.

    Args:
        files: One run file with TRANSFER.PEERS, or configs, one a peer, named after the files; a
            single one needs ``TRANSFER.RULE none``.
        options: The command line's pairs of keys and values; keys that begin with ``TRANSFER.``
            are the run's.
        allow_unsafe: Let YAML files run the Python they hold, as Detectron2 itself does.

    Raises:
        ConfigError: Unknown keys or values, missing files, peers that disagree on what they share.
    """
    if not files:
        raise ConfigError(
            "no config was given: --config-file RUN.yaml with TRANSFER.PEERS, or --config-file "
            "once for every peer"
        )
    shared, specs = _read_files([Path(file) for file in files], allow_unsafe)
    return _assemble(shared, specs, Path(files[0]), options, allow_unsafe)


def load_content(content: Mapping[str, Any], path: Path, options: Sequence[str] = ()) -> RunConfig:
    """Understand a run file's content as ``load_run`` does.

    Args:
        content: Nested keys, with TRANSFER.PEERS.
        path: Names it in errors; configs and weights are looked for beside it.
        options: See ``load_run``.

    Raises:
        ConfigError: See ``load_run``.
    """
    return _assemble(dict(content), [], path, options, False)


def _assemble(
    shared: dict[str, Any],
    specs: list[dict[str, Any]],
    path: Path,
    options: Sequence[str],
    allow_unsafe: bool,
) -> RunConfig:
    transfer, common, own = _split_options(options)
    node = _transfer_node(shared.pop("TRANSFER", {}), transfer, path)
    specs = specs or [_checked_spec(spec, path) for spec in _listed_peers(node, path)]
    names = [spec["NAME"] for spec in specs]
    _check_run(node, names, path)
    unknown = sorted(set(own) - set(names))
    if unknown:
        raise ConfigError(f"{PEER_PREFIX}{unknown[0]}: no such peer; peers: {', '.join(names)}")
    specs = [{"LAYOUT": node.LAYOUT, **spec} for spec in specs]
    tried = [spec["NAME"] for spec in specs if spec["LAYOUT"] == AUTO]
    if node.ENGINE == "peer-parallel" and tried:
        raise ConfigError(
            f"peer {tried[0]!r}: LAYOUT auto with TRANSFER.ENGINE peer-parallel: what a peer tries "
            "by itself would wait for the processes of the others; give contiguous or channels_last"
        )
    peers = [
        _peer_config(spec, shared, common, own.get(spec["NAME"], []), path, allow_unsafe)
        for spec in specs
    ]
    _check_shared(peers)
    _check_values(peers)
    output = Path(peers[0].cfg.OUTPUT_DIR)
    for peer in peers:
        peer.cfg.OUTPUT_DIR = str(output / peer.name)
        peer.cfg.freeze()
    node.freeze()
    run = RunConfig(peers, node, output)
    _check_averages(run, path)
    return run


def _transfer_node(content: Any, options: Sequence[str], path: Path) -> CfgNode:
    """Merge what is given over the recipe that is given, and that over the defaults."""
    recipe = _given(transfer_defaults(), content, options, path).RECIPE
    node = transfer_defaults()
    if recipe:
        try:
            node.update(recipe_keys(recipe))
        except ValueError as error:
            raise ConfigError(f"{path}: TRANSFER.RECIPE: {error}") from error
    return _given(node, content, options, path)


def _given(node: CfgNode, content: Any, options: Sequence[str], path: Path) -> CfgNode:
    _merge(node, content, f"{path}: TRANSFER")
    _merge_options(node, options, "the command line: TRANSFER")
    return node


def recipe_keys(recipe: str) -> dict[str, Any]:
    """Return what a recipe sets, by the keys of TRANSFER.

    Raises:
        ValueError: No such recipe, or one that wants what segmentation does not offer.
    """
    keys = {}
    for name, value in {**recipes.values_of(recipe), **_OF_TASK.get(recipe, {})}.items():
        if name in OF_RECIPE:
            keys[OF_RECIPE[name]] = 0.0 if name == "margin" and value is None else value
        elif value != _NOT_OFFERED[name]:
            raise ValueError(f"{recipe} sets {name} to {value}, which segmentation does not offer")
    return keys


def _read_files(
    files: list[Path], allow_unsafe: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a run file's content, and the peers where every file is one."""
    if len(files) == 1:
        content = read_yaml(files[0], allow_unsafe)
        if "TRANSFER" in content:
            return content, []
    specs: list[dict[str, Any]] = []
    for file in files:
        name, used = file.stem, [spec["NAME"] for spec in specs]
        if name in used:
            name = next(f"{name}-{i}" for i in range(2, 99) if f"{name}-{i}" not in used)
        specs.append({"NAME": name, "CONFIG": str(file.absolute())})
    return {}, specs


def read_yaml(path: Path, allow_unsafe: bool = False) -> dict[str, Any]:
    """Read a YAML file and those it has as ``_BASE_``.

    Raises:
        ConfigError: Missing, broken or too large by its aliases, or it holds Python to run and is
            not trusted.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; check --config-file")
    try:
        content = _looked_at(path).load_yaml_with_base(str(path), allow_unsafe=allow_unsafe)
    except OptionError as error:
        raise ConfigError(str(error)) from error
    except (OSError, AssertionError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from error
    except FAULTS as error:
        if ":python/" in str(getattr(error, "problem", "")) and not allow_unsafe:
            raise ConfigError(_unsafe(path, error)) from error
        raise ConfigError(f"{path}: cannot be read as YAML ({fault_told(error)})") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: holds no keys")
    return dict(content)


def _looked_at(path: Path) -> type[CfgNode]:
    """Return Detectron2's reader with a look at every file's aliases before its values are made."""
    opened: list[str] = []

    class Reader(CfgNode):
        @classmethod
        def _open_cfg(cls, filename: str) -> io.StringIO:
            with super()._open_cfg(filename) as file:
                text = file.read()
            opened.append(filename)
            if len(opened) > _MOST_FILES:
                raise OptionError(
                    f"{path}: names more than {_MOST_FILES} files by _BASE_; look whether one of "
                    "them names itself"
                )
            if refuse_large(filename, text) is None:
                raise OptionError(f"{filename}: holds no keys")
            return io.StringIO(text)

    return Reader


def _unsafe(path: Path, error: Any) -> str:
    return (
        f"{path}: holds Python to run ({error.problem}, line {error.problem_mark.line + 1} of it "
        "or of its _BASE_); write the value out, or trust the file with --allow-unsafe-config"
    )


def _split_options(
    options: Sequence[str],
) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Sort the command line's pairs into the run's, every peer's, and one peer's."""
    flags = [str(option) for option in options if str(option).startswith("--")]
    if flags:
        raise ConfigError(f"{flags[0]}: arguments with -- come before KEY VALUE; move it there")
    if len(options) % 2:
        raise ConfigError(
            f"options come in pairs of KEY VALUE; {options[-1]!r} is left over in "
            f"{' '.join(options)!r}"
        )
    transfer: list[str] = []
    common: list[str] = []
    own: dict[str, list[str]] = {}
    for key, value in zip(options[::2], options[1::2], strict=True):
        if key.startswith("TRANSFER."):
            transfer += [key.removeprefix("TRANSFER."), value]
        elif key.startswith(PEER_PREFIX):
            name, _, inner = key.removeprefix(PEER_PREFIX).partition(".")
            own.setdefault(name, []).extend([inner, value])
        else:
            common += [key, value]
    return transfer, common, own


def _listed_peers(node: CfgNode, file: str | Path) -> Sequence[Any]:
    if not isinstance(node.PEERS, Sequence) or isinstance(node.PEERS, str):
        raise ConfigError(f"{file}: TRANSFER.PEERS is {node.PEERS!r}; expected a list of peers")
    return node.PEERS


def _checked_spec(spec: Any, file: str | Path) -> dict[str, Any]:
    if not isinstance(spec, Mapping):
        raise ConfigError(
            f"{file}: TRANSFER.PEERS holds {spec!r}; expected keys {', '.join(PEER_KEYS)}"
        )
    unknown = [str(key) for key in spec if key not in PEER_KEYS]
    if unknown:
        raise ConfigError(
            f"{file}: unknown key {unknown[0]!r} of a peer; choose from {', '.join(PEER_KEYS)}"
        )
    if not spec.get("CONFIG"):
        raise ConfigError(f"{file}: peer {spec.get('NAME', '?')!r} has no CONFIG")
    name = str(spec.get("NAME") or Path(str(spec["CONFIG"])).stem)
    options = spec.get("OPTS") or []
    if not isinstance(options, Sequence) or isinstance(options, str):
        raise ConfigError(
            f"{file}: peer {name!r}: OPTS is {options!r}; expected a list: [KEY, VALUE, ...]"
        )
    frozen = spec.get("FROZEN", False)
    if not isinstance(frozen, bool):
        raise ConfigError(f"{file}: peer {name!r}: FROZEN is {frozen!r}; expected true or false")
    if spec.get("LAYOUT", LAYOUTS[0]) not in LAYOUTS:
        raise ConfigError(
            f"{file}: peer {name!r}: LAYOUT is {spec['LAYOUT']!r}; choose from {', '.join(LAYOUTS)}"
        )
    return {**spec, "NAME": name, "CONFIG": str(spec["CONFIG"]), "OPTS": options}


def _check_run(node: CfgNode, names: Sequence[str], file: str | Path) -> None:
    if not names:
        raise ConfigError(
            f"{file}: no peers; list them under TRANSFER.PEERS, or give --config-file once for "
            "every peer"
        )
    try:
        check_names(names)
        check_rule(node.RULE, names)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    if any("." in name for name in names):
        raise ConfigError(f"{file}: a peer's name may not hold a dot: {', '.join(names)}")
    named = {
        "GRANULARITY": GRANULARITIES,
        "SCORE": SCORES,
        "TEACHERS": TEACHERS,
        "AMP_DTYPE": tuple(AMP_DTYPES),
        "ENGINE": tuple(ENGINES),
        "GUARD": POLICIES,
        "LAYOUT": LAYOUTS,
        "ON_NONFINITE": ON_NONFINITE,
    }
    for key, allowed in named.items():
        if node[key] not in allowed:
            raise ConfigError(
                f"{file}: TRANSFER.{key} is {node[key]!r}; choose from {', '.join(allowed)}"
            )
    least = dict.fromkeys(
        ("WEIGHT", "MARGIN", "WARMUP_ITERS", "KEEP", "MAX_SKIPS_IN_A_ROW", "MAX_BAD_SAMPLES"), 0
    )
    for key, value in {**least, "ACCUMULATE": 1, "GUARD_PATIENCE": 1}.items():
        if not node[key] >= value:
            raise ConfigError(f"{file}: TRANSFER.{key} is {node[key]}; expected {value} or more")
    if not 0 <= node.HELD_OUT < 1:
        raise ConfigError(
            f"{file}: TRANSFER.HELD_OUT is {node.HELD_OUT}; expected a share from 0 to below 1"
        )
    if not 0 <= node.MODEL_EMA_DECAY < 1:
        raise ConfigError(
            f"{file}: TRANSFER.MODEL_EMA_DECAY is {node.MODEL_EMA_DECAY}; expected more than 0 and "
            "less than 1, or 0 for what MODEL_EMA_SPAN gives"
        )
    if not 0 < node.MODEL_EMA_SPAN <= 1:
        raise ConfigError(
            f"{file}: TRANSFER.MODEL_EMA_SPAN is {node.MODEL_EMA_SPAN}; expected a share of the "
            "run, above 0 and at most 1"
        )
    for key in ("TEMPERATURE", "GUARD_METRIC_DROP"):
        if not node[key] > 0:
            raise ConfigError(f"{file}: TRANSFER.{key} is {node[key]}; expected more than 0")


def _check_averages(run: RunConfig, file: str | Path) -> None:
    """Refuse averages of weights that teach where they cannot, or are measured with others' parts.

    Raises:
        ConfigError: Names the keys, and the way out.
    """
    node, defaults = run.transfer, transfer_defaults()
    try:
        transfer = build_transfer(run, seed=0)
    except ValueError as error:
        raise ConfigError(f"{file}: TRANSFER: {error}") from error
    if transfer.wants_copies and not node.MODEL_EMA:
        raise ConfigError(
            f"{file}: TRANSFER.TEACHERS is {node.TEACHERS!r}, and there are no averages to teach; "
            "give TRANSFER.MODEL_EMA True"
        )
    for key in ("MODEL_EMA_SPAN", "MODEL_EMA_DECAY"):
        if node[key] != defaults[key] and not node.MODEL_EMA:
            raise ConfigError(
                f"{file}: TRANSFER.{key} is {node[key]} without TRANSFER.MODEL_EMA; give both"
            )
    for peer in run.peers:
        if node.MODEL_EMA and peer.cfg.TEST.PRECISE_BN.ENABLED and not peer.frozen:
            raise ConfigError(
                f"peer {peer.name!r}: TEST.PRECISE_BN with TRANSFER.MODEL_EMA: it estimates the "
                "statistics of the weights, and their average is what is evaluated, whose "
                "statistics are averaged too; leave one of them out"
            )


def build_transfer(run: RunConfig, seed: int) -> KnowledgeTransfer:
    """Build the objective from the TRANSFER node.

    Raises:
        ValueError: See ``KnowledgeTransfer``.
    """
    node = run.transfer
    return KnowledgeTransfer(
        node.RULE,
        node.TEMPERATURE,
        node.WEIGHT,
        node.DETACH_TEACHER,
        margin=node.MARGIN or None,
        teachers=node.TEACHERS,
        warmup_steps=node.WARMUP_ITERS,
        names=run.names,
        frozen=[peer.name for peer in run.peers if peer.frozen],
        seed=seed,
    )


def _peer_config(
    spec: Mapping[str, Any],
    shared: Mapping[str, Any],
    common: Sequence[str],
    own: Sequence[str],
    run_file: Path,
    allow_unsafe: bool,
) -> PeerConfig:
    cfg = base_config()
    path = _find_config(spec["CONFIG"], run_file)
    _merge_file(cfg, path, allow_unsafe)
    _merge(cfg, shared, str(run_file))
    if spec.get("WEIGHTS") is not None:
        cfg.MODEL.WEIGHTS = str(spec["WEIGHTS"])
    where = f"peer {spec['NAME']!r}"
    _merge_options(cfg, spec.get("OPTS") or [], f"{where}: OPTS")
    _merge_options(cfg, common, "the command line")
    _merge_options(cfg, own, f"the command line, {PEER_PREFIX}{spec['NAME']}")
    cfg.MODEL.WEIGHTS = _find_weights(cfg.MODEL.WEIGHTS, run_file)
    if cfg.MODEL.META_ARCHITECTURE == "MaskFormer" and "MaskFormer" not in META_ARCH_REGISTRY:
        cfg.MODEL.META_ARCHITECTURE = Mask2Former.__name__  # ours reads the original's keys
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        raise ConfigError(
            f"{where}: MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}; choose from "
            f"{', '.join(sorted(name for name, _ in META_ARCH_REGISTRY))}"
        )
    return PeerConfig(spec["NAME"], cfg, spec.get("FROZEN", False), spec["LAYOUT"])


def _find_config(name: str, run_file: Path) -> Path:
    """Find a peer's config beside the run file, in the working folder or in Detectron2's zoo."""
    given = Path(name).expanduser()
    # not through detectron2.model_zoo, which needs the pkg_resources that setuptools has dropped
    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    for path in (run_file.parent / given, given, zoo / given):
        if path.is_file():
            return path
    raise ConfigError(
        f"{name}: no such config beside {run_file}, in the working folder, or in Detectron2's "
        "model zoo"
    )


def _find_weights(source: str, run_file: Path) -> str:
    """Find a file of weights beside the run file too; what is no such file stays as it is."""
    given = Path(source).expanduser()
    beside = run_file.parent / given
    return str(beside) if source and not given.is_file() and beside.is_file() else source


def _merge_file(cfg: CfgNode, path: Path, allow_unsafe: bool) -> None:
    content = read_yaml(path, allow_unsafe)
    if "TRANSFER" in content:
        raise ConfigError(f"{path}: a run file, not the config of one peer")
    if content.get("VERSION", cfg.VERSION) == cfg.VERSION:
        _merge(cfg, content, str(path))
        return
    try:
        cfg.merge_from_file(str(path), allow_unsafe=allow_unsafe)  # translates older versions
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"{path}: VERSION {content['VERSION']}: {error.args[0]}") from error


def _merge(cfg: CfgNode, content: Any, where: str) -> None:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where} is {content!r}; expected keys, of {', '.join(sorted(cfg))}")
    _refuse_unknown(cfg, content, where)
    try:
        cfg.merge_from_other_cfg(CfgNode(_as_floats(cfg, content)))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _as_floats(cfg: CfgNode, content: Mapping[str, Any]) -> dict[str, Any]:
    """Copy content; whole numbers become floats where the config holds a float."""
    copied: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and isinstance(cfg[key], CfgNode):
            copied[key] = _as_floats(cfg[key], value)
        elif isinstance(cfg[key], float) and type(value) is int:
            copied[key] = float(value)
        else:
            copied[key] = copy.deepcopy(value)
    return copied


def _refuse_unknown(cfg: CfgNode, content: Mapping[str, Any], where: str, prefix: str = "") -> None:
    for key, value in content.items():
        if key not in cfg:
            first, dot, rest = str(key).partition(".")
            nested = f"write it nested, {first}: {{{rest}: VALUE}}" if dot else ""
            raise ConfigError(
                f"{where}: unknown key {prefix}{key}; {nested or choices(cfg, str(key))}"
            )
        if not isinstance(cfg[key], CfgNode):
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{where}: {prefix}{key} is {value!r}; expected keys, of "
                f"{', '.join(sorted(cfg[key]))}"
            )
        _refuse_unknown(cfg[key], value, where, f"{prefix}{key}.")


def _merge_options(cfg: CfgNode, options: Sequence[Any], where: str) -> None:
    if len(options) % 2:
        raise ConfigError(f"{where}: expected pairs of keys and values, got {list(options)}")
    for key, value in zip(options[::2], options[1::2], strict=True):
        with told_of(where):
            node = value_at(cfg, str(key))
        try:
            whole = isinstance(node, float) and str(value).lstrip("+-").isdigit()
            cfg.merge_from_list([key, float(value) if whole else value])
        except (KeyError, ValueError, AssertionError) as error:
            raise ConfigError(f"{where}: {key} {value!r}: {error}") from error


def _check_shared(peers: Sequence[PeerConfig]) -> None:
    first = peers[0]
    for key in (*SHARED_KEYS, "OUTPUT_DIR"):
        expected = value_at(first.cfg, key)
        for peer in peers[1:]:
            found = value_at(peer.cfg, key)
            if found != expected:
                raise ConfigError(
                    f"peers differ in {key}: {first.name}: {expected!r}, {peer.name}: {found!r}; "
                    "all peers see one stream of data in one loop, so set it for all, in the run "
                    "file or as KEY VALUE on the command line"
                )


_CROPS = ("relative", "relative_range", "absolute", "absolute_range")


def _check_crop(kind: str, size: list[float]) -> None:
    """Refuse what Detectron2 finds out at the first image, or takes for the other kind."""
    if kind not in _CROPS:
        raise ConfigError(f"INPUT.CROP.TYPE is {kind!r}; choose from {', '.join(_CROPS)}")
    if kind.startswith("relative"):
        expected = "two shares of the sides, above 0 and at most 1"
        fits = all(0 < side <= 1 for side in size)
    else:
        expected = "two whole numbers of pixels above 0"
        fits = all(isinstance(side, int) and side > 0 for side in size)
    if kind == "absolute_range":
        expected += ", the smaller one first"
        fits = fits and sorted(size) == size
    if not fits or len(size) != 2:
        raise ConfigError(f"INPUT.CROP.SIZE is {size} of TYPE {kind}; expected {expected}")


def _check_values(peers: Sequence[PeerConfig]) -> None:
    """Refuse what would end in a traceback only later."""
    cfg = peers[0].cfg
    for key in ("DATALOADER.NUM_WORKERS", "SOLVER.MAX_ITER"):
        if value_at(cfg, key) < 0:
            raise ConfigError(f"{key} is {value_at(cfg, key)}; expected 0 or more")
    if cfg.INPUT.CROP.ENABLED:
        _check_crop(cfg.INPUT.CROP.TYPE, list(cfg.INPUT.CROP.SIZE))
    for peer in peers:
        for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
            values = value_at(peer.cfg, key)
            if len(values) != 3:
                raise ConfigError(
                    f"peer {peer.name!r}: {key} is {values}; expected 3 values, in the order of "
                    "INPUT.FORMAT"
                )
