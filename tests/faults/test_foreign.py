"""Checkpoints that are cut off, changed, or of another run: each task names and refuses them."""

import random
import shutil
from dataclasses import replace

import pytest
import torch

from common.checkpoint import list_runs
from saliency.train import main
from tests.faults.runs import same
from tests.faults.test_disk import the_line


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def flip(path):
    whole = bytearray(path.read_bytes())
    draw = random.Random(1)
    for _ in range(20):  # one may hit padding, which nobody reads
        whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(whole)


def multiplied():
    value = "x"
    for _ in range(7):
        value = [value] * 10
    return value


def newest(folder):
    return folder / "run.pt" if (folder / "run.pt").exists() else list_runs(folder)[-1]


@pytest.fixture
def copied(whole, tmp_path):
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    return whole.task, tmp_path


@pytest.mark.parametrize("harm", [cut, pytest.param(flip, marks=pytest.mark.slow)])
def test_a_broken_checkpoint_is_refused_by_name(copied, harm):
    task, folder = copied
    path = newest(folder / "run")
    harm(path)
    assert task.run(folder, resume=True) == 1
    line = the_line(folder)
    assert str(path) in line
    if path.name != "run.pt":
        others = ", ".join(run.name for run in list_runs(folder / "run")[:-1])
        assert f"Other run files of its folder: {others}; --resume one of them" in line


@pytest.mark.slow
@pytest.mark.parametrize("harm", [cut, flip])
def test_a_broken_file_of_a_segmentor_is_refused_by_name(whole_runs, tmp_path, harm):
    whole = whole_runs("segmentation")
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    path = max((tmp_path / "run" / "fpn").glob("model_0*.pth"))
    harm(path)
    assert whole.task.run(tmp_path, "SOLVER.MAX_ITER", "6", resume=True) == 1
    line = the_line(tmp_path)
    assert str(path) in line and "older checkpoint" in line and "model_0000001.pth" in line
    assert "--resume auto" in line


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "saliency"])
def test_auto_passes_over_what_is_broken(whole_runs, tmp_path, task):
    whole = whole_runs(task)
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    path = newest(tmp_path / "run")
    cut(path)
    assert whole.task.run(tmp_path, "--resume", "auto") == 0
    assert f"passed over: {path}" in (tmp_path / "log.txt").read_text()
    assert str(whole.task.final(tmp_path)) == str(whole.final)


@pytest.mark.parametrize("broken", ["fpn/model_0000003.pth", "run.pt"])
def test_auto_passes_over_what_is_broken_of_segmentors(whole_runs, tmp_path, broken):
    whole = whole_runs("segmentation")
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    cut(tmp_path / "run" / broken)
    (tmp_path / "run" / "fpn" / "model_0000099.pth").touch()  # of a moment that is lost
    assert other(whole.task, ("--resume", "--resume=auto")).run(tmp_path, resume=True) == 0
    told = (tmp_path / "log.txt").read_text()
    assert f"passed over: {tmp_path / 'run' / broken}" in told and "Traceback" not in told
    assert ("resumed after iteration 2" in told) == (broken != "run.pt")
    assert same(whole.task.final(tmp_path), whole.final)
    names = [
        sorted(str(path.relative_to(run)) for path in run.rglob("*.pt*"))
        for run in (tmp_path / "run", whole.folder / "run")
    ]
    assert broken == "run.pt" or names[0] == names[1]


def other(task, *changes):
    """Return the task with words of its arguments replaced, and others added."""
    arguments = task.arguments

    def changed(output, *more, resume=False):
        words = [str(word) for word in arguments(output, *more, resume=resume)]
        for old, new in (change for change in changes if isinstance(change, tuple)):
            assert any(old in word for word in words)
            words = [part for word in words for part in word.replace(old, new).split("\n")]
        return [*words, *(change for change in changes if isinstance(change, str))]

    one = replace(task)
    one.arguments = changed
    return one


