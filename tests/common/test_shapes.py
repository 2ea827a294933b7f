"""Run files whose content is not what a trainer goes on from: refused by what they lack."""

import argparse

import pytest
import torch

from common.checkpoint import CheckpointError, list_runs, load_run, newest_good_run
from common.guard import Bounds
from common.written_out import fault_of_plain
from tests.common.toy import make_trainer, run_state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, epochs=1, keep=1, guard=Bounds("rollback", 1.0)).fit()
    return folder


def at(state, path):
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in way:
        state = state[key]
    return state, last


GONE = object()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("progress", {}, "progress has no 'epoch'"),
        ("progress", [], "progress is of the kind list, expected a mapping"),
        ("progress.epoch", "1", "progress.epoch is '1', expected a count"),
        ("progress.batch", -1, "progress.batch is -1, expected a count"),
        ("progress.updates", True, "progress.updates is True, expected a count"),
        ("progress.cut", [6, 0], "progress.cut.1 is 0, expected a count from 1 on"),
        ("progress.best", {"p0": [1.0]}, "progress.best.p0 has 1 values, expected 2"),
        ("progress.best", {"px": [1.0, 1]}, "it tells of 'px', which is none of its peers"),
        ("progress.history", [[]], "progress.history.0 is of the kind list, expected a mapping"),
        ("progress.history.0.p0/top1", [[1]], "progress.history.0.p0/top1 is of the kind list"),
        ("progress.lessons.0.x", {}, "progress.lessons.0.x is of the kind dict, expected text or"),
        ("bad.found", {"a.png": [1]}, "bad.found.a.png is of the kind list, expected text"),
        ("peers", [], "peers is of the kind list, expected a mapping"),
        ("peers", {1: {}}, "a key of peers is 1, expected text"),
        ("peers.p1.module", GONE, "peers.p1 has no 'module'"),
        ("peers.p1.module", {"w": [1.0]}, "peers.p1.module.w is of the kind list"),
        ("peers.p1.optimizer", {}, "peers.p1.optimizer has no 'state'"),
        ("peers.p1.best", {"module": {}}, "peers.p1.best has no 'average'"),
        ("ranks", [], "ranks are 0, expected a multiple of seats, 1"),
        ("ranks.0.ledger", None, "ranks.0.ledger is None, expected a mapping"),
        ("ranks.0.rng.python", (3, ["x"], None), "ranks.0.rng.python.1.0 is 'x'"),
        ("seats", 0, "seats is 0, expected a count from 1 on"),
        ("seats", 2, "ranks are 1, expected a multiple of seats, 2"),
        ("evaluator", GONE, "it has no 'evaluator'"),
        ("guard.events", [{"peer": "py", "action": "x"}], "it tells of 'py', which is none of"),
        ("config", [], "config is of the kind list, expected a mapping"),
        ("config", {3: 4}, "a key of config is 3, expected text"),
        ("config", {"epochs": "7"}, "config.epochs is '7', expected a count"),
        ("config", {"peers": [3]}, "config.peers.0 is 3, expected text or a mapping"),
        ("config", {"lr": torch.zeros(2)}, "config holds a Tensor, which is no plain setting"),
    ],
)
def test_what_no_trainer_can_go_on_from_is_refused_by_name(run, tmp_path, path, value, says):
    (good,) = list_runs(run)
    state = load_run(good)
    place, key = at(state, path)
    if value is GONE:
        del place[key]
    else:
        place[key] = value
    torch.save(state, tmp_path / good.name)
    with pytest.raises(CheckpointError) as caught:
        load_run(tmp_path)
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / good.name}: a run file that was changed, or none of this")
    assert f": {says}" in told and told.endswith("start a run of its own from the peers' weights")


def nested(levels, leaf="x"):
    value = leaf
    for _ in range(levels):
        value = [value] * 10
    return value


def round_and_round():
    one = []
    one.append({"up": one})
    return one


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (nested(9), "config is too large: written out it would hold more than 5000000 characters"),
        (nested(2, "x" * 99999), "config is too large: written out"),
        (round_and_round(), "config is too large: one of its values holds itself"),
        (argparse.Namespace(x=1), "config holds a Namespace, which is no plain setting"),
    ],
)
def test_settings_that_multiply_are_refused_before_anything_shows_them(tmp_path, value, says):
    torch.save({"format": 1, **run_state(lr=value)}, tmp_path / "run-00000-00000000.pt")
    with pytest.raises(CheckpointError) as caught:
        load_run(tmp_path)
    assert says in str(caught.value) and len(str(caught.value)) < 500


def test_ordinary_settings_are_read():
    shared = ["a", 1, None, 0.5, True]
    assert fault_of_plain({"x": shared, "y": [shared] * 99, "z": (shared,)}, "config") == ""
    assert fault_of_plain(nested(4), "config") == ""


def test_auto_goes_back_to_the_file_before(run, tmp_path, caplog):
    state = load_run(run)
    torch.save(state, tmp_path / "run-00001-00000000.pt")
    torch.save({**state, "progress": {}}, tmp_path / "run-00002-00000000.pt")
    path, _ = newest_good_run(tmp_path)
    assert path.name == "run-00001-00000000.pt" and "progress has no 'epoch'" in caplog.text


def test_run_files_of_older_versions_are_read(run, tmp_path):
    state = load_run(run)
    for key in ("guard", "finite", "bad", "seats", "versions"):
        del state[key]
    del state["progress"]["cut"], state["ranks"][0]["scaler"]
    for peer in state["peers"].values():
        for key in ("kind", "exported", "best"):
            peer.pop(key, None)
    torch.save(state, tmp_path / "run-00001-00000000.pt")
    trainer = make_trainer(tmp_path, epochs=2)
    trainer.resume(load_run(tmp_path), source=run)
    assert trainer.fit().epoch == 2


def test_a_start_without_the_metric_of_the_guard_is_refused_at_once(run, tmp_path):
    state = load_run(run)
    del state["progress"]["history"][0]["p1/top1"]
    with pytest.raises(CheckpointError, match=r"did not measure p1/top1 at its start.*--guard off"):
        make_trainer(tmp_path, epochs=2, guard=Bounds("warn", 1.0)).resume(state, source=run)
    make_trainer(tmp_path, epochs=2, guard=Bounds("off")).resume(state, source=run)
