"""Corrupted images: what they look like, that they repeat, and that every view sees the same."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from classification.corruptions import Corrupted, corrupt
from classification.data import open_dataset
from classification.experiment import Classification
from classification.images import BrokenImageError
from common.corrupt import SEVERITIES
from common.experiment import read_experiment
from common.experiment.work import work
from common.options import OptionError
from tests.classification.test_data import options_of
from tests.classification.test_experiment import small


def photograph(size=(64, 48), mode="RGB"):
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    grain = generator.normal(0, 8, (size[1], size[0], 3))
    pixels = np.asarray(coarse.resize(size, Image.BICUBIC)) + grain
    return Image.fromarray(np.uint8(pixels.clip(0, 255))).convert(mode)


def array(image):
    return np.asarray(image, dtype=np.float64)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", SEVERITIES)
def test_a_corruption_repeats_and_grows_with_its_severity(name, mode):
    image = photograph(mode=mode)
    distances = []
    for severity in range(1, len(SEVERITIES[name]) + 1):
        spoilt = corrupt(image, name, severity, number=3)
        assert (spoilt.size, spoilt.mode) == (image.size, image.mode)
        assert np.array_equal(array(spoilt), array(corrupt(image, name, severity, number=3)))
        distances.append(np.abs(array(spoilt) - array(image)).mean())
    assert distances[0] > 0 and distances == sorted(distances)


@pytest.mark.parametrize("name", SEVERITIES)
def test_what_is_drawn_depends_on_the_image_s_number_alone(name):
    image = photograph()
    torch.manual_seed(1)
    one = array(corrupt(image, name, 3, number=3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert np.array_equal(one, array(corrupt(image, name, 3, number=3)))
    assert torch.equal(state, torch.get_rng_state())
    drawn = name in ("gaussian_noise", "elastic")
    assert np.array_equal(one, array(corrupt(image, name, 3, number=4))) is not drawn


def test_by_hand():
    flat = Image.new("L", (8, 8), 100)
    assert set(array(corrupt(flat, "darker", 3, 0)).flat) == {50.0}
    assert set(array(corrupt(flat, "brighter", 2, 0)).flat) == {150.0}
    assert set(array(corrupt(flat, "posterize", 4, 0)).flat) == {64.0}  # the two highest bits
    noisy = array(corrupt(Image.new("L", (200, 200), 128), "gaussian_noise", 2, 0))
    assert noisy.std() / 255 == pytest.approx(0.08, rel=0.02)
    edge = Image.fromarray(np.repeat([[0, 255]], 50, axis=1).repeat(40, axis=0).astype(np.uint8))
    blurred = (
        array(corrupt(edge, "gaussian_blur", 5, 0))[20] / 255
    )  # sigma: 4 % of 40 pixels, and 0.3
    assert blurred[49] == pytest.approx(0.396, abs=0.01)  # of a normal distribution at -0.5 / 1.9
    small = array(corrupt(photograph((20, 20), "L"), "pixelate", 5, 0))
    assert np.array_equal(small[::5, ::5].repeat(5, axis=0).repeat(5, axis=1), small)


def test_a_tiny_image_is_taken():
    for name, amounts in SEVERITIES.items():
        assert corrupt(Image.new("L", (3, 2), 9), name, len(amounts), 0).size == (3, 2)


def test_other_modes_are_refused():
    with pytest.raises(OptionError, match="got mode RGBA; give --input-img-mode"):
        corrupt(Image.new("RGBA", (4, 4)), "jpeg", 1, 0)


def test_every_view_sees_the_same_spoilt_picture(digits):
    plain = open_dataset(options_of(digits), False, 3)
    spoilt = Corrupted(plain, "gaussian_noise", 3)
    one, two = copy.copy(spoilt), copy.copy(spoilt)
    one.transform, two.transform = (lambda image: array(image)), (lambda image: image.size)
    assert len(spoilt) == len(plain)
    assert np.array_equal(one[7][0], array(corrupt(plain[7][0], "gaussian_noise", 3, 7)))
    assert two[7] == (plain[7][0].size, plain[7][1])
    assert plain.transform is None and spoilt.transform is None


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ()


def test_a_broken_file_is_named_and_a_stream_refused(digits):
    plain = open_dataset(options_of(digits), False, 3)
    plain.reader.samples[0] = (str(digits / "nothing.png"), 0)
    with pytest.raises(BrokenImageError, match=r"nothing\.png"):
        Corrupted(plain, "jpeg", 1)[0]
    with pytest.raises(OptionError, match="this is a stream"):
        Corrupted(Stream(), "jpeg", 1)


def test_an_experiment_measures_peers_of_different_views(digits, tmp_path):
    path = small(
        digits, tmp_path, corruptions=["jpeg", {"darker": 5}], controls=["none", "best"], arms={}
    )
    task = Classification()
    experiment = read_experiment(task.read(path), path)
    start = work(experiment, task, "start:3")["test"]["metrics"]
    last = work(experiment, task, "none:3")["last"]["metrics"]
    for metrics in (start, last):
        for who in ("a", "b", "ensemble"):
            each = [metrics[f"{who}/top1@{label}"] for label in ("jpeg-3", "darker-5")]
            assert metrics[f"{who}/top1@corrupted"] == pytest.approx(np.mean(each))
        for key in ("ece", "ece_calibrated"):
            each = [metrics[f"a/{key}@{label}"] for label in ("jpeg-3", "darker-5")]
            assert metrics[f"a/{key}@corrupted"] == pytest.approx(np.mean(each))
    files = {name: tmp_path / f"out/seed-3/none/run/{name}/last.safetensors" for name in ("b", "a")}
    options, dark = experiment.options("none", 3), [("darker", 5)]
    fitted = {name: last[f"{name}/temperature"] for name in "ab"}
    (again,) = task.measure_corrupted(options, files, dark, fitted)
    for key in ("top1", "ece", "ece_calibrated"):
        assert again[f"b/{key}"] == last[f"b/{key}@darker-5"]
    (plain,) = task.measure_corrupted(options, files, dark, {"a": 1.0, "b": 1.0})
    for name in "ab":  # files in another order than temperatures
        assert plain[f"{name}/ece_calibrated"] == pytest.approx(plain[f"{name}/ece"], abs=1e-4)
    assert again["b/ece_calibrated"] != pytest.approx(plain["b/ece_calibrated"], abs=1e-4)
    (bare,) = task.measure_corrupted(options, files, dark, {})
    assert bare["a/ece"] == plain["a/ece"] and "a/ece_calibrated" not in bare