ALLOWED = "--allow-changed-options"
FOREIGN = {
    "classification": [
        ([("embed_dim=24", "embed_dim=36"), ALLOWED], "not a checkpoint of this VisionTransformer"),
        ([("name=c", "name=d")], "holds the peers a, b, c; this run has a, b, d"),
        (["--peer", "test_vit,name=d"], "holds the peers a, b, c; this run has a, b, c, d"),
        ([("adamw", "sgd"), ALLOWED], "state of AdamW, not of SGD"),
        (["--held-out", "0.25", ALLOWED], "measured on 200 validation images, there are 100"),
        (["--val-split", "train"], "--val-split 'validation' -> 'train'"),
        ([("embed_dim=24", "embed_dim=36")], "kwargs of peer 1 (a) {'patch_size': 8"),
    ],
    "saliency": [
        ([("width=3", "width=4"), ALLOWED], "not a checkpoint of this StandIn"),
        ([("width=3", "width=4")], "kwargs of peer 1 (saliency.standins:pair) {'width': 3}"),
        (
            [("pair", "recent"), ALLOWED],
            "holds the peers pair, around; this run has recent, around",
        ),
        (
            ["--peer", "saliency.standins:recent", ALLOWED],
            "holds the peers pair, around; this run has pair, around, recent",
        ),
        (["--opt", "sgd", ALLOWED], "state of Adam, not of SGD"),
    ],
    "segmentation": [
        (["PEER.fpn.MODEL.FPN.OUT_CHANNELS", "16"], "PEER.fpn.MODEL.FPN.OUT_CHANNELS 32 -> 16"),
        (
            [
                ("--resume", "--resume\n--allow-changed-options"),
                *"PEER.fpn.MODEL.FPN.OUT_CHANNELS 16".split(),
            ],
            "not a checkpoint of this SemanticSegmentor",
        ),
        (["PEER.fpn.SOLVER.OPTIMIZER", "ADAMW"], "OPTIMIZER 'SGD' -> 'ADAMW'"),
        (["DATASETS.TRAIN", "('scenes_val',)"], "DATASETS.TRAIN ('scenes_train',) -> "),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "changes", "says"),
    [(task, *case) for task, cases in FOREIGN.items() for case in cases],
)
def test_another_runs_checkpoint_is_refused_by_name(whole_runs, tmp_path, task, changes, says):
    whole = whole_runs(task)
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    assert other(whole.task, *changes).run(tmp_path, resume=True) == 1
    assert says in the_line(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("fpn", "deeplab", "deeplab_v3"), ("fpn", "deeplab_v3")])
def test_a_segmentation_run_of_other_peers_is_refused(whole_runs, tmp_path, kinds):
    whole = whole_runs("segmentation")
    shutil.copytree(whole.folder / "run", tmp_path / "run")

    def with_others():
        from tests.segmentation import runs

        write = runs.write_run
        runs.write_run = lambda *given, **named: write(*given, **{**named, "kinds": kinds})

    assert whole.task.run(tmp_path, resume=True, before=with_others) == 1
    line = the_line(tmp_path)
    assert "fpn, deeplab" in line and ", ".join(kinds) in line


def configs(run):
    return {str(path.relative_to(run)): path.read_text() for path in run.rglob("*.yaml")}


def test_an_evaluation_alone_leaves_a_runs_configs(whole_runs, tmp_path):
    whole = whole_runs("segmentation")
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    one = other(whole.task, ("--resume", "--resume\n--eval-only"), "TRANSFER.RULE", "none")
    assert one.run(tmp_path, resume=True) == 0
    found = configs(tmp_path / "run")
    assert found == configs(whole.folder / "run") and "fpn/config.yaml" in found


def test_a_segmentation_run_under_other_settings_is_refused_with_all_of_them(whole_runs, tmp_path):
    whole = whole_runs("segmentation")
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    more = "TRANSFER.RULE mutual TRANSFER.TEMPERATURE 2 SEED 9 SOLVER.MAX_ITER 5".split()
    assert other(whole.task, *more).run(tmp_path, resume=True) == 1
    line = the_line(tmp_path)
    for change in ("RULE 'random' -> 'mutual'", "TEMPERATURE 1.0 -> 2.0", "SEED 1 -> 9"):
        assert change in line
    assert configs(tmp_path / "run") == configs(whole.folder / "run")
    assert "--allow-changed-options" in line and "MAX_ITER" not in line
    one = other(whole.task, ("--resume", "--resume\n--allow-changed-options"), *more)
    assert one.run(tmp_path, resume=True) == 0
    told = (tmp_path / "log.txt").read_text()
    assert "resuming with other settings than the run had: SEED 1 -> 9" in told
    assert "SOLVER.MAX_ITER was 4, is 5" in told
    assert "RULE: mutual" in configs(tmp_path / "run")["transfer.yaml"]


