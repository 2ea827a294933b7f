"""Fine-tune N image classifiers that teach each other: timm's train.py, for N peers."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils import random_seed
from torch.utils.data import Dataset

from classification import cards, outputs
from classification.data import TrainLoader, View, classes_of, common_view, open_dataset
from classification.evaluation import PeerEvaluator
from classification.held_out import split_held_out
from classification.models import PUBLISHED_TOP1, ModelError, full_name
from classification.options import GUARD_DROPS, PeerSpec, build_parser, parse
from classification.peer import ClassifierPeer, build_modules, build_peers
from classification.plan import tell_plan
from classification.publish import check_push, deliver
from classification.trials import choose_ways
from common import distributed
from common.apart import WAY_OUT, in_both, told_shared
from common.broken import BadSampleError, BadSamples
from common.checkpoint import CheckpointError
from common.claimed import claims_end
from common.disk import OutputError
from common.distributed import World
from common.engine import build_engine
from common.options import OptionError, amp_dtype, bounds_of, transfer_of
from common.outputs import (
    check_resumed,
    finish,
    folder_of,
    log_resumed,
    plain,
    progress_bars,
    read_resumed,
    resumed_folder,
    run_command,
    seat_world,
    start_world,
)
from common.peers import Peer, PeerGroup, UnreachedError, share_statistics
from common.roles import NonFiniteError
from common.score_temperatures import ScoreTemperatures
from common.termination import ended_at_once
from common.trainer import Plan, Progress, Trainer

_logger = logging.getLogger("train")

FAULTS = (
    OptionError,
    ModelError,
    CheckpointError,
    UnreachedError,
    NonFiniteError,
    BadSampleError,
    OutputError,
)

BASELINE_GAP = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    logging.getLogger("timm").setLevel(logging.WARNING)

    def work() -> None:
        with ended_at_once():
            run(arguments)

    return run_command(work, FAULTS)


@claims_end()
def run(arguments: Sequence[str] | None = None, bars: bool = True) -> Progress:
    """Train as the arguments say.

    Args:
        arguments: As on the command line; None: ``sys.argv``.
        bars: Show progress bars where the output is a terminal.

    Returns:
        Where the run ended: best values, history of evaluations, lessons of every epoch. With
        ``--plan`` it never begins.

    Raises:
        OptionError, ModelError, CheckpointError: Bad input, before any training.
        NonFiniteError: A peer's loss is not finite.
        BadSampleError: More files are broken than allowed.
    """
    options, specs = parse(arguments)
    if options.plan:
        tell_plan(options, specs, start(options))
        return Progress()
    check_push(options, specs)
    world = start(options)
    state = _resumed_state(options, specs, world)
    world = seat_world(world, options, len(specs))
    check_resumed(state)
    random_seed(options.seed, 0)
    _logger.info("building %d peers: %s", len(specs), ", ".join(spec.name for spec in specs))
    modules, views = build_modules(specs, options)
    train_set, held_out = open_both(options, views[0].size[0], modules[0].num_classes)
    metadata = {
        spec.name: outputs.metadata(spec, module, view)
        for spec, module, view in zip(specs, modules, views, strict=True)
    }
    origins = _origins(specs, modules, world, state)
    classes, bad = modules[0].num_classes, BadSamples(options.max_bad_samples)
    loader = TrainLoader(train_set, common_view(views), options, world, classes, bad)
    shown = zip(specs, modules, views, strict=True) if world.is_main else ()
    rows = [outputs.describe(*peer) for peer in shown]
    updates = -(-len(loader) // options.grad_accum_steps)
    kept = {} if state is None else state["config"]
    choose_ways(specs, modules, views, options, world, kept)
    peers, epochs = build_peers(specs, modules, views, options, world, updates)
    del modules  # those that other processes hold
    random_seed(options.seed, world.rank)
    epochs = max(distributed.gather_objects(epochs))
    trainer = _trainer(
        options, specs, views, peers, loader, held_out, epochs, metadata, world, bars
    )
    trainer.config["origins"] = origins
    outputs.log_peers(rows, trainer.peers, world)
    if state is not None:
        source = resumed_folder(options)
        trainer.resume(state, optimizer=not options.no_resume_opt, source=source)
        log_resumed(options, trainer.progress)
    if options.start_epoch is not None:
        trainer.begin_at(options.start_epoch)
    if world.is_main:  # once nothing is refused any more: a resumed run keeps its own till then
        outputs.write_arguments(trainer.folder, options)
    trainer.writers = outputs.writers(options, trainer.folder, world, trainer.progress.updates)
    progress = trainer.fit()
    with trainer.finishing():
        outputs.check_exports(trainer, specs)
        images = cards.images_of(train_set, held_out, world)
        cards.write_cards(trainer, specs, options, origins, images)
        if world.is_main:
            finish(trainer, outputs.settings(options))
        distributed.barrier()
    if world.is_main and options.push_to_hub:
        _push(trainer, specs, options)
    return progress


def _origins(
    specs: Sequence[PeerSpec],
    modules: Sequence[Any],
    world: World,
    state: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Tell from what the peers start; a resumed run tells what it began with."""
    if state is not None:
        return state["config"].get("origins", {})
    mine = {}
    if world.is_main:  # the files are read once, however many processes there are
        shown = zip(specs, modules, strict=True)
        mine = {spec.name: cards.origin(spec, module) for spec, module in shown}
    return distributed.gather_objects(mine)[0]


