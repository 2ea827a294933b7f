"""Checkpoints: atomic, safe, strict."""

import argparse
import os
import pickle
import tarfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from common.checkpoint import (
    RUN_KEYS,
    CheckpointError,
    atomic_write,
    list_runs,
    load_run,
    load_weights,
    newest_good_run,
    read_file,
    read_metadata,
    read_weights,
    save_run,
    save_weights,
)
from tests.common.toy import run_state


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_a_pickle_with_code_is_refused_by_name_and_runs_nothing(tmp_path, writer):
    evil, proof = tmp_path / "evil.pth", tmp_path / "executed"
    content = {"state_dict": {"weight": torch.zeros(1)}, "x": Bomb(f"touch {proof}")}
    if writer == "pickle":
        evil.write_bytes(pickle.dumps(Bomb(f"touch {proof}")))
    else:
        torch.save(content, evil, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(CheckpointError, match=r"evil\.pth") as error:
        read_weights(evil)
    assert not proof.exists()
    assert writer == "pickle" or "posix.system" in str(error.value)


def test_an_argparse_namespace_beside_the_weights_is_no_obstacle(tmp_path):
    model = nn.Linear(2, 3)
    path = tmp_path / "mae.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1.0)}, path)
    assert set(read_weights(path, "model")) == {"weight", "bias"}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_survive_a_round_trip(tmp_path, suffix):
    model, path = nn.Linear(2, 3), tmp_path / f"peer.{suffix}"
    save_weights(path, model.state_dict(), {"architecture": "linear"})
    other = nn.Linear(2, 3)
    load_weights(other, read_weights(path), path)
    assert torch.equal(model.weight, other.weight)
    assert read_metadata(path) == ({"architecture": "linear"} if suffix == "safetensors" else {})


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_missing_truncated_and_foreign_files_are_named(tmp_path, suffix):
    path = tmp_path / f"peer.{suffix}"
    with pytest.raises(CheckpointError, match="no such file"):
        read_file(path)
    save_weights(path, nn.Linear(200, 300).state_dict())
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=f"{path}: truncated or damaged file .* download"):
        read_file(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{path}: truncated or damaged file .it is empty"):
        read_file(path)
    path.write_bytes(b"<html>404 not found</html>")
    with pytest.raises(CheckpointError, match=f"{path}: .* download"):
        read_file(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x[:-1], r"truncated or damaged file \(its end is missing\)"),
        (lambda x: x[: len(x) // 2], r"truncated or damaged file \(its end is missing\)"),
        (lambda x: bytes(len(x)), r"truncated or damaged file \(it begins with zeros\)"),
        (lambda x: _flipped(x, b"OrderedDict"), r"\(the checksum of its part .*data.pkl is wrong"),
        (lambda x: b"?" + x[1:], "is damaged or something else, a web page"),
    ],
)
def test_what_is_wrong_with_a_torch_file_is_told(tmp_path, change, told):
    path = tmp_path / "peer.pth"
    torch.save(nn.Linear(200, 300).state_dict(), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"{path}: .*{told}.* download"):
        read_file(path)


def test_a_flipped_bit_in_the_weights_is_told(tmp_path, caplog):
    path, weights = tmp_path / "peer.pth", torch.arange(1000.0)
    torch.save({"weight": weights}, path)
    assert torch.equal(read_file(path)["weight"], weights) and not caplog.text
    path.write_bytes(_flipped(path.read_bytes(), weights.numpy().tobytes()))
    assert not torch.equal(read_file(path)["weight"], weights)
    assert f"{path}: read, but the checksum of its part data/0 is wrong" in caplog.text
    with pytest.raises(CheckpointError, match="the checksum of its part data/0 is wrong"):
        read_file(path, sums=True)


def _flipped(content, part):
    """Flip a bit in the midst of a part."""
    flipped, at = bytearray(content), content.index(part) + len(part) // 2
    flipped[at] ^= 16
    return bytes(flipped)


def test_a_checkpoint_of_another_model_is_named():
    weights = {"weight": torch.zeros(3, 5), "scale": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        load_weights(nn.Linear(2, 3), weights, "other.pth")
    for part in (
        "other.pth",
        "missing: bias",
        "left over: scale",
        "weight [3, 5] (model: [3, 2])",
    ):
        assert part in str(error.value)


def test_weights_that_are_not_finite_are_named():
    weights = {"weight": torch.full((3, 2), float("nan")), "bias": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="not finite in weight"):
        load_weights(nn.Linear(2, 3), weights, "x.pth")


def test_training_checkpoints_give_their_weights(tmp_path):
    path = tmp_path / "timm.pth.tar"
    weights = nn.Linear(2, 3).state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, path)
    assert set(read_weights(path)) == {"weight", "bias"}
    with pytest.raises(CheckpointError, match=r"no key 'model'; keys: epoch, state_dict"):
        read_weights(path, "model")
    torch.save({"epoch": 3, "loss": 2.0}, path)
    with pytest.raises(CheckpointError, match="not tensors: epoch, loss"):
        read_weights(path)


def test_only_the_newest_run_files_stay_and_the_newest_is_read(tmp_path):
    for epoch, batch in [(0, 5), (1, 0), (1, 7), (2, 0)]:
        save_run(tmp_path, run_state(epoch, batch), epoch, batch, keep=2)
    names = [path.name for path in list_runs(tmp_path)]
    assert names == ["run-00001-00000007.pt", "run-00002-00000000.pt"]
    assert load_run(tmp_path)["progress"]["epoch"] == 2
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_goes_on_from_an_older_file_keeps_what_it_saves_and_no_later_one(tmp_path):
    for epoch in (1, 2, 3):
        save_run(tmp_path, run_state(epoch), epoch, 0, keep=3)
    (tmp_path / "run-00003-00000000.pt").write_bytes(b"broken")
    saved = save_run(tmp_path, run_state(1, 5, begun=1), 1, 5, keep=1)
    assert list_runs(tmp_path) == [saved]
    assert newest_good_run(tmp_path)[1]["config"] == {"begun": 1}


def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, lambda to: to.write_text("old"))

    def fail(to):
        to.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_is_no_run_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        load_run(tmp_path)
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a run file"):
        load_run(path)
    for content in ({"format": 1, "peers": {}}, {"format": "x", **dict.fromkeys(RUN_KEYS)}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="not a run file"):
            load_run(path)
    torch.save({"format": 99, **dict.fromkeys(RUN_KEYS)}, path)
    with pytest.raises(CheckpointError, match="format 99"):
        load_run(path)


class EarlyParameter:
    """Pickled as torch did before it had a function to rebuild parameters."""

    def __init__(self, data, hooks=()):
        self.data, self.hooks = data, hooks

    def __reduce__(self):
        return nn.Parameter, (self.data,), (True, False, OrderedDict(self.hooks))


@pytest.mark.parametrize("as_zip", [True, False])
def test_parameters_of_early_torch_are_read(tmp_path, as_zip):
    file = tmp_path / "early.pth"
    content = {"w": EarlyParameter(torch.arange(3.0))}
    torch.save(content, file, _use_new_zipfile_serialization=as_zip)
    assert read_weights(file)["w"].tolist() == [0, 1, 2]
    content = {"w": EarlyParameter(torch.arange(3.0), {"hook": 1})}
    torch.save(content, file, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(CheckpointError, match=str(file)):
        read_weights(file)


def test_a_tar_of_early_torch_is_refused_as_such(tmp_path):
    file = tmp_path / "early.tar"
    (tmp_path / "storages").write_bytes(b"x" * 600)
    with tarfile.open(file, "w:", format=tarfile.PAX_FORMAT) as archive:
        archive.add(tmp_path / "storages", "storages")
    with pytest.raises(CheckpointError, match="tar"):
        read_weights(file)
