"""Detectron2's loop for N segmentors that teach each other."""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.engine import TrainerBase, hooks
from detectron2.engine.defaults import default_writers
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import TensorboardXWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from common import distributed
from common.average import WeightAverage, chosen_decay
from common.board import Board
from common.broken import BadSamples, is_worker_death
from common.checkpoint import CheckpointError, read_weights
from common.disk import write_csv
from common.distributed import World
from common.engine import build_engine
from common.finite import FiniteCheck, refuse_broken_weights
from common.guard import Bounds, Guard
from common.ledger import Ledger
from common.peers import Peer, PeerGroup, RemotePeer
from common.ranks import SavedRanks, refuse_other_moments
from common.seeding import generators_kept
from common.soup import STATISTICS_BATCHES, Soup, Weights, make_soups, write_soup
from common.termination import Preempted, Termination, ended_at_once
from common.trainer import load_rng_state, rng_state
from common.transfer import KnowledgeTransfer
from common.trials import AUTO, Trial, choose_layouts, to_layout
from segmentation import checkpoints, solver
from segmentation.config import PeerConfig, RunConfig, build_transfer, lasting_settings
from segmentation.data import (
    SharedMapper,
    allowed,
    build_train_loader,
    check_apart,
    check_classes,
    load_datasets,
)
from segmentation.errors import FAULTS, ConfigError, told_of
from segmentation.evaluation import evaluate_group
from segmentation.held_out import hold_out
from segmentation.hooks import (
    EndIfAsked,
    Evaluate,
    PeerSchedules,
    PeriodicSave,
    SameBatches,
    ToBoard,
    Writers,
    preempted_at,
)
from segmentation.models import build_with_weights
from segmentation.noise import random_batch
from segmentation.peer import SegmentorPeer, make_batch, read_losses
from segmentation.weights import origin_of

_logger = logging.getLogger(__name__)

LOG_PERIOD = 20
METRIC = "mIoU"
_ON_CPU = 2  # images of a trial there


