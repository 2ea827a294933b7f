"""Fine-tune N video saliency models that teach each other.

    python saliency/train_dhf1k.py --data-root DHF1K \\
        --peer vinet_s,checkpoint=vinet_s.pt --peer vinet_a,checkpoint=vinet_a.pt

``train_hollywood2.py`` and ``train_ucf_sports.py`` do the same on their data sets, and
``train.py --dataset NAME`` on any.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from common import distributed, recipes
from common.apart import WAY_OUT, in_both, told_shared
from common.broken import BadSamples
from common.checkpoint import CheckpointError
from common.claimed import claims_end
from common.disk import OutputError, write_text
from common.distributed import World
from common.engine import build_engine
from common.options import OptionError, amp_dtype, bounds_of, transfer_of
from common.outputs import (
    check_resumed,
    finish,
    folder_of,
    log_resumed,
    log_table,
    on_main,
    plain,
    progress_bars,
    read_resumed,
    resumed_folder,
    run_command,
    seat_world,
    start_world,
    writers,
)
from common.peers import Peer, PeerGroup, UnreachedError, share_statistics
from common.roles import NonFiniteError
from common.seeding import seed_alike
from common.termination import ended_at_once
from common.trainer import Plan, Progress, Trainer, Writer
from saliency import cards
from saliency.check import check_data
from saliency.clips import ClipView
from saliency.data import EvalLoader, TrainLoader, allowed
from saliency.errors import DataError
from saliency.evaluation import (
    SaliencyEvaluator,
    has_fixations,
    metrics_for,
    needs_fixations,
)
from saliency.held_out import split_held_out
from saliency.layouts import VideoSet, open_dataset
from saliency.models import ModelError
from saliency.options import (
    FREE_TO_CHANGE,
    GUARD_DROPS,
    LOSS_TERMS,
    LOWER_IS_BETTER,
    PeerSpec,
    build_parser,
    parse,
)
from saliency.packed import PackedFrames, pack_frames
from saliency.peer import build_modules, build_peers, describe, warn_of_random_weights
from saliency.pictures import teaching_pictures
from saliency.plan import grid_of, tell_plan
from saliency.trials import choose_ways

_logger = logging.getLogger("train")

FAULTS = (
    OptionError,
    ModelError,
    DataError,
    CheckpointError,
    UnreachedError,
    NonFiniteError,
    OutputError,
)


def main(
    dataset: str | None = None,
    script: str = "train",
    arguments: Sequence[str] | None = None,
) -> int:
    """Run the command line of a data set; bad input ends in one line, not in a traceback."""

    def work() -> None:
        with ended_at_once():
            run(dataset, script, arguments)

    return run_command(work, FAULTS)


@claims_end()
def run(
    dataset: str | None, script: str, arguments: Sequence[str] | None = None, bars: bool = True
) -> Trainer | None:
    """Train as the arguments say.

    Args:
        dataset: One of ``saliency.layouts.LAYOUTS``; None: ``--dataset`` chooses.
        script: Its name, for messages.
        arguments: As on the command line; None: ``sys.argv``.
        bars: Show progress bars where the output is a terminal.

    Returns:
        The trainer at the run's end; None with ``--check-data`` and ``--plan``.

    Raises:
        OptionError, ModelError, DataError, CheckpointError: Bad input, before any training.
        NonFiniteError: A peer's loss is not finite.
    """
    options, specs = parse(dataset, script, arguments)
    world = start_world(options.device)
    if options.plan:
        tell_plan(options, specs, world, script)
        return None
    if specs:
        world = seat_world(world, options, len(specs))
    if options.sync_bn and world.device.type != "cuda":
        raise OptionError("--sync-bn needs GPUs; leave it out on a CPU")
    state = _resumed_state(options, specs, world)
    check_resumed(state)
    seed_alike(options.seed)
    _logger.info("building %d peers: %s", len(specs), ", ".join(spec.name for spec in specs))
    modules, views = build_modules(specs)
    origins = _origins(specs, world, state)
    train_set, held_out = open_splits(options, world, bars)
    if options.check_data:
        return None
    packed = pack(options, (train_set, held_out), views, world, bars)
    bad = allowed(options.max_bad_samples)
    loader = _train_loader(options, train_set, views, world, packed, bad)
    if world.is_main:
        rows = zip(specs, modules, views, strict=True)
        log_table([describe(*row) for row in rows])
        if state is None:
            warn_of_random_weights(specs)
    updates = options.epochs * -(-len(loader) // options.grad_accum_steps)
    kept = {} if state is None else state["config"]
    choose_ways(specs, modules, views, options, world, kept)
    group = _group(build_peers(specs, modules, views, options, world, updates))
    del modules  # those that other processes hold
    seed_alike(options.seed + world.rank)
    watch = progress_bars(bars and world.is_main)
    given = (_held_here(views, world), world, packed, watch)
    reading = {"bad": bad, "elsewhere": views}
    evaluator = build_evaluator(options, held_out, *given, **reading)
    steps = progress_bars(bars and world.is_main, lines=False)  # the trainer has its own
    trainer = _trainer(options, group, loader, evaluator, world, steps)
    if options.soup:
        trainer.halves = video_halves(options, held_out, *given, **reading)
    trainer.config["origins"] = origins
    if state is not None:
        source = resumed_folder(options)
        trainer.resume(state, optimizer=not options.no_resume_opt, source=source)
        log_resumed(options, trainer.progress)
    if world.is_main:
        _write_arguments(trainer.folder, options, keep_dataset=dataset is None)
    trainer.writers = _writers(options, trainer.folder, world, trainer.progress)
    trainer.fit()
    with trainer.finishing():
        cards.write_cards(trainer, specs, options, origins, train_set)
        if world.leads:
            pictures = [teaching_pictures(trainer.peers, held_out, world, views)]
            if world.is_main:
                finish(trainer, settings(options), pictures)
        distributed.barrier()
    return trainer


def open_splits(options: argparse.Namespace, world: World, bars: bool) -> tuple[VideoSet, VideoSet]:
    """List what to train on and what to evaluate on, after a look at all their files.

    Returns:
        The training split and the validation split; with ``--held-out`` the training split in two
        parts, and the validation split is not touched.

    Raises:
        DataError: Shows what is wrong, or a frame that is in both splits.
        OptionError: A held-out part that leaves nothing to train on.
    """
    names = ("train",) if options.held_out else ("train", "val")
    splits = [open_dataset(options.dataset, options.data_root, name) for name in names]

    def look() -> None:
        check_videos(options, splits, progress=bars and sys.stderr.isatty())

    on_main(world, look, (DataError,))
    if options.held_out:
        return split_held_out(splits[0], options.held_out, options.seed)
    check_apart(*splits)
    return splits[0], splits[1]


def check_apart(trained: VideoSet, measured: VideoSet) -> None:
    """Refuse to measure on frames that are trained on.

    Raises:
        DataError: Names a frame, and the way out.
    """
    one, other = (frames_of(videos) for videos in (trained, measured))
    shared = in_both(one, other)
    if shared:
        raise DataError(
            f"{trained.root}: {told_shared(shared, len(one))}; make two folders of different "
            f"videos: {WAY_OUT}"
        )


def frames_of(videos: VideoSet) -> list[str]:
    """List all frames."""
    return [video.path(frame) for video in videos.videos for frame in video.frames]


def check_videos(
    options: argparse.Namespace, splits: Sequence[VideoSet], progress: bool = False
) -> None:
    """Look at all files of splits, and tell how many there are.

    Raises:
        DataError: Shows what is wrong.
    """
    check_data(
        splits,
        depth=options.check_depth,
        progress=progress,
        most_broken=options.max_bad_samples,
    )
    for split in splits:
        frames = sum(len(video) for video in split.videos)
        _logger.info("%s: %d videos, %d frames", split, len(split.videos), frames)


def pack(
    options: argparse.Namespace,
    splits: Sequence[VideoSet],
    views: Sequence[ClipView],
    world: World,
    bars: bool,
) -> PackedFrames | None:
    """Pack the frames at the peers' sizes where that is asked for, each rank its share."""
    if not options.packed:
        return None
    sizes = [view.size for view in views]
    return pack_frames(splits, sizes, options.packed, bars and world.is_main, world)


