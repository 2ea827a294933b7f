"""The command line: timm's training arguments, for N peers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm.utils import ParseKwargs

from classification.models import models_meant
from common.checkpoint import CheckpointError, read_metadata
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
    number,
    number_repeats,
    own_options,
    parse_over_file,
    peer_mapping,
    transfer_of,
    truth,
)
from common.planner import add_plan_options
from common.roles import COMPARING, compares_scores
from common.score_temperatures import WHEN
from common.scouting import refuse_few
from common.trials import with_layout_asked
from common.yaml_files import read_yaml as read_plain_yaml


@dataclass(frozen=True)
class PeerSpec:
    """One peer as asked for.

    Attributes:
        name: Unique.
        model: What ``classification.models.create_classifier`` takes.
        checkpoint: Local file or files, or None.
        frozen: It teaches and does not learn.
        published: Top-1 that its authors report, to compare the baseline with.
        options: The run's options with this peer's own values in place.
    """

    name: str
    model: str
    checkpoint: str | list[str] | None
    frozen: bool
    published: float | None
    options: argparse.Namespace

    @property
    def takes_published_weights(self) -> bool:
        """Whether it starts from the weights that its model is published with."""
        return self.checkpoint is None and self.options.pretrained is not False

    def without_checkpoint(self) -> PeerSpec:
        """Return the same peer, to be filled with a run file's weights."""
        return replace(self, checkpoint=None)


# Options that a peer may set for itself, by the names of the command line.
PEER_OPTIONS = (
    "pretrained gp img_size input_size crop_pct mean std interpolation channels_last auto_layout "
    "grad_checkpointing model_kwargs head_init_scale head_init_bias torchcompile torchcompile_mode "
    "model_dtype opt opt_eps opt_betas momentum weight_decay clip_grad clip_mode layer_decay "
    "layer_decay_min_scale layer_decay_no_opt_scale opt_kwargs sched lr lr_base lr_base_size "
    "lr_base_scale lr_noise lr_noise_pct lr_noise_std lr_cycle_mul lr_cycle_decay lr_cycle_limit "
    "lr_k_decay warmup_lr min_lr decay_milestones decay_epochs warmup_epochs patience_epochs "
    "decay_rate drop drop_connect drop_path drop_block bn_momentum bn_eps sync_bn model_ema "
    "model_ema_decay model_ema_span model_ema_warmup model_ema_force_cpu trust_remote_code"
).split()
PEER_ALIASES = {"compile": "torchcompile", "ema": "model_ema", "kwargs": "model_kwargs"}
EXPORT = ".safetensors"
EMA_DECAY = 0.9998  # timm's
GUARD_DROPS = {"top1": 1.0, "top5": 1.0, "loss": 0.05}  # in points, and in nats
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
PEER_OWN = ("name", "checkpoint", "frozen", "published")

