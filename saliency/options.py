"""The command lines: of training, for N peers on one of the data sets, and of evaluation."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.options import (
    OptionError,
    actions_of,
    add_bad_sample_option,
    add_fault_options,
    add_guard_options,
    add_resume_options,
    add_soup_option,
    add_transfer_options,
    bounds_of,
    check_copies,
    check_least,
    number_repeats,
    own_options,
    parse_over_file,
    peer_mapping,
    transfer_of,
    truth,
)
from common.peers import check_names
from common.planner import add_plan_options
from common.resumed import FREE
from common.scouting import refuse_few
from common.trials import with_layout_asked
from common.yaml_files import read_yaml
from saliency.check import DEPTHS
from saliency.clips import VIEWS, ClipView
from saliency.layouts import LAYOUTS
from saliency.metrics import METRICS

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("none", "cosine")
SELECTION = ("loss", *METRICS)  # what may choose the best checkpoint
LOWER_IS_BETTER = ("loss", "kldiv")
# By how much a metric may be worse than at the start, in its own units.
GUARD_DROPS = {
    "loss": 0.02,
    "auc_judd": 0.005,
    "auc_shuffled": 0.005,
    "nss": 0.05,
    "cc": 0.01,
    "similarity": 0.01,
    "kldiv": 0.02,
}
LOSS_TERMS = {"kl": 1.0, "cc": -1.0, "similarity": 0.0, "nss": 0.0, "l1": 0.0}
_FLAG = {"action": "store_true", "default": False}
# Options that a peer may set for itself, by the names of the command line.
PEER_OPTIONS = (
    "backbone size view before stride mean std lr weight_decay opt clip_grad model_ema "
    "model_ema_span model_ema_decay grad_checkpointing compile channels_last auto_layout kwargs"
).split()
_NOT_NEGATIVE = ("lr", "weight_decay", "clip_grad")
PEER_OWN = ("name", "checkpoint", "frozen")
# Options under which a resumed run is still the same run.
FREE_TO_CHANGE = FREE | frozenset(
    "data_root packed check_depth check_data val_batch_size backbone".split()
)


@dataclass(frozen=True)
class PeerSpec:
    """One peer as asked for.

    Attributes:
        name: Unique.
        model: A name of ``saliency.models.MODELS``, or ``MODULE:FUNCTION`` of the user's own.
        checkpoint: Local file, or None.
        frozen: It teaches and does not learn.
        options: The run's options with this peer's own values in place.
    """

    name: str
    model: str
    checkpoint: str | None
    frozen: bool
    options: argparse.Namespace

    def without_weights(self) -> PeerSpec:
        """Return the same peer, to be filled with a run file's weights."""
        options = argparse.Namespace(**{**vars(self.options), "backbone": None})
        return replace(self, checkpoint=None, options=options)

    def loaded_from(self, file: Path) -> PeerSpec:
        """Return the same peer with the weights of a file."""
        return replace(self.without_weights(), checkpoint=str(file))


def add_data_options(parser: argparse.ArgumentParser, dataset: str | None) -> None:
    """Add where the data is and how it is read.

    Args:
        dataset: The script's data set; None: ``--dataset`` chooses.
    """
    group = parser.add_argument_group("data")
    add = group.add_argument
    if dataset is None:
        add("--dataset", choices=tuple(LAYOUTS), default="dhf1k")
    add("--data-root", metavar="DIR", help="of the data set, in its authors' layout")
    add("--check-data", **_FLAG, help="only look at the data, and list what is wrong")
    add("--check-depth", choices=DEPTHS, default="headers", help="how closely to look beforehand")
    add("--packed", metavar="DIR", help="keep frames there at the peers' sizes, for slow disks")
    add_bad_sample_option(group)
    add("-j", "--workers", type=int, default=4)
    add("--val-stride", type=int, default=32, help="from one target of a video to the next")
    add("--val-batch-size", type=int, default=4, help="targets a batch")
    add("--blur", type=int, default=11, help="pixels across the Gaussian on predictions; 0: none")
    add("--metrics", nargs="+", choices=tuple(METRICS), help="default: all that the data allows")


