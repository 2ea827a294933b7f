"""Files that cannot be read, and reading processes that die: counted, named, told in one line."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any, NamedTuple

import numpy as np

from common.distributed import gather_objects, is_first

_logger = logging.getLogger(__name__)

_NAMED = 5  # files of a message; the rest is counted
_TRIED = 20  # others for a broken sample
_DEATH = re.compile(r"DataLoader worker \(pid")
_SENDING = ("multiprocessing.resource_sharer", "torch.multiprocessing.reductions")
_SIGNALS = {
    "Killed": "most likely by the system, for want of memory",
    "Segmentation fault": "a library that decodes files crashed",
    "Bus error": "most likely /dev/shm is full",
}


class BadSampleError(ValueError):
    """More files are broken than a run may do without; names the first of them."""


class WorkerDiedError(RuntimeError):
    """A process that reads data died; says why, as far as that is known, and the way out."""


class BadSample(NamedTuple):
    """A file that cannot be used; travels with a batch from the process that found it.

    Attributes:
        name: The file.
        reason: What is wrong with it.
    """

    name: str
    reason: str

    @classmethod
    def of(cls, error: Exception) -> BadSample:
        """Read ``FILE: REASON`` from an error's message."""
        name, _, reason = str(error).partition(": ")
        return cls(name, reason or type(error).__name__)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Replaced(NamedTuple):
    """A sample, and the files that had to be passed over to get it; None: no file would do."""

    sample: Any
    passed_over: list[BadSample]


def read_or_replace(
    read: Callable[[Any], Any],
    asked: Any,
    others: Callable[[int], Any],
    faults: tuple[type[Exception], ...],
    most: int,
) -> Any:
    """Read a sample; where it is broken another one.

    Args:
        read: Reads what is asked for; what it raises of ``faults`` begins with ``FILE: ``.
        asked: The sample.
        others: Chooses the k-th other one, from its position in the run alone; so a resume and
            another number of ranks choose the same.
        faults: What tells a broken file.
        most: Files that the run may do without; once more are met, no other is tried.

    Returns:
        The sample itself where it is sound, else ``Replaced``.
    """
    passed_over: dict[str, BadSample] = {}
    for attempt in range(_TRIED + 2 * most if most else 1):
        try:
            sample = read(asked if attempt == 0 else others(attempt))
        except faults as error:
            bad = BadSample.of(error)
            passed_over[bad.name] = bad
        else:
            return Replaced(sample, list(passed_over.values())) if passed_over else sample
        if len(passed_over) > most:
            break
    return Replaced(None, list(passed_over.values()))


def other_index(size: int, *numbers: int) -> int:
    """Choose one of ``size`` samples from numbers alone, such as seed, epoch, position, attempt."""
    return int(np.random.default_rng(numbers).integers(size))


def sound(samples: Iterable[Any]) -> tuple[list[Any], list[BadSample]]:
    """Take samples out of their ``Replaced``; those that nothing replaces are left out."""
    found: list[Any] = []
    bad: list[BadSample] = []
    for sample in samples:
        if isinstance(sample, Replaced):
            bad += sample.passed_over
            sample = sample.sample
        if sample is not None:
            found.append(sample)
    return found, bad


