"""How fast a loop runs, and how much of its time it waits for data."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

_logger = logging.getLogger(__name__)

_Batch = TypeVar("_Batch")
_END = object()
_LINE_SECONDS = 30


@dataclass(frozen=True)
class Pace:
    """Of a stretch of a loop.

    Attributes:
        seconds: How long it took.
        waited: How much of that the loop waited for its batches, in seconds.
        samples: How many it saw.
        batches: How many of them.
    """

    seconds: float
    waited: float
    samples: int
    batches: int

    @property
    def samples_per_second(self) -> float:
        """Samples of this process a second."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def data_share(self) -> float:
        """Share of the time that went into waiting for batches, in [0, 1]."""
        return self.waited / self.seconds if self.seconds else 0.0

    def seconds_of(self, batches: int) -> float:
        """Foretell how long further batches take; those of a stretch without any, no time."""
        return batches * self.seconds / self.batches if self.batches else 0.0


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class LoopClock:
    """Measures a loop by the host's clock; never waits for the device.

    Where steps run on an accelerator, the host is ahead of it, and what it waits for data meanwhile
    costs nothing as long as the device has work: the share is then an upper bound.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._begun, self._waited = time.perf_counter(), 0.0
        self._samples = self._batches = 0

    def around(self, batches: Iterable[_Batch]) -> Iterator[_Batch]:
        """Yield the batches, and count how long each is waited for, start-up included."""
        iterator = iter(batches)
        while True:
            begun = time.perf_counter()
            batch = next(iterator, _END)
            self._waited += time.perf_counter() - begun
            if batch is _END:
                return
            yield batch  # type: ignore[misc]

    def saw(self, samples: int) -> None:
        """Count what a step learned from."""
        self._samples += samples
        self._batches += 1

    def look(self) -> Pace:
        """Return the stretch since ``read`` was called last, or since the start; it goes on."""
        seconds = time.perf_counter() - self._begun
        return Pace(seconds, self._waited, self._samples, self._batches)

    def read(self) -> Pace:
        """Return the stretch since the last call, or since the start."""
        pace = self.look()
        self._begin()
        return pace


def with_lines(items: Iterable[_Batch], title: str) -> Iterator[_Batch]:
    """Yield items, and log every half minute how many there were: what a bar shows a terminal."""
    total = operator.length_hint(items, 0)
    begun = told = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - told >= _LINE_SECONDS:
            told = now
            of = f" of {total}" if total else ""
            _logger.info("%s: %d%s, %.2f s each", title, done, of, (now - begun) / done)