def add_peer_options(parser: argparse.ArgumentParser, training: bool = False) -> None:
    """Add the peers, and what each of them may set for itself (marked ``*``).

    Args:
        training: Also what only training needs.
    """
    add = parser.add_argument_group("peers (* a peer may set its own)").add_argument
    add(
        "--peer",
        action="append",
        dest="peers",
        metavar="MODEL[,key=value...]",
        help="vinet_s, vinet_a, tmfi_net, or MODULE:FUNCTION, with keys name, checkpoint, frozen "
        "and any option marked *; repeat for every peer",
    )
    add("--backbone", metavar="FILE", help="* Kinetics weights, or `kinetics` to download them")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="* of its frames")
    add("--view", choices=tuple(VIEWS), help="* which frames it sees; default: its model's")
    add("--before", type=int, help="* frames of the video before the target its clip begins")
    add("--stride", type=int, help="* from one frame of its clip to the next")
    add("--mean", type=float, nargs=3, help="*")
    add("--std", type=float, nargs=3, help="*")
    if training:
        add("--grad-checkpointing", **_FLAG, help="* less memory, more time")
        add(
            "--compile",
            nargs="?",
            const="inductor",
            metavar="BACKEND",
            help="* auto: try both ways before training and keep the faster one",
        )
        add("--channels-last", **_FLAG, help="*")
        add(
            "--auto-layout",
            **_FLAG,
            help="* time both layouts before training and keep the faster one; of a peer also as "
            "channels_last=auto",
        )
    parser.set_defaults(kwargs={})


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add device and precision."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto")
    add("--amp", **_FLAG)
    add("--amp-dtype", default="bfloat16", choices=("float16", "bfloat16"))
    add("--seed", type=int, default=0)


Extend = Callable[[argparse.ArgumentParser], None]


def build_parser(
    dataset: str | None, script: str, extend: Extend | None = None
) -> argparse.ArgumentParser:
    """Build the parser of a training script; the defaults are those of the published runs.

    Args:
        dataset: The script's data set; None: ``--dataset`` chooses.
        script: Its name, for the usage.
        extend: Adds the options of another script that takes those of training, but ``--plan``.
    """
    parser = argparse.ArgumentParser(
        prog=f"saliency/{script}.py",
        description="Fine-tune N video saliency models that teach each other."
        if extend is None
        else "Choose, before any training, which of several video saliency models should teach "
        "each other.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", default="", metavar="FILE", help="YAML of options")
    add_data_options(parser, dataset)
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="evaluate on a share of the training videos, which are not trained on, instead of the "
        "validation split; drawn by --seed",
    )
    add_peer_options(parser, training=True)
    group = parser.add_argument_group("transfer")
    add_transfer_options(group)
    add_guard_options(group, GUARD_DROPS)
    add_soup_option(group)
    add = parser.add_argument_group("loss (weights of its terms; 0: not computed)").add_argument
    for term, weight in LOSS_TERMS.items():
        add(f"--{term}", type=float, default=weight)
    add = parser.add_argument_group("optimization (* a peer may set its own)").add_argument
    add("--epochs", type=int, default=100)
    add("-b", "--batch-size", type=int, default=4, help="per process")
    add("--clips-per-video", type=int, default=1, help="targets of a video in an epoch")
    add("--map-size", type=int, nargs=2, metavar=("H", "W"), help="of ground truth and transfer")
    add("--grad-accum-steps", type=int, default=1)
    add("--opt", default="adam", choices=OPTIMIZERS, help="*")
    add("--lr", type=float, default=1e-6, help="*")
    add("--weight-decay", type=float, default=1e-5, help="*")
    add("--sched", default="none", choices=SCHEDULES)
    add("--warmup-steps", type=int, default=0, help="optimizer steps to the full learning rate")
    add("--clip-grad", type=float, help="* largest norm of each peer's own gradient")
    add("--model-ema", **_FLAG, help="* average the weights, and evaluate the average")
    add(
        "--model-ema-span",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="* of the run that the average reaches back over",
    )
    add("--model-ema-decay", type=float, help="* of the average, in the place of a span")
    add("--sync-bn", **_FLAG)
    add_machine_options(parser)
    group = parser.add_argument_group("run")
    add_fault_options(group)
    add = group.add_argument
    add_resume_options(group)
    add("--output", default="", metavar="DIR")
    add("--experiment", default="", metavar="NAME")
    add("--eval-metric", default="loss", choices=SELECTION, help="what chooses the best weights")
    add("--val-interval", type=int, default=1)
    add("--log-interval", type=int, default=50)
    add("--recovery-interval", type=int, default=0, help="optimizer steps between run files")
    add("--checkpoint-hist", type=int, default=3)
    add("--log-wandb", **_FLAG)
    add("--wandb-project")
    parser.set_defaults(plan=False)
    if extend is None:
        add_plan_options(parser)
    else:
        extend(parser)
    return parser


