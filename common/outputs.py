"""What every run shows and leaves behind: logs, bars, tables, its folder, its writers."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common import distributed
from common.board import Board
from common.broken import WorkerDiedError, worker_deaths_told
from common.checkpoint import CheckpointError, list_runs, load_run, newest_good_run
from common.claimed import claim
from common.clock import with_lines
from common.disk import OutputError, remove_leftovers, write_text, writing_into
from common.distributed import World
from common.options import OptionError
from common.planner import Flags, TeamCost, advise, engine_rows, memory_of, notes, peer_rows
from common.ranks import refuse_other_moments
from common.report import write_run_report
from common.resumed import changed_options, forgotten_options
from common.termination import EXIT_STATUS, Preempted, end_interrupted
from common.trainer import Progress, Trainer, Writer

_logger = logging.getLogger("train")

_LOST_RANK = (
    "error: another process of the run has ended; its own error says why, and where there is none "
    "it was killed, most likely for want of memory; resume from the last run file, if any"
)


def start_logging() -> None:
    """Log plain lines to stderr."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)


def run_command(work: Callable[[], object], faults: tuple[type[Exception], ...]) -> int:
    """Run a command line; bad input ends in one line, not in a traceback.

    Of several ranks the first that meets a fault, or SIGTERM, tells it: others meet the same.

    Args:
        work: Does it.
        faults: What it raises on bad input.

    Returns:
        The exit status: 0, 1 on bad input, 75 where SIGTERM ended it and it can be resumed, 130
        where Ctrl-C did.
    """
    start_logging()
    told: tuple[type[Exception], ...] = (*faults, WorkerDiedError)
    try:
        with worker_deaths_told(), worker_deaths_told():  # see there
            work()
    except told as error:
        _tell(logging.ERROR, f"error: {error}")
        return 1
    except ToldByMain:
        return 1
    except Preempted as end:
        _tell(logging.WARNING, str(end))
        return EXIT_STATUS
    except KeyboardInterrupt as error:
        return end_interrupted(error)
    except RuntimeError as error:
        if not distributed.is_lost_rank(error):
            raise
        _logger.error("%s", _LOST_RANK)
        return 1
    finally:
        distributed.stop()
    return 0


def _tell(level: int, why: str) -> None:
    if distributed.first_to("tell why the run ends"):
        _logger.log(level, "%s", why)


class ToldByMain(Exception):
    """The main rank found a fault and tells it; the other ranks end quietly."""


def on_main(world: World, work: Callable[[], object], faults: tuple[type[Exception], ...]) -> None:
    """Do something on the main rank while the others wait; where it fails, all ranks end.

    Args:
        world: Where this process stands.
        work: Done once, on the main rank.
        faults: What it raises on bad input; anything else leaves the others waiting.

    Raises:
        ToldByMain: On the other ranks; on the main rank the fault itself.
    """
    fault = None
    if world.is_main:
        try:
            work()
        except faults as error:
            fault = error
    failed = distributed.gather_objects(fault is not None)[0]
    if fault is not None:
        raise fault
    if failed:
        raise ToldByMain


def start_world(device: str) -> World:
    """Join the other processes and set the device up; only the main rank logs.

    Raises:
        OptionError: A device that is not there, or a torchrun that is gone.
    """
    try:
        world = distributed.start(device)
    except ConnectionError as error:
        raise OptionError(str(error)) from error
    except (ValueError, RuntimeError) as error:
        raise OptionError(f"--device {device}: {error}") from error
    if not world.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    if world.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # sets torch's newer name too, not vice versa
        torch.backends.cudnn.benchmark = True
    return world