def _train_loader(
    options: argparse.Namespace,
    videos: VideoSet,
    views: Sequence[ClipView],
    world: World,
    packed: PackedFrames | None,
    bad: BadSamples,
) -> TrainLoader:
    if options.nss and not has_fixations(videos):
        raise OptionError(
            f"--nss is {options.nss}, but {videos} has no fixations; leave it out, or bring "
            "VIDEO/fixation/maps/*.mat or VIDEO/fixation/*.png"
        )
    return TrainLoader(
        videos,
        _held_here(views, world),
        world,
        batch_size=options.batch_size,
        seed=options.seed,
        workers=options.workers,
        clips_per_video=options.clips_per_video,
        map_size=grid_of(views, options),
        fixations=bool(options.nss),
        packed=packed,
        bad=bad,
        elsewhere=views,
    )


def _held_here(views: Sequence[ClipView], world: World) -> list[ClipView]:
    """Return what the peers of this process see."""
    return [view for i, view in enumerate(views) if world.holds(i)]


def build_evaluator(
    options: argparse.Namespace,
    videos: VideoSet,
    views: Sequence[ClipView],
    world: World,
    packed: PackedFrames | None = None,
    watch: Any = lambda batches, title: batches,
    corruption: tuple[str, int] | None = None,
    **rest: Any,
) -> SaliencyEvaluator:
    """Build the evaluator that the options describe.

    Args:
        corruption: Spoils every frame, see ``EvalLoader``.
        rest: See ``SaliencyEvaluator``.

    Raises:
        OptionError: A metric that the data does not allow.
    """
    try:
        metrics = metrics_for(videos, options.metrics, rest.pop("shuffled", False))
    except ValueError as error:
        raise OptionError(f"--metrics {error}") from error
    chosen = getattr(options, "eval_metric", "loss")
    if chosen not in ("loss", *metrics):
        raise OptionError(
            f"--eval-metric is {chosen}, which is not measured; measured: loss {' '.join(metrics)}"
        )
    loader = EvalLoader(
        videos,
        views,
        world,
        batch_size=options.val_batch_size,
        stride=options.val_stride,
        workers=options.workers,
        fixations=any(map(needs_fixations, metrics)),
        packed=packed,
        bad=rest.pop("bad", None) or allowed(options.max_bad_samples),
        corruption=corruption,
        elsewhere=rest.pop("elsewhere", ()),
    )
    return SaliencyEvaluator(
        loader,
        world,
        metrics,
        blur=options.blur,
        amp_dtype=amp_dtype(options),
        seed=options.seed,
        watch=watch,
        **rest,
    )


