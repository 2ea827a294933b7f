"""The processes that torchrun starts do what those of ``--num-gpus`` do."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from detectron2.utils import comm

from common.checkpoint import read_file
from common.claimed import claim
from segmentation.cli import check_machine, main, train
from segmentation.config import load_run
from segmentation.errors import ConfigError
from tests.launch import launch
from tests.segmentation.runs import write_run

ROOT = Path(__file__).parents[2]
CPU = ["MODEL.DEVICE", "cpu"]
SHORT = [*CPU, "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def command_line(world, data, folder, *arguments):
    """Call the command line as one of torchrun's processes; write down how it ended."""
    os.environ["DETECTRON2_DATASETS"] = str(data)
    logging.getLogger().handlers.clear()  # pytest's: the command has its own
    (folder / f"status{world.rank}").write_text(str(main([*arguments])))


def statuses(folder):
    return [int((folder / f"status{rank}").read_text()) for rank in range(2)]


def as_launched(world, run_file, data, output):
    """Train as Detectron2's ``launch`` lets a process do."""
    os.environ["DETECTRON2_DATASETS"] = str(data)
    comm.create_local_process_group(world.size)
    train(load_run([run_file], [*SHORT, "OUTPUT_DIR", str(output)]))


def assert_same_runs(one, two):
    mine, other = (read_file(folder / "run.pt") for folder in (one, two))
    assert mine["iteration"] == other["iteration"]
    assert str(mine["history"]) == str(other["history"])  # as text: NaN where a class is not there
    assert str(mine["lessons"]) == str(other["lessons"])
    for peer in ("fpn", "deeplab"):
        mine, other = (read_file(f / peer / "model_final.pth")["model"] for f in (one, two))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine), peer


def test_two_of_torchruns_processes_are_one_run(tmp_path, datasets):
    run_file = write_run(tmp_path)
    launch(as_launched, 2, run_file, datasets, tmp_path / "launched")
    launch(command_line, 2, datasets, tmp_path, "--config-file", str(run_file), *SHORT)
    assert statuses(tmp_path) == [0, 0]
    assert_same_runs(tmp_path / "launched", tmp_path / "out")


def test_a_fault_is_told_once(tmp_path, datasets, capfd):
    asked = ["--config-file", str(write_run(tmp_path)), *SHORT]
    for more, told in (
        (["PEER.fpn.MODEL.WEIGHTS", "none.pth"], "none.pth: no such file"),  # found by each
        (["OUTPUT_DIR", f"{__file__}/out"], "cannot be written to"),  # by the first alone
        (["TRANSFER.RULE", "bests"], "'bests'"),  # before they meet
    ):
        launch(command_line, 2, datasets, tmp_path, *asked, *more)
        assert statuses(tmp_path) == [1, 1]
        err = capfd.readouterr().err
        assert told in err and err.count("error: ") == 1, err


def test_processes_are_started_by_torchrun_or_by_options(tmp_path, datasets, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    asked = ["--config-file", str(write_run(tmp_path)), *SHORT]
    for option in ("--num-gpus", "--num-machines"):
        assert main([option, "3", *asked]) == 1
        told = capsys.readouterr().err
        assert f"{option} 3 under torchrun, which started 2 processes" in told
    assert not (tmp_path / "out").exists()


def test_machines_are_told_where_to_meet(tmp_path, datasets, capsys):
    asked = ["--config-file", str(write_run(tmp_path)), *SHORT]
    assert main(["--num-machines", "2", *asked]) == 1
    assert "--num-machines 2 without --dist-url; give each machine" in capsys.readouterr().err
    assert main(["--num-machines", "2", "--plan", *asked]) == 0


def test_a_plan_counts_torchruns_processes(tmp_path, datasets, monkeypatch, caplog):
    asked = ["--plan", "--config-file", str(write_run(tmp_path)), *CPU]
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(asked) == 0
    assert "batches" not in caplog.text  # the first tells it
    monkeypatch.setenv("RANK", "0")
    assert main(asked) == 0
    assert "Of one process with batches of 1" in caplog.text and "buckets" in caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("there", "device", "message"),
    [
        (1, "cuda", "torchrun --nproc-per-node=2: this machine has 1"),
        (2, "cuda:1", "with torchrun --nproc-per-node=2 give cuda"),
        (2, "cpu", None),
        (2, "cuda", None),
    ],
)
def test_what_a_machine_has(tmp_path, monkeypatch, there, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    run = load_run([write_run(tmp_path)], ["MODEL.DEVICE", device])
    if message is None:
        check_machine(run, 2, torchrun=True)
        return
    with pytest.raises(ConfigError, match=message):
        check_machine(run, 2, torchrun=True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["joint", "peer-parallel"])
def test_torchrun_equals_num_gpus(tmp_path, datasets, engine):
    options = [*SHORT, "TRANSFER.ENGINE", engine]
    asked = ["--config-file", str(write_run(tmp_path))]
    here = tmp_path / "launched"
    script = [*TORCHRUN, "segmentation/train_net.py", *asked]
    assert main([*asked, "--num-gpus", "2", *options, "OUTPUT_DIR", str(here)]) == 0
    subprocess.run([*script, *options], cwd=ROOT, check=True)
    assert_same_runs(here, tmp_path / "out")
    if engine == "joint":
        subprocess.run([*script, "--eval-only", "--resume", *options], cwd=ROOT, check=True)
        assert (tmp_path / "out" / "evaluation.csv").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_ends_the_run_and_it_goes_on(tmp_path, datasets, number):
    asked = ["segmentation/train_net.py", "--config-file", str(write_run(tmp_path))]
    # evaluations, before which the ranks agree on the end: torchrun waits no more than 30 seconds
    asked += ["--resume", "auto", *CPU, "TEST.EVAL_PERIOD", "4", "SOLVER.MAX_ITER"]
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen([*TORCHRUN, *asked, "1000"], cwd=ROOT, stdout=log, stderr=log)
    record = tmp_path / "out" / "run.pt"
    while not record.is_file() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait() != 0
    told = (tmp_path / "log.txt").read_text()
    what = "SIGTERM: saved after iteration" if number == signal.SIGTERM else "interrupted: go on"
    assert told.count(what) == 1, told
    at = read_file(record)["iteration"]
    more = [str(at + 2), "TRANSFER.KEEP", "0"]
    done = subprocess.run([*TORCHRUN, *asked, *more], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"resumed after iteration {at}" in done.stdout + done.stderr
    assert read_file(record)["iteration"] == at + 2


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_processes_keep_out_of_the_folder_of_a_run_that_goes_on(tmp_path, datasets, machines):
    """Of several machines all end, though only the first one looks."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{one.getsockname()[1]}"
    asked = [sys.executable, "segmentation/train_net.py", "--config-file", str(write_run(tmp_path))]
    asked += ["--num-gpus", str(3 - machines), "--num-machines", str(machines), "--dist-url", url]
    (tmp_path / "out").mkdir()
    claim(tmp_path / "out")
    processes = [
        subprocess.Popen(
            [*asked, "--machine-rank", str(rank), *SHORT],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(machines)
    ]
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [1] * machines, told
    assert told[0].count(f"{tmp_path / 'out'}: another command trains into it (process ") == 1
    assert "Traceback" not in "".join(told)
    assert [text.count("the first machine's process tells why") for text in told[1:]] == [1] * (
        machines - 1
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