def seat_world(world: World, options: argparse.Namespace, peers: int) -> World:
    """Lay the peers out over the processes where ``--engine peer-parallel`` asks for it.

    Raises:
        OptionError: The processes are no multiple of the peers.
    """
    if options.engine != "peer-parallel":
        return world
    try:
        return distributed.seat_peers(world, peers)
    except ValueError as error:
        raise OptionError(
            f"--engine peer-parallel: {error}; start it by torchrun --nproc-per-node={peers}"
        ) from error


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options as plain containers, as they go into a run file."""
    return json.loads(json.dumps(vars(options), default=str))


def read_resumed(
    options: argparse.Namespace,
    world: World,
    free: Collection[str],
    defaults: argparse.Namespace,
    lasting: Iterable[str] = (),
    kept: Iterable[str] = (),
) -> dict[str, Any] | None:
    """Read the run that ``--resume`` names, and let this one go on in its folder.

    ``auto`` is the newest good run file of the run's own folder, or nothing where there is none: so
    one command starts a run and goes on with it. Else a broken run file is refused. Other options
    than the run had are refused, or told where ``allow_changed_options`` is set.

    Args:
        options: ``resume`` becomes the path, or empty; without ``output`` and ``experiment`` the
            run's folder becomes the output.
        world: Where this process stands; all must call it.
        free: Names of options under which a run is still the same run.
        defaults: Of the options, for runs of versions that did not have some of them.
        lasting: Names of options under which it would be another run, whatever is allowed.
        kept: Names of counts that every run of the task keeps beside its options.

    Returns:
        What ``load_run`` gives; None: a fresh run.

    Raises:
        OptionError: ``auto`` without --experiment, which names the folder.
        CheckpointError: As ``load_run``; with ``auto``, no file of several can be read; a run of
            another task; or other options, each of which is named with both values.
        OutputError: Another command trains into the folder.
    """
    _claim_first(options, world)
    if options.resume == "auto":
        state = _read_newest(options)
    else:
        state = _read_asked(options) if options.resume else None
    if state is None:
        return None
    config = plain(options)
    missing = [name for name in kept if not isinstance(state["config"].get(name), int)]
    if missing:
        raise CheckpointError(
            f"{options.resume}: a run of another task: it keeps no {missing[0]}; resume it by that "
            "task's script, or start a run of its own from the peers' weights"
        )
    for name in lasting:
        had = state["config"].get(name, config[name])
        if had != config[name]:
            told = f"with --{name} {had}" if had else f"without --{name}, of another task"
            raise CheckpointError(
                f"{options.resume}: a run {told}, this one has {config[name]}; start a run of its "
                "own from the peers' weights"
            )
    changed = changed_options(state["config"], config, plain(defaults), free)
    if changed and not options.allow_changed_options:
        raise CheckpointError(
            f"{options.resume}: the run had other options: {'; '.join(changed)}. Give its own "
            f"(-c {resumed_folder(options) / 'args.yaml'} has them), or --allow-changed-options "
            "to go on under these, or start a run of its own from the peers' weights"
        )
    if changed:
        _logger.warning("resuming with other options than the run had: %s", "; ".join(changed))
    forgotten = forgotten_options(state["config"], config, free)
    if forgotten:
        _logger.warning("the run had options that are no more: %s", "; ".join(forgotten))
    epochs = state["config"].get("epochs", options.epochs)
    if epochs != options.epochs:
        _logger.warning(
            "--epochs was %d, is %d: from here on learning rates that follow a schedule, and "
            "averages that reach back over a share of the run, are those of a run of %d epochs",
            *(epochs, options.epochs, options.epochs),
        )
    if not options.output and not options.experiment:
        options.output = str(resumed_folder(options))
        options.in_place = True
    return state


def _claim_first(options: argparse.Namespace, world: World) -> None:
    """Claim a folder that is there before it is read: what runs there writes newer files."""
    if options.experiment:
        folder = _new_folder(options, [])
    elif options.resume not in ("", "auto") and not options.output:
        folder = resumed_folder(options)
    else:
        return  # a new one

    def claim_it() -> None:
        if list_runs(folder) or (options.experiment and folder.is_dir()):  # not where a typo leads
            claim(folder)

    on_main(world, claim_it, (OutputError,))


def _read_newest(options: argparse.Namespace) -> dict[str, Any] | None:
    if not options.experiment:
        raise OptionError("--resume auto needs --experiment NAME, to know the run's folder")
    found = newest_good_run(_new_folder(options, []))
    if found is None:
        options.resume = ""
        return None
    options.resume, state = str(found[0]), found[1]
    return state


def _read_asked(options: argparse.Namespace) -> dict[str, Any]:
    try:
        return load_run(Path(options.resume))
    except CheckpointError as error:
        runs = list_runs(resumed_folder(options))
        others = [path.name for path in runs if path.is_file() and str(path) not in str(error)]
        if not others:
            raise
        raise CheckpointError(
            f"{error}. Other run files of its folder: {', '.join(others)}; --resume one of them, "
            "or --resume auto with the run's --experiment for the newest good one"
        ) from error


def log_resumed(options: argparse.Namespace, progress: Progress) -> None:
    """Say from what the run goes on, and where it stands."""
    begun = f" and {progress.batch} batches of the next" if progress.batch else ""
    _logger.info(
        "resumed from %s: after %d epochs%s, %d optimizer steps in all",
        *(options.resume, progress.epoch, begun, progress.updates),
    )


def check_resumed(state: Mapping[str, Any] | None) -> None:
    """Refuse processes that read different moments of the run to resume. All must call it.

    Raises:
        CheckpointError: As ``refuse_other_moments``.
    """
    progress = {} if state is None else state["progress"]
    refuse_other_moments(*(progress[name] for name in ("epoch", "batch") if name in progress))


def resumed_folder(options: argparse.Namespace) -> Path:
    """Return the folder of the run that ``--resume`` names."""
    path = Path(options.resume)
    return path if path.is_dir() else path.parent


def progress_bars(show: bool, lines: bool = True) -> Callable[[Iterable[Any], str], Iterable[Any]]:
    """Return a wrapper that shows how far an iteration is.

    Args:
        show: Show a bar on a terminal, and elsewhere log lines.
        lines: Whether to log such lines.
    """
    terminal = sys.stderr.isatty()
    if show and lines and not terminal:
        return with_lines
    show = show and terminal
    return lambda batches, title: tqdm(
        batches, desc=title, leave=False, disable=not show, dynamic_ncols=True
    )


def folder_of(options: argparse.Namespace, names: Sequence[str], world: World) -> Path:
    """Make the output folder, one for all ranks; a fresh run never writes into an older run's.

    It is named after the time, the rule and the peers, or after the experiment.

    Args:
        options: The first rank's count.
        names: Of the peers.
        world: Where this process stands.

    Raises:
        OptionError: It holds run files and this is no resume, or it cannot be written.
        OutputError: Another command trains into it.
    """
    in_place = getattr(options, "in_place", False)
    chosen = Path(options.output) if in_place else _new_folder(options, names)
    folder = distributed.gather_objects(chosen)[0]

    def make() -> None:
        make_writable(folder)
        claim(folder)
        if list_runs(folder) and not options.resume:
            raise OptionError(
                f"{folder}: holds the run files of an earlier run; give --resume {folder} to go on "
                "with it, or another --experiment"
            )
        remove_leftovers(folder)

    on_main(world, make, (OptionError, OutputError))
    return folder


def _new_folder(options: argparse.Namespace, names: Sequence[str]) -> Path:
    told = "-".join([options.rule.replace(":", "-"), *names])[:80]
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(options.output or "output/train") / (options.experiment or f"{stamp}-{told}")


def make_writable(folder: Path, option: str = "--output", keep: bool = True) -> None:
    """Make a folder, and try to write into it.

    Args:
        folder: Which.
        option: That named it.
        keep: Leave it there; otherwise what was made is removed again, for it may stay empty.

    Raises:
        OptionError: It cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OptionError(
            f"{option} {folder}: {error.strerror}; give a folder that can be written"
        ) from error
    if not keep:
        with contextlib.suppress(OSError):  # another process writes into it already
            for path in made:
                path.rmdir()


