"""Signals that end a run before its time.

SIGTERM, as schedulers send it before they take a machine: save, and ask to be started again.
Ctrl-C: end at once, and say how to go on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from common import distributed
from common.distributed import World

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED = 130  # what shells tell of a command that Ctrl-C ended
TOGETHER = 10.0
"""Seconds within which signals are one request: Slurm sends one to every process of a job, and what
started a process (torchrun, ``timeout``) hands its own on."""
SLOW = 1.0
"""Seconds a step lasts from which on ranks wait for one another's answers at once: torchrun and
Slurm kill 30 seconds after SIGTERM, and the step under way and the save need them."""

_logger = logging.getLogger("train")


class Preempted(Exception):
    """A run was asked to end before its time, and is saved as far as it came; says how to go on."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run; says how to go on."""


@contextmanager
def interrupts_told(how: Callable[[], str]) -> Iterator[None]:
    """Let Ctrl-C say how to go on; what is told inside already stays.

    Args:
        how: Says it; called where it came.

    Raises:
        Interrupted: It came.
    """
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as error:
        raise Interrupted(how()) from error


def end_interrupted(error: KeyboardInterrupt) -> int:
    """Tell in a line on the first rank that Ctrl-C ended the command; return the exit status.

    torchrun sends another to its processes, and people press it again: from here on one ends the
    process without a word, not with a traceback from the midst of its end.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # till it is told
    if distributed.is_first():
        _logger.warning("interrupted%s", f": {error}" if str(error) else "")
    if main_thread:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return INTERRUPTED


class Termination:
    """Notes SIGTERM instead of dying of it, while it is entered; may be entered again.

    One that comes more than ``TOGETHER`` seconds after the first has its usual effect. Outside of
    the main thread, where Python takes no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.asked = False
        self._exchange: distributed.Exchange | None = None  # with the other ranks, after steps
        self._stepped_at, self._slow = 0.0, True
        self._since = 0.0
        self._ends = ""
        self._before: Callable[[int, FrameType | None], Any] | int | None = None

    def __enter__(self) -> Termination:
        self._stepped_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = True, now
            if self._ends:
                raise Preempted(self._ends)
        elif now - self._since > TOGETHER:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextmanager
    def at_once(self, told: str) -> Iterator[None]:
        """Let the signal end what is done inside wherever it is; for what is lost without harm.

        An evaluation lasts longer than schedulers wait. Ranks do not agree on its end, since they
        need not look at the same number of batches: each ends by its own signal, or because others
        ended by theirs. So all that a resume needs must be saved before.

        Args:
            told: Of ``Preempted``.

        Raises:
            Preempted: The signal came, here or before.
        """
        self._ends = told
        try:
            if self.asked:
                raise Preempted(told)
            yield
        except RuntimeError as error:
            if self.asked and distributed.is_lost_rank(error):
                raise Preempted(told) from error
            raise
        finally:
            self._ends = ""

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked. With several ranks a collective: all must call it."""
        if world.size == 1:
            return self.asked
        return any(distributed.gather_objects(self.asked))

    def agreed_after_step(self, world: World) -> bool:
        """Whether any rank was asked; all must call it after each step, and hear the same.

        A single process looks at itself. Several tell one another over the CPU, while the next step
        goes on: what is heard is what they told a step before, and nothing waits for the device.
        Where the last step took more than ``SLOW`` seconds on any of them, they wait for what is
        told now, which then costs nothing that matters, while one more step might be too late.

        Args:
            world: Where this process stands.
        """
        if world.size == 1:
            return self.asked
        if self._exchange is None:
            self._exchange = distributed.Exchange()
        now = time.monotonic()
        self._exchange.tell([float(self.asked), now - self._stepped_at])
        self._stepped_at = now
        while self._exchange.unheard > (0 if self._slow else 1):
            asked, seconds = self._exchange.hear()
            self._slow = seconds > SLOW
            if asked:
                return True
        return False


@contextmanager
def ended_at_once(
    told: str = "ended outside of the training; go on by --resume, or begin anew",
    termination: Termination | None = None,
) -> Iterator[None]:
    """Let a signal end at once what is done inside, which a resume makes anew.

    Args:
        told: How to go on.
        termination: That of the run; None: a new one.

    Raises:
        Preempted: SIGTERM came.
        Interrupted: Ctrl-C came.
    """
    termination = termination or Termination()
    with (
        interrupts_told(lambda: told),
        termination,
        termination.at_once(f"SIGTERM: {told}"),
    ):
        yield


@contextmanager
def deaf_to(*signals: int) -> Iterator[None]:
    """Start processes that signals do not reach; this one ends them when one comes.

    A terminal sends Ctrl-C to all processes of a command, some schedulers SIGTERM, and what they
    would do and tell differs by where each of them is. Windows knows no such thing; nothing changes
    there.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_children(patience: float = 0.0) -> None:
    """End the processes that this one started by ``multiprocessing``; they save nothing more.

    Args:
        patience: Seconds in which they may end by themselves.
    """
    children = multiprocessing.active_children()
    end = time.monotonic() + patience
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
    for child in children:
        child.kill()
    for child in children:
        child.join()


def end_with_parent() -> None:
    """End this process when the one that started it by ``multiprocessing`` has, by ``kill -9`` too.

    Nobody else would, where Ctrl-C is ignored, as it is by what a shell's script starts with ``&``.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def outlive_sigterm(worker: int = 0) -> None:
    """Let a reading process end by its own run's SIGTERM alone; for a loader's ``worker_init_fn``.

    torchrun and Slurm send one to all processes, and the run needs its data until it has saved.
    Where the system does not tell who sent a signal (macOS, Windows), nothing changes in this.
    A run that ends while a batch is handed over is no fault of the process, and is not told.
    """
    sys.excepthook = _tell_all_but_a_lost_run
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _tell_all_but_a_lost_run(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Tell errors of ``multiprocessing``'s own threads; a loader's own ones go to the run."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def handed_to_children() -> Iterator[None]:
    """Hand SIGTERM on to the processes that this one started, instead of dying of it before them.

    Where there are none yet, it has its usual effect.
    """

    def hand_on(number: int, frame: FrameType | None) -> None:
        children = multiprocessing.active_children()
        for child in children:
            child.terminate()
        if not children:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
