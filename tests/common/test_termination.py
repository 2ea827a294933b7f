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


def steps_of_agreements(monkeypatch, durations, period, others=0.0, done=0):
    """Return after which steps a rank asks the other one, whose steps take ``others`` seconds."""
    now, asked, told = [0.0], [], []

    def gather(own):
        asked.append(step)
        told.append(own)
        return [own, (False, others)]

    monkeypatch.setattr(common.termination.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(common.termination.distributed, "gather_objects", gather)
    world = World(0, 2, 0, torch.device("cpu"))
    with Termination() as termination:
        for step, seconds in enumerate(durations, done + 1):
            now[0] += seconds
            assert not termination.agreed_after_step(world, step, period)
    assert all(seconds > 0 and not signalled for signalled, seconds in told)
    return asked


@pytest.mark.parametrize(
    ("durations", "others", "expected"),
    [
        ([0.01] * 160, 0.0, [1, 3, 7, 15, 31, 50, 100, 150]),
        ([0.01] * 160, 0.01, [1, 3, 7, 15, 31, 50, 100, 150]),
        ([2.0] * 9, 0.0, [1, 3, 5, 7, 9]),
        ([20.0] * 4, 0.0, [1, 2, 3, 4]),
        ([0.01] * 9, 2.0, [1, 3, 5, 7, 9]),  # the other one's are slow
        ([20.0, *[0.5] * 30], 0.0, [1, 2, 4, 8, 16, 26]),  # only the first is slow
        ([*[0.001] * 4, *[1.0] * 20], 0.0, [1, 3, 7, 13, 18, 23]),  # fast on what was read ahead
    ],
)
def test_ranks_ask_one_another_as_often_as_their_steps_are_slow(
    monkeypatch, durations, others, expected
):
    assert steps_of_agreements(monkeypatch, durations, 50, others) == expected


def test_a_resumed_run_asks_after_its_first_step_too(monkeypatch):
    found = steps_of_agreements(monkeypatch, [0.01] * 80, 50, done=137)
    assert found == [138, 140, 144, 150, 166, 198, 200]


def test_a_single_process_looks_after_each_step(monkeypatch):
    def refuse(own):
        raise AssertionError("nobody to ask")

    monkeypatch.setattr(common.termination.distributed, "gather_objects", refuse)
    termination = Termination()
    world = World(0, 1, 0, torch.device("cpu"))
    assert not any(termination.agreed_after_step(world, step, 50) for step in range(1, 60))
    termination.asked = True
    assert termination.agreed_after_step(world, 60, 50)


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