def parse(
    dataset: str | None,
    script: str,
    arguments: Sequence[str] | None = None,
    extend: Extend | None = None,
) -> tuple[argparse.Namespace, list[PeerSpec]]:
    """Parse a training script's flags over a YAML file over the defaults.

    Args:
        dataset: The script's data set.
        script: Its name.
        arguments: None: ``sys.argv``.
        extend: See ``build_parser``.

    Returns:
        The run's options, ``dataset`` among them, and its peers as asked for.

    Raises:
        OptionError: An unknown key, a value of another kind or out of its range, peers or a rule
            that do not fit.
        SystemExit: As argparse does, for flags.
    """
    parser = build_parser(dataset, script, extend)
    options = parse_over_file(parser, arguments, read_yaml)
    options.dataset = dataset or options.dataset
    _check(options)
    if script == "scout" and not (options.realised or options.check_data):
        refuse_few(len(options.peers or ()), "for instance --model vinet_s,checkpoint=vinet_s.pt")
    specs = [] if options.check_data and not options.peers else read_peers(parser, options)
    if specs:
        transfer_of(options, [spec.name for spec in specs])
        bare = [spec.name for spec in specs if not (spec.frozen or spec.options.model_ema)]
        check_copies(options, bare, "--model-ema")
        bounds_of(options, GUARD_DROPS)
    return options, specs


def read_peers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[PeerSpec]:
    """Read every ``--peer``.

    Raises:
        OptionError: None, or one with a key or value that cannot be used.
    """
    if not options.peers:
        raise OptionError(
            "no peers: give --peer MODEL for every model, for instance "
            "--peer vinet_s,checkpoint=vinet_s.pt --peer tmfi_net,checkpoint=tmfi.pth"
        )
    alone = ("frozen", *_flags(parser))
    entries = [with_layout_asked(peer_mapping(asked, alone)) for asked in options.peers]
    names = number_repeats(
        (str(entry.get("name", "")), _base_name(str(entry["model"]))) for entry in entries
    )
    try:
        check_names(names)
    except ValueError as error:
        raise OptionError(str(error)) from error
    return [
        PeerSpec(
            name=name,
            model=str(entry["model"]),
            checkpoint=None if entry.get("checkpoint") is None else str(entry["checkpoint"]),
            frozen=truth(entry.get("frozen", False), f"peer {entry['model']!r}: frozen"),
            options=_own(parser, options, entry),
        )
        for entry, name in zip(entries, names, strict=True)
    ]


def view_of(own: ClipView, options: argparse.Namespace) -> ClipView:
    """Return a peer's view: its model's own, but for what its options change.

    Raises:
        OptionError: A number out of its range.
    """
    view = VIEWS[options.view] if options.view else own
    asked = {
        "size": options.size and tuple(options.size),
        "before": options.before,
        "stride": options.stride,
        "mean": options.mean and tuple(options.mean),
        "std": options.std and tuple(options.std),
    }
    if options.view:  # the frames are chosen; size and colours stay the model's
        asked = {"size": own.size, "mean": own.mean, "std": own.std} | {
            key: value for key, value in asked.items() if value is not None
        }
    try:
        return replace(view, **{key: value for key, value in asked.items() if value is not None})
    except ValueError as error:
        raise OptionError(str(error)) from error


