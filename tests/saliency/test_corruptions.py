"""Video saliency on corrupted frames: the maps stay, and every peer sees the same."""

import json
import math

import cv2
import numpy as np
import pytest

from common.experiment import read_experiment
from common.experiment.work import work
from saliency.corruptions import SEVERITIES, spoil
from saliency.experiment import Saliency, main
from saliency.frames import FrameReader
from saliency.images import read_frame, resize_frame
from saliency.layouts import open_dataset
from tests.saliency.folders import picture, write_dataset
from tests.saliency.test_experiment import small


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the check of the data is kept
    videos = {f"annotation/{k:04d}": 3 for k in range(1, 5)}
    return write_dataset(tmp_path / "data", videos | {"val/0601": 5, "val/0602": 4})


@pytest.mark.parametrize("name", SEVERITIES)
def test_frames_have_the_same_corruption_and_noise_of_their_own(name):
    image = picture(0, 0, (30, 40))
    spoilt = [spoil(image, (name, severity), "0601", 3) for severity in (1, SEVERITIES[name])]
    assert np.array_equal(image, picture(0, 0, (30, 40)))
    assert all((x.shape, x.dtype) == (image.shape, np.uint8) for x in spoilt)
    near, far = (np.abs(x.astype(float) - image).mean() for x in spoilt)
    assert 0 < near < far
    assert np.array_equal(spoilt[0], spoil(image, (name, 1), "0601", 3))
    for video, frame in (("0601", 4), ("0602", 3)):
        other = spoil(image, (name, 1), video, frame)
        assert np.array_equal(spoilt[0], other) is (name != "gaussian_noise")


def test_what_moves_things_is_not_there():
    assert "elastic" not in SEVERITIES and {"jpeg", "gaussian_blur", "darker"} <= set(SEVERITIES)


class Packed:
    def holds(self, video, size):
        return True


def test_frames_are_spoilt_before_they_are_resized_packed_or_not(data):
    video, noise = open_dataset("dhf1k", data, "val").videos[1], ("gaussian_noise", 5)
    reader = FrameReader(Packed(), 2, noise)
    for _ in range(2):  # the second time they are remembered
        found = reader.read(video, {(18, 32): np.array([1, 3]), (9, 16): np.array([3])})
        for row, number in enumerate((1, 3)):
            image = read_frame(video.path(video.frames[number]))
            by_hand = resize_frame(spoil(image, noise, video.name, number), (18, 32))
            assert np.array_equal(found[18, 32][row], by_hand)
    assert np.array_equal(
        found[9, 16][0], resize_frame(spoil(image, noise, video.name, 3), (9, 16))
    )


def test_an_experiment_measures_as_if_the_files_were_spoilt(data, tmp_path):
    noise = ("gaussian_noise", 5)
    asked = [{noise[0]: noise[1]}, {"darker": 4}]
    path = small(data, tmp_path, corruptions=asked, controls=["none", "mutual"], arms={})
    path.write_text(path.read_text().replace("epochs: 2", "epochs: 1"))
    task = Saliency()
    experiment = read_experiment(task.read(path), path)
    start = work(experiment, task, "start:3")["test"]["metrics"]
    last = work(experiment, task, "none:3")["last"]["metrics"]
    work(experiment, task, "mutual:3")
    for metrics in (start, last):
        for who in ("a", "b", "ensemble"):
            each = [metrics[f"{who}/cc@{label}"] for label in ("gaussian_noise-5", "darker-4")]
            assert all(map(math.isfinite, each))
            assert metrics[f"{who}/cc@corrupted"] == pytest.approx(np.mean(each))
    assert start["a/cc@darker-4"] != last["a/cc@darker-4"] != last["a/cc"]
    assert main([str(path), "--report"]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "Robustness to corruptions" in page and "gaussian_noise-5 and darker-4" in page
    robust = json.loads((tmp_path / "out/analysis.json").read_text())["robustness"]["mean"]
    before, after = (last[f"a/cc{what}"] for what in ("", "@corrupted"))
    told = robust["arms"]["none"]["peers"]["a"]["after"]["mean"]
    assert told == pytest.approx(after) != before and not robust["lower_is_better"]
    for video in open_dataset("dhf1k", data, "val").videos:
        for number, frame in enumerate(video.frames):
            file = video.path(frame)
            spoilt = spoil(read_frame(file), noise, video.name, number)
            cv2.imwrite(file, cv2.cvtColor(spoilt, cv2.COLOR_RGB2BGR))
    files = {name: tmp_path / f"out/seed-3/none/run/{name}/last.pth" for name in "ab"}
    before = {name: tmp_path / f"out/seed-3/start/{name}.pth" for name in "ab"}
    found = task.measure(experiment.options("none", 3), files, before).metrics
    for who in ("a", "b", "ensemble"):
        assert found[f"{who}/cc"] == last[f"{who}/cc@gaussian_noise-5"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["elastic"], "unknown corruption 'elastic'"),
        (["jpg"], "unknown corruption 'jpg'; did you mean jpeg"),
        ([{"jpeg": 6}], "severity is 6; expected 1 to 5"),
    ],
)
def test_what_is_unknown_is_refused_before_any_work(data, tmp_path, caplog, asked, told):
    assert main([str(small(data, tmp_path, corruptions=asked))]) == 1
    assert told in caplog.text and not (tmp_path / "out").exists()