# timm's arguments that have no meaning here, and what to use instead.
REJECTED = {
    "--model": "give every model as --peer MODEL",
    "--pretrained-path": "give the file to its peer: --peer MODEL,checkpoint=FILE",
    "--initial-checkpoint": "give the file to its peer: --peer MODEL,checkpoint=FILE",
    "--fuser": "TorchScript fusers do not apply to eager models; use compile=inductor on a peer",
    "--torchscript": "TorchScript is deprecated; use compile=inductor on a peer",
    "--no-prefetcher": "images are always normalised on the device, once for every view",
    "--use-multi-epochs-loader": "workers always persist between epochs here",
    "--worker-seeding": "every sample is seeded by itself, whatever the workers",
    "--save-images": "write a few samples with torchvision instead; a run's images would be large",
    "--tta": "timm's loader makes no test-time augmentations; there is nothing to reduce",
    "--aug-splits": "an augmentation split has no per-sample score to choose the teacher by",
    "--resplit": "it belongs to --aug-splits, which has no per-sample score",
    "--split-bn": "it belongs to --aug-splits, which has no per-sample score",
    "--jsd-loss": "a loss over augmentation splits has no per-sample score",
    "--device-modules": "only devices that torch itself knows are supported",
    "--synchronize-step": "steps are never synchronised; that is what makes them fast",
    "--wandb-resume-id": "resume the run; its writers go on in the same folder",
    "--naflex-loader": "peers need one common image; NaFlex batches have none",
    "--naflex-train-seq-lens": "peers need one common image; NaFlex batches have none",
    "--naflex-max-seq-len": "peers need one common image; NaFlex batches have none",
    "--naflex-patch-sizes": "peers need one common image; NaFlex batches have none",
    "--naflex-patch-size-probs": "peers need one common image; NaFlex batches have none",
    "--naflex-loss-scale": "peers need one common image; NaFlex batches have none",
    "--naflex-patchify-channels-first": "peers need one common image; NaFlex batches have none",
    "--train-img-sizes": "every peer trains at its own size; set img_size on the peer",
    "--train-batch-sizes": "every peer trains at its own size; set img_size on the peer",
    "--train-size-probs": "every peer trains at its own size; set img_size on the peer",
    "--train-size-schedule": "every peer trains at its own size; set img_size on the peer",
    "--train-size-schedule-spread": "every peer trains at its own size; set img_size on the peer",
    "--train-size-random-mix": "every peer trains at its own size; set img_size on the peer",
    "--variable-batch-loss-scale": "batches have one size here",
    "--kd-model-name": "give the teacher as --peer MODEL,frozen=true and --rule one_way:NAME",
    "--kd-distill-type": "transfer is between logits",
    "--kd-loss-type": "transfer uses the KL divergence",
    "--distill-loss-weight": "weigh the transfer with --transfer-weight",
    "--task-loss-weight": "the task loss has weight 1; use --transfer-weight",
    "--kd-temperature": "the transfer's is --temperature, 1 by default",
    "--kd-student-feature-dim": "transfer is between logits",
    "--kd-teacher-feature-dim": "transfer is between logits",
    "--kd-token-distill-type": "transfer is between logits",
}


