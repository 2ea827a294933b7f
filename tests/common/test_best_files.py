"""Best files of a moment that a kill took: known, mended from the run file, or measured anew."""

import shutil

import pytest
import torch
from torch import nn

from common.best_files import EXPORTED, fault_of
from common.checkpoint import digest_of, list_runs, load_run, read_weights, save_weights
from common.guard import Bounds
from tests.common.test_ema_teachers import averaged_peers
from tests.common.test_trainer import assert_same, final
from tests.common.toy import ToyEvaluator, make_peers, make_trainer

VALUES = {"p0": [50, 60, 55, 70], "p1": [50, 40, 45, 60], "p2": [50, 51, 52, 53]}


class Written(ToyEvaluator):
    """Gives values by heart, by epochs finished."""

    def __init__(self, trainer):
        self.trainer = trainer

    def evaluate(self, peers):
        epoch = self.trainer.progress.epoch
        return {f"{peer.name}/top1": float(VALUES[peer.name][epoch]) for peer in peers}


def trainer_of(folder, peers=None, **plan):
    trainer = make_trainer(folder, peers=peers, keep=9, **plan)
    trainer.evaluator = Written(trainer)
    return trainer


@pytest.mark.parametrize("averages", [False, True])
def test_what_a_lost_moment_wrote_is_mended_or_measured_anew(tmp_path, caplog, averages):
    def peers():
        return averaged_peers(3) if averages else make_peers(3, dropout=0.3)

    torch.manual_seed(0)
    whole = trainer_of(tmp_path, peers())
    whole.fit()
    run = list_runs(tmp_path)[1]  # after two of three epochs; the third is lost
    state = load_run(run)
    again = trainer_of(tmp_path, peers())
    again.resume(state)
    # best of p2 is of this very moment, those of the others of earlier ones
    kind = "average" if averages else "module"
    assert_same(read_weights(tmp_path / "p2" / "best.safetensors"), state["peers"]["p2"][kind])
    assert [(name, best.epoch) for name, best in again.progress.best.items()] == [("p2", 2)]
    assert (
        "p0/best.safetensors is of a later moment than the run file; the best of p0" in caplog.text
    )
    assert "p2/best.safetensors is of a later moment than the run file; it is wri" in caplog.text
    again.fit()
    assert_same(final(again), final(whole))
    for name in whole.peers.names:
        assert (
            digest_of(read_weights(tmp_path / name / "best.safetensors"))
            == (load_run(tmp_path)["peers"][name][EXPORTED])
        )


def test_a_guard_that_takes_back_has_all_that_is_needed(tmp_path, caplog):
    guard = Bounds("rollback", 100.0)
    trainer_of(tmp_path, guard=guard).fit()
    shutil.copytree(tmp_path / "p0", tmp_path / "copy")
    (tmp_path / "p1" / "best.safetensors").write_bytes(b"cut off")
    (tmp_path / "p2" / "best.safetensors").unlink()
    state = load_run(list_runs(tmp_path)[1])
    again = trainer_of(tmp_path, guard=guard)
    again.resume(state)
    assert [best.epoch for best in again.progress.best.values()] == [1, 0, 2]
    for name, told in (("p0", "is of a later"), ("p1", "cannot be read"), ("p2", "is gone")):
        file = tmp_path / name / "best.safetensors"
        assert_same(read_weights(file), state["peers"][name]["best"]["module"])
        assert f"{file} {told}" in caplog.text


def test_the_right_file_and_one_of_a_run_without_digests_are_left_alone(tmp_path, caplog):
    trainer_of(tmp_path).fit()
    files = {path: path.read_bytes() for path in tmp_path.rglob("best.safetensors")}
    again = trainer_of(tmp_path)
    again.resume(load_run(tmp_path))
    older = load_run(list_runs(tmp_path)[1])
    for own in older["peers"].values():
        del own[EXPORTED]
    trainer_of(tmp_path).resume(older)
    assert not caplog.text
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_digests_tell_weights_and_not_files(tmp_path, suffix):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    weights = {**module.state_dict(), "half": torch.rand(3).bfloat16(), "none": torch.empty(0)}
    file = tmp_path / f"x{suffix}"
    save_weights(file, weights)
    digest = digest_of(weights)
    assert fault_of(file, digest) == fault_of(file, None) == ""
    assert digest_of({f"module.{name}": x for name, x in weights.items()}) == digest
    for name, other in (
        ("half", weights["half"].float()),
        ("0.weight", weights["0.weight"] + 1e-7),
        ("0.bias", weights["0.bias"].view(2, 2)),
    ):
        assert digest_of({**weights, name: other}) != digest
