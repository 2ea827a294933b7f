"""Draws that depend on what is drawn for, not on what was drawn before."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


class Draws:
    """Remembers where the generators that a forward may draw from stand, to draw the same again.

    Args:
        device: Of the forward; its generator is remembered too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw from there once more; afterwards the generators stand where they stood before."""
        now = Draws(self.device)
        self.restore()
        try:
            yield
        finally:
            now.restore()

    def restore(self) -> None:
        """Put the generators back to where they stood."""
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
        torch.set_rng_state(self._states[2])
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self.device)


@contextlib.contextmanager
def drawn_for(device: torch.device, *numbers: int) -> Iterator[None]:
    """Draw, on the CPU and on a device, what depends on numbers alone; then go on as before.

    Args:
        device: Its generator is seeded too.
        numbers: Such as the run's seed and a position, each >= 0.
    """
    before = Draws(device)
    word = seed_generators(*numbers)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(word)
    try:
        yield
    finally:
        before.restore()


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the CPU generators of Python, numpy and torch as they were before."""
    before = Draws(torch.device("cpu"))
    try:
        yield
    finally:
        before.restore()


def seed_generators(*numbers: int) -> int:
    """Seed the CPU generators from several numbers, such as the run's seed and a position.

    Returns:
        What torch's was seeded with.
    """
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))
    return int(words[2])


def seed_alike(seed: int) -> None:
    """Seed the generators of Python, numpy and torch (of its devices too) with one number."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