class _Reject(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        option = rest[-1]
        parser.error(f"{option} is timm's, but not taken here: {REJECTED[option]}")


Extend = Callable[[argparse.ArgumentParser], None]
_ABOUT = {
    "train": "Fine-tune N image classifiers that teach each other.",
    "validate": "Measure image classifiers, each in its own view, and as an ensemble.",
    "scout": "Choose, before any training, which of many classifiers should teach each other.",
}


def build_parser(script: str = "train", extend: Extend | None = None) -> argparse.ArgumentParser:
    """Build the parser; every option's dest is timm's.

    Args:
        script: One of those that take these options, for the usage.
        extend: Adds that script's own options.
    """
    parser = argparse.ArgumentParser(
        prog=f"classification/{script}.py",
        description=_ABOUT[script],
        allow_abbrev=False,
    )
    flag = {"action": "store_true", "default": False}
    numbers = {"type": float, "nargs": "+", "default": None}
    add = parser.add_argument
    add("-c", "--config", default="", metavar="FILE", help="YAML of options; flags override it")

    group = parser.add_argument_group("peers and transfer")
    add = group.add_argument
    add(
        "--peer",
        action="append",
        dest="peers",
        default=None,
        metavar="MODEL[,key=value...]",
        help="a timm model, dinov2_vits14_lc, mae_vit_base_ft, hf:ORG/NAME, or a file that a run "
        "exported (NAME/best.safetensors), with keys name, checkpoint (several files: a+b), "
        "frozen, published, compile, and any option marked * below; repeat for every peer; "
        "replaces the peers of a YAML file",
    )
    add_transfer_options(group)
    add(
        "--calibrate-scores",
        default="off",
        choices=WHEN,
        help="compare the peers' scores with each one's logits divided by a temperature of its "
        "own, fitted on what the run is evaluated on (give --held-out, so that it is no test set): "
        "once at the start, or anew at every evaluation; only the choice of the teacher uses it",
    )
    add_guard_options(group, GUARD_DROPS, flips=True)
    add_soup_option(group)
    add("--trust-remote-code", **flag, help="* run code from a Hugging Face model's repository")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("data", nargs="?", metavar="DIR", help="path to the dataset")
    add("--data-dir", metavar="DIR")
    add("--dataset", default="", metavar="NAME", help="torch/, hfds/, hfids/, wds/, tfds/ or ''")
    add("--train-split", default="train")
    add("--val-split", default="validation")
    add(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="evaluate on a stratified share of the training split, which is not trained on, "
        "instead of the validation split; drawn by --seed",
    )
    add("--train-num-samples", type=int)
    add("--val-num-samples", type=int)
    add("--dataset-download", **flag)
    add("--class-map", default="", metavar="FILE")
    add("--input-img-mode")
    add("--input-key")
    add("--target-key")
    add("--dataset-trust-remote-code", **flag)
    add_bad_sample_option(group)

    group = parser.add_argument_group("model (* a peer may set its own)")
    add = group.add_argument
    add(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="* hub weights (default: yes, unless the peer has a checkpoint)",
    )
    add("--num-classes", type=int, help="new heads for every peer, for your own classes")
    add("--gp", metavar="POOL", help="* global pooling")
    add("--img-size", type=int, help="*")
    add("--in-chans", type=int)
    add("--input-size", type=int, nargs=3, help="* channels height width")
    add("--crop-pct", type=float, help="* of evaluation")
    add("--mean", **numbers, help="*")
    add("--std", **numbers, help="*")
    add("--interpolation", default="", choices=("", *INTERPOLATIONS), help="* of evaluation")
    add("-b", "--batch-size", type=int, default=128, help="per process")
    add("-vb", "--validation-batch-size", type=int)
    add("--channels-last", **flag, help="*")
    add(
        "--auto-layout",
        **flag,
        help="* time both layouts before training and keep the faster one; of a peer also as "
        "channels_last=auto",
    )
    add("--grad-accum-steps", type=int, default=1)
    add("--grad-checkpointing", **flag, help="*")
    add("--fast-norm", **flag)
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="*")
    add("--head-init-scale", type=float, help="*")
    add("--head-init-bias", type=float, help="*")
    add(
        "--torchcompile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="* auto: try both ways before training and keep the faster one",
    )
    add("--torchcompile-mode", help="*")

    group = parser.add_argument_group("device and distribution")
    add = group.add_argument
    add("--device", default="auto")
    add("--amp", **flag)
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"))
    add("--model-dtype", choices=("float32", "bfloat16"), help="* weights of this type")
    add("--no-ddp-bb", **flag, help="do not broadcast buffers at each forward")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    add("--sync-bn", **flag, help="*")
    add("--dist-bn", default="reduce", choices=("broadcast", "reduce", ""))

    group = parser.add_argument_group("optimizer and schedule (* a peer may set its own)")
    add = group.add_argument
    add("--opt", default="sgd", help="*")
    add("--opt-eps", type=float, help="*")
    add("--opt-betas", **numbers, help="*")
    add("--momentum", type=float, default=0.9, help="*")
    add("--weight-decay", type=float, default=2e-5, help="*")
    add("--clip-grad", type=float, help="* each peer by its own gradients")
    add("--clip-mode", default="norm", choices=("norm", "value", "agc"), help="*")
    add("--layer-decay", type=float, help="*")
    add("--layer-decay-min-scale", type=float, default=0, help="*")
    add("--layer-decay-no-opt-scale", type=float, help="*")
    add("--opt-kwargs", nargs="*", default={}, action=ParseKwargs, help="*")
    add("--sched", default="cosine", help="*")
    add("--sched-on-updates", **flag)
    add("--lr", type=float, help="* absolute; overrides --lr-base")
    add("--lr-base", type=float, default=0.1, help="* lr = lr_base * global batch / lr_base_size")
    add("--lr-base-size", type=int, default=256, help="*")
    add("--lr-base-scale", default="", choices=("", "linear", "sqrt"), help="*")
    add("--lr-noise", **numbers, help="*")
    add("--lr-noise-pct", type=float, default=0.67, help="*")
    add("--lr-noise-std", type=float, default=1.0, help="*")
    add("--lr-cycle-mul", type=float, default=1.0, help="*")
    add("--lr-cycle-decay", type=float, default=0.5, help="*")
    add("--lr-cycle-limit", type=int, default=1, help="*")
    add("--lr-k-decay", type=float, default=1.0, help="*")
    add("--warmup-lr", type=float, default=1e-5, help="*")
    add("--min-lr", type=float, default=0, help="*")
    add("--epochs", type=int, default=300)
    add("--epoch-repeats", type=float, default=0.0)
    add("--start-epoch", type=int)
    add("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], help="*")
    add("--decay-epochs", type=float, default=90, help="*")
    add("--warmup-epochs", type=int, default=5, help="*")
    add("--warmup-prefix", **flag)
    add("--cooldown-epochs", type=int, default=0)
    add("--patience-epochs", type=int, default=10, help="*")
    add("--decay-rate", "--dr", type=float, default=0.1, help="*")
    add("--train-batches-per-epoch", "--train-steps-per-epoch", type=int)

    group = parser.add_argument_group("augmentation and regularisation")
    add = group.add_argument
    add("--no-aug", **flag)
    add("--train-crop-mode", choices=("rrc", "rkrc", "rkrr"))
    add("--scale", type=float, nargs=2, default=[0.08, 1.0])
    add("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3])
    add("--hflip", type=float, default=0.5)
    add("--vflip", type=float, default=0.0)
    add("--color-jitter", type=float, default=0.4)
    add("--color-jitter-prob", type=float)
    add("--grayscale-prob", type=float)
    add("--gaussian-blur-prob", type=float)
    add("--aa", metavar="POLICY")
    add("--aug-repeats", type=float, default=0)
    add("--bce-loss", **flag)
    add("--bce-sum", **flag)
    add("--bce-target-thresh", type=float)
    add("--bce-pos-weight", type=float)
    add("--reprob", type=float, default=0.0)
    add("--remode", default="pixel", choices=("const", "rand", "pixel"))
    add("--recount", type=int, default=1)
    add("--mixup", type=float, default=0.0)
    add("--cutmix", type=float, default=0.0)
    add("--cutmix-minmax", **numbers)
    add("--mixup-prob", type=float, default=1.0)
    add("--mixup-switch-prob", type=float, default=0.5)
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))
    add("--mixup-off-epoch", type=int, default=0)
    add("--smoothing", type=float, default=0.1)
    add("--train-interpolation", default="random", choices=("random", *INTERPOLATIONS))
    add("--drop", type=float, default=0.0, help="*")
    add("--drop-connect", type=float, help="*")
    add("--drop-path", type=float, help="*")
    add("--drop-block", type=float, help="*")
    add("--bn-momentum", type=float, help="*")
    add("--bn-eps", type=float, help="*")
    add("--model-ema", **flag, help="*")
    add("--model-ema-force-cpu", **flag, help="*")
    add(
        "--model-ema-decay",
        type=float,
        help=f"* {EMA_DECAY} where nothing is said; overrides a span",
    )
    add(
        "--model-ema-span",
        type=float,
        metavar="SHARE",
        help="* where no decay is given: the average reaches back over this share of the "
        "run's optimizer steps (decay 1 - 1 / (SHARE * steps))",
    )
    add("--model-ema-warmup", **flag, help="*")

    group = parser.add_argument_group("run")
    add_fault_options(group)
    add = group.add_argument
    add_resume_options(group)
    add("--seed", type=int, default=42)
    add("--log-interval", type=int, default=50)
    add("--val-interval", type=int, default=1)
    add("--recovery-interval", type=int, default=0, help="optimizer steps between run files")
    add("--checkpoint-hist", type=int, default=10)
    add("-j", "--workers", type=int, default=4)
    add("--pin-mem", **flag)
    add("--output", default="", metavar="DIR")
    add("--experiment", default="", metavar="NAME")
    add("--eval-metric", default="top1", choices=("top1", "top5", "loss"))
    add("--log-wandb", **flag)
    add("--wandb-project")
    add("--wandb-tags", nargs="+", default=[])
    add(
        "--push-to-hub",
        default="",
        metavar="ORG/PREFIX",
        help="at the end, push each learning peer's best weights and their card to the Hugging "
        "Face hub, as the private repository ORG/PREFIX-PEER",
    )
    parser.set_defaults(plan=False)
    if script == "train":
        add_plan_options(group)
    if extend is not None:
        extend(parser)
    for option in [o for o in REJECTED if o not in parser._option_string_actions]:
        parser.add_argument(
            option, nargs="*", action=_Reject, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def parse(
    arguments: Sequence[str] | None = None, script: str = "train", extend: Extend | None = None
) -> tuple[argparse.Namespace, list[PeerSpec]]:
    """Parse flags over a YAML file over the defaults.

    Args:
        arguments: None: ``sys.argv``.
        script, extend: See ``build_parser``.

    Returns:
        The run's options, and its peers as asked for; of ``scout`` exported files are not read yet
        (see ``from_export``).

    Raises:
        CheckpointError: A peer given as a file that is missing or broken.
        ModelError: A name with wildcards that stands for nothing.
        OptionError: A YAML or peer key that does not exist (lists near or all choices), a value of
            the wrong kind, peers or a rule that do not fit.
        SystemExit: As argparse does, for flags.
    """
    parser = build_parser(script, extend)
    options = parse_over_file(parser, arguments, read_yaml)
    unlabelled = getattr(options, "unlabelled", None)  # scout.py can do without labels
    options.data = options.data or options.data_dir or unlabelled
    _check_ranges(options)
    choosing = script == "scout" and not options.realised
    if not options.peers and not choosing:
        raise OptionError("no peers: give --peer MODEL for every model, or a `peers:` list in YAML")
    options.peers = [one for asked in options.peers or () for one in _models_meant(asked)]
    if choosing:
        refuse_few(len(options.peers), "a wildcard such as --model 'pit_*', or `peers:` in YAML")
    peers = _name_peers([_peer_spec(parser, options, asked) for asked in options.peers])
    if script != "scout":  # which names all that cannot be had, and may go on without them
        peers = [_read_export(peer) for peer in peers]
    transfer_of(options, [peer.name for peer in peers])
    bare = [
        peer.name
        for peer in peers
        if not peer.frozen and (not peer.options.model_ema or peer.options.model_ema_force_cpu)
    ]
    check_copies(options, bare, "--model-ema")
    for peer in peers:
        span = peer.options.model_ema_span
        if span is not None and not 0 < span <= 1:
            raise OptionError(
                f"peer {peer.name!r}: model-ema-span is {span}; expected a share of the run, above "
                "0 and at most 1"
            )
        if span is not None and not (peer.options.model_ema or peer.frozen or options.recipe):
            raise OptionError(f"peer {peer.name!r}: model-ema-span without --model-ema; give both")
    compares = compares_scores(options.rule, options.margin, options.gap_power)
    if options.calibrate_scores != "off" and not compares:
        raise OptionError(
            f"--calibrate-scores {options.calibrate_scores} under --rule {options.rule}: no scores "
            "are compared there, so temperatures change nothing; leave it out, or take a rule of "
            f"{', '.join(COMPARING)}, a --margin or a --gap-power"
        )
    averaged = [peer.name for peer in peers if peer.options.model_ema and not peer.frozen]
    if options.calibrate_scores == "epoch" and options.teachers == "peers" and averaged:
        raise OptionError(
            "--calibrate-scores epoch with --model-ema: temperatures are fitted on the averages, "
            "and the models themselves are compared; give --teachers ema, or --calibrate-scores "
            "start"
        )
    bounds_of(options, GUARD_DROPS)
    return options, peers


def _models_meant(asked: str | Mapping[str, Any]) -> list[str | Mapping[str, Any]]:
    """Put one entry for every model that a name with wildcards stands for."""
    if isinstance(asked, str):
        model, comma, keys = asked.partition(",")
        return [name + comma + keys for name in models_meant(model.strip())]
    if "model" not in asked:
        return [asked]
    return [{**asked, "model": name} for name in models_meant(str(asked["model"]))]


def read_yaml(path: Path) -> Any:
    """Read a YAML file into plain containers.

    Raises:
        OptionError: As ``common.yaml_files``, or an option of timm's that is not taken here.
    """
    content = read_plain_yaml(path)
    for key in content if isinstance(content, dict) else ():
        option = "--" + str(key).replace("_", "-")
        if option in REJECTED:
            reason = REJECTED[option]
            raise OptionError(f"{path}: {key} is timm's, but not taken here: {reason}")
    return content


def _peer_spec(
    parser: argparse.ArgumentParser, options: argparse.Namespace, asked: str | Mapping[str, Any]
) -> PeerSpec:
    actions = actions_of(parser)
    entry = with_layout_asked(peer_mapping(asked, alone=("frozen",)))
    where = f"peer {entry['model']!r}"
    own = own_options(options, actions, entry, PEER_OPTIONS, PEER_ALIASES, PEER_OWN)
    given = {key.replace("-", "_") for key in entry}
    spans = "model_ema_span" in given and own.model_ema_span is not None
    if spans and "model_ema_decay" not in given:
        own.model_ema_decay = None  # the peer's own span goes before the run's decay
    if own.model_ema_decay is None and own.model_ema_span is None:
        own.model_ema_decay = EMA_DECAY
    checkpoint = entry.get("checkpoint")
    if isinstance(checkpoint, str) and "+" in checkpoint and not Path(checkpoint).exists():
        checkpoint = checkpoint.split("+")
    return PeerSpec(
        name=str(entry.get("name", "")),
        model=str(entry["model"]),
        checkpoint=checkpoint,
        frozen=truth(entry.get("frozen", False), f"{where}: frozen"),
        published=number(entry.get("published"), f"{where}: published"),
        options=own,
    )


def _read_export(peer: PeerSpec) -> PeerSpec:
    try:
        return from_export(peer)
    except CheckpointError as error:
        raise CheckpointError(f"peer {peer.name!r}: {error}") from error


def from_export(peer: PeerSpec) -> PeerSpec:
    """Read model, view and options of a peer that is given as a file that a run exported.

    Raises:
        CheckpointError: The file is missing or broken.
        OptionError: It does not tell what it holds.
    """
    if not peer.model.endswith(EXPORT):
        return peer
    told = read_metadata(peer.model)
    if "architecture" not in told:
        raise OptionError(
            f"{peer.model}: does not tell its architecture; give it as the checkpoint of a model: "
            f"--peer MODEL,checkpoint={peer.model}"
        )
    try:
        arguments = dict(json.loads(told["model_args"]))
        size = _three(json.loads(told["input_size"]))
        given = {
            "gp": arguments.pop("global_pool", None),
            "bn_eps": arguments.pop("bn_eps", None),
            "mean": [float(x) for x in json.loads(told["mean"])],
            "std": [float(x) for x in json.loads(told["std"])],
            "interpolation": told["interpolation"],
            "crop_pct": float(told["crop_pct"]),
        }
    except (KeyError, ValueError, TypeError) as error:
        raise OptionError(
            f"{peer.model}: its description cannot be read ({error!r}); give it as the checkpoint "
            f"of a model: --peer MODEL,checkpoint={peer.model}"
        ) from error
    own = argparse.Namespace(**vars(peer.options))
    for name, value in given.items():
        if getattr(own, name) in (None, ""):
            setattr(own, name, value)
    if own.img_size is None and own.input_size is None:
        own.input_size = size
    for name in ("img_size", "in_chans"):
        arguments.pop(name, None)
    own.model_kwargs = {**arguments, **own.model_kwargs}
    return replace(peer, model=told["architecture"], checkpoint=peer.model, options=own)


def _three(values: Any) -> list[int]:
    channels, height, width = values
    return [int(channels), int(height), int(width)]


def _name_peers(peers: list[PeerSpec]) -> list[PeerSpec]:
    """Name unnamed peers after their model, with a number where it repeats."""
    names = number_repeats((peer.name, _base_name(peer.model)) for peer in peers)
    return [replace(peer, name=name) for peer, name in zip(peers, names, strict=True)]


def _base_name(model: str) -> str:
    if model.endswith(EXPORT):
        return Path(model).resolve().parent.name
    return model.removeprefix("hf:").rstrip("/").rsplit("/", 1)[-1].split(".")[0]


def mixes(options: argparse.Namespace) -> bool:
    """Whether samples are mixed, and targets soft."""
    return bool(options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax)


def _check_ranges(options: argparse.Namespace) -> None:
    at_least = {
        "batch_size": 1,
        "grad_accum_steps": 1,
        "epochs": 1,
        "log_interval": 1,
        "val_interval": 1,
        "checkpoint_hist": 1,
        "recovery_interval": 0,
        "workers": 0,
        "transfer_warmup_steps": 0,
        "start_epoch": 0,
        "validation_batch_size": 1,
        "train_batches_per_epoch": 1,
        "max_skips_in_a_row": 0,
        "max_bad_samples": 0,
    }
    check_least(options, at_least)
    if not options.data and not options.plan:
        raise OptionError(
            "no data: give the dataset's folder as the first word, for instance /data/imagenet"
        )
    if not 0 <= options.held_out < 1:
        raise OptionError(f"--held-out is {options.held_out}; expected 0 or more, below 1")
    if not 0 <= options.smoothing < 1:
        raise OptionError(f"--smoothing is {options.smoothing}; expected 0 or more, below 1")
    if mixes(options) and options.transfer_classes != "all":
        raise OptionError(
            "--transfer-classes non-target needs one true class an image; leave mixup and cutmix "
            "out"
        )
    if options.bce_loss and options.calibrate_scores != "off":
        raise OptionError(
            f"--calibrate-scores {options.calibrate_scores}: a temperature is of a softmax, and "
            "--bce-loss trains without one; leave one of them out"
        )
    if mixes(options) and options.batch_size % 2:
        raise OptionError(f"mixup needs an even --batch-size, got {options.batch_size}")