def _push(trainer: Trainer, specs: Sequence[PeerSpec], options: argparse.Namespace) -> None:
    for spec in specs:
        if not spec.frozen:
            repo = f"{options.push_to_hub}-{spec.name}"
            deliver(trainer.folder, [spec.name], repo=repo, private=True)


def start(options: argparse.Namespace) -> World:
    """Join the other processes and set the device up.

    Raises:
        OptionError: A device that is not there.
    """
    world = start_world(options.device)
    if options.fast_norm:
        timm.layers.set_fast_norm()
    return world


def _resumed_state(
    options: argparse.Namespace, specs: list[PeerSpec], world: World
) -> dict[str, Any] | None:
    """Read the run file to resume, and make the peers' own weights unnecessary."""
    state = read_resumed(
        options,
        world,
        outputs.FREE_TO_CHANGE,
        defaults=build_parser().parse_args([]),
        kept=("resolved_num_classes",),
    )
    if state is None:
        return None
    options.num_classes = state["config"]["resolved_num_classes"]
    for i, spec in enumerate(specs):
        spec.options.pretrained = False
        specs[i] = spec.without_checkpoint()
    return state


def open_both(
    options: argparse.Namespace, channels: int, num_classes: int
) -> tuple[Dataset, Dataset]:
    """Open what is trained on, and what is evaluated on: the validation split, or a held-out part.

    Raises:
        OptionError: Data that is missing, of other classes, that cannot be split, or without
            ``--held-out`` the same images in both.
    """
    train_set = open_dataset(options, True, channels)
    check_classes(train_set, num_classes)
    if options.transfer_classes != "all" and num_classes < 3:
        raise OptionError(
            f"--transfer-classes non-target needs 3 classes or more; the peers tell {num_classes}"
        )
    if options.held_out:
        return split_held_out(train_set, options.held_out, options.seed)
    held_out = open_dataset(options, False, channels)
    check_same_classes(train_set, held_out)
    check_apart(train_set, held_out, options, "make two split folders, or give --held-out SHARE")
    return train_set, held_out


def check_classes(dataset: Any, num_classes: int) -> None:
    """Refuse data of other classes than the peers tell.

    Raises:
        OptionError: Names both counts.
    """
    classes = classes_of(dataset)
    if classes and len(classes) != num_classes:
        raise OptionError(
            f"the data has {len(classes)} classes, the peers tell {num_classes}; give "
            f"--num-classes {len(classes)} for new heads, or the peers' own data"
        )


def check_same_classes(train_set: Any, held_out: Any) -> None:
    """Refuse splits whose folders number the classes differently.

    Raises:
        OptionError: Names the classes that only one of the splits has.
    """
    one, two = classes_of(train_set), classes_of(held_out)
    if one and two and one != two:
        differ = sorted(str(name) for name, _ in one.items() ^ two.items())
        alone = sorted(str(name) for name in one.keys() ^ two.keys()) or differ
        raise OptionError(
            "training and validation data number their classes differently; in one of them only: "
            f"{', '.join(alone[:6])}; complete the folders, or number them with --class-map"
        )


def check_apart(train_set: Any, measured: Any, options: argparse.Namespace, way_out: str) -> None:
    """Refuse to measure on images that are trained on.

    Of folders the images are compared, of tar files the files, of all other data the names of the
    splits.

    Raises:
        OptionError: Names an image or the split, and the way out.
    """
    one, other = images_at(train_set), images_at(measured)
    if one is not None and other is not None:
        shared = in_both(one, other)
        told = told_shared(shared, len(one)) if shared else ""
    else:
        same = options.train_split == options.val_split
        told = f"--train-split and --val-split are both {options.val_split!r}" if same else ""
    if told:
        raise OptionError(f"{options.data}: {told}; {way_out}: {WAY_OUT}")


