"""The command line of ``segmentation/train_net.py``: Detectron2's arguments, for a run of peers."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.logger import setup_logger
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessException, ProcessRaisedException

from common import distributed
from common.broken import worker_deaths_told
from common.checkpoint import CheckpointError
from common.claimed import claim, claims_end
from common.disk import remove_leftovers, write_csv, write_text
from common.distributed import PATIENCE
from common.outputs import ToldByMain, on_main, run_command, start_logging
from common.planner import add_plan_options
from common.report import write_run_report
from common.termination import (
    EXIT_STATUS,
    Interrupted,
    Preempted,
    end_children,
    end_interrupted,
    end_with_parent,
    ended_at_once,
    handed_to_children,
    interrupts_told,
)
from segmentation import checkpoints
from segmentation.cards import write_cards
from segmentation.config import RunConfig, load_run
from segmentation.data import allowed, check_classes
from segmentation.errors import FAULTS, ConfigError
from segmentation.models import build_with_weights
from segmentation.peer import SegmentorPeer
from segmentation.pictures import teaching_pictures
from segmentation.plan import tell_plan
from segmentation.trainer import (
    METRIC,
    TransferTrainer,
    check_processes,
    current_world,
    evaluate_run,
    join_torchrun,
    log_metrics,
    summary_of,
)

_logger = logging.getLogger("segmentation")
_AUTO = "--resume-auto"  # what "--resume auto" is to argparse
_UNWINDING = 5.0  # seconds for processes that Ctrl-C reached too
_LOGGERS = ("fvcore", "detectron2", "segmentation", "common")


def parser() -> argparse.ArgumentParser:
    """Return Detectron2's own parser, with ``--config-file`` as often as there are peers."""
    built = argparse.ArgumentParser(
        prog="segmentation/train_net.py",
        description="Any N segmentors of Detectron2, made better by teaching each other.",
        parents=[default_argument_parser(epilog=" ")],
        add_help=False,
        conflict_handler="resolve",
    )
    built.add_argument(
        "--config-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a run file with TRANSFER.PEERS; or, repeated, the config of each peer",
    )
    built.add_argument(  # Detectron2's default is the same port for all runs of a user
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where processes meet, tcp://HOST:PORT of the first machine; of a single machine they "
        "take a free port by themselves",
    )
    built.add_argument(
        "--allow-unsafe-config",
        action="store_true",
        help="let YAML files run the Python they hold; only for files you trust",
    )
    built.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run of OUTPUT_DIR, or start it; `--resume auto` goes back to an older "
        "checkpoint where the newest is broken",
    )
    built.add_argument(
        "--allow-changed-options",
        action="store_true",
        help="resume under other settings than the run had, and tell them, instead of refusing",
    )
    built.add_argument(
        _AUTO, dest="resume", action="store_const", const="auto", help=argparse.SUPPRESS
    )
    add_plan_options(built)
    return built


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; ``--resume`` alone takes no value, since KEY VALUE may follow it.

    Args:
        arguments: None: ``sys.argv``.
    """
    words: list[str] = []
    for word in sys.argv[1:] if arguments is None else arguments:
        if word == "auto" and words[-1:] == ["--resume"]:
            words[-1] = _AUTO
        else:
            words.append(_AUTO if word == "--resume=auto" else word)
    return parser().parse_args(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    options = parse(arguments)
    try:
        with claims_end():
            return _main(options)
    except KeyboardInterrupt as error:
        return end_interrupted(error)


def _main(options: argparse.Namespace) -> int:
    try:
        run = load_run(options.config_file, options.opts or [], options.allow_unsafe_config)
        count, here = check_launch(options)
        if options.plan:
            return plan(run, count, options.gpu_mem)
        check_machine(run, here, torchrun=distributed.launched() is not None)
        if not options.eval_only:
            check_processes(run, count)
        check_classes({peer.name: peer.cfg for peer in run.peers})
        if distributed.launched() is None:
            check_folder(run, options)
    except FAULTS as error:
        return _failed(error)
    if distributed.launched() is not None:
        return _join(run, options)
    if count > 1:
        return _launch(run, options)
    try:
        with ended_at_once(), interrupts_told(lambda: _how_to_go_on(run, options)):
            work(run, options)
    except FAULTS as error:
        return _failed(error)
    except Preempted as end:
        _logger.warning("%s", end)
        return EXIT_STATUS
    return 0


def plan(run: RunConfig, processes: int, memory: int | None) -> int:
    """Tell what the run would need in so many processes, in one: of torchrun's in the first."""
    if distributed.is_first():
        check_machine(run, 1)
        start_logging()
        tell_plan(run, processes, memory)
    return 0


