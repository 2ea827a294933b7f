"""The held-out part of real images, and an experiment on them from its YAML to its report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from classification import experiment as script
from classification.data import classes_of, open_dataset
from classification.experiment import Classification, main, measured
from classification.held_out import Part, labels_of, split_held_out
from classification.train import run
from common.broken import BadSampleError
from common.checkpoint import read_weights
from common.experiment import read_experiment
from common.experiment.command import run as run_experiment
from common.experiment.work import labels_of as jobs_of
from common.experiment.work import work
from common.options import OptionError
from tests.classification.test_data import options_of
from tests.classification.test_train import arguments_of, assert_equal_weights, weights_of

CONFIGS = Path(__file__).parents[2] / "classification/configs/experiments"


@pytest.fixture(scope="module")
def train_set(digits):
    return open_dataset(options_of(digits), True, 3)


def test_the_held_out_part_is_stratified_and_drawn_by_the_seed_alone(train_set):
    rest, part = split_held_out(train_set, 0.2, 3)
    assert np.bincount(labels_of(train_set)[part.indices]).tolist() == [8] * 10
    assert sorted([*rest.indices, *part.indices]) == list(range(400))
    again, other = (split_held_out(train_set, 0.2, seed)[1].indices for seed in (3, 4))
    assert np.array_equal(part.indices, again) and not np.array_equal(part.indices, other)
    assert classes_of(part) == classes_of(train_set)
    assert part[5][1] == train_set[part.indices[5]][1]


def test_parts_have_transforms_of_their_own(train_set):
    rest, part = split_held_out(train_set, 0.2, 3)
    rest.transform, part.transform = (lambda image: "train"), (lambda image: "held out")
    assert (rest[0][0], part[0][0]) == ("train", "held out")
    assert train_set.transform is None


def test_a_class_must_be_left_and_labels_must_be_told(train_set):
    few = Part(train_set, range(400))
    few.targets, few.reader = [0, 0, 1], None
    with pytest.raises(OptionError, match="class 1 has 1 training images"):
        split_held_out(few, 0.3, 0)
    with pytest.raises(OptionError, match="Part does not tell them"):
        labels_of(Part(torch.utils.data.TensorDataset(torch.zeros(3)), [0]))


def test_training_never_sees_the_held_out_part_or_the_test_set(digits, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits / "train", data / "train")  # there is no validation folder at all
    progress = run(arguments_of(data, tmp_path, "--held-out", "0.2", epochs=1), bars=False)
    shutil.copytree(data / "train", tmp_path / "split" / "train")
    rest, part = split_held_out(open_dataset(options_of(data), True, 3), 0.2, 42)
    for i in part.indices:
        path = Path(rest.reader.filename(int(i), absolute=True))
        moved = tmp_path / "split/validation" / path.parent.name / path.name
        moved.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "split/train" / path.parent.name / path.name).rename(moved)
    by_hand = run(arguments_of(tmp_path / "split", tmp_path / "other", epochs=1), bars=False)
    assert progress.history == by_hand.history
    assert_equal_weights(weights_of(tmp_path, "a"), weights_of(tmp_path / "other", "a"))


@pytest.mark.parametrize("share", ["-0.1", "1", "nan"])
def test_the_share_is_checked(digits, tmp_path, share):
    with pytest.raises(OptionError, match="--held-out"):
        run(arguments_of(digits, tmp_path, f"--held-out={share}"))


def small(digits, folder, **more):
    kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = {"model": "vit_tiny_patch16_224", "img_size": 32, "kwargs": kwargs, "pretrained": False}
    content = {
        "output": str(folder / "out"),
        "seeds": [3],
        "held_out": 0.2,
        "peers": [{**model, "name": "a"}, {**model, "name": "b", "img_size": 24, "lr": 2e-3}],
        "train": {
            **{"data": str(digits), "num_classes": 10, "opt": "adamw", "lr": 1e-3, "epochs": 2},
            **{"warmup_epochs": 0, "batch_size": 40, "workers": 0, "scale": [0.8, 1], "hflip": 0},
            "device": "cpu",
        },
        "controls": ["solo", "none", "one_way"],
        "arms": {"hot": {"temperature": 2, "calibrate_scores": "start"}},
        **more,
    }
    path = folder / "exp.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_an_experiment_from_its_yaml_to_its_report(digits, tmp_path):
    path = small(digits, tmp_path)
    task = Classification()
    experiment = read_experiment(task.read(path), path)
    rows = {label: work(experiment, task, label) for label in jobs_of(experiment)}
    start = rows["start:3"]
    for arm in ("none", "one_way", "hot"):
        run_folder = tmp_path / "out/seed-3" / arm / "run"
        first = rows[f"{arm}:3"]["history"][0]
        assert first["a/top1"] == pytest.approx(start["held_out"]["metrics"]["a/top1"])
        told = yaml.safe_load((run_folder / "args.yaml").read_text())
        assert told["rule"] == {"none": "none", "hot": "best"}.get(arm, told["rule"])
        assert told["peers"][1]["lr"] == 2e-3 and told["peers"][1]["name"] == "b"
    strongest = max("ab", key=lambda name: start["held_out"]["metrics"][f"{name}/top1"])
    told = yaml.safe_load((tmp_path / "out/seed-3/one_way/run/args.yaml").read_text())
    assert told["rule"] == f"one_way:{strongest}"
    last = rows["hot:3"]["last"]
    flips = last["metrics"]["a/fixed"] - last["metrics"]["a/broken"]
    gain = last["metrics"]["a/top1"] - start["test"]["metrics"]["a/top1"]
    assert flips / 200 * 100 == pytest.approx(gain)
    assert np.mean(list(last["classes"]["a"].values())) == pytest.approx(last["metrics"]["a/top1"])
    # alone at its own size, b sees other pixels than beside a; their starts are the same
    files = [tmp_path / f"out/seed-3/{x}/best.safetensors" for x in ("solo/a/a", "none/run/a")]
    assert all(read_weights(file) for file in files)
    assert main([str(path), "--report"]) == 0
    assert "Calibration" in (tmp_path / "out/report.html").read_text()
    analysis = json.loads((tmp_path / "out/analysis.json").read_text())
    assert analysis["calibration"]["arms"]["hot"]["peers"]["a"]["after"]["mean"] > 0
    mended = analysis["recalibrated"]["arms"]["hot"]["peers"]["a"]
    chosen = rows["hot:3"]["chosen"]["metrics"]
    assert mended["after"]["mean"] == chosen["a/ece_calibrated"]
    assert mended["before"]["mean"] == start["test"]["metrics"]["a/ece_calibrated"]
    fitted = analysis["temperatures"]["hot"]["a"]
    assert set(fitted.values()) == {chosen["a/temperature"]}
    told = (tmp_path / "out/comparisons.csv").read_text().splitlines()
    of_it = [line for line in told if line.startswith("calibration,ece_calibrated,")]
    assert len(of_it) == 3 * 5  # arms but the control; mean, strongest, weakest, a, b
    assert "last/a/ece_calibrated" in (tmp_path / "out/runs.csv").read_text()


def test_measured_by_hand():
    from classification.evaluation import Scores

    right = torch.tensor([[True, False, True, True]])
    confidence = torch.tensor([[0.9, 0.9, 0.6, 0.6]])
    target = torch.tensor([0, 0, 2, 2])
    scores = Scores(right, right, torch.zeros(1, 4), right[0], confidence, target)
    found = measured(scores, ["a"], torch.tensor([[False, True, True, True]]), ["x", "y", "z"])
    assert found.classes == {"a": {"x": 50.0, "z": 100.0}}
    assert found.metrics["a/fixed"] == found.metrics["a/broken"] == 1
    assert found.metrics["a/ece"] == pytest.approx(100 * (0.8 + 0.8) / 4)


def test_recalibrated_by_hand():
    from classification.evaluation import Scores

    # the same answers, 0.9 sure as they are and 0.7 sure at the temperature; one was not read
    right = torch.tensor([[True, True, True, False, False]])
    sure, calmer = torch.full((1, 5), 0.9), torch.full((1, 5), 0.7)
    target = torch.tensor([0, 0, 1, 1, -1])
    scores = Scores(right, right, torch.zeros(1, 5), right[0], sure, target, calmer)
    found = measured(scores, ["a"], None, ["x", "y"], temperatures=[2.5]).metrics
    assert found["a/ece"] == pytest.approx(100 * (0.9 - 0.75), abs=1e-4)
    assert found["a/ece_calibrated"] == pytest.approx(100 * (0.75 - 0.7), abs=1e-4)
    assert found["a/temperature"] == 2.5
    assert "a/temperature" not in measured(scores, ["a"], None, ["x", "y"]).metrics


class Nearest(torch.nn.Module):
    """Says of which class's mean image an image is least far from, the louder the surer."""

    num_classes = 10

    def __init__(self, means, loud):
        super().__init__()
        self.means, self.loud = torch.nn.Parameter(means), loud

    def forward(self, images):
        far = (seen_by_it(images)[:, None] - self.means).square().sum(dim=2)
        return -self.loud * far