def video_halves(
    options: argparse.Namespace, videos: VideoSet, *rest: Any, **more: Any
) -> Callable[[PeerGroup], tuple[dict[str, float], dict[str, float]]]:
    """Return what measures every second video of a split, and the others.

    Frames of one video are alike, so that none may be in both halves.

    Args:
        options: The run's.
        videos: The split.
        rest, more: See ``build_evaluator``.

    Raises:
        OptionError: A single video.
    """
    if len(videos.videos) < 2:
        raise OptionError(f"--soup: {videos} has one video; two halves need two or more")
    parts = [replace(videos, videos=videos.videos[first::2]) for first in (0, 1)]
    one, other = (build_evaluator(options, part, *rest, **more) for part in parts)
    return lambda peers: (one.evaluate(peers), other.evaluate(peers))


def _group(peers: Sequence[Peer]) -> PeerGroup:
    try:
        return PeerGroup(peers)
    except ValueError as error:
        raise OptionError(str(error)) from error


def _trainer(
    options: argparse.Namespace,
    group: PeerGroup,
    loader: TrainLoader,
    evaluator: SaliencyEvaluator,
    world: World,
    steps: Any,
) -> Trainer:
    transfer = transfer_of(options, group.names, group.frozen, world.shard)
    return Trainer(
        peers=group,
        engine=build_engine(options.engine, group, transfer, world, amp_dtype(options)),
        transfer=transfer,
        loader=loader,
        evaluator=evaluator,
        plan=Plan(
            epochs=options.epochs,
            accumulate=options.grad_accum_steps,
            log_every=options.log_interval,
            evaluate_every=options.val_interval,
            save_every=options.recovery_interval,
            keep=options.checkpoint_hist,
            metric=options.eval_metric,
            lower_is_better=options.eval_metric in LOWER_IS_BETTER,
            guard=bounds_of(options, GUARD_DROPS),
            export_suffix=".pth",  # a bare state dict, as the published checkpoints are
            on_nonfinite=options.on_nonfinite,
            max_skips=options.max_skips_in_a_row,
        ),
        folder=folder_of(options, group.names, world),
        world=world,
        config=plain(options),
        after_epoch=lambda: share_statistics(group, world),
        watch=lambda batches: steps(batches, "training"),
        names_of=loader.names_of,
        bad=loader.bad,
    )


