"""The training loop: epochs, evaluation, exports, exact resume."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from common import distributed
from common.best_files import EXPORTED, best_in, fault_of
from common.broken import BadSamples
from common.checkpoint import (
    CheckpointError,
    atomic_write,
    digest_of,
    list_runs,
    read_weights,
    save_run,
    save_weights,
)
from common.clock import LoopClock, Pace
from common.disk import write_csv
from common.distributed import World
from common.engine import Engine
from common.finite import MOST_SKIPS, FiniteCheck, Names, refuse_broken_weights
from common.guard import Bounds, Guard
from common.ledger import Ledger, Lessons
from common.peers import Peer, PeerGroup
from common.ranks import SavedRanks
from common.soup import STATISTICS_BATCHES, Halves, Soup, Weights, make_soups, write_soup
from common.termination import Preempted, Termination, ended_at_once, interrupts_told
from common.transfer import KnowledgeTransfer

_logger = logging.getLogger(__name__)

Writer = Callable[[Mapping[str, float], int], None]


class Loader(Protocol):
    """Batches on the device, in an order that depends on nothing but seed and epoch."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Prepare an epoch, without its first ``start`` batches; it may be read from now on."""

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches from ``start`` on."""


class Evaluator(Protocol):
    """Measures every peer on held-out data."""

    def evaluate(self, peers: PeerGroup) -> dict[str, float]:
        """Return ``PEER/METRIC`` and group metrics; equal on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""


@dataclass
class Plan:
    """How long to train, and when to log, evaluate and save.

    Attributes:
        epochs: How many, in all.
        accumulate: Batches a optimizer step.
        log_every: Optimizer steps between log lines; the device is read only then.
        evaluate_every: Epochs between evaluations; the last epoch is always evaluated.
        save_every: Optimizer steps between run files inside an epoch; 0: only after each epoch.
        keep: Run files kept.
        metric: Which metric of a peer chooses its best weights.
        lower_is_better: Of that metric.
        export_suffix: Of the per-peer files.
        guard: What a peer may lose against its start, and what is done then.
        on_nonfinite: What becomes of losses that are not finite: ``common.finite.FiniteCheck``.
        max_skips: Optimizer steps that may be skipped in a row.
    """

    epochs: int
    accumulate: int = 1
    log_every: int = 50
    evaluate_every: int = 1
    save_every: int = 0
    keep: int = 3
    metric: str = "top1"
    lower_is_better: bool = False
    export_suffix: str = ".safetensors"
    guard: Bounds = field(default_factory=Bounds)
    on_nonfinite: str = "stop"
    max_skips: int = MOST_SKIPS