class TransferTrainer(TrainerBase):
    """N segmentors, one stream of data, one backward, N optimizer steps an iteration.

    Checkpoints of a peer are in OUTPUT_DIR/PEER/ and load in plain Detectron2; evaluation is before
    the first iteration, every TEST.EVAL_PERIOD, and at the end. With TRANSFER.MODEL_EMA the average
    of each peer's weights is what is evaluated, chosen and loaded there.

    Args:
        run: From ``segmentation.config.load_run``.
        resume: Go on where the folder's last checkpoint stands, if there is one; ``auto``: where
            its newest good one stands.
        allow: Go on under other settings than the run had.

    Attributes:
        run: As given; with TRANSFER.HELD_OUT, on the parts of its training data.
        peers: The group.
        history: One row an evaluation: ``iteration``, and ``PEER/METRIC`` in percent.
        lessons: One row an evaluation but the first: who taught whom since the last.
        best: Each peer's best mIoU and its iteration.
        origins: What each peer started from, in words; empty where that was not kept.
        soups: What averages of start and best were worth, after ``make_soups``.
        layouts: Of peers whose layout was tried, whether channels_last was taken.

    Raises:
        ConfigError, SegmentorError, CheckpointError, DataError: Bad input, before any training.
    """

    def __init__(self, run: RunConfig, resume: bool | str = False, allow: bool = False) -> None:
        super().__init__()
        if all(peer.frozen for peer in run.peers):
            raise ConfigError("every peer is FROZEN; nothing would be trained")
        self.run = run = hold_out(run)
        self.world = seat_run(run, current_world(run.cfg.MODEL.DEVICE))
        self.ignore = check_classes({peer.name: peer.cfg for peer in run.peers})
        self.folder = run.output_dir
        self.settings = lasting_settings(run)
        record = self._find_record(resume == "auto", allow) if resume else None
        self._record = record
        self.seed = self._draw_seed() if record is None else int(record["seed"])
        self.history: list[dict[str, float]] = []
        self.lessons: list[dict[str, float]] = []
        self.best: dict[str, list[float]] = {}
        self.origins = self._tell_origins(record)
        self.bad = allowed(run.transfer.MAX_BAD_SAMPLES)
        self.bad.tells = self.world.seat == 0  # the other peers' processes read the same
        self.soups: list[Soup] = []
        records = load_datasets(run.cfg.DATASETS.TRAIN)
        sets = run.cfg.DATASETS
        check_apart(sets.TRAIN, sets.TEST, "name different ones, or give TRANSFER.HELD_OUT")
        self.dataset = DatasetFromList(records, copy=False)  # one copy for all workers
        self.layouts: dict[str, bool] = {} if record is None else record.get("layouts", {})
        seed_all_rng(self.seed)  # of weights that no file gives
        self.peers = PeerGroup([self._build_peer(i, peer) for i, peer in enumerate(run.peers)])
        self.transfer = build_transfer(run, self.seed + self.world.shard)
        self.engine = build_engine(
            run.transfer.ENGINE, self.peers, self.transfer, self.world, run.amp_dtype
        )
        node = run.transfer
        self.finite = FiniteCheck(self.peers, node.ON_NONFINITE, node.MAX_SKIPS_IN_A_ROW)
        self.engine.finite = self.finite
        self.ledger = Ledger(self.peers.names, self.world.device, self.world.replicas)
        self.guard = build_guard(run, self.peers, self.transfer)
        self.max_iter = run.cfg.SOLVER.MAX_ITER
        self._data: Iterator[Any] = iter(())
        self.termination = Termination()
        self._due = False  # the evaluation of where the run stands
        self._file = ""  # the peers' files that the last record names
        self._spare = ""  # a checkpoint's file that goes with the next one
        seed_all_rng(self.seed + self.world.rank)
        if record is None:
            self._data = self._open_stream()
        else:
            self._resume(record)
        self.register_hooks(self._build_hooks())

    def train(self, start_iter: int | None = None, max_iter: int | None = None) -> None:
        """Train from where the run stands to SOLVER.MAX_ITER.

        Raises:
            NonFiniteError: A peer's loss or weights are not finite; no such weights are saved.
            Preempted: SIGTERM came, and a checkpoint was written; before any evaluation too, which
                it ends at once.
        """
        start_iter = self.start_iter if start_iter is None else start_iter
        max_iter = self.max_iter if max_iter is None else max_iter
        if start_iter >= max_iter and not self._due:
            _logger.info(
                "the run has finished, at iteration %d of %d; a larger SOLVER.MAX_ITER goes on "
                "with it",
                *(start_iter, max_iter),
            )
            self._finish()
            return
        with self.termination, faults_untold():
            super().train(start_iter, max_iter)

    def before_train(self) -> None:
        """Measure the start, so that gains can be told."""
        super().before_train()
        for peer in self.peers:
            peer.train()
        if not self.history:
            if self.run.transfer.SOUP and self.world.leads:
                for peer in self.learners:
                    checkpoints.save_plain(self.folder, peer, 0, checkpoints.START)
            self.storage.put_scalars(**self._evaluate_at(0), smoothing_hint=False)
        elif self._due and self.start_iter < self.max_iter:  # else it is made at the end
            self.storage.put_scalars(**self._evaluate_at(self.start_iter), smoothing_hint=False)

    def run_step(self) -> None:
        """Learn from TRANSFER.ACCUMULATE batches.

        Nothing here waits for the device but at log time. Parts of others do, in each step: where
        the optimizer itself clips, float16's GradScaler asks whether a step is to be skipped;
        Mask2Former tells the device the sizes of its maps, asks whether they are finite, and
        matches queries with masks on the CPU (and its masks come from memory that is not pinned).
        With TRANSFER.ON_NONFINITE skip, it is asked whether to skip.
        """
        if not self.somebody_learns:
            return
        waited, count = 0.0, self.run.transfer.ACCUMULATE
        for i in range(count):
            begun = time.perf_counter()
            samples = next(self._data)
            waited += time.perf_counter() - begun
            batch = make_batch(samples, self.world.device, self.ignore)
            files = [str(sample["file_name"]) for sample in samples]
            result = self.engine.step(
                batch,
                step=self.iter,
                share=1 / count,
                update=i == count - 1,
                names=lambda files=files: files,
            )
            self.ledger.add(result)
        self.storage.put_scalar("data_time", waited)
        done = self.iter + 1
        if done % LOG_PERIOD == 0 or done == self.max_iter:
            self._log(done)

    @property
    def somebody_learns(self) -> bool:
        """Whether a peer is left that the guard has not frozen; else iterations do nothing."""
        return len(self.peers.frozen) < len(self.peers)

    def evaluate(self, tta: bool = False) -> dict[str, float]:
        """Evaluate every peer and their ensemble on each of DATASETS.TEST.

        Args:
            tta: Average over the sizes and flips of TEST.AUG.

        Returns:
            ``PEER/mIoU``, ``fwIoU``, ``mACC``, ``pACC`` and ``IoU-CLASS`` in percent; with several
            data sets ``PEER/DATASET/...``, of which the first is also under the plain name; with
            ``tta`` names end in ``_TTA``.
        """
        share_buffers(self.peers, self.world)
        return evaluate_run(self.run, self.peers.here, self.world, tta, self.bad)

    @property
    def learners(self) -> list[SegmentorPeer]:
        """The peers here that learn, or learned until the guard froze them."""
        return [peer for peer in self.peers.here if peer.optimizer is not None]

    def make_soups(self) -> None:
        """Try averages of each peer's start and best, and write ``model_soup.pth``; all ranks call.

        Every second image of the first of DATASETS.TEST chooses, the others measure.
        """
        distributed.barrier()  # the main rank's files

        def read(name: str, which: str) -> Weights:
            file = {"start": checkpoints.START, "best": checkpoints.BEST}[which]
            return read_weights(self.folder / name / file)

        def write(peer: Any, weights: Weights, soup: Soup) -> None:
            more = {"model": dict(weights), "soup": asdict(soup)}
            checkpoints.save_plain(self.folder, peer, self.max_iter, checkpoints.SOUP, **more)
            write_soup(self.folder / peer.name, soup)

        self.soups = make_soups(
            self.peers,
            self.world,
            self.run.learning,
            read=read,
            write=write,
            halves=self._halves,
            batches=self._first_batches,
            metric=METRIC,
        )

    def _halves(self, peers: PeerGroup) -> tuple[dict[str, float], dict[str, float]]:
        dataset = self.run.cfg.DATASETS.TEST[0]
        one, other = (
            evaluate_group(peers.here, dataset, self.world, bad=self.bad, part=slice(i, None, 2))
            for i in (0, 1)
        )
        return one, other

    def _first_batches(self) -> Iterator[Any]:
        stream = self._open_stream(seed=self.seed + 1)
        for samples in itertools.islice(stream, min(STATISTICS_BATCHES, self.max_iter)):
            yield make_batch(samples, self.world.device, self.ignore)

    def finishing(self) -> AbstractContextManager[None]:
        """Let a signal end at once what comes after the training; see ``ended_at_once``."""
        told = "trained and saved, but not finished; go on with --resume"
        return ended_at_once(told, self.termination)

    def save(self, final: bool = False, due: bool = False) -> None:
        """Write a checkpoint of the run; every rank calls it.

        Args:
            final: It is the run's last: also write each peer's ``model_final.pth``.
            due: An evaluation follows, and a resume shall make it. Where no checkpoint is due, its
                files go with the next one.

        Raises:
            NonFiniteError: A peer's weights are not finite; nothing is written.
        """
        done = min(self.iter + 1, self.max_iter)
        self.finite.check(self.engine.scaler)
        self.bad.share()
        refuse_broken_weights(self.peers, done)
        share_buffers(self.peers, self.world)
        ranks = distributed.gather_objects(
            {
                "rng": rng_state(self.world.device),
                "ledger": self.ledger.state_dict(),
                "transfer": self.transfer.state_dict(),
                "buffers": {peer.name: peer.own_buffers() for peer in self.peers.here},
                "scaler": self.engine.scaler.state_dict(),
            }
        )
        file = self._file_at(done, due)
        if self.world.leads and file != self._file:
            checkpoints.save_peers(self.folder, self.peers.here, file, done, self.guard.kept)
        self._file, self._due = file, due
        distributed.barrier()
        if self.world.is_main:
            state = {
                "peers": self.peers.names,
                "iteration": done,
                "file": file,
                "max_iter": self.max_iter,
                "seed": self.seed,
                "origins": self.origins,
                "settings": self.settings,
                "ranks": ranks,
                "seats": self.world.seats,
                "scaler": self.engine.scaler.state_dict(),
                "guard": self.guard.state_dict(),
                "finite": self.finite.state_dict(),
                "bad": self.bad.state_dict(),
                "best": self.best,
                "history": self.history,
                "lessons": self.lessons,
                "layouts": self.layouts,
                "due": due,
            }
            keep, learning = self.run.transfer.KEEP, self.run.learning
            spare = due and not self._saves_at(done)
            goes = self._spare not in ("", checkpoints.file_of(done))
            keep += bool(keep) and (spare or goes)
            checkpoints.save_record(self.folder, learning, state, keep, final)
            if goes:
                checkpoints.drop(self.folder, learning, self._spare)
            self._spare = file if spare else ""
        distributed.barrier()

    def _file_at(self, done: int, due: bool) -> str:
        """Name the peers' files; another than the last record's where they have changed since."""
        before, after = (checkpoints.file_of(done, evaluated) for evaluated in (False, True))
        if self._file not in (before, after):
            return before
        evaluated = self._due and not due
        return after if evaluated and self.guard.bounds.policy == "rollback" else self._file

    def _saves_at(self, done: int) -> bool:
        period = self.run.cfg.SOLVER.CHECKPOINT_PERIOD
        return done == self.max_iter or (period > 0 and done % period == 0)

    def notes(self) -> list[str]:
        """Say what was left out on the way; nothing where all went well."""
        return [note for note in (self.finite.summary(), self.bad.summary()) if note]

    def _finish(self) -> None:
        """Give a run that was killed at its very end the files that it lacks."""
        if self.world.is_main and self._record is not None:
            keep, learning = self.run.transfer.KEEP, self.run.learning
            checkpoints.save_record(self.folder, learning, self._record, keep, final=True)
        distributed.barrier()

    def _find_record(self, auto: bool, allow: bool) -> dict[str, Any] | None:
        if auto:
            record = checkpoints.find_good(self.folder, self.run.names, self.run.learning)
        else:
            record = checkpoints.find(self.folder)
        refuse_other_moments(*([] if record is None else [record["iteration"]]))
        if record is None:
            _logger.warning("no checkpoint of a run in %s: starting anew", self.folder)
        else:
            checkpoints.refuse_other_settings(self.folder, record, self.settings, allow)
            had = record.get("max_iter", self.run.cfg.SOLVER.MAX_ITER)
            if had != self.run.cfg.SOLVER.MAX_ITER:
                _logger.warning(
                    "SOLVER.MAX_ITER was %d, is %d: from here on learning rates that follow a "
                    "schedule, and averages that reach back over a share of the run, are those of "
                    "a run of %d iterations",
                    *(had, *[self.run.cfg.SOLVER.MAX_ITER] * 2),
                )
        return record

    def _tell_origins(self, record: dict[str, Any] | None) -> dict[str, str]:
        """Tell what each peer starts from, or what was told at the run's start."""
        if record is not None:
            return dict(record.get("origins", {}))
        return (
            {peer.name: origin_of(peer.cfg.MODEL.WEIGHTS) for peer in self.run.peers}
            if self.world.leads
            else {}
        )

    def _draw_seed(self) -> int:
        seed = self.run.cfg.SEED
        return seed if seed >= 0 else comm.shared_random_seed() % 2**31

    def _build_peer(self, number: int, config: PeerConfig) -> Peer:
        module, cfg = build_with_weights(config)  # all of them: random weights are drawn in turn
        to_layout(module, self._channels_last(number, config, module))
        if not self.world.holds(number):
            return RemotePeer(config.name, config.frozen)
        if self.world.seats > 1:
            refuse_talk(module, config.name)
        peer = build_peer(config, module, self.run.transfer)
        if peer.optimizer is not None:
            with told_of(f"peer {config.name!r}"):
                peer.scheduler = solver.build_lr_scheduler(cfg, peer.optimizer)
        peer.distribute(self.world, broadcast_buffers=False)
        return peer

    def _channels_last(self, number: int, config: PeerConfig, module: nn.Module) -> bool:
        """Whether a peer's weights are to be in channels_last; all ranks must call it."""
        if config.layout != AUTO:
            return config.layout == "channels_last"
        self.layouts |= choose_layouts(
            {number: config.name},
            lambda _, last: trial(config, module, self.run, self.world, self.ignore, last),
            self.world,
            self.run.amp_dtype,
            self.layouts,
        )
        return self.layouts[config.name]

    def _build_hooks(self) -> list[Any]:
        cfg = self.run.cfg
        built = [hooks.IterationTimer(), PeerSchedules(self.peers.here), *self._precise_bn()]
        built.append(Evaluate(cfg.TEST.EVAL_PERIOD, self._evaluate_now))
        built.append(PeriodicSave(self.save, cfg.SOLVER.CHECKPOINT_PERIOD))
        built.append(EndIfAsked(self.termination, self.world, self.save))
        if self.world.is_main:
            found = default_writers(str(self.folder), self.max_iter)
            writers = [one for one in found if not isinstance(one, TensorboardXWriter)]
            writers.append(ToBoard(Board(self.folder, self.start_iter or None)))
            built.append(Writers(self.folder, writers, period=LOG_PERIOD))
        return built

    def _precise_bn(self) -> list[hooks.PreciseBN]:
        found = []
        for peer in self.peers.here:
            settings = peer.cfg.TEST.PRECISE_BN
            if settings.ENABLED and not peer.frozen and get_bn_modules(peer.module):
                batches = SameBatches(
                    lambda: self._open_stream(seed=self.seed + 1),
                    lambda samples, peer=peer: peer.inputs(samples, self.ignore),
                    settings.NUM_ITER,
                )
                period = peer.cfg.TEST.EVAL_PERIOD
                found.append(hooks.PreciseBN(period, peer.model, batches, settings.NUM_ITER))
        return found

    def _open_stream(self, done: int = 0, seed: int | None = None) -> Iterator[Any]:
        """Open the data where ``done`` iterations have taken theirs."""
        cfg, transfer = self.run.cfg, self.run.transfer
        per_rank = per_rank_batch(cfg.SOLVER.IMS_PER_BATCH, self.world.shards)
        masks = any(not peer.dense for peer in self.peers.here)
        return build_train_loader(
            self.dataset,
            SharedMapper(cfg, masks),
            batch=per_rank,
            workers=cfg.DATALOADER.NUM_WORKERS,
            seed=self.seed if seed is None else seed,
            rank=self.world.shard,
            ranks=self.world.shards,
            start=done * transfer.ACCUMULATE * cfg.SOLVER.IMS_PER_BATCH,
            pin=self.world.device.type == "cuda",
            bad=self.bad,
        )

    def _log(self, done: int) -> None:
        self.finite.check(self.engine.scaler)
        self.bad.share()
        lessons = self.ledger.read()
        losses = read_losses(self.peers.here, self.world)
        scalars = losses | lessons.scalars() | self.finite.scalars()
        mine = {f"{peer.name}/lr": peer.lr for peer in self.peers.here if not peer.frozen}
        rates = distributed.merge_over_seats(mine, self.world)  # PeerSchedules tells those here
        others = {name: rate for name, rate in rates.items() if name not in mine}
        self.storage.put_scalars(**others, smoothing_hint=False)
        scalars["transfer/weight"] = self.transfer.weight_at(done)
        self.storage.put_scalars(**scalars)

    def _evaluate_now(self) -> dict[str, float]:
        if not self.somebody_learns:  # nothing has changed
            return {}
        done = min(self.iter + 1, self.max_iter)
        self.save(due=True)
        return self._evaluate_at(done)

    def _evaluate_at(self, iteration: int) -> dict[str, float]:
        """Evaluate, keep each peer's best, and tell the writers all but the classes' own values."""
        if self.termination.agreed(self.world):
            raise Preempted(preempted_at(iteration))
        if iteration:
            self.finite.check(self.engine.scaler)
            lessons = self.ledger.read_epoch().scalars() | self.finite.scalars()
            self.lessons.append({"iteration": iteration, **lessons})
        metrics = self._measure(iteration)
        start = self.history[0] if self.history else metrics
        self._note(iteration, {**metrics, **self.guard.look(iteration, metrics, start)})
        if self.guard.roll_back():
            self._note(iteration, self._measure(iteration))
        return summary_of(metrics)

    def _measure(self, iteration: int) -> dict[str, float]:
        _logger.info("evaluating %s", f"iteration {iteration}" if iteration else "the start")
        with self.termination.at_once(preempted_at(iteration)):
            return self.evaluate()

    def _note(self, iteration: int, metrics: dict[str, float]) -> None:
        """Enter an evaluation into the history, and keep the weights that are best by it."""
        self.history.append({"iteration": iteration, **metrics})
        better = []
        for peer in self.peers:
            value = metrics[f"{peer.name}/{METRIC}"]
            if peer.name not in self.best or value > self.best[peer.name][0]:
                self.best[peer.name] = [value, iteration]
                better.append(peer.name)
        for peer in self.peers.here:
            if peer.name in better and self.world.leads and not peer.frozen:
                checkpoints.save_plain(self.folder, peer, iteration)
        self.guard.remember(better)
        if self.world.is_main:
            log_metrics(metrics, [*self.peers.names, "ensemble"])
            write_csv(self.folder / "summary.csv", self.history)
            write_csv(self.folder / "ledger.csv", self.lessons)

    def _resume(self, record: dict[str, Any]) -> None:
        if self.run.transfer.SOUP:
            checkpoints.check_starts(self.folder, self.run.learning)
        kept = checkpoints.load(self.folder, list(self.peers), record)
        self.best = {name: list(best) for name, best in record["best"].items()}
        self._mend_best(record, kept)
        files = {name: self.folder / name / checkpoints.BEST for name in self.best}
        files = {name: path for name, path in files.items() if path.is_file()}
        self.guard.load_state_dict(record.get("guard"), kept, files)
        self.start_iter = self.iter = int(record["iteration"])
        self._file = record["file"]
        self._due = record.get("due", False)
        if self._due and not self._saves_at(self.start_iter):
            self._spare = record["file"]
        self.history, self.lessons = list(record["history"]), list(record["lessons"])
        ranks = SavedRanks(record["ranks"], record.get("seats", 1))
        ranks.load_scaler(self.engine.scaler, self.world, record["scaler"])
        if "finite" in record:
            self.finite.load_state_dict(record["finite"])
        if "bad" in record:
            self.bad.load_state_dict(record["bad"])
        self._data = self._open_stream(self.start_iter)
        _logger.info("resumed after iteration %d", self.start_iter)
        share = ranks.of_share(self.world)
        if not share:
            return
        self.ledger.load_state_dict(share[0]["ledger"])
        self.transfer.load_state_dict(share[0]["transfer"], self.world.device)
        buffers = {name: own for rank in share for name, own in rank["buffers"].items()}
        for peer in self.peers.here:
            peer.load_own_buffers(buffers.get(peer.name, {}))
        mine = ranks.of_place(self.world)
        if mine is not None:
            load_rng_state(mine["rng"], self.world.device)

    def _mend_best(self, record: dict[str, Any], kept: dict[str, dict[str, Any]]) -> None:
        """Write best files that are lost anew, from what is loaded or from another of the run's.

        Where that cannot be, the best is measured anew.

        Raises:
            CheckpointError: The run is finished, so nothing is measured any more.
        """
        told: dict[str, str] = {}
        if self.world.is_main:
            for name in set(self.best) & set(self.run.learning):
                told[name] = checkpoints.fault_of_best(self.folder, name, int(self.best[name][1]))
        told = distributed.gather_objects(told)[0]
        lost = {name: fault for name, fault in told.items() if fault}
        mended = []
        for peer in (peer for peer in self.peers.here if peer.name in lost):
            held, iterations = kept[peer.name].get("best"), int(self.best[peer.name][1])
            if iterations == record["iteration"]:
                weights = peer.best_module.state_dict()
            elif held is not None:
                weights = held["average"] or held["module"]
            else:
                weights = checkpoints.weights_at(self.folder, peer.name, iterations)
            if weights is not None:
                mended.append(peer.name)
                if self.world.leads:
                    checkpoints.save_plain(self.folder, peer, iterations, model=dict(weights))
        mended = [name for names in distributed.gather_objects(mended) for name in names]
        for name, fault in lost.items():
            path = self.folder / name / checkpoints.BEST
            if name in mended:
                _logger.warning("%s %s; it is written anew", path, fault)
                continue
            if record["iteration"] >= self.max_iter:
                raise CheckpointError(
                    f"{path} {fault}, the run is finished, and none of its other files has the "
                    f"weights of iteration {int(self.best[name][1])}; put the file back from a "
                    f"copy, take {checkpoints.FINAL}, or give a larger SOLVER.MAX_ITER: then the "
                    "run goes on, and the best is measured anew"
                )
            _logger.warning("%s %s; the best of %s is measured anew", path, fault, name)
            del self.best[name]


