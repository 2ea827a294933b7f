"""Runs with a process for every peer are the runs of one process for all."""

import os
import shutil

import pytest
import torch

from common.checkpoint import load_run, read_weights
from saliency.train import main, run
from tests.launch import launch
from tests.saliency.folders import write_dataset

TOY = "tests.saliency.toy"
BOTH = (f"{TOY}:Deep", f"{TOY}:Flat")
SEATED = ("--engine", "peer-parallel")
KEPT = ("--recovery-interval", "1", "--checkpoint-hist", "9")
MIDDLE = "run-00001-00000002.pt"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("dhf1k")
    videos = {f"annotation/{k:04d}": 8 for k in range(1, 9)}
    return write_dataset(root, videos | {"val/0601": 7, "val/0602": 6}, fixations="mat")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the check of the data is kept


def arguments(data, output, *rest, peers=BOTH):
    return [
        *("--data-root", str(data), "--output", str(output), "--experiment", "run"),
        *(word for peer in peers for word in ("--peer", peer)),
        *("--epochs", "2", "-b", "2", "--lr", "1e-2", "--workers", "0", "--val-stride", "3"),
        *(
            "--device",
            "cpu",
            "--model-ema",
            "--model-ema-decay",
            "0.8",
            "--nss",
            "-0.1",
            "--log-interval",
            "1",
        ),
        *map(str, rest),
    ]


def train(*asked, **more):
    return run("dhf1k", "train_dhf1k", arguments(*asked, **more), bars=False)


def ranked(world, data, output, rest, peers):
    os.environ["HOME"] = str(output)
    torch.set_num_threads(1)
    train(data, output, *rest, peers=peers)


def assert_close_runs(one, two):
    """Weights, averages, evaluations and lessons; the ensemble's evaluation too."""
    one, two = load_run(one), load_run(two)
    assert list(two["peers"]) == list(one["peers"])
    for name, peer in one["peers"].items():
        for part in ("module", "average"):
            torch.testing.assert_close(two["peers"][name][part], peer[part], rtol=1e-3, atol=1e-5)
    for part, tolerance in (("history", 1e-3), ("lessons", 1e-2)):
        for row, other in zip(*(x["progress"][part] for x in (one, two)), strict=True):
            assert list(other) == list(row)
            assert other == pytest.approx(row, rel=tolerance, abs=1e-4, nan_ok=True)


def test_two_processes_equal_the_joint_run_which_goes_on_with_theirs(data, tmp_path):
    rest = ("--rule", "random", "--grad-accum-steps", "2", "--packed", tmp_path / "packed", *KEPT)
    joint, seated = (tmp_path / name / "run" for name in ("joint", "seated"))
    train(data, tmp_path / "joint", *rest)
    launch(ranked, 2, data, tmp_path / "seated", (*rest, *SEATED), BOTH)
    assert_close_runs(joint, seated)
    rows = (seated / "scalars.csv").read_text()
    page = (seated / "report.html").read_text()
    for name in ("Deep", "Flat"):
        assert f"{name}/lr" in rows and name in page
        assert (seated / name / "best.pth").exists()
        one, two = (read_weights(folder / name / "last.pth") for folder in (joint, seated))
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    assert "data:image/png" in page
    to_one = ("--resume", seated / MIDDLE, "--engine", "two-pass")
    train(data, tmp_path / "to-one", *rest, *to_one)
    assert_close_runs(joint, tmp_path / "to-one" / "run")


@pytest.mark.slow
def test_two_processes_go_on_with_a_joint_run(data, tmp_path):
    train(data, tmp_path / "joint", *KEPT)
    joint = tmp_path / "joint" / "run"
    launch(ranked, 2, data, tmp_path / "seated", (*SEATED, "--resume", joint / MIDDLE), BOTH)
    assert_close_runs(joint, tmp_path / "seated" / "run")


@pytest.mark.slow
def test_teams_of_replicas_equal_data_parallelism(data, tmp_path):
    """Two times two; without batch norm's statistics, of which each process has its own."""
    peers = (f"{TOY}:plain,name=one", f"{TOY}:Flat,name=two")
    launch(ranked, 2, data, tmp_path / "joint", KEPT, peers)
    launch(ranked, 4, data, tmp_path / "seated", (*KEPT, *SEATED), peers)
    joint, seated = (tmp_path / name / "run" for name in ("joint", "seated"))
    assert_close_runs(joint, seated)
    to_two = (*KEPT, "--resume", seated / MIDDLE)
    launch(ranked, 2, data, tmp_path / "to-two", to_two, peers)
    assert_close_runs(joint, tmp_path / "to-two" / "run")


@pytest.mark.slow
def test_a_frozen_peer_teaches_from_a_process_of_its_own(data, tmp_path):
    peers = (f"{TOY}:Flat,name=old,frozen", f"{TOY}:Deep", f"{TOY}:Deep,size=16+24,stride=2")
    rest = ("--score", "confidence", "--amp", "--clip-grad", "0.5", "--sched", "cosine")
    train(data, tmp_path / "joint", *rest, peers=peers)
    launch(ranked, 3, data, tmp_path / "seated", (*rest, *SEATED), peers)
    one, two = (load_run(tmp_path / name / "run") for name in ("joint", "seated"))
    for name, peer in one["peers"].items():
        torch.testing.assert_close(
            two["peers"][name]["module"], peer["module"], rtol=1e-2, atol=1e-3
        )
    history = two["progress"]["history"]
    assert history[-1]["old/loss"] == history[0]["old/loss"]
    assert two["progress"]["lessons"][0]["transfer/Deep->old/share"] == 0


def test_a_frame_broken_for_one_peer_is_passed_over_by_all(data, tmp_path):
    """The frames are in the clips of every second frame alone, for their targets."""
    root = shutil.copytree(data, tmp_path / "broken")
    files = [root / f"annotation/000{k}/images/0001.png" for k in (2, 5)]
    files.append(root / "val/0601/images/0001.png")
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    peers = (f"{TOY}:Flat", f"{TOY}:Deep,stride=2")
    rest = ("--max-bad-samples", "3", "--clips-per-video", "3")
    joint, seated = (tmp_path / name / "run" for name in ("joint", "seated"))
    train(root, tmp_path / "joint", *rest, peers=peers)
    launch(ranked, 2, root, tmp_path / "seated", (*rest, *SEATED), peers)
    assert_close_runs(joint, seated)
    one, two = (load_run(folder)["bad"] for folder in (joint, seated))
    assert two == one and set(one["found"]) == set(map(str, files))
    assert one["left_out"] == [str(files[2])]


def test_a_wrong_number_of_processes_says_how_to_start(data, tmp_path, caplog):
    assert main("dhf1k", "train_dhf1k", arguments(data, tmp_path, *SEATED)) == 1
    assert "2 peers in 1 processes" in caplog.text
    assert "torchrun --nproc-per-node=2" in caplog.text
    assert not (tmp_path / "run").exists()
    asked = ["--data-root", str(data), "--check-data", "--device", "cpu", *SEATED]
    assert main("dhf1k", "train_dhf1k", asked) == 0