@dataclass
class Best:
    """A peer's best evaluation so far."""

    value: float
    epoch: int


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        epoch: Epochs finished.
        batch: Batches finished in the running epoch.
        updates: Optimizer steps made.
        best: Of each peer.
        history: One row an evaluation: ``epoch``, and the evaluation's metrics.
        lessons: One row an epoch: ``epoch``, and the ledger's scalars.
    """

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    best: dict[str, Best] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    lessons: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """Trains a group of peers, and can go on exactly where a killed run stopped.

    Args:
        peers: The group.
        engine: Runs the steps.
        transfer: The objective; its draws are saved.
        loader: Training batches.
        evaluator: Held-out measurement.
        plan: When to do what.
        folder: Output; run files in it, per-peer files in ``folder/PEER/``.
        world: Where this process stands.
        config: Plain settings, kept in the run file; a resume under others is told.
        metadata: Of each peer's exported files.
        writers: Called with scalars and the number of optimizer steps, on the main rank.
        after_epoch: Called after each epoch's steps, for instance to average BatchNorm buffers.
        on_baseline: Called with the metrics of the start, before any training.
        watch: Wraps the loader's iterator, for instance in a progress bar.
        names_of: Given the batch that the loader gave last, returns what tells its samples.
        bad: Where loader and evaluator count broken files.
        halves: Measures the group on two halves of the held-out data; where it is given, averages
            of start and best are tried at the end (``common.soup``).

    Attributes:
        soups: What these averages were worth.
    """

    def __init__(
        self,
        *,
        peers: PeerGroup,
        engine: Engine,
        transfer: KnowledgeTransfer,
        loader: Loader,
        evaluator: Evaluator,
        plan: Plan,
        folder: Path,
        world: World,
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Mapping[str, str]] | None = None,
        writers: Iterable[Writer] = (),
        after_epoch: Callable[[], None] = lambda: None,
        on_baseline: Callable[[Mapping[str, float]], None] = lambda metrics: None,
        watch: Callable[[Iterable[Any]], Iterable[Any]] = lambda batches: batches,
        names_of: Callable[[Any], Names | None] = lambda batch: None,
        bad: BadSamples | None = None,
        halves: Halves | None = None,
    ) -> None:
        self.peers = peers
        self.engine = engine
        self.transfer = transfer
        self.loader = loader
        self.evaluator = evaluator
        self.plan = plan
        self.folder = Path(folder)
        self.world = world
        self.config = dict(config or {})
        self.metadata = dict(metadata or {})
        self.writers = list(writers)
        self.after_epoch = after_epoch
        self.on_baseline = on_baseline
        self.watch = watch
        self.names_of = names_of
        self.bad = bad or BadSamples()
        self.bad.tells = world.seat == 0  # the other peers' processes read the same
        self.finite = engine.finite = FiniteCheck(peers, plan.on_nonfinite, plan.max_skips)
        self.halves = halves
        self.soups: list[Soup] = []
        self._learners = [name for name in peers.names if name not in peers.frozen]
        self.ledger = Ledger(peers.names, world.device, world.replicas)
        self.guard = Guard(peers, transfer, plan.guard, plan.metric, plan.lower_is_better)
        self.progress = Progress()
        self.termination = Termination()
        self._exported: dict[str, str] = {}  # digests of the best weights
        self._stepped = False
        self._saved_at: tuple[int, int] | None = None
        self._spare: Path | None = None  # a run file that goes with the next one

    def fit(self) -> Progress:
        """Measure the start, train the epochs that are left, export each peer's last weights.

        Raises:
            NonFiniteError: A peer's loss or weights are not finite; no such weights are saved.
            BadSampleError: More files are broken than ``bad`` allows.
            Preempted: SIGTERM came, and a run file was written. It is looked for after every step
                (of several ranks after that or the next one) and before each evaluation.
                One that comes in an evaluation ends it at once: a run file was written before.
            Interrupted: Ctrl-C came; it saves nothing.
        """
        if self.progress.history and self.progress.epoch >= self.plan.epochs:
            _logger.info(
                "the run has finished its %d epochs; its last files and its report are made anew, "
                "and a larger --epochs goes on with it",
                self.progress.epoch,
            )
        with self.termination, interrupts_told(self._how_to_go_on):
            if not self.progress.history:
                self.loader.set_epoch(self.progress.epoch, self.progress.batch)  # read meanwhile
                if self.halves is not None:
                    self._export("start", self._learners)
                self.on_baseline(self._evaluate(0))
            self._tell_begin()
            while self.progress.epoch < self.plan.epochs and self._somebody_learns():
                self._train_epoch()
                self._finish_epoch()
        with self.finishing():
            if set(self.progress.best) != set(self.peers.names):  # resumed at the end, files gone
                self._note(self.progress.epoch, self.evaluator.evaluate(self.peers))
            self._export("last", self.peers.names)
            if self.halves is not None:
                self._make_soups(self.halves)
        return self.progress

    def finishing(self) -> AbstractContextManager[None]:
        """Let a signal end at once what comes after the training; see ``ended_at_once``."""
        told = f"trained and saved, but not finished; go on with --resume {self.folder}"
        return ended_at_once(told, self.termination)

    def _how_to_go_on(self) -> str:
        if not list_runs(self.folder):
            return "nothing was saved yet; the same command begins anew"
        return f"go on from the last run file with --resume {self.folder}"

    def _make_soups(self, halves: Halves) -> None:
        distributed.barrier()  # other processes' files

        def write(peer: Peer, weights: Weights, soup: Soup) -> None:
            described = {**self.metadata.get(peer.name, {}), **soup.metadata()}
            save_weights(self._file("soup", peer.name), weights, described)
            write_soup(self.folder / peer.name, soup)

        self.soups = make_soups(
            self.peers,
            self.world,
            self._learners,
            read=lambda name, which: read_weights(self._file(which, name)),
            write=write,
            halves=halves,
            batches=self._first_batches,
            metric=self.plan.metric,
            lower_is_better=self.plan.lower_is_better,
        )

    def _first_batches(self) -> Iterator[Any]:
        self.loader.set_epoch(0)
        return itertools.islice(iter(self.loader), STATISTICS_BATCHES)

    def _somebody_learns(self) -> bool:
        return len(self.peers.frozen) < len(self.peers)

    def _tell_begin(self) -> None:
        left = self.plan.epochs - self.progress.epoch
        if left > 0 and self._somebody_learns():
            _logger.info(
                "training: %d epoch%s of %d optimizer steps; losses come every %d",
                left,
                "s" * (left > 1),
                -(-len(self.loader) // self.plan.accumulate),
                self.plan.log_every,
            )

    def _train_epoch(self) -> None:
        epoch, batches = self.progress.epoch, len(self.loader)
        self.loader.set_epoch(epoch, self.progress.batch)
        for peer in self.peers:
            peer.train()
        accumulate = min(self.plan.accumulate, batches)
        last_whole = batches - batches % accumulate
        clock = LoopClock()
        for data in clock.around(self.watch(self.loader)):
            done = self.progress.batch + 1
            in_group = accumulate if done <= last_whole else batches - last_whole
            update = done % accumulate == 0 or done == batches
            result = self.engine.step(
                data,
                step=self.progress.updates,
                share=1 / in_group,
                update=update,
                names=self.names_of(data),
            )
            self.ledger.add(result)
            clock.saw(result.score.shape[1])
            self.progress.batch = done
            if not update:
                continue
            self.progress.updates += 1
            self._tell_first(clock)
            for peer in self.peers:
                if peer.schedule is not None:
                    peer.schedule.step_update(num_updates=self.progress.updates)
            if self.progress.updates % self.plan.log_every == 0:
                self._log(self.ledger.read(), clock.read())
            self._end_if(self.termination.agreed_after_step(self.world))
            if self.plan.save_every and self.progress.updates % self.plan.save_every == 0:
                self.save()
        if self.progress.batch != batches:
            _logger.warning(
                "epoch %d had %d batches, expected %d", epoch, self.progress.batch, batches
            )

    def _tell_first(self, clock: LoopClock) -> None:
        """Say once that the steps have begun; nothing is read from the device for it."""
        if not self._stepped and self.plan.log_every > 1:
            pace = clock.look()
            _logger.info(
                "first step after %.1f s, of which %.1f waited for data", pace.seconds, pace.waited
            )
        self._stepped = True

    def _end_if(self, asked: bool) -> None:
        if asked:
            self.save()
            raise Preempted(self._saved())

    def _save_before_evaluation(self) -> None:
        """Save all that a resume needs, since SIGTERM may end an evaluation, and ``kill`` too."""
        period, updates = self.plan.save_every, self.progress.updates
        if self._saved_at != (self.progress.epoch, self.progress.batch):
            self.save(spare=not period or updates % period > 0)

    def _saved(self) -> str:
        if not self.progress.updates:
            return "SIGTERM: nothing was trained yet; the same command begins anew"
        return (
            f"SIGTERM: saved after {self.progress.updates} optimizer steps; go on with "
            f"--resume {self.folder}"
        )

    def _log(self, lessons: Lessons, pace: Pace) -> None:
        self.finite.check(self.engine.scaler)
        self.bad.share()
        rates = {f"{peer.name}/lr": peer.lr for peer in self.peers.here}
        rates = distributed.merge_over_seats(rates, self.world)
        if not self.world.is_main:
            return
        scalars = lessons.scalars() | rates | self.finite.scalars()
        rate = pace.samples_per_second * self.world.shards
        scalars["transfer/weight"] = self.transfer.weight_at(self.progress.updates)
        scalars |= {"samples_per_second": rate, "data_share": pace.data_share}
        told = "  ".join(
            f"{peer.name} loss {lessons.task_loss[peer.name]:.4f}"
            f" kl {lessons.transfer_loss[peer.name]:.4f}"
            f" teaches {100 * lessons.teaches[peer.name]:.0f}%"
            for peer in self.peers
        )
        _logger.info(
            "epoch %d [%d/%d]  %s  %.0f samples/s  waited for data %.1f%%  eta %s",
            self.progress.epoch,
            self.progress.batch,
            len(self.loader),
            told,
            rate,
            100 * pace.data_share,
            timedelta(seconds=round(pace.seconds_of(self._batches_left()))),
        )
        self._write(scalars)

    def _batches_left(self) -> int:
        return (self.plan.epochs - self.progress.epoch) * len(self.loader) - self.progress.batch

    def _finish_epoch(self) -> None:
        epoch = self.progress.epoch + 1
        evaluates = epoch % self.plan.evaluate_every == 0 or epoch == self.plan.epochs
        if evaluates:
            self._save_before_evaluation()
        elif self.world.size > 1:
            self._end_if(self.termination.agreed(self.world))
        self.finite.check(self.engine.scaler)
        self.bad.share()
        lessons = self.ledger.read_epoch()
        self.after_epoch()
        self.progress.lessons.append({"epoch": epoch, **lessons.scalars(), **self.finite.scalars()})
        if self.world.is_main:
            name = lessons.collapsed()
            if name and self.transfer.rule in ("best", "better", "better_sum"):
                _logger.warning(
                    "epoch %d: %s taught %.0f%% of the taught samples; the others have little to "
                    "give it. A weaker transfer weight or a stronger second peer may help.",
                    epoch,
                    name,
                    100 * lessons.teaches[name],
                )
        self.progress.epoch, self.progress.batch = epoch, 0
        metrics: Mapping[str, float] = {}
        if evaluates:
            metrics = self._evaluate(epoch)
        for peer in self.peers:
            if peer.schedule is not None:
                known = metrics or self.progress.history[-1]
                peer.schedule.step(epoch, known.get(f"{peer.name}/{self.plan.metric}"))
        self.save()

    def _evaluate(self, epoch: int) -> Mapping[str, float]:
        if self.termination.agreed(self.world):
            raise Preempted(self._saved())
        _logger.info("evaluating %s", f"epoch {epoch}" if epoch else "the start")
        metrics = self._measure()
        start = self.progress.history[0] if self.progress.history else metrics
        self._note(epoch, {**metrics, **self.guard.look(epoch, metrics, start)})
        if self.guard.roll_back():
            self._note(epoch, self._measure())
        return metrics

    def _measure(self) -> dict[str, float]:
        with self.termination.at_once(self._saved()):
            return self.evaluator.evaluate(self.peers)

    def _note(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Enter an evaluation into the history, and export the weights that are best by it."""
        self.progress.history.append({"epoch": epoch, **metrics})
        better = []
        for peer in self.peers:
            value = metrics[f"{peer.name}/{self.plan.metric}"]
            best = self.progress.best.get(peer.name)
            if best is None or self._beats(value, best.value):
                self.progress.best[peer.name] = Best(value, epoch)
                better.append(peer.name)
        self.progress.best = {name: self.progress.best[name] for name in self.peers.names}
        self._export("best", better)
        self.guard.remember(better)
        if self.world.is_main:
            for peer in self.peers:
                best = self.progress.best[peer.name]
                _logger.info(
                    "epoch %d  %s  %s %.3f  (best %.3f at epoch %d)",
                    epoch,
                    peer.name,
                    self.plan.metric,
                    metrics[f"{peer.name}/{self.plan.metric}"],
                    best.value,
                    best.epoch,
                )
            self._write({f"eval/{name}": value for name, value in metrics.items()})
            write_csv(self.folder / "summary.csv", self.progress.history)
            write_csv(self.folder / "ledger.csv", self.progress.lessons)

    def _beats(self, value: float, best: float) -> bool:
        if math.isnan(best):
            return True
        return value < best if self.plan.lower_is_better else value > best

    def _export(self, which: str, names: Iterable[str]) -> None:
        if not self.world.leads:
            return
        for peer in self.peers.here:
            if peer.name in names:
                weights = peer.best_module.state_dict()
                save_weights(self._file(which, peer.name), weights, self.metadata.get(peer.name))
                if which == "best":
                    self._exported[peer.name] = digest_of(weights)

    def notes(self) -> list[str]:
        """Say what was left out on the way; nothing where all went well."""
        return [note for note in (self.finite.summary(), self.bad.summary()) if note]

    def _write(self, scalars: Mapping[str, float]) -> None:
        for writer in self.writers:
            writer(scalars, self.progress.updates)

    def save(self, spare: bool = False) -> None:
        """Write a run file from which ``resume`` goes on bit for bit (on the CPU).

        Args:
            spare: It goes once the next one is written, and takes no other's place.

        Raises:
            NonFiniteError: A peer's weights are not finite; nothing is written.
        """
        self.finite.check(self.engine.scaler)
        self.bad.share()
        refuse_broken_weights(self.peers, self.progress.updates)
        ranks = distributed.gather_objects(
            {
                "rng": rng_state(self.world.device),
                "ledger": self.ledger.state_dict(),
                "transfer": self.transfer.state_dict(),
                "buffers": {peer.name: peer.own_buffers() for peer in self.peers.here},
                "scaler": self.engine.scaler.state_dict(),
            }
        )
        mine = {
            peer.name: peer.state_dict()
            | self.guard.kept(peer.name)
            | {EXPORTED: self._exported.get(peer.name, "")}
            for peer in self.peers.here
            if self.world.leads
        }
        parts = distributed.send_to_main(mine, self.world)
        if self.world.is_main:
            progress = self.progress
            state = {
                "peers": {name: own for part in parts for name, own in part.items()},
                "scaler": self.engine.scaler.state_dict(),
                "evaluator": self.evaluator.state_dict(),
                "guard": self.guard.state_dict(),
                "ranks": ranks,
                "seats": self.world.seats,
                "finite": self.finite.state_dict(),
                "bad": self.bad.state_dict(),
                "progress": {
                    "epoch": progress.epoch,
                    "batch": progress.batch,
                    "updates": progress.updates,
                    "cut": self._cut(),
                    "best": {name: [b.value, b.epoch] for name, b in progress.best.items()},
                    "history": progress.history,
                    "lessons": progress.lessons,
                },
                "config": self.config,
                "versions": {"torch": str(torch.__version__), "numpy": str(np.__version__)},
            }
            keep = self.plan.keep + (spare or self._spare is not None)
            path = save_run(self.folder, state, progress.epoch, progress.batch, keep)
            if self._spare not in (None, path):
                self._spare.unlink(missing_ok=True)
            self._spare = path if spare else None
        self._saved_at = self.progress.epoch, self.progress.batch
        distributed.barrier()

    def resume(
        self, state: Mapping[str, Any], optimizer: bool = True, source: Path | None = None
    ) -> None:
        """Go on from a run file's content.

        Args:
            state: From ``common.checkpoint.load_run``.
            source: The folder of that run; the best weights so far are taken over from it.
            optimizer: False: take weights and position, but fresh optimizers.

        Raises:
            CheckpointError: The run had other peers, or measured something else at its start.
        """
        if list(state["peers"]) != self.peers.names:
            raise CheckpointError(
                f"the run file holds the peers {', '.join(state['peers'])}; this run has "
                f"{', '.join(self.peers.names)}; give the same --peer options in the same order"
            )
        for peer in self.peers.here:
            peer.load_state_dict(state["peers"][peer.name], optimizer)
        saved = state["progress"]
        self.progress = Progress(
            epoch=saved["epoch"],
            batch=saved["batch"],
            updates=saved["updates"],
            best={name: Best(*best) for name, best in saved["best"].items()},
            history=list(saved["history"]),
            lessons=list(saved["lessons"]),
        )
        self._check_start_was_measured()
        self._take_over_best(source or self.folder, state["peers"])
        if self.halves is not None:
            self._take_over_starts(source or self.folder)
        self.guard.load_state_dict(
            state.get("guard"),
            state["peers"],
            {name: self._file("best", name) for name in self.progress.best},
        )
        if "finite" in state:
            self.finite.load_state_dict(state["finite"])
        if "bad" in state:
            self.bad.load_state_dict(state["bad"])
        self.evaluator.load_state_dict(state["evaluator"])
        self._position_schedules()
        saved_ranks = SavedRanks(state["ranks"], state.get("seats", 1))
        if optimizer:
            saved_ranks.load_scaler(self.engine.scaler, self.world, state["scaler"])
        share = saved_ranks.of_share(self.world)
        cut, had = self._cut(), saved.get("cut", self._cut())
        if self.progress.batch and had != cut:
            _logger.warning(
                "the run had %d batches an epoch, %d an optimizer step; this one has %d and %d",
                *(*had, *cut),
            )
            share = []
        if not share:
            if self.progress.batch:
                _logger.warning("the interrupted epoch starts anew")
                self.begin_at(self.progress.epoch)
            return
        self._take_over_share(share)
        mine = saved_ranks.of_place(self.world)
        if mine is not None:
            load_rng_state(mine["rng"], self.world.device)

    def _check_start_was_measured(self) -> None:
        """Refuse a run whose start has no value of the metric that the guard compares with it.

        Raises:
            CheckpointError: Names the first.
        """
        needed = [f"{name}/{self.plan.metric}" for name in self._learners]
        starts = self.progress.history[:1]
        missing = [name for name in needed for start in starts if name not in start]
        if missing and self.plan.guard.policy != "off":
            raise CheckpointError(
                f"the run did not measure {missing[0]} at its start, which the guard compares "
                "with; give the run's own --eval-metric, or --guard off"
            )

    def _take_over_share(self, seats: Sequence[Mapping[str, Any]]) -> None:
        """Take up what the run's processes that read this one's share of the data knew."""
        self.ledger.load_state_dict(seats[0]["ledger"])
        self.transfer.load_state_dict(seats[0]["transfer"], self.world.device)
        buffers = {name: own for seat in seats for name, own in seat["buffers"].items()}
        for peer in self.peers.here:
            peer.load_own_buffers(buffers.get(peer.name, {}))

    def _cut(self) -> list[int]:
        """Return how an epoch is cut up; under another cut a position in it is another's."""
        return [len(self.loader), self.plan.accumulate]

    def begin_at(self, epoch: int) -> None:
        """Go on as if that many epochs were finished: schedules, order of the data, steps made."""
        batches = len(self.loader)
        updates = -(-batches // min(self.plan.accumulate, batches))
        self.progress.epoch, self.progress.batch = epoch, 0
        self.progress.updates = epoch * updates
        self._position_schedules()

    def _position_schedules(self) -> None:
        """Bring the learning rates to where the run stands; at its start they are there."""
        for peer in self.peers:
            if peer.schedule is not None and self.progress.epoch:
                peer.schedule.step(self.progress.epoch)
            if peer.schedule is not None and self.progress.updates:
                peer.schedule.step_update(num_updates=self.progress.updates)

    def _file(self, which: str, name: str, folder: Path | None = None) -> Path:
        return Path(folder or self.folder) / name / f"{which}{self.plan.export_suffix}"

    def _take_over_starts(self, source: Path) -> None:
        """Copy the starts' weights from another folder.

        Raises:
            CheckpointError: The run kept none.
        """
        for name in self._learners:
            found, mine = self._file("start", name, source), self._file("start", name)
            if not found.is_file():
                raise CheckpointError(
                    f"{found}: no such file; a run keeps its start only where it begins with "
                    "--soup; resume without"
                )
            if self.world.is_main and found != mine:
                atomic_write(mine, functools.partial(shutil.copyfile, found))
        distributed.barrier()

    def _take_over_best(self, source: Path, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy best files from another folder, or mend them from the peers' parts of the run file.

        Where that cannot be, the best is measured anew.
        """
        self._exported = {name: own.get(EXPORTED, "") for name, own in saved.items()}
        told = {}
        if self.world.is_main:
            for name in self.progress.best:
                file = self._file("best", name, source)
                told[name] = fault_of(file, self._exported.get(name))
        told = distributed.gather_objects(told)[0]
        for name in list(self.progress.best):
            found, mine = self._file("best", name, source), self._file("best", name)
            weights = best_in(saved[name]) if told[name] else None
            if told[name] and weights is None:
                _logger.warning("%s %s; the best of %s is measured anew", found, told[name], name)
                del self.progress.best[name]
            elif not self.world.is_main:
                continue
            elif weights is not None:
                _logger.warning("%s %s; it is written anew", found, told[name])
                save_weights(mine, weights, self.metadata.get(name))
            elif found != mine:  # all of a run's files in one file system
                atomic_write(mine, functools.partial(shutil.copyfile, found))
        distributed.barrier()


def rng_state(device: torch.device) -> dict[str, Any]:
    """Capture every generator a step may draw from, in plain containers."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            float(cached),
        ],
        "python": random.getstate(),
    }


def load_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what ``rng_state`` captured."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