def build_peer(config: PeerConfig, module: nn.Module, transfer: CfgNode) -> SegmentorPeer:
    """Give a segmentor its optimizer, clipping and average.

    Args:
        config: Of the peer.
        module: Built from it.
        transfer: The TRANSFER node.
    """
    learning: dict[str, Any] = {"frozen": True}
    if not config.frozen:
        with told_of(f"peer {config.name!r}"):
            learning = {
                "optimizer": solver.build_optimizer(config.cfg, module),
                "clip": solver.build_clip(config.cfg, module),
                "average": _average(config, module, transfer),
            }
    return SegmentorPeer(
        config.name,
        module,
        config.cfg,
        granularity=transfer.GRANULARITY,
        score=transfer.SCORE,
        **learning,
    )


def _average(config: PeerConfig, module: nn.Module, transfer: CfgNode) -> WeightAverage | None:
    """Begin the average of a peer's weights, before a hook is on them that knows the peer."""
    if not transfer.MODEL_EMA:
        return None
    span, iterations = transfer.MODEL_EMA_SPAN, config.cfg.SOLVER.MAX_ITER
    decay = chosen_decay(transfer.MODEL_EMA_DECAY or None, span, iterations)  # 0: not given
    return WeightAverage(module, decay)


def trial(
    config: PeerConfig,
    module: nn.Module,
    run: RunConfig,
    world: World,
    ignore: int,
    channels_last: bool,
) -> Trial:
    """Build a peer of a model's copy to be timed, and a batch of noise, on the device.

    Args:
        config: Of the peer.
        module: Its model, which stays as it is.
        run: The run's config.
        world: Where this process stands.
        ignore: The ignore label.
        channels_last: The copy's memory layout.
    """
    tried = copy.deepcopy(module)
    to_layout(tried, channels_last)
    peer = build_peer(config, tried, run.transfer)
    samples = per_rank_batch(run.cfg.SOLVER.IMS_PER_BATCH, world.shards)
    samples = samples if world.device.type == "cuda" else min(samples, _ON_CPU)
    with generators_kept():
        batch = random_batch(run, samples, torch.device("cpu"), ignore, not peer.dense)
    return peer, make_batch(batch.samples, world.device, ignore)