def work(run: RunConfig, options: argparse.Namespace) -> None:
    """Train or evaluate in this process."""
    begin(run)
    with worker_deaths_told(), worker_deaths_told():  # see there
        if options.eval_only:
            evaluate_only(run, options.resume)
        else:
            train(run, options.resume, options.allow_changed_options)


def _join(run: RunConfig, options: argparse.Namespace) -> int:
    """Work as one of the processes that torchrun started."""

    def together() -> None:
        with ended_at_once(), interrupts_told(lambda: _how_to_go_on(run, options)):
            world = join_torchrun(run.cfg.MODEL.DEVICE)
            if not world.is_main:
                logging.getLogger().setLevel(logging.WARNING)
            on_main(world, lambda: check_folder(run, options), FAULTS)
            work(run, options)

    return run_command(together, FAULTS)


def _launch(run: RunConfig, options: argparse.Namespace) -> int:
    """Work in several processes; of those that fail, the first one's line is told."""
    told = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        with handed_to_children():
            launch(
                _work_and_tell,
                options.num_gpus,
                num_machines=options.num_machines,
                machine_rank=options.machine_rank,
                dist_url=options.dist_url,
                args=(run, options, told, multiprocessing.get_start_method()),
                timeout=PATIENCE,
            )
    except KeyboardInterrupt as error:
        end_children(_UNWINDING)
        raise Interrupted(_how_to_go_on(run, options)) from error
    except ProcessException as error:
        if getattr(error, "exit_code", None) == EXIT_STATUS:
            return EXIT_STATUS
        if told.empty() and isinstance(error, ProcessRaisedException):
            raise
        return _failed(error if told.empty() else told.get())
    return 0


def _work_and_tell(run: RunConfig, options: argparse.Namespace, told: Any, method: str) -> None:
    end_with_parent()
    # of the processes that read data: being spawned itself, this one would spawn them, which takes
    # seconds of imports for every loader, in which they do not outlive SIGTERM
    multiprocessing.set_start_method(method, force=True)
    status = _status_of(run, options, told)
    if status:  # not from where the error is: it holds the loaders, whose processes would be killed
        raise SystemExit(status)


def _status_of(run: RunConfig, options: argparse.Namespace, told: Any) -> int:
    try:
        with ended_at_once():
            if options.num_machines > 1:
                world = current_world(run.cfg.MODEL.DEVICE)
                on_main(world, lambda: _claim(run, options), FAULTS)
            work(run, options)
    except FAULTS as error:
        told.put(str(error))
        return 1
    except ToldByMain:
        if options.machine_rank:
            told.put("the first machine's process tells why the run ends")
        return 1
    except Preempted as end:
        _logger.warning("%s", end)
        return EXIT_STATUS
    return 0


def _how_to_go_on(run: RunConfig, options: argparse.Namespace) -> str:
    if options.eval_only:
        return "nothing is lost; the same command begins anew"
    if not checkpoints.is_run(run.output_dir):
        return "nothing was saved yet; the same command begins anew"
    return "go on from the last checkpoint with --resume"


def _failed(error: object) -> int:
    here = distributed.launched()
    if here is None or here.local_rank == 0:  # torchrun's others of this machine find the same
        sys.stderr.write(f"error: {error}\n")
    return 1


def train(run: RunConfig, resume: bool | str = False, allow: bool = False) -> TransferTrainer:
    """Train as the run says, evaluate with TTA where it is asked for, write the report."""
    configs = configs_of(run)  # before building changes them
    trainer = TransferTrainer(run, resume, allow)
    if comm.is_main_process():  # a resume that is refused leaves those of the run
        write_configs(configs)
    run = trainer.run
    trainer.train()
    with trainer.finishing():
        if run.transfer.SOUP:
            trainer.make_soups()
        if run.cfg.TEST.AUG.ENABLED:
            _report_tta(run, trainer.evaluate(tta=True))
        if trainer.world.leads and trainer.history:
            path = write_report(run, trainer)
            for note in trainer.notes():
                _logger.warning("%s", note)
            _logger.info("report: %s", path)
            write_cards(trainer)
    return trainer


