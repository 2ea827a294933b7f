"""Reading ahead, across the end of an epoch: the next one's first batches are there in time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


class Received(Iterator[Any]):
    """What a loader's processes read, of which a thread receives the next while a step runs.

    A reading process hands a batch's memory over only when it is asked, and answers when it finds
    time between two samples.

    Args:
        batches: Of a loader with processes that read.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._thread = ThreadPoolExecutor(1, "receive")
        self._coming = self._thread.submit(next, batches)

    def __next__(self) -> Any:
        """Return the next batch, and have the one after it received."""
        coming = self._coming
        self._coming = self._thread.submit(next, self._batches)
        return coming.result()

    def drop(self) -> None:
        """Wait for what is being received: a loader serves one iteration at a time."""
        self._coming.exception()


class ReadAhead:
    """Batches of an epoch, from processes that go on with the next one when its last is read.

    So they read while a run learns from the last batches, evaluates and saves. They are never
    further ahead than torch's loader is within an epoch: by its usual number of batches, and one
    that is received. Where an epoch is not the one that is expected next, what was read for that is
    dropped.

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
        self._next: tuple[int, int] | None = None
        self._asked = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begin to read an epoch, without its first ``start`` batches."""
        self._asked = epoch, start
        if start < len(self) and self._next != self._asked:
            if isinstance(self._running, Received):
                self._running.drop()
            self._order.position = self._next = self._asked
            self._running = iter(self._loader)
            if self._loader.num_workers:
                self._running = Received(self._running)

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""
        return self._order.count

    def __iter__(self) -> Iterator[Any]:
        """Yield what is left of the epoch."""
        self.set_epoch(*self._asked)
        epoch, start = self._asked
        for batch in range(start + 1, len(self) + 1):
            self._next = (epoch, batch) if batch < len(self) else (epoch + 1, 0)
            yield next(self._running)
