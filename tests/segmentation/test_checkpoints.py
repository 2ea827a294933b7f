"""Checkpoints of a run of segmentors: which is the newest good one, and which go."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from common.checkpoint import CheckpointError
from segmentation import checkpoints
from tests.common.toy import rank_state

PEERS = ("a", "b")


def save(folder, iteration, keep=3, evaluated=False):
    file = checkpoints.file_of(iteration, evaluated)
    for name in PEERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        optimizer = {"state": {}, "param_groups": []}
        content = {"model": {}, "optimizer": optimizer, "scheduler": {}, "iteration": iteration - 1}
        torch.save(content, folder / name / file)
    state = {"iteration": iteration, "file": file, "peers": list(PEERS), "seed": 1, "scaler": {}}
    state |= {"ranks": [rank_state()], "best": {}, "history": [], "lessons": []}
    checkpoints.save_record(folder, PEERS, state, keep)


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*_0*.pt*"))


def files_of(*iterations):
    numbers = [f"{iteration - 1:07d}" for iteration in iterations]
    records = [f"run_{number}.pt" for number in numbers]
    return sorted([*records, *(f"{p}/model_{n}.pth" for p in PEERS for n in numbers)])


def found(folder):
    record = checkpoints.find_good(folder, PEERS, PEERS)
    return record and record["iteration"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def test_the_newest_are_kept_with_their_records(tmp_path):
    assert not checkpoints.is_run(tmp_path) and found(tmp_path) is None
    for iteration in (2, 4, 6, 8):
        save(tmp_path, iteration)
    assert names_in(tmp_path) == files_of(4, 6, 8)
    assert found(tmp_path) == 8 and checkpoints.is_run(tmp_path)


@pytest.mark.parametrize(
    ("broken", "stands"),
    [
        (("run.pt",), 6),  # of which there is another
        (("run.pt", "run_0000005.pt"), 4),
        (("b/model_0000005.pth",), 4),
        (("a/model_0000005.pth", "b/model_0000003.pth"), 2),
    ],
)
def test_what_is_broken_is_passed_over_and_told(tmp_path, caplog, broken, stands):
    for iteration in (2, 4, 6):
        save(tmp_path, iteration)
    for name in broken:
        cut(tmp_path / name)
    assert found(tmp_path) == stands
    assert all(f"passed over: {tmp_path / name}" in caplog.text for name in broken)


def test_other_peers_are_no_fault_of_the_files(tmp_path, caplog):
    save(tmp_path, 2)
    names = [*PEERS, "third"]
    with pytest.raises(CheckpointError, match=f"had the peers {', '.join(PEERS)}, this one has"):
        checkpoints.find_good(tmp_path, names, names)
    assert not caplog.text


def test_files_of_another_moment_are_passed_over(tmp_path):
    for iteration in (2, 4):
        save(tmp_path, iteration)
    path = tmp_path / "a" / "model_0000003.pth"
    path.write_bytes((tmp_path / "a" / "model_0000001.pth").read_bytes())
    assert found(tmp_path) == 2


def test_where_none_is_good_the_run_is_not_begun_anew(tmp_path):
    save(tmp_path, 2)
    cut(tmp_path / "a" / "model_0000001.pth")
    with pytest.raises(CheckpointError, match="none of its 2 records names checkpoints that can"):
        found(tmp_path)


def test_a_run_that_goes_on_from_an_older_one_removes_the_later(tmp_path):
    for iteration in (2, 4, 6):
        save(tmp_path, iteration)
    save(tmp_path, 3)
    assert names_in(tmp_path) == files_of(2, 3) and found(tmp_path) == 3


def test_a_checkpoint_for_an_evaluation_alone_goes_with_the_next(tmp_path):
    for iteration in (2, 3, 4):
        save(tmp_path, iteration)
    checkpoints.drop(tmp_path, PEERS, checkpoints.file_of(3))
    assert names_in(tmp_path) == files_of(2, 4)


def test_what_an_evaluation_changed_takes_the_place_of_its_moment(tmp_path):
    for iteration in (2, 4):
        save(tmp_path, iteration)
        save(tmp_path, iteration, evaluated=True)
    changed = [name.replace(".pth", "_after.pth") for name in files_of(2, 4)]
    assert names_in(tmp_path) == sorted(changed) and found(tmp_path) == 4
    assert checkpoints.weights_at(tmp_path, "a", 2) == {}
    assert checkpoints.weights_at(tmp_path, "a", 3) is None
    orphan = tmp_path / "a" / checkpoints.file_of(6, evaluated=True)
    orphan.touch()  # of a run that was killed before its record
    save(tmp_path, 6)
    assert not orphan.exists()
    save(tmp_path, 8)
    left = [name for name in changed if "0003" in name]
    assert names_in(tmp_path) == sorted([*left, *files_of(6, 8)])


def test_a_flipped_bit_in_a_best_file_is_seen(tmp_path):
    path = tmp_path / "a" / checkpoints.BEST
    path.parent.mkdir()
    torch.save({"model": {"w": torch.full((999,), 7.0)}, "iteration": 3}, path)
    assert checkpoints.fault_of_best(tmp_path, "a", 4) == ""
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((99,), 7.0).numpy().tobytes()) + 80] ^= 1
    path.write_bytes(content)
    assert checkpoints.fault_of_best(tmp_path, "a", 4) == "cannot be read"


def change(path, edit):
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda x: x.pop("file"), "it has no 'file'"),
        (lambda x: x.update(file="../../model_0000001.pth"), "file is '../../model_0000001.pth'"),
        (lambda x: x.update(iteration="2"), "iteration is '2', expected a count from 1 on"),
        (lambda x: x.update(format="x"), "format is 'x', expected a count from 1 on"),
        (lambda x: x.update(peers=3), "peers is 3, expected a list"),
        (lambda x: x.update(ranks=[]), "ranks are 0, expected a multiple of seats, 1"),
        (lambda x: x.update(settings={"SEED": [1]}), "settings.SEED is of the kind list"),
        (lambda x: x.update(best={"c": [1.0, 2]}), "it tells of 'c', which is none of its peers"),
        (lambda x: x.update(history=[{}]), "history.0 has no 'iteration'"),
        (
            lambda x: x.update(history=[{"iteration": 2, "a/mIoU": []}]),
            "history.0.a/mIoU is of the",
        ),
        (lambda x: x["ranks"][0].pop("rng"), "ranks.0 has no 'rng'"),
    ],
)
def test_a_record_of_another_shape_is_refused_by_name(tmp_path, edit, says):
    save(tmp_path, 2)
    assert checkpoints.find(tmp_path)["iteration"] == 2
    change(tmp_path / "run.pt", edit)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.find(tmp_path)
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / 'run.pt'}: not the record of a run, or changed: ")
    assert says in told and told.endswith("remove it, or resume elsewhere")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda x: x.pop("scheduler"), "it has no 'scheduler'"),
        (lambda x: x.update(scheduler=[]), "scheduler is of the kind list, expected a mapping"),
        (lambda x: x.update(model={"w": 1.0}), "model.w is 1.0, expected a tensor"),
        (lambda x: x["optimizer"].pop("param_groups"), "optimizer has no 'param_groups'"),
    ],
)
def test_a_peers_file_of_another_shape_is_passed_over_by_name(tmp_path, caplog, edit, says):
    for iteration in (2, 4):
        save(tmp_path, iteration)
    path = tmp_path / "b" / "model_0000003.pth"
    change(path, edit)
    assert found(tmp_path) == 2
    assert f"{path}: not a checkpoint of a run, or changed: {says}" in caplog.text
