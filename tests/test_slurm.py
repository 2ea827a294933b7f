"""The Slurm script of several machines: ended by SIGTERM, it saves, requeues itself and goes on.

With stand-ins for ``scontrol`` and ``srun``, which starts the "machines" here; all else is real.
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

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "slurm_multinode.sbatch"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM $(jobs -p)' TERM
for ((i = 0; i < SLURM_NNODES; i++)); do "$@" & done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
wait
exit $status
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && echo localhost || echo "$@" >> "$TOLD"
"""


@pytest.fixture
def cluster(tmp_path):
    """Return the environment of a job of two machines with a process each."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
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
    }


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
    assert (tmp_path / "told").read_text().split() == ["requeue", cluster["SLURM_JOB_ID"]]
    stands = load_run(tmp_path / "run")["progress"]
    assert 0 < stands["updates"] < 60
    assert subprocess.run(command, check=False, **start).returncode == 0
    assert load_run(tmp_path / "run")["progress"]["updates"] == 60
    assert "resumed after epoch" in (tmp_path / "log").read_text()
    assert (tmp_path / "run" / "report.html").exists()
    assert len((tmp_path / "told").read_text().splitlines()) == 1