def evaluate_only(run: RunConfig, resume: bool | str = False) -> dict[str, float]:
    """Evaluate the peers' MODEL.WEIGHTS, or with ``resume`` the run's last checkpoint.

    Args:
        run: Its peers.
        resume: ``auto``: the newest good checkpoint.
    """
    peers = [
        SegmentorPeer(config.name, build_with_weights(config)[0], config.cfg, frozen=True)
        for config in (_at_last_checkpoint(run, resume) if resume else run.peers)
    ]
    bad = allowed(run.transfer.MAX_BAD_SAMPLES)
    world = current_world(run.cfg.MODEL.DEVICE)
    metrics = evaluate_run(run, peers, world, bad=bad)
    if comm.is_main_process():
        log_metrics(metrics, [*run.names, "ensemble"])
        write_csv(run.output_dir / "evaluation.csv", [metrics])
    if run.cfg.TEST.AUG.ENABLED:
        augmented = evaluate_run(run, peers, world, tta=True, bad=bad)
        _report_tta(run, augmented)
        metrics |= augmented
    return metrics


def check_launch(options: argparse.Namespace) -> tuple[int, int]:
    """Return of how many processes the run is, and how many of them this machine has.

    Raises:
        ConfigError: The options ask for processes, and torchrun started some; or machines have no
            place to meet.
    """
    here = distributed.launched()
    if here is None:
        if options.num_machines > 1 and options.dist_url == "auto" and not options.plan:
            raise ConfigError(
                f"--num-machines {options.num_machines} without --dist-url; give each machine "
                "--dist-url tcp://HOST:PORT, a free port of the first one"
            )
        return options.num_gpus * options.num_machines, options.num_gpus
    for option in ("num_gpus", "num_machines"):
        if getattr(options, option) > 1:
            raise ConfigError(
                f"--{option.replace('_', '-')} {getattr(options, option)} under torchrun, which "
                f"started {here.size} process{'es' * (here.size > 1)}: each would start as many; "
                "give torchrun --nproc-per-node and --nnodes alone, or no torchrun"
            )
    return here.size, here.local_size


def check_machine(run: RunConfig, count: int, torchrun: bool = False) -> None:
    """Refuse more GPUs than there are, before any work.

    On the CPU any number of processes may run.

    Args:
        run: The run's config.
        count: Processes on this machine.
        torchrun: Whether torchrun starts them.

    Raises:
        ConfigError: Says how many there are.
    """
    asked = f"torchrun --nproc-per-node={count}" if torchrun else f"--num-gpus {count}"
    there = torch.cuda.device_count()
    device = run.cfg.MODEL.DEVICE
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError as error:
        raise ConfigError(f"MODEL.DEVICE is {device!r}: {error}") from error
    if kind == "cuda" and there == 0:
        raise ConfigError("MODEL.DEVICE is cuda, and there is no GPU; give MODEL.DEVICE cpu")
    if kind == "cuda" and index is not None:
        if index >= there:
            raise ConfigError(f"MODEL.DEVICE is {device}; this machine has {there} GPUs")
        if count > 1:
            raise ConfigError(
                f"MODEL.DEVICE is {device}: with {asked} give cuda; CUDA_VISIBLE_DEVICES says "
                "which GPUs"
            )
    if kind == "cpu" and count > 1:
        if there and not torchrun:  # Detectron2's launch asks for NCCL wherever it sees one
            raise ConfigError(
                f"{asked} with MODEL.DEVICE cpu: hide the GPUs too (CUDA_VISIBLE_DEVICES=)"
            )
        return
    if count > max(there, 1):
        raise ConfigError(f"{asked}: this machine has {there}; give no more than there are")


def check_folder(run: RunConfig, options: argparse.Namespace) -> None:
    """Make OUTPUT_DIR; refuse to write a fresh run over an older one.

    Raises:
        ConfigError: OUTPUT_DIR cannot be written to, or holds the record of a run and this is no
            resume.
        OutputError: Another command trains into it.
    """
    try:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run.output_dir):
            pass
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR {run.output_dir}: cannot be written to ({error.strerror}); give another"
        ) from error
    if options.num_machines == 1:  # of several, once they have met
        _claim(run, options)


def _claim(run: RunConfig, options: argparse.Namespace) -> None:
    if options.eval_only:
        return
    claim(run.output_dir)
    if checkpoints.is_run(run.output_dir) and not options.resume:
        raise ConfigError(
            f"{run.output_dir}: holds an earlier run; give --resume to go on with it, or another "
            "OUTPUT_DIR"
        )
    remove_leftovers(run.output_dir)