def _base_name(model: str) -> str:
    return model.rpartition(":")[2].rpartition(".")[2]


def _own(
    parser: argparse.ArgumentParser, options: argparse.Namespace, entry: dict[str, Any]
) -> argparse.Namespace:
    given = {key: value for key, value in entry.items() if key != "kwargs"}
    may_set = [name for name in PEER_OPTIONS if name == "kwargs" or hasattr(options, name)]
    own = own_options(options, actions_of(parser), given, may_set, {}, PEER_OWN)
    kwargs = entry.get("kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise OptionError(
            f"peer {entry['model']!r}: kwargs is {kwargs!r}; expected kwargs.NAME=VALUE"
        )
    own.kwargs = dict(kwargs)
    keys = {key.replace("-", "_") for key in given}
    if "model_ema_span" in keys and "model_ema_decay" not in keys:
        own.model_ema_decay = None  # the peer's own span goes before the run's decay
    span = getattr(own, "model_ema_span", 1.0)
    if not 0 < span <= 1:
        raise OptionError(
            f"peer {entry['model']!r}: model-ema-span is {span}; expected a share of the run, "
            "above 0 and at most 1"
        )
    check_least(own, {name: 0 for name in _NOT_NEGATIVE if hasattr(own, name)})
    return own


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options that may stand alone: truth values, and those with a value for that."""
    return [
        name.replace("_", sign)
        for name, action in actions_of(parser).items()
        for sign in "_-"
        if name in PEER_OPTIONS and action.const is not None
    ]


def _check(options: argparse.Namespace) -> None:
    check_data_options(options)
    if options.transfer_classes != "all":
        raise OptionError("--transfer-classes non-target: a map's pixels have no true class")
    check_least(
        options,
        {
            "epochs": 1,
            "batch_size": 1,
            "clips_per_video": 1,
            "grad_accum_steps": 1,
            "warmup_steps": 0,
            "transfer_warmup_steps": 0,
            "seed": 0,
            "val_interval": 1,
            "log_interval": 1,
            "recovery_interval": 0,
            "checkpoint_hist": 1,
            "max_skips_in_a_row": 0,
        },
    )
    if not 0 <= options.held_out < 1:
        raise OptionError(f"--held-out is {options.held_out}; expected 0 or more, below 1")
    if options.map_size and min(options.map_size) < 1:
        raise OptionError(f"--map-size is {options.map_size}; expected a height and a width")
    if not any(getattr(options, term) for term in LOSS_TERMS):
        raise OptionError("every weight of the loss is 0; give at least one, such as --kl 1")
    if options.metrics and options.eval_metric not in ("loss", *options.metrics):
        raise OptionError(
            f"--eval-metric is {options.eval_metric}, which is not among --metrics "
            f"{' '.join(options.metrics)}; add it"
        )


def check_data_options(options: argparse.Namespace) -> None:
    """Refuse data options that cannot be used.

    Raises:
        OptionError: Names the option.
    """
    if not options.data_root and not getattr(options, "plan", False):
        raise OptionError("no data: give the folder of the data set as --data-root")
    least = {"workers": 0, "val_stride": 1, "val_batch_size": 1, "blur": 0, "max_bad_samples": 0}
    check_least(options, least)
    if options.packed and options.max_bad_samples:
        raise OptionError(
            f"--max-bad-samples {options.max_bad_samples} with --packed: every frame is packed, "
            "and a broken one cannot be; leave one of the two out"
        )
    if options.blur and options.blur % 2 == 0:
        raise OptionError(f"--blur is {options.blur}; expected an odd number of pixels, or 0")