@pytest.mark.parametrize("task", ["classification", "saliency"])
def test_a_run_under_other_options_is_refused_with_all_of_them(whole_runs, tmp_path, task):
    whole = whole_runs(task)
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    more = ["--seed", "5", "--temperature", "2", "--log-interval", "1", "--epochs", "3"]
    one = other(whole.task, ("random", "mutual"), *more)
    assert one.run(tmp_path, resume=True) == 1
    line = the_line(tmp_path)
    seed = {"classification": 42, "saliency": 0}[task]
    for change in ("--rule 'random' -> 'mutual'", f"--seed {seed} -> 5", "--temperature 1.0 -> 2"):
        assert change in line
    assert "--allow-changed-options" in line and "args.yaml" in line and "interval" not in line
    assert str(whole.task.final(tmp_path)) == str(whole.final)  # nothing was touched
    assert one.run(tmp_path, "--allow-changed-options", resume=True) == 0
    told = (tmp_path / "log.txt").read_text()
    assert "resuming with other options than the run had: --rule 'random' -> 'mutual'" in told
    assert "--epochs was 2, is 3" in told


@pytest.mark.slow
def test_data_of_other_classes_is_refused_at_a_resume(whole_runs, tmp_path):
    whole = whole_runs("classification")
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    for split in ("train", "validation"):
        for label in "012":
            shutil.copytree(whole.task.data / split / label, tmp_path / "data" / split / label)
    one = replace(whole.task, data=tmp_path / "data")
    assert one.run(tmp_path, resume=True) == 1
    assert "the data has 3 classes, the peers tell 10" in the_line(tmp_path)


@pytest.mark.slow
def test_another_data_set_is_refused_at_a_resume(whole_runs, tmp_path):
    whole = whole_runs("saliency")
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    one = other(whole.task, "--dataset", "ucf_sports")
    one.main = lambda output, resume: main(None, "train", one.arguments(output, resume=resume))
    assert one.run(tmp_path, resume=True) == 1
    assert "a run with --dataset dhf1k, this one has ucf_sports" in the_line(tmp_path)


@pytest.mark.parametrize("allowed", [(), (ALLOWED,)])
def test_classification_refuses_a_run_of_another_task_whatever_is_allowed(
    whole_runs, tmp_path, allowed
):
    shutil.copytree(whole_runs("saliency").folder / "run", tmp_path / "run")
    assert whole_runs("classification").task.run(tmp_path, *allowed, resume=True) == 1
    assert "a run of another task: it keeps no resolved_num_classes" in the_line(tmp_path)


@pytest.mark.slow
def test_a_classification_run_without_its_baseline_is_refused(whole_runs, tmp_path):
    whole = whole_runs("classification")
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    path = newest(tmp_path / "run")
    torch.save({**torch.load(path, weights_only=True), "evaluator": {}}, path)
    assert whole.task.run(tmp_path, resume=True) == 1
    assert "the run file was changed: evaluator has no 'baseline'" in the_line(tmp_path)


@pytest.mark.parametrize("task", ["classification", "saliency"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"progress": {}}, "progress has no 'epoch'"),
        ({"config": {"lr": multiplied()}}, "config is too large: written out it would hold more"),
    ],
)
def test_a_run_file_that_was_changed_is_refused_by_name(whole_runs, tmp_path, task, changes, says):
    whole = whole_runs(task)
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    path = newest(tmp_path / "run")
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    assert whole.task.run(tmp_path, ALLOWED, resume=True) == 1
    line = the_line(tmp_path)
    assert str(path) in line and says in line and len(line) < 1000


def test_a_run_of_another_task_is_refused_as_such(whole_runs, tmp_path):
    shutil.copytree(whole_runs("classification").folder / "run", tmp_path / "run")
    assert whole_runs("saliency").task.run(tmp_path, resume=True) == 1
    assert "a run without --dataset, of another task, this one has dhf1k" in the_line(tmp_path)