@contextmanager
def faults_untold() -> Iterator[None]:
    """Keep Detectron2's loop from logging a traceback of what is told in one line later."""

    def tells_more(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, (*FAULTS, Preempted)) or is_worker_death(error))

    logger = logging.getLogger(TrainerBase.__module__)
    logger.addFilter(tells_more)
    try:
        yield
    finally:
        logger.removeFilter(tells_more)


@torch.no_grad()
def share_buffers(peers: PeerGroup, world: World) -> None:
    """Give every rank that holds a peer the buffers of the first, which are those that are saved.

    In between, batch norm has its own running statistics on each rank, as in Detectron2.
    """
    if world.shards > 1:
        first = world.seat * world.shards if world.seats > 1 else 0
        for peer in peers.here:
            modules = [peer.module] if peer.average is None else [peer.module, peer.average.module]
            for buffer in itertools.chain.from_iterable(module.buffers() for module in modules):
                torch.distributed.broadcast(buffer, src=first, group=world.replicas)


def seat_run(run: RunConfig, world: World) -> World:
    """Lay the peers out over the processes where TRANSFER.ENGINE asks for it."""
    if run.transfer.ENGINE != "peer-parallel":
        return world
    check_processes(run, world.size)
    return distributed.seat_peers(world, len(run.peers))


