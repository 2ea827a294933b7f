"""SIGTERM to a process that started others."""

import multiprocessing
import os
import signal
import socket
import subprocess
import time
from multiprocessing.resource_sharer import DupFd

import pytest
import torch

import common.termination
from common.distributed import World
from common.termination import (
    EXIT_STATUS,
    TOGETHER,
    Preempted,
    Termination,
    _tell_all_but_a_lost_run,
    handed_to_children,
    outlive_sigterm,
)
from tests.children import in_a_child


def wait_to_be_asked(ready, first):
    with Termination() as termination:
        ready.wait()
        if first:
            os.kill(os.getppid(), signal.SIGTERM)
        while not termination.asked:
            time.sleep(0.01)
    os._exit(EXIT_STATUS)


def test_sigterm_is_handed_to_all_children():
    def work():
        fork = multiprocessing.get_context("fork")
        ready = fork.Barrier(2)
        started = [fork.Process(target=wait_to_be_asked, args=(ready, k == 0)) for k in (0, 1)]
        with handed_to_children():
            for child in started:
                child.start()
            for child in started:
                child.join()
        return 0 if [child.exitcode for child in started] == [EXIT_STATUS] * 2 else 1

    assert in_a_child(work) == 0


def test_without_children_sigterm_has_its_usual_effect():
    def work():
        with handed_to_children():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    assert in_a_child(work) == -signal.SIGTERM


@pytest.mark.parametrize(("together", "ends"), [(TOGETHER, 0), (0.0, -signal.SIGTERM)])
def test_signals_that_come_together_are_one_request(monkeypatch, together, ends):
    monkeypatch.setattr(common.termination, "TOGETHER", together)

    def work():
        with Termination() as termination:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
        return 0 if termination.asked else 1

    assert in_a_child(work) == ends


@pytest.mark.parametrize("before", [False, True])
def test_what_may_be_lost_is_ended_at_once(before):
    def work():
        reached = []
        with Termination() as termination:
            if before:
                os.kill(os.getpid(), signal.SIGTERM)
            with (
                pytest.raises(Preempted, match="all is saved"),
                termination.at_once("all is saved"),
            ):
                reached.append(1)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
                reached.append(2)
            os.kill(os.getpid(), signal.SIGTERM)  # the same request: what follows is not ended
        return 0 if reached == ([] if before else [1]) else 1

    begun = time.monotonic()
    assert in_a_child(work) == 0 and time.monotonic() - begun < 8


@pytest.mark.parametrize("asked", [False, True])
def test_a_rank_whose_others_have_ended_ends_alike_where_it_was_asked(monkeypatch, asked):
    monkeypatch.setattr(common.termination.distributed, "is_lost_rank", lambda error: True)
    termination = Termination()
    with pytest.raises(Preempted if asked else RuntimeError), termination.at_once("saved"):
        termination.asked = asked
        raise RuntimeError("Connection closed by peer")


def read_for_ever(ready):
    outlive_sigterm()
    ready.set()
    time.sleep(60)


def test_a_reading_process_is_ended_by_its_own_run_alone():
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    reader = fork.Process(target=read_for_ever, args=(ready,), daemon=True)
    reader.start()
    ready.wait()
    subprocess.run(["kill", "-TERM", str(reader.pid)], check=True)
    reader.join(0.3)
    assert reader.is_alive()
    reader.terminate()
    reader.join(20)
    assert reader.exitcode == 0


class OtherRank:
    """Stands for ``Exchange`` with one other rank, whose every step takes ``seconds``."""

    def __init__(self, seconds=0.0, asked_at=None):
        self.seconds, self.asked_at = seconds, asked_at
        self.told, self.heard = [], 0

    @property
    def unheard(self):
        return len(self.told) - self.heard

    def tell(self, numbers):
        self.told.append(numbers)

    def hear(self):
        self.heard += 1
        asked, seconds = self.told[self.heard - 1]
        return [max(asked, float(self.heard == self.asked_at)), max(seconds, self.seconds)]


def hear_after_each(monkeypatch, durations, other):
    """Return how many steps were heard of after each, up to the one that ends the run."""
    now, heard = [0.0], []
    monkeypatch.setattr(common.termination.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(common.termination.distributed, "Exchange", lambda: other)
    world = World(0, 2, 0, torch.device("cpu"))
    with Termination() as termination:
        for seconds in durations:
            now[0] += seconds
            ends = termination.agreed_after_step(world)
            heard.append(other.heard)
            if ends:
                break
    return heard


@pytest.mark.parametrize(
    ("durations", "other", "expected"),
    [
        ([0.01] * 5, 0.0, [1, 1, 2, 3, 4]),
        ([2.0] * 4, 0.0, [1, 2, 3, 4]),
        ([0.01] * 4, 2.0, [1, 2, 3, 4]),  # the other one's are slow
        ([20.0, 0.5, 0.5, 0.5, 0.5], 0.0, [1, 2, 2, 3, 4]),  # only the first is slow
        ([0.01, 0.01, 5.0, 5.0, 5.0], 0.0, [1, 1, 2, 4, 5]),  # they turn slow
    ],
)
def test_ranks_hear_at_once_where_steps_are_slow_else_a_step_later(
    monkeypatch, durations, other, expected
):
    assert hear_after_each(monkeypatch, durations, OtherRank(other)) == expected


@pytest.mark.parametrize(("seconds", "ends"), [(0.01, 8), (3.0, 7)])
def test_a_run_ends_where_another_rank_was_asked(monkeypatch, seconds, ends):
    heard = hear_after_each(monkeypatch, [seconds] * 20, OtherRank(asked_at=7))
    assert (len(heard), heard[-1]) == (ends, 7)


def test_a_single_process_looks_after_each_step(monkeypatch):
    def refuse():
        raise AssertionError("nobody to ask")

    monkeypatch.setattr(common.termination.distributed, "Exchange", refuse)
    termination = Termination()
    world = World(0, 1, 0, torch.device("cpu"))
    assert not any(termination.agreed_after_step(world) for _ in range(60))
    termination.asked = True
    assert termination.agreed_after_step(world)


@pytest.mark.parametrize(("reads", "tracebacks"), [(outlive_sigterm, 0), (lambda: None, 1)])
def test_a_run_that_goes_while_a_batch_is_handed_over_is_not_told(tmp_path, reads, tracebacks):
    def work():
        reads()
        given = DupFd(os.open(os.devnull, os.O_RDONLY))
        with socket.socket(socket.AF_UNIX) as run:
            run.connect(given._id[0])  # and ends in the midst of the handshake
        os.close(given.detach())  # one that goes well, after it
        return 0

    assert in_a_child(work, tmp_path / "log.txt") == 0
    assert (tmp_path / "log.txt").read_text().count("Traceback") == tracebacks


def test_other_errors_of_a_reading_process_are_told(capsys):
    _tell_all_but_a_lost_run(KeyError, KeyError("no such frame"), None)
    _tell_all_but_a_lost_run(EOFError, EOFError(), None)
    assert capsys.readouterr().err.splitlines() == ["KeyError: 'no such frame'"]
