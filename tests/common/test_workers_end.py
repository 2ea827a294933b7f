"""A signal to the process that leads others, by real processes: all end in seconds, and go on."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from common.demo import side_by_side
from common.experiment.local import run_local
from common.outputs import run_command
from common.termination import EXIT_STATUS, INTERRUPTED
from tests.children import alive, work_and_end
from tests.common.waiting import train_for_a_minute

ROOT = Path(__file__).parents[2]
SECONDS = 10  # what the end may take on a busy machine; the work would take a minute
ENDS = [(signal.SIGTERM, EXIT_STATUS), (signal.SIGINT, INTERRUPTED)]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="asks Linux which processes are alive"
)

JOB = """
import pathlib, signal, sys, time

def save(*given):
    pathlib.Path(sys.argv[1] + ".saved").write_text("")
    sys.exit(75)

def interrupted(*given):
    pathlib.Path(sys.argv[1] + ".interrupted").write_text("")

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, interrupted)
pathlib.Path(sys.argv[1] + ".begun").write_text("")
time.sleep(60)
"""


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.02)


@pytest.fixture
def lead(tmp_path):
    """Fork a leader of a group of processes; what it tells goes into ``told.txt``."""
    leaders = []

    def start(work):
        leader = os.fork()
        if leader:
            leaders.append(leader)
            return leader
        os.setsid()
        os.chdir(tmp_path)
        work_and_end(work, "told.txt")

    yield start
    for leader in leaders:  # where the test failed
        if alive(leader):
            os.killpg(leader, signal.SIGKILL)


def status_of(leader):
    """Wait for the leader and all of its group; return its exit status."""
    end = time.monotonic() + SECONDS
    while not (found := os.waitpid(leader, os.WNOHANG))[0]:
        assert time.monotonic() < end, f"it lives on {SECONDS} seconds later"
        time.sleep(0.02)
    wait_until(lambda: not alive(leader), SECONDS)
    return os.waitstatus_to_exitcode(found[1])


@pytest.mark.parametrize(
    ("sent", "status", "to_all"), [*((*end, False) for end in ENDS), (*ENDS[1], True)]
)
def test_jobs_save_and_end_with_the_process_that_started_them(tmp_path, lead, sent, status, to_all):
    commands = {name: [sys.executable, "-c", JOB, name] for name in "ab"}
    logs = {name: tmp_path / name / "log.txt" for name in commands}

    def work():
        return run_command(lambda: run_local(commands, logs, [[], []], "jobs"), ())

    leader = lead(work)
    wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == 2)
    (os.killpg if to_all else os.kill)(leader, sent)  # a terminal sends Ctrl-C to all
    assert status_of(leader) == status
    assert len(list(tmp_path.glob("*.saved"))) == 2
    assert not list(tmp_path.glob("*.interrupted"))  # it would have ended in the midst of anything
    told = (tmp_path / "told.txt").read_text() + "".join(x.read_text() for x in logs.values())
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("sent", "status", "to_all"),
    [
        (*ENDS[0], False),
        *(
            pytest.param(*end, to_all, marks=pytest.mark.slow)
            for end in (*ENDS, (signal.SIGKILL, -signal.SIGKILL))
            for to_all in (False, True)
            if (end[0], to_all) not in ((signal.SIGTERM, False), (signal.SIGKILL, True))
        ),
    ],
)
def test_runs_side_by_side_end_with_the_process_that_asked_for_them(
    tmp_path, lead, sent, status, to_all
):
    runs = {k: (tmp_path / f"{k}.begun",) for k in range(5)}

    def work():
        def ask():
            with side_by_side(2, len(runs)) as workers:
                workers.run("training", train_for_a_minute, runs)

        return run_command(ask, ())

    leader = lead(work)
    wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == 2)
    (os.killpg if to_all else os.kill)(leader, sent)
    assert status_of(leader) == status
    assert len(list(tmp_path.glob("*.begun"))) == 2  # nobody took up what was still waiting
    told = (tmp_path / "told.txt").read_text()
    assert "Traceback" not in told
    assert sent == signal.SIGKILL or "give the same command again" in told


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), ENDS)
def test_an_experiment_that_is_ended_says_how_it_goes_on(tmp_path, lead, sent, status):
    peers = [{"model": "toy", "name": "a"}, {"model": "toy", "name": "bb"}]
    experiment = {"peers": peers, "seeds": [0], "train": {"epochs": 10**6}, "output": "out"}
    (tmp_path / "exp.json").write_text(json.dumps(experiment))
    command = [sys.executable, "-m", "tests.common.toy_experiment", "exp.json", "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    leader = lead(lambda: os.execve(command[0], command, environment))
    out = tmp_path / "out"
    wait_until(lambda: len({path.parents[1] for path in out.rglob("run-*.pt")}) == 2)
    os.killpg(leader, sent)
    assert status_of(leader) == status
    told = (tmp_path / "told.txt").read_text()
    assert "give the same command again to go on" in told and "Traceback" not in told
    saved = [log for log in out.rglob("log.txt") if "SIGTERM: saved after" in log.read_text()]
    assert len(saved) == 2 and not any("Traceback" in log.read_text() for log in saved)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_demo_hands_sigterm_on(tmp_path, lead):
    python = tmp_path / "venv/bin/python"  # instead of the demo's
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/begun\nexec sleep 60\n')
    python.chmod(0o755)
    known = [word for name in (".demo", ".torch") for word in ("-o", f"{tmp_path}/venv/{name}")]
    command = ["make", "-C", str(ROOT), *known, f"VENV={tmp_path}/venv", "demo"]
    leader = lead(lambda: os.execvp(command[0], command))
    wait_until((tmp_path / "begun").exists)
    os.kill(leader, signal.SIGTERM)
    assert status_of(leader) != 0
    assert (tmp_path / "begun").read_text().strip() == "-m classification.demo"