def check_processes(run: RunConfig, count: int) -> None:
    """Refuse a number of processes over which the peers cannot be laid out.

    Raises:
        ConfigError: Says how to start the run.
    """
    peers = len(run.peers)
    if run.transfer.ENGINE == "peer-parallel" and count % peers:
        raise ConfigError(
            f"TRANSFER.ENGINE is peer-parallel: {peers} peers in {count} processes; expected a "
            f"multiple of {peers}: each holds one peer; start it with --num-gpus {peers}, or by "
            f"torchrun --nproc-per-node={peers}"
        )


def refuse_talk(module: nn.Module, name: str) -> None:
    """Refuse a host's layers that ask all processes, of which some hold other peers.

    Raises:
        ConfigError: Names the layer.
    """
    for part in module.modules():
        kind = type(part)
        if isinstance(part, NaiveSyncBatchNorm) or kind.__module__.startswith("mask2former."):
            raise ConfigError(
                f"peer {name!r}: {kind.__name__} averages over all processes, and with "
                "TRANSFER.ENGINE peer-parallel some hold other peers; take SyncBN and "
                "META_ARCHITECTURE Mask2Former, or another engine"
            )


def join_torchrun(device: str) -> World:
    """Join the processes that torchrun started, as Detectron2's ``launch`` joins its own.

    Args:
        device: MODEL.DEVICE.

    Raises:
        ConfigError: A device that is not there, machines with unlike numbers of processes, or a
            torchrun that is gone.
    """
    try:
        world = distributed.start(device)
    except ConnectionError as error:
        raise ConfigError(str(error)) from error
    except ValueError as error:
        raise ConfigError(f"MODEL.DEVICE {device} under torchrun: {error}") from error
    here = distributed.launched() or distributed.Launched()
    found = sorted(set(distributed.gather_objects(here.local_size)))
    if len(found) > 1:
        raise ConfigError(
            f"torchrun started {' and '.join(map(str, found))} processes on a machine; give the "
            "same --nproc-per-node on each: Detectron2 counts on it"
        )
    if world.size > 1:
        comm.create_local_process_group(here.local_size)
    return world


