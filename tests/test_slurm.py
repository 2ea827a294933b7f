"""The Slurm scripts: ended by SIGTERM, they save, requeue themselves and go on.

With stand-ins for Slurm's commands; ``srun`` starts the "machines" here. All else is real.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.checkpoint import list_runs, load_run
from tests.saliency.folders import write_dataset

ROOT = Path(__file__).parents[1]
ONE = ROOT / "docs" / "slurm.sbatch"
SCRIPT = ROOT / "docs" / "slurm_multinode.sbatch"
# As the real one, it kills the tasks where it gets SIGTERM itself, and tells their worst status.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$TOLD.srun"; shift; done
trap 'for task in $(jobs -p); do kill -9 $(< /proc/$task/task/$task/children) $task; done' TERM
for ((i = 0; i < SLURM_NNODES; i++)); do "$@" & done
jobs -p > "$TOLD.tasks"
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
wait
exit $status
"""
SCANCEL = """#!/bin/bash
[[ $1 == --signal=TERM && $2 == "$SLURM_JOB_ID" && $# == 2 ]] && kill -TERM $(< "$TOLD.tasks")
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && echo localhost || echo "$@" >> "$TOLD"
"""
# A training that ends with $FREE, or where it is signalled with $SIGNALLED, as after saving.
TORCHRUN = """#!/bin/bash
trap 'sleep 0.1; exit $SIGNALLED' TERM
touch "$TOLD.begun.$$"
[[ $FREE ]] && exit $FREE
for ((i = 0; i < 600; i++)); do sleep 0.05; done
"""


def write_commands(folder, **texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """Return the environment of a job of two machines with a process each."""
    folder = tmp_path / "bin"
    write_commands(folder, srun=SRUN, scontrol=SCONTROL, scancel=SCANCEL)
    return os.environ | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "TOLD": str(tmp_path / "told"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "3",
    }


@pytest.mark.parametrize("script", [ONE, SCRIPT], ids=["one", "several"])
@pytest.mark.parametrize(
    ("free", "signalled", "again"),
    [
        ("", 1, True),  # what torchrun makes of a training that saved
        ("", 0, False),  # it came to its end
        (75, 1, True),  # without torchrun
        (1, 1, False),  # an error of its own
        (0, 1, False),
    ],
)
def test_a_job_is_begun_anew_only_where_it_was_ended(
    tmp_path, cluster, script, free, signalled, again
):
    write_commands(tmp_path / "fake", torchrun=TORCHRUN)
    cluster |= {"FREE": str(free), "SIGNALLED": str(signalled)}
    cluster["PATH"] = f"{tmp_path / 'fake'}:{cluster['PATH']}"
    job = subprocess.Popen(["bash", str(script)], env=cluster)
    if free == "":
        awaited = 1 if script == ONE else 3  # srun's list of tasks, and each of these
        while len([*tmp_path.glob("told.tasks"), *tmp_path.glob("told.begun.*")]) < awaited:
            assert job.poll() is None
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == (signalled if free == "" else free)
    assert (tmp_path / "told").exists() == again


@pytest.mark.slow
def test_a_job_that_gets_sigterm_is_requeued_and_goes_on(tmp_path, cluster):
    videos = {f"annotation/{k:04d}": 8 for k in range(1, 5)}
    data = write_dataset(tmp_path / "data", videos | {"val/0601": 7}, fixations="mat")
    command = ["bash", str(SCRIPT), "saliency/train_dhf1k.py", "--data-root", str(data)]
    command += "--peer tests.saliency.toy:Deep --peer tests.saliency.toy:Flat".split()
    command += "--engine peer-parallel --device cpu --epochs 30 --val-interval 99".split()
    command += "-b 2 --workers 0 --lr 1e-3 --log-interval 1 --recovery-interval 1".split()
    command += ["--output", str(tmp_path), "--experiment", "run", "--resume", "auto"]
    log = (tmp_path / "log").open("w")
    start = {"cwd": ROOT, "env": cluster, "stdout": log, "stderr": log}
    job = subprocess.Popen(command, **start)
    while not list_runs(tmp_path / "run") and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.wait()
    told = (tmp_path / "log").read_text()
    assert "SIGTERM: saved after" in told, told
    assert "--cpus-per-task=3" in (tmp_path / "told.srun").read_text().split()
    assert (tmp_path / "told").read_text().split() == ["requeue", cluster["SLURM_JOB_ID"]]
    stands = load_run(tmp_path / "run")["progress"]
    assert 0 < stands["updates"] < 60
    assert subprocess.run(command, check=False, **start).returncode == 0
    assert load_run(tmp_path / "run")["progress"]["updates"] == 60
    assert "resumed from" in (tmp_path / "log").read_text()
    assert (tmp_path / "run" / "report.html").exists()
    assert len((tmp_path / "told").read_text().splitlines()) == 1
