"""Run files that are cut off, changed or foreign are refused by name; ``auto`` passes them over."""

import random

import pytest
import torch

from common.checkpoint import CheckpointError, list_runs, load_run, newest_good_run
from tests.faults.test_kill import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    trainer = make(tmp_path_factory.mktemp("run"))
    trainer.fit()
    return trainer.folder


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other or one != one


def test_no_flipped_bit_goes_unseen(folder, tmp_path):
    newest = list_runs(folder)[-1]
    whole, good = newest.read_bytes(), load_run(newest)
    draw, refused = random.Random(0), 0
    for _ in range(100):
        changed = bytearray(whole)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path = tmp_path / "run-00001-00000000.pt"
        path.write_bytes(changed)
        try:
            assert same(load_run(path), good)  # of padding, which nobody reads
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 80


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_file_that_was_cut_off_is_refused(folder, tmp_path, share):
    whole = list_runs(folder)[-1].read_bytes()
    path = tmp_path / "run-00001-00000000.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_run(path)


def test_auto_takes_the_newest_good_file(folder, tmp_path, caplog):
    assert newest_good_run(tmp_path) is None
    runs = list_runs(folder)
    for path in runs:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert newest_good_run(tmp_path)[0] == tmp_path / runs[-1].name
    (tmp_path / runs[-1].name).write_bytes(b"nothing")
    path, state = newest_good_run(tmp_path)
    assert path == tmp_path / runs[-2].name and same(state, load_run(path))
    assert "passed over" in caplog.text and runs[-1].name in caplog.text
    for path in runs:
        (tmp_path / path.name).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=f"none of its {len(runs)} run files"):
        newest_good_run(tmp_path)


def test_weights_alone_are_no_run(tmp_path):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a run file"):
        load_run(tmp_path / "x.pt")