def current_world(device: str) -> World:
    """Describe this process as Detectron2's ``launch`` started it, or torchrun.

    Args:
        device: MODEL.DEVICE; alone, a process keeps the GPU that it names.
    """
    size = comm.get_world_size()
    local_rank = comm.get_local_rank() if size > 1 else 0
    chosen = torch.device(device)
    if chosen.type == "cuda":
        alone = size == 1 and chosen.index is not None
        chosen = torch.device("cuda", chosen.index if alone else local_rank)
    return World(comm.get_rank(), size, local_rank, chosen)


def build_guard(run: RunConfig, peers: PeerGroup, transfer: KnowledgeTransfer) -> Guard:
    """Build the guard from the TRANSFER node."""
    node = run.transfer
    bounds = Bounds(node.GUARD, node.GUARD_METRIC_DROP, patience=node.GUARD_PATIENCE)
    return Guard(peers, transfer, bounds, METRIC, unit="iteration")


def per_rank_batch(batch: int, ranks: int) -> int:
    """Split SOLVER.IMS_PER_BATCH over the ranks.

    Raises:
        ConfigError: It does not divide.
    """
    if batch < 1 or batch % ranks:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {batch}; expected a multiple of the {ranks} processes"
        )
    return batch // ranks


def evaluate_run(
    run: RunConfig,
    peers: Sequence[SegmentorPeer],
    world: World,
    tta: bool = False,
    bad: BadSamples | None = None,
) -> dict[str, float]:
    """Evaluate the peers that are here on each of DATASETS.TEST; see ``TransferTrainer``.

    Args:
        bad: Counts broken files; None: by itself, with TRANSFER.MAX_BAD_SAMPLES.
    """
    bad = bad or allowed(run.transfer.MAX_BAD_SAMPLES)
    metrics: dict[str, float] = {}
    for i, dataset in enumerate(run.cfg.DATASETS.TEST):
        found = evaluate_group(peers, dataset, world, tta, bad)
        if len(run.cfg.DATASETS.TEST) > 1:
            for name, value in found.items():
                peer, metric = name.split("/", 1)
                metrics[f"{peer}/{dataset}/{metric}"] = value
        if i == 0:
            metrics |= found
    return metrics


def summary_of(metrics: dict[str, float]) -> dict[str, float]:
    """Leave out the classes' own values."""
    return {k: v for k, v in metrics.items() if "/IoU-" not in k and "/ACC-" not in k}


def log_metrics(metrics: dict[str, float], names: Sequence[str], suffix: str = "") -> None:
    """Log the table of peers and metrics."""
    columns = [f"{name}{suffix}" for name in ("mIoU", "fwIoU", "mACC", "pACC")]
    lines = [f"{'':16}" + "".join(f"{column:>12}" for column in columns)]
    for name in names:
        values = [metrics.get(f"{name}/{column}") for column in columns]
        if any(value is not None for value in values):
            cells = "".join(f"{'':>12}" if v is None else f"{v:12.2f}" for v in values)
            lines.append(f"{name:16}{cells}")
    _logger.info("evaluation, in percent\n%s", "\n".join(lines))
