"""Whole runs through the scripts' own functions."""

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from common.checkpoint import load_run, read_weights
from common.guard import STOPPED, UNTAUGHT
from saliency.data import TrainLoader
from saliency.evaluate import evaluate
from saliency.evaluate import main as evaluate_main
from saliency.images import read_map
from saliency.models import create_model, published_state_dict
from saliency.train import main, run
from tests.launch import launch
from tests.saliency.folders import write_dataset, write_image
from tests.saliency.toy import Deep, Flat

ROOT = Path(__file__).parents[2]
TOY = "tests.saliency.toy"
TRAINING = {f"{k:04d}": 8 for k in range(1, 6)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("dhf1k")
    videos = {f"annotation/{k}": n for k, n in TRAINING.items()}
    return write_dataset(root, videos | {"val/0601": 7, "val/0602": 6}, fixations="mat")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the check of the data is kept


def arguments(data, output, *rest, peers=(f"{TOY}:Deep", f"{TOY}:Flat")):
    return [
        *("--data-root", str(data), "--output", str(output), "--experiment", "run"),
        *(word for peer in peers for word in ("--peer", peer)),
        *("--epochs", "2", "-b", "2", "--lr", "1e-2", "--workers", "0", "--val-stride", "3"),
        *("--device", "cpu", *map(str, rest)),
    ]


def train(data, output, *rest, **more):
    return run("dhf1k", "train_dhf1k", arguments(data, output, *rest, **more), bars=False)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = train(data, folder, "--rule", "random", "--recovery-interval", "1", "--soup")
    return trainer.folder


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_what_its_users_expect(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"report.html", "summary.csv", "ledger.csv", "scalars.csv", "args.yaml"} <= names
    assert any(finished.glob("tensorboard/events*"))
    header, *rows = (finished / "summary.csv").read_text().splitlines()
    for name in ("Deep/loss", "Flat/cc", "Deep/nss", "Flat/auc_judd", "ensemble/similarity"):
        assert name in header.split(",")
    assert [row.split(",")[0] for row in rows] == ["0", "1", "2"]
    page = (finished / "report.html").read_text()
    assert "data:image/png" in page and "Flat" in page


def test_every_file_loads_strictly_where_it_came_from(finished):
    for kind in (Deep, Flat):
        for which in ("best", "last", "start", "soup"):
            weights = torch.load(finished / kind.__name__ / f"{which}.pth", weights_only=True)
            kind().load_state_dict(weights, strict=True)


def test_a_soup_is_chosen_by_one_video_and_measured_on_the_other(data, finished, tmp_path):
    for kind in ("Deep", "Flat"):
        told = json.loads((finished / kind / "soup.json").read_text())
        assert told["alphas"] == [0, 0.25, 0.5, 0.75, 1] and told["metric"] == "loss"
        assert told["alpha"] in told["alphas"] and told["measured"] != told["chosen_by"]
        found = evaluate(
            [
                *("--data-root", str(data), "--output", str(tmp_path), "--workers", "0"),
                *("--peer", f"{TOY}:{kind},checkpoint={finished}/{kind}/soup.pth"),
                *("--val-stride", "3", "--device", "cpu"),
            ],
            bars=False,
        )[kind]
        video = found.videos["0602"]
        place = told["alphas"].index(told["alpha"])
        assert video["kldiv"] - video["cc"] == pytest.approx(told["measured"][place], rel=1e-4)
    assert "<h2>Soup" in (finished / "report.html").read_text()


def test_a_run_seeds_all_generators(data, tmp_path):
    found = []
    for name in ("one", "other"):
        random.random(), np.random.rand()
        train(data, tmp_path / name, "--epochs", "1")
        found.append(load_run(tmp_path / name / "run")["ranks"][0]["rng"])
    assert found[0]["python"] == found[1]["python"]
    assert torch.equal(found[0]["numpy"][1], found[1]["numpy"][1])


def test_a_run_repeats_from_its_own_arguments(data, finished, tmp_path):
    path = finished / "args.yaml"
    assert yaml.safe_load(path.read_text())["lr"] == 1e-2
    again = run("dhf1k", "train_dhf1k", ["-c", str(path), "--output", str(tmp_path)], bars=False)
    for name in ("Deep", "Flat"):
        one, other = (read_weights(f / name / "last.pth") for f in (finished, again.folder))
        assert same(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_bit_for_bit(data, finished, tmp_path, workers):
    command = [sys.executable, "saliency/train_dhf1k.py"]
    command += arguments(data, tmp_path, "--rule", "random", "--recovery-interval", "1")
    command += ["--workers", str(workers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.DEVNULL
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
    )
    while len(list(tmp_path.glob("run/run-*.pt"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    at = load_run(tmp_path / "run")["progress"]
    assert (at["epoch"], at["batch"]) < (2, 0)
    trainer = train(
        data, tmp_path, "--rule", "random", "--resume", tmp_path / "run", "--workers", workers
    )
    for name in ("Deep", "Flat"):
        for file in ("best.pth", "last.pth"):
            mine, whole = (torch.load(f / name / file) for f in (trainer.folder, finished))
            assert same(mine, whole)
    whole = load_run(finished)["progress"]
    mine = load_run(trainer.folder)["progress"]
    assert str(mine["history"]) == str(whole["history"])
    assert str(mine["lessons"]) == str(whole["lessons"])


def _weights(trainer):
    return {peer.name: peer.module.state_dict() for peer in trainer.peers}


PEERS = ["--peer", f"{TOY}:Deep", "--peer", f"{TOY}:Flat"]
BOTH = (f"{TOY}:plain,name=one", f"{TOY}:Flat,name=two")


def _in_a_process(world, data, folder):
    os.environ["HOME"] = str(folder)
    trainer = train(data, folder, "-b", "1", peers=BOTH)
    torch.save([_weights(trainer), trainer.progress.history], folder / f"rank{world.rank}.pt")


def test_two_processes_equal_one(tmp_path):
    videos = {f"annotation/{k:04d}": 8 for k in range(1, 5)}
    data = write_dataset(tmp_path / "data", videos | {"val/0601": 7, "val/0602": 6})
    launch(_in_a_process, 2, data, tmp_path)
    (first, history), (second, _) = (
        torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2)
    )
    alone = train(data, tmp_path / "alone", peers=BOTH)
    for name, weights in _weights(alone).items():
        assert same(first[name], second[name])
        for key, value in weights.items():
            torch.testing.assert_close(first[name][key], value, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(history, alone.progress.history, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_three_peers_with_everything_on(data, tmp_path):
    trainer = train(
        data,
        tmp_path,
        *("--amp", "--model-ema", "--grad-accum-steps", "2", "--clip-grad", "0.1", "--nss", "-0.1"),
        *("--packed", tmp_path / "packed", "--sched", "cosine", "--rule", "better"),
        peers=(f"{TOY}:Deep", f"{TOY}:Deep,size=16+24,stride=2", f"{TOY}:Flat,frozen"),
    )
    assert trainer.peers.names == ["Deep", "Deep-2", "Flat"]
    assert same(
        read_weights(trainer.folder / "Flat/last.pth"), trainer.peers[2].module.state_dict()
    )
    first, last = trainer.progress.history[0], trainer.progress.history[-1]
    assert last["Flat/loss"] == first["Flat/loss"] and last["Deep/loss"] != first["Deep/loss"]
    assert any((tmp_path / "packed").iterdir())


def test_a_peer_that_gets_worse_is_rolled_back(data, tmp_path):
    """The loss upside down makes a peer worse; the other one goes on."""
    upside_down = ("--kl", "-1", "--cc", "1", "--eval-metric", "cc")
    guard = ("--guard", "rollback", "--guard-patience", "1", "--guard-metric-drop", "1e-6")
    trainer = train(data, tmp_path, *upside_down, *guard, "--epochs", "4")
    actions = [(e["epoch"], e["action"]) for e in trainer.guard.events if e["peer"] == "Deep"]
    assert actions == [(1, UNTAUGHT), (2, STOPPED)]
    best, last = (read_weights(trainer.folder / "Deep" / f"{w}.pth") for w in ("best", "last"))
    assert same(best, last) and trainer.progress.best["Deep"].epoch == 0
    assert STOPPED in (trainer.folder / "report.html").read_text()


def test_packed_frames_change_nothing(data, tmp_path):
    one = train(data, tmp_path / "a", "--epochs", "1")
    two = train(data, tmp_path / "b", "--epochs", "1", "--packed", tmp_path / "packed")
    assert all(same(_weights(one)[name], _weights(two)[name]) for name in ("Deep", "Flat"))


def test_accumulated_batches_are_one_step(data, tmp_path):
    root = write_dataset(
        tmp_path / "data", {f"annotation/{k:04d}": 8 for k in range(1, 5)} | {"val/0601": 6}
    )
    one = train(root, tmp_path / "a", "-b", "4", "--rule", "none", peers=BOTH)
    two = train(
        root, tmp_path / "b", "-b", "2", "--grad-accum-steps", "2", "--rule", "none", peers=BOTH
    )
    for name, weights in _weights(one).items():
        for key, value in weights.items():
            torch.testing.assert_close(_weights(two)[name][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vinet_s", "vinet_a", "tmfi_net"])
def test_published_models_train_and_go_back(data, tmp_path, name):
    start = create_model(name)
    torch.save(published_state_dict(start), tmp_path / "start.pth")
    size = "64+104" if name == "vinet_a" else "64+96"
    trainer = train(
        data,
        tmp_path,
        *("--epochs", "1", "--val-stride", "8", "-b", "3"),
        peers=(f"{name},size={size},checkpoint={tmp_path}/start.pth,lr=1e-4", f"{TOY}:Flat"),
    )
    weights = torch.load(trainer.folder / name / "last.pth", weights_only=True)
    assert list(weights) == list(published_state_dict(start))
    assert not same(weights, published_state_dict(start))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--data-root", "/nowhere"], "/nowhere: no such folder"),
        (["--peer", "vinet_s,checkpoint=/nowhere.pth"], "/nowhere.pth"),
        (["--peer", f"{TOY}:Deep,name=transfer"], "it is the name of a metric"),
        (["--rule", "one_way:nobody"], "nobody"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--output", "/proc/x"], "give a folder that can be written"),
        (["--resume", "/nowhere"], "/nowhere"),
        (["-c", "/nowhere.yaml"], "no such config file"),
        (["--peer", f"{TOY}:Deep,lr=-1"], "--lr is -1.0"),
        (["--peer", f"{TOY}:Deep,clip_grad=-1"], "--clip-grad is -1.0"),
        (["--peer", f"{TOY}:Deep,kwargs=3"], "expected kwargs.NAME=VALUE"),
        (["--peer", f"{TOY}:Deep,kwargs=3,kwargs.width=4"], "one value and by keys"),
        (["--map-size", "0", "5"], "--map-size is [0, 5]"),
        (["--seed", "-1"], "--seed is -1"),
        (["--sync-bn"], "--sync-bn needs GPUs"),
        (["--metrics", "auc_shuffled", "--eval-metric", "cc"], "--eval-metric is cc"),
    ],
)
def test_bad_input_ends_in_one_line(data, tmp_path, caplog, change, says):
    with caplog.at_level(logging.ERROR):
        assert main("dhf1k", "train_dhf1k", [*arguments(data, tmp_path), *change]) == 1
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert says in record.getMessage() and record.exc_info is None


def test_all_frozen_and_older_runs_are_refused(data, finished, tmp_path, caplog):
    frozen = (f"{TOY}:Deep,frozen", f"{TOY}:Flat,frozen")
    assert main("dhf1k", "train", arguments(data, tmp_path, peers=frozen)) == 1
    assert "every peer is frozen" in caplog.text
    assert main("dhf1k", "train", arguments(data, finished.parent)) == 1
    assert "holds the run files of an earlier run" in caplog.text


def test_another_models_checkpoint_is_refused(data, finished, tmp_path, caplog):
    wrong = f"{TOY}:Deep,checkpoint={finished}/Flat/best.pth"
    peers = (wrong, f"{TOY}:Flat")
    assert main("dhf1k", "train", arguments(data, tmp_path, peers=peers)) == 1
    assert "Flat/best.pth" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, caplog):
    peers = (f"{TOY}:Deep,opt=sgd,lr=1e30", f"{TOY}:Flat")
    rest = ("--log-interval", "1")
    assert main("dhf1k", "train", arguments(data, tmp_path, *rest, peers=peers)) == 1
    assert re.search(r"of Deep.* not finite at optimizer step .*/images/\d+\.png", caplog.text)


@pytest.fixture
def nan_in_batch_1(monkeypatch):
    """Break the second map of the second batch of every epoch; return where its frame is told."""
    told, batches = [], TrainLoader.__iter__

    def broken(loader):
        for k, batch in enumerate(batches(loader)):
            if k == 1:
                batch.maps[1, 0, 0] = float("nan")
                told.append(loader.names_of(batch)()[1])
            yield batch

    monkeypatch.setattr(TrainLoader, "__iter__", broken)
    return told


def test_a_nan_in_a_map_stops_and_its_frame_is_told(data, tmp_path, caplog, nan_in_batch_1):
    assert main("dhf1k", "train", arguments(data, tmp_path)) == 1
    told = f"Deep, Flat was not finite at optimizer step 2, in {nan_in_batch_1[0]};"
    assert told in caplog.text and Path(nan_in_batch_1[0]).is_file()
    assert not list(tmp_path.rglob("run-*.pt"))


def test_or_is_skipped_by_all_peers(data, tmp_path, caplog, nan_in_batch_1):
    more = ("--on-nonfinite", "skip", "--max-skips-in-a-row", "1", "--log-interval", "1")
    trainer = run("dhf1k", "train", arguments(data, tmp_path, *more), bars=False)
    epochs = trainer.progress.epoch
    assert trainer.progress.lessons[-1]["Flat/skipped"] == epochs == len(nan_in_batch_1)
    assert f"{epochs} optimizer steps were skipped by all peers" in caplog.text


@pytest.fixture
def broken_data(data, tmp_path):
    """A copy with a broken frame of a training video, and one of a validation video."""
    root = shutil.copytree(data, tmp_path / "broken")
    files = [root / "annotation/0002/images/0003.png", root / "val/0602/images/0004.png"]
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    return root, [str(file) for file in files]


def test_broken_files_are_replaced_left_out_and_told(broken_data, data, tmp_path, caplog):
    root, files = broken_data
    assert main("dhf1k", "train", arguments(root, tmp_path)) == 1
    assert "2 faults in the data" in caplog.text
    assert main("dhf1k", "train", arguments(root, tmp_path, "--max-bad-samples", 1)) == 1
    more = ("--max-bad-samples", 2, "--clips-per-video", 2, "--recovery-interval", 1)
    trainer = train(root, tmp_path, *more, "--checkpoint-hist", 99, "--workers", 1)
    assert set(trainer.bad.found) == set(files) and trainer.bad.left_out == {files[1]}
    assert f"replaced by others: {files[0]}: no image that can be decoded" in caplog.text
    assert re.search(r"evaluated without [1-3] of 5 samples", caplog.text)
    page = (trainer.folder / "report.html").read_text()
    assert "2 broken files were done without" in page and "left out 1 of them" in page
    middle = trainer.folder / "run-00000-00000003.pt"
    again = train(root, tmp_path / "again", *more, "--resume", middle)
    assert again.progress == trainer.progress and again.bad.found == trainer.bad.found
    asked = ("--packed", str(tmp_path / "packed"), "--max-bad-samples", 2)
    assert main("dhf1k", "train", arguments(root, tmp_path / "x", *asked)) == 1
    assert "--max-bad-samples 2 with --packed" in caplog.text


def test_a_killed_worker_ends_in_one_line(data, tmp_path, caplog, monkeypatch):
    def read(path):
        if torch.utils.data.get_worker_info() is not None and path.endswith("0005.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return read_map(path)

    monkeypatch.setattr("saliency.data.read_map", read)
    assert main("dhf1k", "train", arguments(data, tmp_path, "--workers", "1")) == 1
    assert "error: a process that reads data" in caplog.text and "(--workers" in caplog.text
    assert "Traceback" not in caplog.text


def test_check_data_lists_what_is_wrong_and_builds_nothing(tmp_path, caplog):
    root = write_dataset(tmp_path / "d", {"annotation/0001": 5, "val/0601": 4})
    asked = ["--data-root", str(root), "--check-data"]
    assert main("dhf1k", "train_dhf1k", asked) == 0
    (root / "annotation/0001/maps/0003.png").unlink()
    (root / "annotation/0001/images/.DS_Store").touch()
    (root / "val/0601/images/0002.png").write_bytes(b"no image")
    assert main("dhf1k", "train_dhf1k", asked) == 1
    for told in ("0003.png: frame without a map", ".DS_Store", "0601/images/0002.png"):
        assert told in caplog.text
    assert not (tmp_path / "output").exists()


def test_empty_maps_are_no_targets_and_no_nan(tmp_path):
    import numpy as np

    root = write_dataset(
        tmp_path / "d", {"annotation/0001": 5, "annotation/0002": 5, "val/0601": 4}
    )
    for k in (1, 2, 4):
        write_image(root / f"annotation/0001/maps/{k:04d}.png", np.zeros((36, 64), np.uint8))
    write_image(root / "val/0601/maps/0002.png", np.zeros((36, 64), np.uint8))
    trainer = train(root, tmp_path, "--epochs", "3", "--val-stride", "1")
    assert all(value == value for value in trainer.progress.history[-1].values())


@pytest.mark.parametrize("dataset", ["hollywood2", "ucf_sports"])
def test_the_other_data_sets(tmp_path, dataset):
    videos = {"training/clip1_1": 5, "training/clip1_2": 4, "testing/clip2_1": 6}
    root = write_dataset(tmp_path / "d", videos, fixations="png")
    trainer = run(dataset, f"train_{dataset}", arguments(root, tmp_path), bars=False)
    assert trainer.progress.epoch == 2


def test_evaluation_writes_tables_maps_and_a_report(data, finished, tmp_path):
    peers = [f"{TOY}:Deep,checkpoint={finished}/Deep/best.pth", f"{TOY}:Flat"]
    scores = evaluate(
        [
            *("--data-root", str(data), "--output", str(tmp_path), "--workers", "0"),
            *(word for peer in peers for word in ("--peer", peer)),
            *("--predictions", "--device", "cpu", "--exact-auc"),
        ],
        bars=False,
    )
    assert list(scores) == ["Deep", "Flat", "ensemble"]
    assert scores["Deep"].frames == 13 and set(scores["Deep"].videos) == {"0601", "0602"}
    assert scores["Deep"].flags["auc_shuffled"]["splits"] is None
    assert len(list(tmp_path.glob("Deep/0601/*.png"))) == 7
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "auc_shuffled" in header and len(rows) == 3
    assert len((tmp_path / "videos.csv").read_text().splitlines()) == 1 + 3 * 2
    assert "splits = None" in (tmp_path / "report.html").read_text()


def test_evaluation_of_the_best_file_gives_the_runs_own_numbers(data, finished, tmp_path):
    scores = evaluate(
        [
            *("--data-root", str(data), "--output", str(tmp_path), "--workers", "0"),
            *("--peer", f"{TOY}:Flat,checkpoint={finished}/Flat/last.pth"),
            *("--val-stride", "3", "--device", "cpu"),
        ],
        bars=False,
    )
    told = load_run(finished)["progress"]["history"][-1]
    for metric in ("cc", "kldiv", "nss", "auc_judd", "similarity"):
        assert scores["Flat"].mean[metric] == pytest.approx(told[f"Flat/{metric}"], rel=1e-5)


def test_metrics_without_fixations_are_refused(tmp_path, caplog):
    root = write_dataset(tmp_path / "d", {"annotation/0001": 4, "val/0601": 4})
    asked = ["--data-root", str(root), "--peer", f"{TOY}:Flat", "--output", str(tmp_path)]
    assert evaluate_main([*asked, "--metrics", "nss"]) == 1
    assert "has no fixations" in caplog.text
    assert evaluate_main([*asked, "--workers", "0", "--device", "cpu"]) == 0
    assert "auc" not in (tmp_path / "metrics.csv").read_text()


def test_engines_give_the_same_run(data, finished, tmp_path):
    """Up to rounding; and a run of one goes on under the other."""
    rest = ("--rule", "random", "--engine", "two-pass", "--log-interval", "1")
    trainer = train(data, tmp_path, *rest, "--epochs", "1")
    rest = (*rest[:2], "--resume", trainer.folder)
    assert train(data, tmp_path, *rest).progress.epoch == 2
    for name in ("Deep", "Flat"):
        mine, whole = (read_weights(f / name / "last.pth") for f in (trainer.folder, finished))
        for key, value in whole.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-5)


def test_a_resume_goes_on_with_averages_schedules_and_scaling(data, tmp_path):
    rest = ["--model-ema", "--model-ema-decay", "0.8", "--sched", "cosine", "--warmup-steps", "2"]
    rest += ["--amp", "--amp-dtype", "float16", "--grad-accum-steps", "2", "--clip-grad", "0.5"]
    rest += ["--transfer-warmup-steps", "3", "--recovery-interval", "1", "--checkpoint-hist", "9"]
    whole = train(data, tmp_path / "whole", *rest)
    (middle,) = whole.folder.glob("run-00001-00000002.pt")
    again = train(data, tmp_path / "again", *rest, "--resume", middle)
    for name in ("Deep", "Flat"):
        one, other = (read_weights(t.folder / name / "last.pth") for t in (whole, again))
        assert same(one, other)
    assert str(again.progress.history) == str(whole.progress.history)


def test_a_refused_resume_leaves_the_arguments_as_they_were(data, tmp_path, caplog):
    trainer = train(data, tmp_path)
    before = (trainer.folder / "args.yaml").read_text()
    peers = (f"{TOY}:Deep", f"{TOY}:Flat,opt=sgd")
    resume = ("--resume", trainer.folder)
    assert main("dhf1k", "train", arguments(data, tmp_path, *resume, peers=peers))
    assert f"opt of peer 2 ({TOY}:Flat) 'not given' -> 'sgd'" in caplog.text
    resume = ("--allow-changed-options", *resume)
    assert main("dhf1k", "train", arguments(data, tmp_path, *resume, peers=peers))
    assert "state of Adam, not of SGD" in caplog.text
    assert (trainer.folder / "args.yaml").read_text() == before
    fresh = ("--no-resume-opt", "--epochs", "3", *resume)
    assert train(data, tmp_path, *fresh, peers=peers).progress.epoch == 3


def test_the_arguments_of_the_general_script_name_their_data_set(tmp_path):
    videos = {"training/clip1_1": 5, "testing/clip2_1": 6}
    root = write_dataset(tmp_path / "d", videos)
    asked = ["--dataset", "hollywood2", *arguments(root, tmp_path)]
    trainer = run(None, "train", asked, bars=False)
    config = str(trainer.folder / "args.yaml")
    again = run(None, "train", ["-c", config, "--output", str(tmp_path / "b")], bars=False)
    assert again.progress.epoch == 2


def test_a_loss_on_fixations_needs_some(tmp_path, caplog):
    root = write_dataset(tmp_path / "d", {"annotation/0001": 4, "val/0601": 4})
    assert main("dhf1k", "train", arguments(root, tmp_path, "--nss", "-1")) == 1
    assert "has no fixations" in caplog.text


@pytest.mark.parametrize("name", ["ensemble", "../out", "Flat"])
def test_evaluation_refuses_names_that_cannot_be(data, tmp_path, caplog, name):
    asked = ["--data-root", str(data), "--output", str(tmp_path / "out"), "--peer", f"{TOY}:Flat"]
    assert evaluate_main([*asked, "--peer", f"{TOY}:Flat,name={name}"]) == 1
    assert name in caplog.text and not (tmp_path / "out").exists()


def test_evaluation_needs_a_folder_that_can_be_written(data, caplog):
    asked = ["--data-root", str(data), "--peer", f"{TOY}:Flat", "--output", "/proc/1"]
    assert evaluate_main(asked) == 1
    assert "give a folder that can be written" in caplog.text


def _on_broken_data(world, root, folder):
    status = main("dhf1k", "train_dhf1k", arguments(root, folder))
    (folder / f"{world.rank}.txt").write_text(str(status))


def test_a_fault_ends_all_ranks(tmp_path):
    root = write_dataset(tmp_path / "d", {"annotation/0001": 4, "val/0601": 4})
    (root / "annotation/0001/maps/0002.png").unlink()
    launch(_on_broken_data, 2, root, tmp_path)
    assert [(tmp_path / f"{i}.txt").read_text() for i in range(2)] == ["1", "1"]


def test_one_command_starts_a_run_and_goes_on_with_it(data, tmp_path, caplog):
    rest = ("--resume", "auto", "--recovery-interval", "1", "--checkpoint-hist", "9")
    first = train(data, tmp_path, *rest, "--epochs", "1")
    newest = sorted(first.folder.glob("run-*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    again = train(data, tmp_path, *rest)
    assert "passed over" in caplog.text and newest.name in caplog.text
    assert again.folder == first.folder and again.progress.epoch == 2
    assert main("dhf1k", "train", ["--data-root", str(data), "--resume", "auto", *PEERS]) == 1
    assert "--resume auto needs --experiment" in caplog.text
