"""The held-out videos, and an experiment on small ones from its YAML to its report."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from common.checkpoint import read_weights
from common.experiment import read_experiment
from common.experiment.command import run as run_experiment
from common.experiment.work import labels_of, work
from common.options import OptionError
from saliency.errors import DataError
from saliency.experiment import Saliency, main, moved
from saliency.held_out import split_held_out
from saliency.layouts import open_dataset
from saliency.train import run
from tests.saliency.folders import write_dataset
from tests.saliency.test_train import arguments

CONFIGS = Path(__file__).parents[2] / "saliency/configs/experiments"
TOY = "tests.saliency.toy"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("dhf1k")
    videos = {f"annotation/{k:04d}": 5 for k in range(1, 7)}
    return write_dataset(root, videos | {"val/0601": 5, "val/0602": 4}, fixations="png")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the check of the data is kept


def names(videos):
    return [video.name for video in videos.videos]


def test_whole_videos_are_held_out_drawn_by_the_seed_alone(data):
    videos = open_dataset("dhf1k", data, "train")
    rest, part = split_held_out(videos, 0.34, 3)
    assert len(part.videos) == 2 and sorted(names(rest) + names(part)) == names(videos)
    assert names(rest) == sorted(names(rest)) and part.split == "held-out"
    draws = {tuple(names(split_held_out(videos, 0.34, seed)[1])) for seed in range(12)}
    assert len(draws) > 3 and names(split_held_out(videos, 0.34, 3)[1]) == names(part)
    with pytest.raises(OptionError, match="has 6 videos; nothing would be left"):
        split_held_out(videos, 0.95, 0)


def test_shots_of_one_film_stay_together(tmp_path):
    shots = {f"training/clip{k}_{i}": 1 for k in range(4) for i in (1, 2)}
    root = write_dataset(tmp_path, shots)
    for seed in range(5):
        _, part = split_held_out(open_dataset("hollywood2", root, "train"), 0.25, seed)
        assert len({name.split("_")[0] for name in names(part)}) == 1 and len(part.videos) == 2


def test_training_never_sees_the_held_out_videos_or_the_test_set(data, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(data / "annotation", alone / "annotation")  # there is no val folder at all
    mine = run("dhf1k", "train", arguments(alone, tmp_path / "a", "--held-out", "0.34"), bars=False)
    _, part = split_held_out(open_dataset("dhf1k", alone, "train"), 0.34, 0)
    for name in names(part):
        (alone / "val").mkdir(exist_ok=True)
        (alone / "annotation" / name).rename(alone / "val" / name)
    by_hand = run("dhf1k", "train", arguments(alone, tmp_path / "b"), bars=False)
    assert mine.progress.history == by_hand.progress.history
    for file in ("Deep/last.pth", "Flat/last.pth"):
        one, other = (read_weights(t.folder / file) for t in (mine, by_hand))
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("share", ["-0.1", "1", "nan"])
def test_the_share_is_checked(data, tmp_path, share):
    with pytest.raises(OptionError, match="--held-out"):
        run("dhf1k", "train", arguments(data, tmp_path, f"--held-out={share}"), bars=False)


def test_what_is_trained_on_is_not_measured_on(tmp_path):
    root = write_dataset(tmp_path / "data", {f"training/{k}": 2 for k in range(4)})
    (root / "testing").symlink_to(root / "training")
    told = "8 of 8 files to train on are measured on too"
    with pytest.raises(DataError, match=told):
        run("hollywood2", "train", arguments(root, tmp_path), bars=False)
    path = small(root, tmp_path)
    content = yaml.safe_load(path.read_text())
    content["train"]["dataset"] = "hollywood2"
    path.write_text(yaml.safe_dump(content))
    task = Saliency()
    with pytest.raises(DataError, match=told):
        work(read_experiment(task.read(path), path), task, "start:3")


def small(data, folder, **more):
    content = {
        "output": str(folder / "out"),
        "seeds": [3],
        "held_out": 0.34,
        "peers": [
            {"model": f"{TOY}:Deep", "name": "a", "kwargs": {"width": 3}},
            {"model": f"{TOY}:Flat", "name": "b", "lr": 2e-2},
        ],
        "train": {
            **{"dataset": "dhf1k", "data_root": str(data), "lr": 1e-2, "epochs": 2},
            **{"batch_size": 4, "workers": 0, "val_stride": 2, "device": "cpu"},
        },
        "controls": ["solo", "none", "one_way"],
        "arms": {"hot": {"temperature": 2}},
        **more,
    }
    path = folder / "exp.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_frozen_peer_stays_what_it_is_where_it_is_alone(data, tmp_path, caplog):
    path = small(data, tmp_path, controls=["none", "solo"], arms={"best": {}})
    content = yaml.safe_load(path.read_text())
    content["train"]["epochs"] = 1
    content["peers"][1] = {"model": f"{TOY}:Flat", "name": "b", "frozen": True}
    path.write_text(yaml.safe_dump(content))
    task = Saliency()
    experiment = read_experiment(task.read(path), path)
    start, solo, none = (work(experiment, task, x) for x in ("start:3", "solo:3", "none:3"))
    for which in ("chosen", "last"):
        assert str(solo[which]) == str(none[which])  # as text: a frame may have no score
        assert solo[which]["metrics"]["b/cc"] == start["test"]["metrics"]["b/cc"]
        assert solo[which]["metrics"]["b/fixed"] == solo[which]["metrics"]["b/broken"] == 0
    content["peers"][0]["frozen"] = True
    path.write_text(yaml.safe_dump({**content, "output": str(tmp_path / "other")}))
    assert main([str(path)]) == 1 and "every peer is frozen" in caplog.text


def test_an_experiment_from_its_yaml_to_its_report(data, tmp_path):
    path = small(data, tmp_path)
    task = Saliency()
    experiment = read_experiment(task.read(path), path)
    rows = {label: work(experiment, task, label) for label in labels_of(experiment)}
    start, told = rows["start:3"], {}
    for arm in ("none", "one_way", "hot"):
        first = rows[f"{arm}:3"]["history"][0]
        assert first["a/cc"] == pytest.approx(start["held_out"]["metrics"]["a/cc"])
        told[arm] = yaml.safe_load((tmp_path / f"out/seed-3/{arm}/run/args.yaml").read_text())
        assert told[arm]["peers"][1]["lr"] == 2e-2 and told[arm]["eval_metric"] == "cc"
    strongest = max("ab", key=lambda name: start["held_out"]["metrics"][f"{name}/cc"])
    assert told["one_way"]["rule"] == f"one_way:{strongest}" and told["hot"]["temperature"] == 2
    for what in ("chosen", "last"):
        found = rows["solo:3"][what]["metrics"]  # each from a run of its own, measured together
        assert {"a/cc", "b/cc", "ensemble/cc", "a/kldiv", "b/nss", "b/auc_judd"} <= set(found)
        assert 0 <= found["b/fixed"] + found["b/broken"] <= 100 + 1e-9
    assert rows["none:3"]["last"]["metrics"]["a/cc"] != start["test"]["metrics"]["a/cc"]
    assert main([str(path), "--report"]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "broken ← % → fixed" in page  # shares of the frames, not counts
    assert "Other metrics" in page and "better, and worse, than at its start" in page
    analysis = json.loads((tmp_path / "out/analysis.json").read_text())
    assert analysis["beside"]["kldiv"]["lower_is_better"]
    assert list(analysis["beside"]) == ["kldiv", "similarity", "nss", "auc_judd"]


def test_a_start_measured_again_moves_no_frame(data, tmp_path):
    task, path = Saliency(), small(data, tmp_path)
    experiment = read_experiment(task.read(path), path)
    work(experiment, task, "start:3")
    options = experiment.options("none", 3)
    files = {name: tmp_path / f"out/seed-3/start/{name}.pth" for name in "ab"}
    found = task.measure(options, files, files).metrics
    assert [found[f"{name}/{flip}"] for name in "ab" for flip in ("fixed", "broken")] == [0] * 4


def test_moved_by_hand():
    nan = math.nan
    before = torch.tensor([0.1, 0.2, 0.3, nan, 0.5])
    after = torch.tensor([0.2, 0.1, 0.3, 0.4, nan])
    assert moved(before, after) == pytest.approx({"fixed": 100 / 3, "broken": 100 / 3})


def test_what_ships_is_understood():
    for path in CONFIGS.glob("*.yaml"):
        experiment = read_experiment(Saliency().read(path), path)
        assert len(experiment.seeds) >= 5 and "none" in experiment.arms


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"arms": {"x": {"temprature": 1}}}, "temperature"),
        ({"arms": {"x": {"transfer_classes": "non-target"}}}, "no true class"),
        ({"arms": {"x": {"eval_metric": "loss"}}}, "eval_metric loss"),
    ],
)
def test_faults_end_in_one_line_before_any_work(data, tmp_path, caplog, more, told):
    assert main([str(small(data, tmp_path, **more))]) == 1
    assert "arm 'x'" in caplog.text and told in caplog.text
    assert "options.yaml" not in caplog.text  # which the user has never seen
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (
            {"model": "vinet_z"},
            "model 'vinet_z', expected one of .*did you mean vinet_s or vinet_a",
        ),
        ({"model": "vinet_s", "checkpoint": "no.pt"}, r"no\.pt: no such file"),
        ({"model": "vinet_s", "backbone": "no.pt"}, r"no\.pt: no such file"),
        ({"model": "tests.saliency.toy:Dep"}, "tests.saliency.toy:Dep: cannot be imported"),
        ({"model": "vinet_s.pt"}, r"vinet_s\.pt is a file; give it to its model"),
    ],
)
def test_models_that_cannot_be_had_are_told_before_any_job(
    data, tmp_path, entry, told, monkeypatch
):
    monkeypatch.setattr("common.experiment.command.run_jobs", None)
    path = small(data, tmp_path)
    content = yaml.safe_load(path.read_text())
    content["peers"][1] = {**entry, "name": "b"}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(OptionError, match=rf"{path}: peer 'b': {told}"):
        run_experiment(Saliency(), [str(path)])
    assert not (tmp_path / "out").exists()


def test_missing_data_is_told_before_any_work(tmp_path, caplog):
    assert main([str(small(tmp_path / "none", tmp_path))]) == 1
    assert "no such folder" in caplog.text and not (tmp_path / "out").exists()