def log_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Log rows of one set of columns, aligned."""
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    for cells in (columns, *([row[column] for column in columns] for row in rows)):
        _logger.info("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip())


def log_plan(
    team: TeamCost, memory: int | None, flags: Flags, world: World, dtype: torch.dtype | None
) -> None:
    """Log what peers and engines need, and which engine to take, on the main rank.

    Args:
        team: As measured.
        memory: Of one GPU; None: of the one here, if any.
        flags: Of the task's command line.
        world: Where it was measured.
        dtype: What forwards are autocast to.
    """
    if not world.is_main:
        return
    memory = memory or memory_of(world.device)
    log_table(peer_rows(team))
    _logger.info("")
    log_table(engine_rows(team, memory))
    for line in ["", *notes(team, world.device, dtype), "", *advise(team, memory, flags)]:
        _logger.info(line)


def writers(folder: Path, world: World, updates: int) -> list[Writer]:
    """Open TensorBoard and the CSV of training scalars.

    What a killed run wrote of steps after ``updates``, which are made again, is dropped.

    Args:
        folder: Of the run.
        world: Only the main rank writes.
        updates: Optimizer steps made so far.
    """
    if not world.is_main:
        return []
    board = Board(folder / "tensorboard", updates + 1 if updates else None)
    _trim(folder / "scalars.csv", updates)
    return [board, lambda scalars, step: _append(folder, scalars, step)]


def _trim(path: Path, updates: int) -> None:
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                row  # whole ones: a kill may have cut off the last
                for row in csv.reader(file)
                if len(row) == 3 and row[0].isdigit() and int(row[0]) <= updates
            ]
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        write_text(path, text.getvalue())


def _append(folder: Path, scalars: Mapping[str, float], step: int) -> None:
    with writing_into(folder), (folder / "scalars.csv").open("ab") as file:
        text = io.StringIO()
        csv.writer(text).writerows([step, name, value] for name, value in scalars.items())
        file.write(text.getvalue().encode())


def finish(
    trainer: Trainer, settings: Mapping[str, Any], pictures: Sequence[tuple[bytes, str]] = ()
) -> Path:
    """Write the report and log each peer's best against its start.

    Args:
        trainer: After ``fit``.
        settings: What a reader of the report wants to know of the run.
        pictures: PNGs and their captions.

    Returns:
        The report.
    """
    progress, metric = trainer.progress, trainer.plan.metric
    report = write_run_report(
        trainer.folder / "report.html",
        names=trainer.peers.names,
        history=progress.history,
        lessons=progress.lessons,
        metric=metric,
        settings=settings,
        lower_is_better=trainer.plan.lower_is_better,
        events=trainer.guard.events,
        notes=trainer.notes(),
        soups=[asdict(soup) for soup in trainer.soups],
        pictures=pictures,
    )
    start = progress.history[0]
    for name in trainer.peers.names:
        best = progress.best[name]
        before = start[f"{name}/{metric}"]
        _logger.info(
            "%s: %s %.3f -> %.3f (%+.3f) at epoch %d",
            name,
            metric,
            before,
            best.value,
            best.value - before,
            best.epoch,
        )
    for note in trainer.notes():
        _logger.warning("%s", note)
    _logger.info("report: %s", report)
    return report
