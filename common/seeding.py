"""Draws that depend on what is drawn for, not on what was drawn before."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the CPU generators of Python, numpy and torch as they were before."""
    keep = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(keep[0])
        np.random.set_state(keep[1])
        torch.set_rng_state(keep[2])


def seed_generators(*numbers: int) -> None:
    """Seed the CPU generators from several numbers, such as the run's seed and a position."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))
