"""SIGTERM, as schedulers send it before they take a machine: save, and ask to be started again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from common import distributed
from common.distributed import World

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Preempted(Exception):
    """The run was asked to end before its time, and has saved where it stands."""


class Termination:
    """Notes SIGTERM instead of dying of it, while it is entered.

    A second SIGTERM has its usual effect. Outside of the main thread, where Python takes no
    signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Callable[[int, FrameType | None], Any] | int | None = None

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked. With several ranks a collective: all must call it."""
        if world.size == 1:
            return self.asked
        return any(distributed.gather_objects(self.asked))