def _origins(
    specs: Sequence[PeerSpec], world: World, state: Mapping[str, Any] | None
) -> dict[str, str]:
    """Tell from what the peers start; a resumed run tells what it began with."""
    if state is not None:
        return state["config"].get("origins", {})
    mine: dict[str, str] = {}
    if world.is_main:  # the files are read once, however many processes there are
        mine = {spec.name: cards.origin(spec) for spec in specs}
    return distributed.gather_objects(mine)[0]


def _resumed_state(
    options: argparse.Namespace, specs: list[PeerSpec], world: World
) -> dict[str, Any] | None:
    """Read the run file to resume, and make the peers' own weights unnecessary."""
    state = read_resumed(
        options,
        world,
        FREE_TO_CHANGE,
        defaults=build_parser(options.dataset, "train").parse_args([]),
        lasting=("dataset",),
    )
    if state is not None:
        specs[:] = [spec.without_weights() for spec in specs]
    return state


def _write_arguments(folder: Path, options: argparse.Namespace, keep_dataset: bool) -> None:
    """Keep the arguments as a YAML file that ``--config`` takes."""
    hidden = ["config", "resume", "in_place", "kwargs", "check_data", "plan", "gpu_mem"]
    hidden += ["layouts", "compiled", "allow_changed_options"]
    hidden += [] if keep_dataset else ["dataset"]
    content = {name: value for name, value in plain(options).items() if name not in hidden}
    write_text(folder / "args.yaml", yaml.safe_dump(content, sort_keys=False))


def _writers(
    options: argparse.Namespace, folder: Path, world: World, progress: Progress
) -> list[Writer]:
    found = writers(folder, world, progress.updates)
    if options.log_wandb and world.is_main:
        try:
            import wandb
        except ImportError as error:
            raise OptionError("--log-wandb needs wandb: pip install wandb") from error
        wandb.init(project=options.wandb_project, name=folder.name, config=plain(options))
        found.append(lambda scalars, step: wandb.log(dict(scalars), step=step))
    return found


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a reader of the report wants to know of the run."""
    names = (
        "recipe peers dataset data_root held_out rule score temperature transfer_weight "
        "transfer_warmup_steps detach_teacher margin engine guard opt lr weight_decay sched "
        "epochs batch_size clips_per_video grad_accum_steps map_size amp amp_dtype model_ema seed "
        "val_stride blur"
    ).split()
    values = {**plain(options), "recipe": recipes.told(options)}
    terms = {f"loss: {term}": values[term] for term in LOSS_TERMS if values[term]}
    return {**{name: values[name] for name in names}, **terms}


if __name__ == "__main__":
    # Python puts this folder first, where models.py and data.py of a user's would not be found.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
