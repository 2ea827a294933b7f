"""Reading ahead, across the end of an epoch: the next one's first batches are there in time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

Draws = Callable[[int, int], Iterator[Any]]
"""Given an epoch and a number of samples: what to ask the data for, but for so many at first."""


class EpochBatches(Sampler[list[Any]]):
    """The batches of one epoch after another, without end.

    Args:
        draws: Of an epoch; they depend on nothing else.
        size: Samples a batch; the last one of an epoch may have fewer.
        count: Batches an epoch; draws that are left over are in none.

    Attributes:
        position: Epoch and batch with which the next pass begins.
    """

    def __init__(self, draws: Draws, size: int, count: int) -> None:
        self.draws = draws
        self.size = size
        self.count = count
        self.position = 0, 0

    def __iter__(self) -> Iterator[list[Any]]:
        epoch, batch = self.position
        while True:
            draws = self.draws(epoch, batch * self.size)
            for _ in range(batch, self.count):
                yield list(itertools.islice(draws, self.size))
            epoch, batch = epoch + 1, 0


class ReadAhead:
    """Batches of an epoch, from processes that go on with the next one when its last is read.

    So they read while a run learns from the last batches, evaluates and saves. They are never
    further ahead than torch's loader is within an epoch: by its usual number of batches, and one
    that is received. Where an epoch is not the one that is expected next, what was read for that is
    dropped.

    A thread receives the next batch while a step runs: a reading process hands a batch's memory
    over only when it is asked, and answers when it finds time between two samples.

    Args:
        dataset: Asked for draws.
        draws: See ``EpochBatches``, as are ``size`` and ``count``.
        seed: Of what a reading process draws without a seed of its own.
        workers: Processes that read; 0: this one, which reads nothing ahead.
        reading: More of torch's loader: how to join samples, whether to pin memory.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        draws: Draws,
        size: int,
        count: int,
        *,
        seed: int,
        workers: int,
        **reading: Any,
    ) -> None:
        self._order = EpochBatches(draws, size, count)
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._order,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(seed),
            **reading,
        )
        self._running: Iterator[Any] = iter(())
        self._receiver = ThreadPoolExecutor(1, "receive") if workers else None
        self._coming: Future[Any] | None = None
        self._next: tuple[int, int] | None = None
        self._asked = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begin to read an epoch, without its first ``start`` batches."""
        self._asked = epoch, start
        if start < len(self) and self._next != self._asked:
            if self._coming is not None:
                self._coming.exception()  # the loader serves one at a time; this batch is dropped
            self._order.position = self._next = self._asked
            self._running = iter(self._loader)
            self._receive()

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""
        return self._order.count

    def __iter__(self) -> Iterator[Any]:
        """Yield what is left of the epoch."""
        self.set_epoch(*self._asked)
        epoch, start = self._asked
        for batch in range(start + 1, len(self) + 1):
            self._next = (epoch, batch) if batch < len(self) else (epoch + 1, 0)
            yield self._received()

    def _receive(self) -> None:
        if self._receiver is not None:
            self._coming = self._receiver.submit(next, self._running)

    def _received(self) -> Any:
        if self._coming is None:
            return next(self._running)
        coming = self._coming
        self._receive()
        return coming.result()