def images_at(dataset: Any) -> list[str] | None:
    """Return the images of folders, or the tar file that they are in; None for all other data."""
    files = cards.files_of(dataset)
    if files is not None:
        return list(files.paths)
    reader = getattr(dataset, "reader", None)
    return [str(reader.root)] if isinstance(reader, ReaderImageInTar) else None


def _trainer(
    options: argparse.Namespace,
    specs: Sequence[PeerSpec],
    views: Sequence[View],
    peers: Sequence[Peer],
    loader: TrainLoader,
    held_out: Dataset,
    epochs: int,
    metadata: Mapping[str, Mapping[str, str]],
    world: World,
    bars: bool,
) -> Trainer:
    try:
        group = PeerGroup(peers)
    except ValueError as error:
        raise OptionError(str(error)) from error
    here = [i for i in range(len(peers)) if world.holds(i)]
    dtype = amp_dtype(options)
    transfer = transfer_of(options, group.names, group.frozen, world.shard)
    watch = progress_bars(bars and world.is_main)
    steps = progress_bars(bars and world.is_main, lines=False)  # the trainer has its own
    evaluator = PeerEvaluator(
        held_out,
        [views[i] for i in here],
        options,
        world,
        dtype,
        channels_last=[specs[i].options.channels_last for i in here],
        dtypes=[next(peer.module.parameters()).dtype for peer in group.here],
        watch=watch,
        bad=loader.bad,
        temperatures=_score_temperatures(options, group, world),
    )
    folder = folder_of(options, group.names, world)
    return Trainer(
        peers=group,
        engine=build_engine(options.engine, group, transfer, world, dtype),
        transfer=transfer,
        loader=loader,
        evaluator=evaluator,
        plan=Plan(
            epochs=epochs,
            accumulate=options.grad_accum_steps,
            log_every=options.log_interval,
            evaluate_every=options.val_interval,
            save_every=options.recovery_interval,
            keep=options.checkpoint_hist,
            metric=options.eval_metric,
            lower_is_better=options.eval_metric == "loss",
            guard=bounds_of(options, GUARD_DROPS),
            on_nonfinite=options.on_nonfinite,
            max_skips=options.max_skips_in_a_row,
        ),
        folder=folder,
        world=world,
        config={
            **plain(options),
            "resolved_num_classes": int(metadata[group.names[0]]["num_classes"]),
        },
        metadata=metadata,
        after_epoch=lambda: _share_statistics(group, options.dist_bn, world),
        on_baseline=lambda metrics: _compare_with_published(specs, metrics),
        watch=lambda batches: steps(batches, "training"),
        names_of=loader.names_of,
        bad=loader.bad,
        halves=evaluator.halves if options.soup else None,
    )


def _score_temperatures(
    options: argparse.Namespace, group: PeerGroup, world: World
) -> ScoreTemperatures | None:
    """Let every peer be compared at a temperature of its own, where that is asked for."""
    if options.calibrate_scores == "off":
        return None
    if not options.held_out and world.is_main:
        _logger.warning(
            "--calibrate-scores: the temperatures are fitted on the split %r, on which the run is "
            "also evaluated; where its numbers shall be a test, give --held-out SHARE",
            options.val_split,
        )
    temperatures = ScoreTemperatures(group.names, options.calibrate_scores, world)
    for peer in group.here:
        if isinstance(peer, ClassifierPeer):
            peer.temperature = temperatures.of(peer.name)
    return temperatures


def _share_statistics(peers: PeerGroup, how: str, world: World) -> None:
    """Share BatchNorm statistics as timm's ``--dist-bn`` asks: reduce, broadcast or nothing."""
    if how:
        share_statistics(peers, world, average=how == "reduce")


def _compare_with_published(specs: Sequence[PeerSpec], metrics: Mapping[str, float]) -> None:
    """Show each peer's start beside its published number; a gap tells of a wrong view or file."""
    for spec in specs:
        published = spec.published
        if published is None and spec.takes_published_weights and not spec.options.num_classes:
            published = PUBLISHED_TOP1.get(full_name(spec.model))
        if published is None:
            continue
        measured = metrics[f"{spec.name}/top1"]
        log = _logger.warning if abs(measured - published) > BASELINE_GAP else _logger.info
        log(
            "%s: baseline top-1 %.2f, published %.2f (%+.2f)%s",
            spec.name,
            measured,
            published,
            measured - published,
            "; more than 0.5 points apart: check data, class order, img_size, interpolation, mean"
            if abs(measured - published) > BASELINE_GAP
            else "",
        )


if __name__ == "__main__":
    sys.exit(main())
