"""Digits of other writers, as image folders: what is read, and how a seed splits it."""

import sys
from collections import Counter

import pytest
from sklearn.datasets import load_digits

from classification.digits import SOURCES, write_digits, write_splits

UCI = SOURCES["uci"]


def test_uci_is_read_as_large_as_mnist_within_its_border():
    images, labels = UCI.read()
    raw = load_digits()
    assert images.shape == (1797, 28, 28)
    assert labels == raw.target.tolist()
    assert images.min() == 0
    assert 0.9 < images.max() <= 1
    inside = images[:, 4:24, 4:24]
    assert inside.sum() == pytest.approx(images.sum())  # nothing lies in the border
    for i in (0, 500, 1796):  # the ink is where it was: a digit keeps its side and its way up
        small = inside[i].reshape(4, 5, 4, 5).mean((1, 3))
        assert small.numpy() == pytest.approx(
            raw.images[i].reshape(4, 2, 4, 2).mean((1, 3)) / 16, abs=0.11
        )


def test_a_seed_splits_uci_into_parts_that_fit_it(tmp_path):
    digits = write_digits(tmp_path / "digits", UCI)
    assert sum(map(len, digits.values())) == 1797
    skews = {"low": range(5), "high": range(5, 10)}
    write_splits(digits, tmp_path / "seed-0", skews, 0, UCI)

    def names(part: str) -> dict[str, str]:
        files = (tmp_path / "seed-0" / part).glob("*/*.png")
        return {file.name: file.parent.name for file in files}

    test, tune = names("tune/validation"), names("tune/train")
    assert len(test) == 964
    assert Counter(tune.values()) == dict.fromkeys(map(str, range(10)), 25)
    for name, own in skews.items():
        train = names(f"pretrain-{name}/train")
        assert names(f"pretrain-{name}/validation") == test
        assert not train.keys() & (test.keys() | tune.keys())
        left = {file.name for label in own for file in digits[label]} - test.keys() - tune.keys()
        assert {file for file, label in train.items() if int(label) in own} == left
        assert 5 < len(train.keys() - left) < 40
    assert not tune.keys() & test.keys()


def test_a_peer_is_pretrained_on_every_class(tmp_path, monkeypatch):
    monkeypatch.setattr("classification.digits.FOREIGN", 0.0)
    digits = write_digits(tmp_path / "digits", UCI)
    write_splits(digits, tmp_path / "seed-0", {"low": range(5)}, 0, UCI)
    folder = tmp_path / "seed-0" / "pretrain-low" / "train"
    counts = {int(path.name): len(list(path.iterdir())) for path in folder.iterdir()}
    assert [counts[label] for label in range(5, 10)] == [1] * 5
    assert min(counts[label] for label in range(5)) > 20


def test_a_missing_scikit_learn_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install -e \"\.\[demo\]\""):
        write_digits(tmp_path, UCI)
