"""Segmentors on corrupted images: the labels stay, and every peer sees the same."""

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from common.experiment import read_experiment
from common.experiment.work import work
from common.seeding import generators_kept
from segmentation.corruptions import SEVERITIES, spoil
from segmentation.data import TestMapper, load_datasets
from segmentation.trials import Segmentation, main
from tests.segmentation.test_experiment import written


def photograph():
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((40, 30), Image.BICUBIC))


@pytest.mark.parametrize("name", SEVERITIES)
def test_a_corruption_repeats_by_the_file_s_name_and_grows(name):
    image, before = photograph(), photograph()
    spoilt = [spoil(image, (name, severity), "a/x.png") for severity in (1, SEVERITIES[name])]
    assert np.array_equal(image, before)
    assert all((x.shape, x.dtype) == (image.shape, np.uint8) for x in spoilt)
    near, far = (np.abs(x.astype(float) - image).mean() for x in spoilt)
    assert 0 < near < far
    with generators_kept():
        torch.manual_seed(1)
        assert np.array_equal(spoilt[0], spoil(image, (name, 1), "b/x.png"))
    other = spoil(image, (name, 1), "a/y.png")
    assert np.array_equal(spoilt[0], other) is (name != "gaussian_noise")


def test_what_moves_things_is_not_there():
    assert "elastic" not in SEVERITIES and {"jpeg", "gaussian_blur", "darker"} <= set(SEVERITIES)


def test_images_are_spoilt_before_they_are_resized(datasets):
    record, noise = load_datasets(["scenes_val"])[0], ("gaussian_noise", 5)
    image = TestMapper(0, 0)(record)["image"].permute(1, 2, 0).numpy()
    spoilt = spoil(image, noise, record["file_name"])
    small = ResizeShortestEdge(24, 96).get_transform(spoilt).apply_image(spoilt)
    sample = TestMapper(24, 96, noise)(record)
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), small)
    assert (sample["height"], sample["width"]) == image.shape[:2] > small.shape[:2]


def test_an_experiment_measures_as_if_the_files_were_spoilt(own_datasets, tmp_path):
    corruptions = [("gaussian_noise", 5), ("darker", 4)]
    asked = [{name: severity} for name, severity in corruptions]
    path = written(tmp_path, corruptions=asked, controls=["none", "best"], arms={})
    task = Segmentation()
    experiment = read_experiment(task.read(path), path)
    experiment.train["SOLVER.MAX_ITER"] = 1
    start = work(experiment, task, "start:3")["test"]["metrics"]
    last = work(experiment, task, "none:3")["last"]["metrics"]
    for metrics in (start, last):
        for who in ("fpn", "deeplab", "ensemble"):
            for key in ("mIoU", "ece", "ece_calibrated"):
                labels = ("gaussian_noise-5", "darker-4")
                each = [metrics[f"{who}/{key}@{label}"] for label in labels]
                assert metrics[f"{who}/{key}@corrupted"] == pytest.approx(np.mean(each))
    assert start["fpn/mIoU@darker-4"] != last["fpn/mIoU@darker-4"]
    for record in load_datasets(["scenes_val"]):
        file = record["file_name"]
        image = np.asarray(Image.open(file).convert("RGB"))
        Image.fromarray(spoil(image, corruptions[0], file)).save(file)
    files = {x: tmp_path / f"out/seed-3/none/run/{x}/model_final.pth" for x in ("fpn", "deeplab")}
    before = {name: tmp_path / f"out/seed-3/start/{name}.pth" for name in files}
    found = task.measure(experiment.options("none", 3), files, before).metrics
    for who in ("fpn", "deeplab", "ensemble"):
        assert found[f"{who}/temperature"] == last[f"{who}/temperature"] != 1
        for key in ("mIoU", "ece", "ece_calibrated"):
            assert found[f"{who}/{key}"] == last[f"{who}/{key}@gaussian_noise-5"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["elastic"], "unknown corruption 'elastic'"),
        (["jpg"], "unknown corruption 'jpg'; did you mean jpeg"),
        ([{"jpeg": 6}], "severity is 6; expected 1 to 5"),
    ],
)
def test_what_is_unknown_is_refused_before_any_work(datasets, tmp_path, caplog, asked, told):
    assert main([str(written(tmp_path, corruptions=asked))]) == 1
    assert told in caplog.text and not (tmp_path / "out").exists()