def write_report(run: RunConfig, trainer: TransferTrainer) -> Path:
    """Write OUTPUT_DIR/report.html: each peer before and after, and who taught whom.

    The processes that lead the peers' seats must all call it; the main one writes.
    """
    picture = teaching_pictures(trainer.peers, run.cfg.DATASETS.TEST[0], trainer.world)
    path = run.output_dir / "report.html"
    if trainer.world.is_main:
        write_run_report(
            path,
            names=run.names,
            history=[summary_of(row) for row in trainer.history],
            lessons=trainer.lessons,
            metric=METRIC,
            settings=settings(run),
            events=trainer.guard.events,
            notes=trainer.notes(),
            soups=[asdict(soup) for soup in trainer.soups],
            pictures=[picture],
        )
    return path


def settings(run: RunConfig) -> dict[str, Any]:
    """Return what a reader of a report wants to know of a run, as plain values."""
    cfg = run.cfg
    shown: dict[str, Any] = {
        key.lower(): value for key, value in run.transfer.items() if key != "PEERS"
    }
    shown |= {
        "training data": ", ".join(cfg.DATASETS.TRAIN),
        "test data": ", ".join(cfg.DATASETS.TEST),
        "batch": cfg.SOLVER.IMS_PER_BATCH,
        "iterations": cfg.SOLVER.MAX_ITER,
    }
    for peer in run.peers:
        shown[f"{peer.name}: architecture"] = peer.cfg.MODEL.META_ARCHITECTURE
        shown[f"{peer.name}: weights"] = peer.cfg.MODEL.WEIGHTS or "random"
        shown[f"{peer.name}: learning rate"] = "frozen" if peer.frozen else peer.cfg.SOLVER.BASE_LR
    return shown


def begin(run: RunConfig) -> None:
    """Make the run's folder and log into it."""
    run.output_dir.mkdir(parents=True, exist_ok=True)
    for name in _LOGGERS:
        setup_logger(str(run.output_dir), distributed_rank=comm.get_rank(), name=name)
    hush()
    for handler in _handlers_of_files():
        handler.handleError = lambda record: None  # a full disk is told by what cannot be saved
    _logger.info("machine:\n%s", collect_env_info())
    torch.backends.cudnn.benchmark = run.cfg.CUDNN_BENCHMARK


def configs_of(run: RunConfig) -> dict[Path, str]:
    """Return the texts of a run's config files, by their paths."""
    files = {Path(peer.cfg.OUTPUT_DIR) / "config.yaml": peer.cfg.dump() for peer in run.peers}
    transfer = {"TRANSFER": yaml.safe_load(run.transfer.dump())}
    return files | {run.output_dir / "transfer.yaml": yaml.safe_dump(transfer, sort_keys=False)}


def write_configs(configs: Mapping[Path, str]) -> None:
    """Write what ``configs_of`` gave."""
    for path, text in configs.items():
        write_text(path, text)


def hush() -> None:
    """Keep Detectron2 from saying again what is told."""
    for name in ("detectron2.evaluation", "detectron2.data.common"):
        logging.getLogger(name).setLevel(logging.WARNING)


def end_logging() -> None:
    """Close what ``begin`` opened, so that another run of this process has a log of its own."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True  # as it was
    setup_logger.cache_clear()


def _handlers_of_files() -> list[logging.Handler]:
    """Return what writes Detectron2's log.txt; it tells a traceback for each line it cannot."""
    return [
        handler
        for name in _LOGGERS
        for handler in logging.getLogger(name).handlers
        if isinstance(handler, logging.StreamHandler)
        and handler.stream not in (sys.stdout, sys.stderr)
    ]


def _at_last_checkpoint(run: RunConfig, resume: bool | str) -> list[Any]:
    """Point every peer that learned at its file of the run's last checkpoint."""
    if resume == "auto":
        record = checkpoints.find_good(run.output_dir, run.names, run.learning)
    else:
        record = checkpoints.find(run.output_dir)
    if record is None:
        raise CheckpointError(f"{run.output_dir}: no checkpoint of a run; nothing to resume")
    for peer in run.peers:
        if not peer.frozen:
            peer.cfg.defrost()
            peer.cfg.MODEL.WEIGHTS = str(run.output_dir / peer.name / record["file"])
            peer.cfg.freeze()
    return run.peers


def _report_tta(run: RunConfig, metrics: dict[str, float]) -> None:
    if comm.is_main_process():
        log_metrics(metrics, [*run.names, "ensemble"], suffix="_TTA")
        write_csv(run.output_dir / "evaluation_tta.csv", [metrics])
