"""Hooks of Detectron2's loop that know of several peers."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventWriter, get_event_storage

from common.board import Board
from common.disk import writing_into
from common.distributed import World
from common.termination import Preempted, Termination
from segmentation.peer import SegmentorPeer

_logger = logging.getLogger(__name__)


class PeerSchedules(HookBase):
    """Step every peer's learning rate after each iteration.

    One hook for all: Detectron2 keeps the state of one hook of a kind, so of several the others
    would be lost. Their state is in the peers' own checkpoints.
    """

    def __init__(self, peers: Sequence[SegmentorPeer]) -> None:
        self.peers = [peer for peer in peers if peer.scheduler is not None]

    def after_step(self) -> None:
        """Write the rates that were used, then move on."""
        for peer in self.peers:
            self.trainer.storage.put_scalar(f"{peer.name}/lr", peer.lr, smoothing_hint=False)
            peer.scheduler.step()


class Evaluate(hooks.EvalHook):
    """Detectron2's, but for a run that failed in its last iteration: that is not evaluated."""

    def after_train(self) -> None:
        """Evaluate the end."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class PeriodicSave(HookBase):
    """Write a checkpoint of the whole run every ``period`` iterations, and at the end.

    Args:
        save: Called with whether this is the end.
        period: In iterations; 0: at the end alone.
    """

    def __init__(self, save: Callable[[bool], None], period: int) -> None:
        self.save = save
        self.period = period

    def after_step(self) -> None:
        """Save where the period is over."""
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done < self.trainer.max_iter:
            self.save(False)

    def after_train(self) -> None:
        """Save the end; a run that failed is not saved."""
        if self.trainer.iter >= self.trainer.max_iter:
            self.save(True)


class ToBoard(EventWriter):
    """Detectron2's scalars for TensorBoard, without the thread that a full disk would end.

    Args:
        board: Writes them.
        window: Of the median, for scalars that are smoothed.
    """

    def __init__(self, board: Board, window: int = 20) -> None:
        self.board = board
        self.window = window
        self._last = -1

    def write(self) -> None:
        """Write what is new.

        Raises:
            OutputError: The disk is full.
        """
        storage = get_event_storage()
        fresh: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self.window).items():
            if iteration > self._last:
                fresh.setdefault(iteration, {})[name] = value
        for iteration in sorted(fresh):
            self.board(fresh[iteration], iteration)
            self._last = iteration
        storage.clear_images()
        storage.clear_histograms()


class Writers(hooks.PeriodicWriter):
    """Detectron2's, with a disk that is full told in one line.

    Args:
        folder: Of the run.
        rest: See Detectron2.
    """

    def __init__(self, folder: Path, *rest: Any, **named: Any) -> None:
        super().__init__(*rest, **named)
        self.folder = folder
        self._begun = 0.0

    def before_step(self) -> None:
        """Look at the clock before the first iteration."""
        super().before_step()
        if self.trainer.iter == self.trainer.start_iter:
            self._begun = time.perf_counter()

    def after_step(self) -> None:
        """Tell the first iteration, and write where the period is over.

        Raises:
            OutputError: The folder cannot be written.
        """
        if self.trainer.iter == self.trainer.start_iter:
            _logger.info("first iteration after %.1f s", time.perf_counter() - self._begun)
        with writing_into(self.folder):
            super().after_step()

    def after_train(self) -> None:
        """Write the end.

        Raises:
            OutputError: The folder cannot be written.
        """
        with writing_into(self.folder):
            super().after_train()


class EndIfAsked(HookBase):
    """Save and end the run where SIGTERM came; after ``PeriodicSave``.

    Args:
        termination: Entered while the run goes on.
        world: Where this process stands.
        save: Called with False.
    """

    def __init__(self, termination: Termination, world: World, save: Callable[[bool], None]):
        self.termination = termination
        self.world = world
        self.save = save

    def after_step(self) -> None:
        """Look for the signal, as ``Termination.agreed_after_step``.

        Raises:
            Preempted: It came, and a checkpoint was written.
        """
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter:
            return
        if self.termination.agreed_after_step(self.world):
            self.save(False)
            raise Preempted(preempted_at(done))


def preempted_at(done: int) -> str:
    """Say where SIGTERM ended the run, and how to go on."""
    if not done:
        return "SIGTERM: nothing was trained yet; the same command begins anew"
    return f"SIGTERM: saved after iteration {done}; go on with --resume"


class SameBatches:
    """The same few batches at every call of PreciseBN, so that a resumed run sees what it saw.

    Args:
        open_stream: Returns an endless stream from its beginning.
        view: Turns a batch into a peer's inputs.
        count: Batches a call takes.
    """

    def __init__(
        self,
        open_stream: Callable[[], Iterator[Any]],
        view: Callable[[Any], Any],
        count: int,
    ) -> None:
        self.open_stream = open_stream
        self.view = view
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        while True:
            stream = self.open_stream()
            yield from map(self.view, itertools.islice(stream, self.count - 1))
            last = next(stream)
            del stream  # with its workers, which would wait for the next call
            yield self.view(last)