def seen_by_it(images):
    return torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1), 8).flatten(1)


def mean_images(folder):
    """Return each class's mean image [10, 64], in the view of a ViT."""
    classes = [sorted(folder.joinpath(str(k)).glob("*.png")) for k in range(10)]
    images = [torch.stack([pil_to_tensor(Image.open(f)) for f in files]) for files in classes]
    return torch.stack([seen_by_it(x / 127.5 - 1).mean(dim=0) for x in images])


def test_temperatures_of_the_held_out_part_undo_how_loud_a_model_is(digits, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    path = small(data, tmp_path, controls=["none"], arms={"best": {}})
    task = Classification()
    experiment = read_experiment(task.read(path), path)
    work(experiment, task, "start:3")
    starts = {name: tmp_path / f"out/seed-3/start/{name}.safetensors" for name in "ab"}
    build, means = script.build_modules, mean_images(data / "train")

    def measure(*loud):
        def built(specs, asked):
            return [Nearest(means, x) for x in loud], build(specs, asked)[1]

        monkeypatch.setattr(script, "build_modules", built)
        return task.measure(experiment.options("none", 3), starts, starts).metrics

    found = measure(1.0, 3.0)
    assert found["a/top1"] > 60 and found["a/ece"] > found["a/ece_calibrated"] + 2
    assert abs(found["a/ece"] - found["b/ece"]) > 1
    again = measure(3.0, 3.0)
    assert again["a/top1"] == found["a/top1"]
    assert again["a/temperature"] / found["a/temperature"] == pytest.approx(3, rel=2e-3)
    assert again["a/ece_calibrated"] == pytest.approx(found["a/ece_calibrated"], abs=0.1)
    # the test set has no say in it, the held-out part has
    for file in (data / "validation").rglob("*.png"):
        file.write_bytes((data / "train" / file.parent.name / file.name).read_bytes())
    other = measure(1.0, 3.0)
    assert other["a/temperature"] == found["a/temperature"] and other["a/ece"] != found["a/ece"]
    (data / "train/0").rename(data / "train/x")
    (data / "train/1").rename(data / "train/0")
    (data / "train/x").rename(data / "train/1")
    assert measure(1.0, 3.0)["a/temperature"] > 1.2 * found["a/temperature"]


def test_what_could_not_be_read_counts_nowhere():
    from classification.evaluation import Scores

    right = torch.tensor([[True, False, False, True]])
    confidence = torch.tensor([[0.9, 0.9, 0.1, 0.6]])
    target = torch.tensor([0, 0, -1, 2])
    scores = Scores(right, right, torch.zeros(1, 4), right[0], confidence, target)
    before, was_valid = torch.tensor([[True, True, True, False]]), torch.tensor([1, 1, 1, 0]) > 0
    found = measured(scores, ["a"], before, ["x", "y", "z"], was_valid)
    assert found.classes == {"a": {"x": 50.0, "z": 100.0}}
    assert (found.metrics["a/fixed"], found.metrics["a/broken"]) == (0, 1)
    assert found.metrics["a/ece"] == pytest.approx(100 * (0.4 * 2 + 0.4) / 3)


def test_broken_images_are_left_out_of_what_is_measured(digits, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    next((data / "validation").rglob("*.png")).write_bytes(b"no image")
    found = {}
    for most in (0, 1):
        path = small(data, tmp_path, controls=["none"], arms={"best": {}})
        content = yaml.safe_load(path.read_text())
        content["train"] |= {"max_bad_samples": most, "epochs": 1}
        path.write_text(yaml.safe_dump(content))
        task = Classification()
        experiment = read_experiment(task.read(path), path)
        if most == 0:
            with pytest.raises(BadSampleError, match="mend or remove it"):
                work(experiment, task, "start:3")
    found = [work(experiment, task, label) for label in ("start:3", "best:3")]
    assert "-1" not in found[1]["last"]["classes"]["a"]
    values = [found[0]["test"]["metrics"]["a/top1"], found[1]["last"]["metrics"]["a/top1"]]
    assert all((x * 199 / 100) == pytest.approx(round(x * 199 / 100), abs=1e-6) for x in values)


def test_a_frozen_peer_stays_what_it_is_where_it_is_alone(digits, tmp_path, caplog):
    path = small(digits, tmp_path, controls=["none", "solo"], arms={"best": {}})
    content = yaml.safe_load(path.read_text())
    content["train"]["epochs"] = 1
    content["peers"][1]["frozen"] = True
    path.write_text(yaml.safe_dump(content))
    task = Classification()
    experiment = read_experiment(task.read(path), path)
    start, solo, none = (work(experiment, task, x) for x in ("start:3", "solo:3", "none:3"))
    for which in ("chosen", "last"):
        assert solo[which] == none[which]
        assert solo[which]["metrics"]["b/top1"] == start["test"]["metrics"]["b/top1"]
        assert solo[which]["metrics"]["b/fixed"] == solo[which]["metrics"]["b/broken"] == 0
    assert solo["last"]["metrics"]["a/loss"] != start["test"]["metrics"]["a/loss"]
    assert main([str(path), "--report"]) == 0
    content["peers"][0]["frozen"] = True
    path.write_text(yaml.safe_dump({**content, "output": str(tmp_path / "other")}))
    assert main([str(path)]) == 1 and "every peer is frozen" in caplog.text
    assert not (tmp_path / "other").exists()


def test_what_ships_is_understood():
    for path in CONFIGS.glob("*.yaml"):
        experiment = read_experiment(Classification().read(path), path)
        assert len(experiment.seeds) >= 5 and "none" in experiment.arms


def test_a_test_set_that_is_trained_on_is_refused_before_any_training(digits, tmp_path):
    path = small(digits / "train", tmp_path)  # no split folders: timm reads all of it for both
    task = Classification()
    experiment = read_experiment(task.read(path), path)
    with pytest.raises(OptionError, match="400 of 400 files to train on are measured on too"):
        work(experiment, task, "start:3")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"model": "resnet5O"}, "resnet5O: unknown model; did you mean .*resnet50"),
        ({"model": "resnet50.a1_in2k"}, "unknown pretrained tag 'a1_in2k' of resnet50; its tags"),
        ({"checkpoint": "no.pth"}, r"no\.pth: no such file"),
        ({"model": "no.safetensors"}, r"no\.safetensors: no such file"),
        (
            {"model": "coatnet_0_224", "pretrained": True},
            "timm has no weights for it; give a local",
        ),
        ({"model": "dinov2_vits14_lc", "checkpoint": "no.pth+two.pth"}, r"no\.pth: no such file"),
    ],
)
def test_models_that_cannot_be_had_are_told_before_any_job(
    digits, tmp_path, entry, told, monkeypatch
):
    monkeypatch.setattr("common.experiment.command.run_jobs", None)
    monkeypatch.setattr("classification.timm_models.is_hub_reachable", None)  # nobody asks
    path = small(digits, tmp_path)
    content = yaml.safe_load(path.read_text())
    content["peers"][1] |= entry
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(OptionError, match=rf"{path}: peer 'b': .*{told}"):
        run_experiment(Classification(), [str(path)])
    assert not (tmp_path / "out").exists()


def test_faults_end_in_one_line(digits, tmp_path, caplog):
    assert main([str(small(digits, tmp_path, arms={"x": {"temprature": 1}}))]) == 1
    assert "arm 'x'" in caplog.text and "temperature" in caplog.text
    assert "options.yaml" not in caplog.text  # which the user has never seen
    assert main([str(tmp_path / "no.yaml")]) == 1