class BadSamples:
    """Counts broken files, each once however often it is met, and refuses more than allowed.

    Reading processes hand over what they found with their batches. Each rank counts what it meets,
    and ``share`` what all of them did.

    Args:
        most: How many there may be.
        option: Raises it, for the error.
        fault: Class of the error.

    Attributes:
        tells: Warn of each file here; of processes that read the same samples one is enough.
        found: Reasons by file, in the order in which they were met.
        left_out: Those that evaluations left out.
    """

    def __init__(
        self,
        most: int = 0,
        option: str = "--max-bad-samples",
        fault: type[Exception] = BadSampleError,
    ) -> None:
        self.most = most
        self.option = option
        self.fault = fault
        self.tells = True
        self.found: dict[str, str] = {}
        self.left_out: set[str] = set()

    def add(self, bad: Sequence[BadSample], evaluating: bool = False) -> None:
        """Count files; log those that are new.

        Args:
            bad: As they came with a batch.
            evaluating: They are left out, for all peers alike; else others take their place.

        Raises:
            Exception: The ``fault``, where there are more than allowed.
        """
        for each in bad:
            new = each.name not in self.found
            self.found[each.name] = each.reason
            new_here = evaluating and each.name not in self.left_out
            self.left_out |= {each.name} if evaluating else set()
            if self.tells and self.most and (new or new_here):
                what = "left out of evaluations" if evaluating else "replaced by others"
                _logger.warning("broken, %s: %s (%d of %d)", what, each, len(self.found), self.most)
        if len(self.found) > self.most:
            raise self.fault(self._refusal())

    def share(self) -> None:
        """Count what all ranks found. All must call it.

        Raises:
            Exception: The ``fault``, on all ranks, where there are more than allowed together.
        """
        for found, left_out in gather_objects((self.found, self.left_out)):
            self.found = {**self.found, **{n: r for n, r in found.items() if n not in self.found}}
            self.left_out |= left_out
        if len(self.found) > self.most:
            raise self.fault(self._refusal())

    def tell_evaluation(self, left_out: int, samples: int) -> None:
        """Warn on the first rank that an evaluation is of fewer samples."""
        if left_out and is_first():
            _logger.warning(
                "evaluated without %d of %d samples, whose files are broken", left_out, samples
            )

    def summary(self) -> str:
        """Say which files were broken; nothing where none was."""
        if not self.found:
            return ""
        parts = [f"{len(self.found)} broken files were done without: {self._listed()}."]
        if self.left_out:
            parts.append(
                f"Evaluations left out {len(self.left_out)} of them, for all peers alike; metrics "
                "are of the others."
            )
        return " ".join(parts)

    def state_dict(self) -> dict[str, Any]:
        """Return what was found so far."""
        return {"found": dict(self.found), "left_out": sorted(self.left_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was found before."""
        self.found |= state["found"]
        self.left_out |= set(state["left_out"])

    def _refusal(self) -> str:
        if len(self.found) == 1:
            return f"{self._listed()}; mend or remove it, or allow broken files ({self.option})"
        return (
            f"{len(self.found)} broken files, {self.most} are allowed ({self.option}): "
            f"{self._listed()}; mend or remove them, or raise {self.option}"
        )

    def _listed(self) -> str:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(self.found.items())[:_NAMED])
        more = len(self.found) - _NAMED
        return f"{told}; and {more} more" if more > 0 else told


class Counted:
    """A loader's batches without what came with them, which is counted.

    Args:
        loader: Gives pairs: a batch, and the ``BadSample``s that were met on the way to it. The
            batch is None where nothing could take the place of one.
        bad: Counts them.
        evaluating: See ``BadSamples.add``.
    """

    def __init__(self, loader: Any, bad: BadSamples, evaluating: bool = False) -> None:
        self.loader = loader
        self.bad = bad
        self.evaluating = evaluating

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch, bad in self.loader:
            if bad:
                self.bad.add(bad, self.evaluating)
            if batch is None:
                raise self.bad.fault(f"{bad[0]}; no sound sample is found to take its place")
            yield batch


_LOST = (ConnectionError, EOFError, FileNotFoundError)  # of the socket to a process that is gone


def is_worker_death(error: BaseException | None) -> bool:
    """Whether an error is about a reading process that died.

    torch raises its own wherever the main process is when the signal comes, not only in its loader;
    and where that was just fetching a batch, its connection breaks first.
    """
    if isinstance(error, _LOST):
        places = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
        return any(place.startswith(_SENDING) for place in places)
    return isinstance(error, RuntimeError) and bool(_DEATH.search(str(error)))


@contextmanager
def worker_deaths_told() -> Iterator[None]:
    """Turn what such a death raises into an error that says the cause and the way out.

    Enter it twice: where the connection to a process breaks first, torch's signal may raise while
    the inner one is being left.

    Raises:
        WorkerDiedError: In its place.
    """
    try:
        yield
    except (RuntimeError, *_LOST) as error:
        if not is_worker_death(error):
            raise
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise again, in the midst of whatever ends the run
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise WorkerDiedError(_death_told(error)) from error


def _death_told(error: BaseException) -> str:
    name, seen = "", error
    while not name and is_worker_death(seen):
        found = re.search(r"by signal: ([\w ]+\w)", str(seen))
        name = found.group(1) if found else ""
        seen = seen.__cause__ or seen.__context__ or RuntimeError()
    ended = f"was ended by the signal {name!r}" if name else "exited unexpectedly"
    cause = _SIGNALS.get(name or "Killed", "it is not known why")
    return (
        f"a process that reads data {ended}, {cause}; start fewer of them (--workers, "
        "DATALOADER.NUM_WORKERS; 0 reads in this process), make batches smaller, or give the "
        "machine more memory; resume from the last run file, if any"
    )
