"""Whole runs through the command line's own functions."""

import csv
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from common.card import Files, file_sum, from_json, told_files
from common.checkpoint import CheckpointError, read_file
from common.guard import STOPPED, UNTAUGHT
from common.soup import average_weights
from segmentation import cards, checkpoints
from segmentation.cli import check_machine, main, write_report
from segmentation.config import load_run
from segmentation.errors import ConfigError
from segmentation.evaluation import evaluate_group
from segmentation.models import build_with_weights
from segmentation.peer import SegmentorPeer
from segmentation.trainer import TransferTrainer, current_world
from tests.common.toy import HERE
from tests.segmentation.conftest import forget_scenes
from tests.segmentation.runs import write_run

ROOT = Path(__file__).parents[2]


def weights(folder, peer, file="model_final.pth"):
    return read_file(folder / peer / file)["model"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scenes_root):
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(scenes_root))
        assert main(["--config-file", str(write_run(folder, RULE="random", SOUP=True))]) == 0
    return folder


def test_a_run_leaves_what_its_users_expect(finished):
    out = finished / "out"
    for peer in ("fpn", "deeplab"):
        assert (out / peer / "model_final.pth").is_file()
        assert (out / peer / "model_best.pth").is_file()
        assert (out / peer / "last_checkpoint").read_text() == "model_final.pth"
        assert "SemanticSegmentor" in (out / peer / "config.yaml").read_text()
    metrics = (out / "metrics.json").read_text()
    for name in ("fpn/loss_sem_seg", "deeplab/lr", "fpn/mIoU", "ensemble/mIoU", "transfer/taught"):
        assert f'"{name}"' in metrics
    assert any(out.glob("events.out.tfevents.*"))
    rows = (out / "summary.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["iteration", "0", "3", "6"]
    assert "fpn" in (out / "report.html").read_text()
    told = (out / "log.txt").read_text()
    phases = ["evaluating the start", "first iteration after", "evaluating iteration 3"]
    assert all(told.count(phase) == 1 for phase in phases)
    assert sorted(phases, key=told.index) == phases


def test_a_soup_is_the_average_that_one_half_of_the_images_chose(finished, datasets):
    folder = finished / "out"
    for peer in ("fpn", "deeplab"):
        told = read_file(folder / peer / "model_soup.pth")["soup"]
        assert told["alphas"] == [0, 0.25, 0.5, 0.75, 1] and told["metric"] == "mIoU"
        files = [f"model_{which}.pth" for which in ("start", "best", "soup")]
        start, best, soup = (weights(folder, peer, file) for file in files)
        averaged = average_weights(start, best, told["alpha"])
        for name, x in soup.items():
            assert "running" in name or torch.equal(x, averaged[name])
    options = []
    for peer in ("fpn", "deeplab"):
        options += [f"PEER.{peer}.MODEL.WEIGHTS", str(folder / peer / "model_soup.pth")]
    run = load_run([finished / "run.yaml"], options)
    peers = [SegmentorPeer(p.name, build_with_weights(p)[0], p.cfg, frozen=True) for p in run.peers]
    found = evaluate_group(peers, "scenes_val", HERE, part=slice(1, None, 2))
    for peer in ("fpn", "deeplab"):
        told = read_file(folder / peer / "model_soup.pth")["soup"]
        measured = told["measured"][told["alphas"].index(told["alpha"])]
        assert found[f"{peer}/mIoU"] == pytest.approx(measured)
    assert "<h2>Soup" in (folder / "report.html").read_text()


def files_in(datasets, split):
    folder = next(datasets.glob(f"*/{split}"))
    return told_files(Files([str(path) for path in folder.glob("*/*.png")], str(folder)))


def test_each_learning_peer_gets_a_card(finished, datasets, tmp_path, caplog):
    out = finished / "out"
    rows = list(csv.DictReader((out / "summary.csv").open()))
    for name, other in (("fpn", "deeplab"), ("deeplab", "fpn")):
        folder = out / name
        card = from_json((folder / "card.json").read_text(), folder)
        assert set(card.evidence) == {"best", "last", "soup"}
        values = [float(row[f"{name}/mIoU"]) for row in rows]
        for which, value in (("best", max(values)), ("last", values[-1])):
            told = card.evidence[which]
            assert told.before["mIoU (%)"] == pytest.approx(values[0])
            assert told.after["mIoU (%)"] == pytest.approx(value)
            assert "3 images of `scenes_val`" in told.measured_on
        assert 0 < card.evidence["last"].teachers[other] < 1
        assert card.lineage["its start"] == "no file: random weights"
        text = (folder / "README.md").read_text()
        assert file_sum(folder / "model_best.pth") in text and "10 images to train on" in text
        config = hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest()
        assert config in text
        assert f"| files trained on | {files_in(datasets, 'train')} |" in text
        assert f"| files measured on | {files_in(datasets, 'val')} |" in text
    copy = tmp_path / "fpn"
    shutil.copytree(out / "fpn", copy)
    assert cards.main([str(copy), "--which", "last"]) == 0
    assert file_sum(copy / "model_final.pth") in (copy / "README.md").read_text()
    assert cards.main([str(copy), "--analysis", str(tmp_path / "no.json")]) == 1
    assert "no.json: no such file" in caplog.text


@pytest.mark.slow
def test_a_file_loads_as_its_card_says(finished):
    folder = finished / "out/fpn"
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    told = f"{code}\nprint(type(model).__name__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", told], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "SemanticSegmentor"
    assert "not in the checkpoint" not in done.stdout + done.stderr


def test_a_card_tells_the_sum_of_the_start_and_the_held_out_part(datasets, tmp_path):
    path = write_run(tmp_path, ("fpn",), RULE="none", HELD_OUT=0.3)
    run = load_run([path])
    module, _ = build_with_weights(run.peers[0])
    torch.save(module.state_dict(), tmp_path / "start.pth")
    options = ["MODEL.WEIGHTS", str(tmp_path / "start.pth"), "SOLVER.MAX_ITER", "1"]
    trainer = TransferTrainer(load_run([path], options))
    (tmp_path / "start.pth").unlink()  # what it was has been told already
    trainer.train()
    card = cards.describe(trainer, trainer.run.peers[0], cards.files_told(trainer))
    assert "start.pth" in card.lineage["its start"] and "sha256" in card.lineage["its start"]
    assert "`scenes_train` without 30 % held out, 7 images" in card.lineage["data"]
    assert "3 images of 30 % of `scenes_train`" in card.evidence["last"].measured_on
    assert ": 14 files," in card.lineage["files trained on"]
    assert ": 6 files," in card.lineage["files measured on"]
    assert TransferTrainer(load_run([path]), resume=False).origins["fpn"].endswith("random weights")


def test_the_sum_of_the_files_changes_where_one_is_added(datasets, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(datasets, copy)
    run = load_run([write_run(tmp_path, ("fpn",), RULE="none")])
    before = cards.files_told(TransferTrainer(run))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(copy))
    forget_scenes()
    assert cards.files_told(TransferTrainer(run)) == before  # the same elsewhere
    folder = next(copy.glob("*/train"))
    for kind in ("images", "labels"):
        first = min((folder / kind).glob("*.png"))
        shutil.copy(first, first.with_name("added.png"))
    after = cards.files_told(TransferTrainer(run))
    assert after["files trained on"] == files_in(copy, "train") != before["files trained on"]
    assert after["files measured on"] == before["files measured on"]


def test_a_resume_for_a_soup_needs_the_start(finished, datasets, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    (tmp_path / "out" / "fpn" / "model_start.pth").unlink()
    run = load_run([write_run(tmp_path, RULE="random", SOUP=True)])
    with pytest.raises(CheckpointError, match=r"fpn/model_start.pth: .*TRANSFER.SOUP"):
        TransferTrainer(run, resume=True)


def test_old_checkpoints_are_pruned(finished):
    files = sorted(path.name for path in (finished / "out" / "fpn").glob("model_0*.pth"))
    assert files == ["model_0000001.pth", "model_0000003.pth", "model_0000005.pth"]
    assert read_file(finished / "out" / "fpn" / "model_0000003.pth")["iteration"] == 3


@pytest.mark.parametrize("peer", ["fpn", "deeplab"])
@pytest.mark.parametrize("file", ["model_final.pth", "model_best.pth", "model_soup.pth"])
def test_a_peers_file_loads_strictly_in_plain_detectron2(finished, peer, file):
    run = load_run([finished / "run.yaml"])
    cfg = next(p.cfg for p in run.peers if p.name == peer)
    module = build_model(cfg)
    path = finished / "out" / peer / file
    unmatched = DetectionCheckpointer(module)._load_model(
        {"model": dict(weights(path.parents[1], peer, file)), "matching_heuristics": False}
    )
    assert not unmatched.missing_keys and not unmatched.unexpected_keys
    assert not unmatched.incorrect_shapes
    assert same(module.state_dict(), weights(path.parents[1], peer, file))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_bit_for_bit(finished, tmp_path, scenes_root, workers):
    run = write_run(tmp_path, RULE="random")
    command = [sys.executable, "segmentation/train_net.py", "--config-file", str(run)]
    command += ["--resume", "DATALOADER.NUM_WORKERS", str(workers)]
    environment = os.environ | {"DETECTRON2_DATASETS": str(scenes_root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    record = tmp_path / "out" / checkpoints.RECORD
    while not record.exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    at = read_file(record)["iteration"]
    assert 2 <= at < 6
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"resumed after iteration {at}" in done.stdout + done.stderr
    for peer in ("fpn", "deeplab"):
        for file in ("model_final.pth", "model_best.pth"):
            assert same(
                weights(tmp_path / "out", peer, file), weights(finished / "out", peer, file)
            )
    mine, whole = (
        read_file(folder / "out" / checkpoints.RECORD) for folder in (tmp_path, finished)
    )
    for rows in ("history", "lessons"):
        assert str(mine[rows]) == str(whole[rows])  # as text: NaN where a class is not there


@pytest.mark.parametrize("file", ["model_0000006.pth", "run.pt", "model_final.pth"])
def test_a_kill_while_a_longer_run_is_saved_costs_nothing(
    finished, datasets, tmp_path, monkeypatch, file
):
    """The finished run goes on to 7; it is killed as it writes the given file."""
    shutil.copytree(finished / "out", tmp_path / "out")
    options = ["SOLVER.MAX_ITER", 7, "TEST.EVAL_PERIOD", 0]
    run = load_run([write_run(tmp_path, RULE="random")], options)
    written = checkpoints.atomic_write

    def killed(path, write):
        if path.name == file:
            raise KeyboardInterrupt
        written(path, write)

    monkeypatch.setattr(checkpoints, "atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        TransferTrainer(run, resume=True).train()
    monkeypatch.undo()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    again = TransferTrainer(run, resume=True)
    assert again.start_iter == (7 if file == "model_final.pth" else 6)
    again.train()
    for peer in again.peers:
        content = read_file(tmp_path / "out" / peer.name / "model_final.pth")
        assert content["iteration"] == 6 and same(content["model"], peer.module.state_dict())
        assert (tmp_path / "out" / peer.name / "last_checkpoint").read_text() == "model_final.pth"


def test_a_finished_run_without_its_best_files_mends_them_or_says_the_way_out(
    finished, datasets, tmp_path, capfd
):
    shutil.copytree(finished / "out", tmp_path / "out")
    record = read_file(tmp_path / "out" / checkpoints.RECORD)
    had = {"fpn": 4, "deeplab": 0}  # a checkpoint's iteration; the start, kept for the soup
    record["best"] = {name: [50.0, iteration] for name, iteration in had.items()}
    torch.save(record, tmp_path / "out" / checkpoints.RECORD)
    for name in had:
        (tmp_path / "out" / name / checkpoints.BEST).unlink()
    path = write_run(tmp_path, RULE="random")
    TransferTrainer(load_run([path]), resume=True)
    for name, file in (("fpn", "model_0000003.pth"), ("deeplab", checkpoints.START)):
        mended = read_file(tmp_path / "out" / name / checkpoints.BEST)
        assert mended["iteration"] == had[name] - 1
        assert same(mended["model"], weights(tmp_path / "out", name, file))
    for file in (checkpoints.BEST, "model_0000003.pth"):
        (tmp_path / "out/fpn" / file).unlink()
    assert main(["--config-file", str(path), "--resume"]) == 1
    told = capfd.readouterr()
    assert "Traceback" not in told.out + told.err
    assert f"fpn/{checkpoints.BEST} is gone, the run is finished" in told.err
    assert "larger SOLVER.MAX_ITER" in told.err
    longer = TransferTrainer(load_run([path], ["SOLVER.MAX_ITER", 7]), resume=True)
    assert longer.start_iter == 6 and list(longer.best) == ["deeplab"]


def test_a_run_of_all_features_goes_on_bit_for_bit(tmp_path, datasets):
    """Accumulation, bfloat16, PreciseBN, a warm-up of the transfer and a peer with masks."""
    options = ["SOLVER.MAX_ITER", 3, "SOLVER.AMP.ENABLED", True, "SOLVER.CHECKPOINT_PERIOD", 2]
    options += ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2]
    settings = {"RULE": "random", "GRANULARITY": "pixel", "ACCUMULATE": 2, "WARMUP_ITERS": 3}
    kinds = ("fpn", "mask2former")
    path = write_run(tmp_path, kinds, AMP_DTYPE="bfloat16", **settings)
    whole = TransferTrainer(load_run([path], [*options, "OUTPUT_DIR", str(tmp_path / "whole")]))
    whole.train()
    cut = TransferTrainer(load_run([path], [*options, "OUTPUT_DIR", str(tmp_path / "cut")]))
    run_step = cut.run_step

    def step():
        if cut.iter == 2:
            raise KeyboardInterrupt
        run_step()

    cut.run_step = step
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    torch.manual_seed(99)  # a process of its own would have other draws
    again = TransferTrainer(
        load_run([path], [*options, "OUTPUT_DIR", str(tmp_path / "cut")]), resume=True
    )
    assert again.start_iter == 2
    again.train()
    for one, other in zip(whole.peers, again.peers, strict=True):
        assert same(one.module.state_dict(), other.module.state_dict())
    assert str(whole.history) == str(again.history) and str(whole.lessons) == str(again.lessons)


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(finished, tmp_path, datasets, monkeypatch):
    run = write_run(tmp_path, RULE="random")
    step = TransferTrainer.run_step

    def signalled(trainer):
        if trainer.iter == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        step(trainer)

    monkeypatch.setattr(TransferTrainer, "run_step", signalled)
    assert main(["--config-file", str(run)]) == 75
    assert read_file(tmp_path / "out" / checkpoints.RECORD)["iteration"] == 3
    monkeypatch.setattr(TransferTrainer, "run_step", step)
    assert main(["--config-file", str(run), "--resume"]) == 0
    for peer in ("fpn", "deeplab"):
        assert same(weights(tmp_path / "out", peer), weights(finished / "out", peer))


def test_engines_give_the_same_run(finished, tmp_path, scenes_root, monkeypatch):
    """Up to rounding: batch norm and all that is drawn are replayed."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(scenes_root))
    run = write_run(tmp_path, RULE="random", ENGINE="two-pass")
    options = ["SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0"]
    assert main(["--config-file", str(run), *options]) == 0
    two = read_file(tmp_path / "out" / checkpoints.RECORD)["lessons"][-1]
    run = write_run(tmp_path, RULE="random", output="joint")
    assert main(["--config-file", str(run), *options]) == 0
    one = read_file(tmp_path / "joint" / checkpoints.RECORD)["lessons"][-1]
    assert two == pytest.approx(one, rel=1e-4, nan_ok=True)
    for peer in ("fpn", "deeplab"):
        mine, other = weights(tmp_path / "out", peer), weights(tmp_path / "joint", peer)
        for name, value in other.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_peer_that_gets_worse_is_rolled_back(tmp_path, datasets, monkeypatch):
    """Worse at every evaluation: first its lessons end, then its learning; also after a resume."""
    evaluate = TransferTrainer.evaluate

    def worse(trainer, tta=False):
        metrics = evaluate(trainer, tta)
        return {**metrics, "fpn/mIoU": 50.0 - trainer.iter, "deeplab/mIoU": 50.0 + trainer.iter}

    monkeypatch.setattr(TransferTrainer, "evaluate", worse)
    settings = {"RULE": "mutual", "GUARD": "rollback", "GUARD_PATIENCE": 1}
    path = write_run(tmp_path, GUARD_METRIC_DROP=0.5, **settings)
    periods = ["TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 2]
    runs = {
        name: load_run([path], [*periods, "OUTPUT_DIR", str(tmp_path / name)])
        for name in ("whole", "cut")
    }
    whole = TransferTrainer(runs["whole"])
    start = {name: x.clone() for name, x in whole.peers[0].module.state_dict().items()}
    whole.train()
    actions = [(e["peer"], e["iteration"], e["action"]) for e in whole.guard.events]
    assert actions == [("fpn", 2, UNTAUGHT), ("fpn", 4, STOPPED)]
    assert same(weights(tmp_path / "whole", "fpn"), start)
    assert not same(weights(tmp_path / "whole", "deeplab"), weights(tmp_path / "whole", "fpn"))
    assert whole.lessons[0]["transfer/deeplab->fpn/share"] == 1
    assert [row["transfer/deeplab->fpn/share"] for row in whole.lessons[1:]] == [0, 0]
    assert [row["transfer/fpn->deeplab/share"] for row in whole.lessons] == [1, 1, 1]
    for cut_at in (3, 5):  # the last checkpoints are of 2 and 4
        cut = TransferTrainer(runs["cut"], resume=cut_at > 3)
        run_step = cut.run_step

        def step(cut=cut, cut_at=cut_at, run_step=run_step):
            if cut.iter == cut_at:
                raise KeyboardInterrupt
            run_step()

        cut.run_step = step
        with pytest.raises(KeyboardInterrupt):
            cut.train()
    again = TransferTrainer(runs["cut"], resume=True)
    assert again.start_iter == 4 and again.peers[0].frozen
    again.train()
    assert again.guard.events == whole.guard.events
    for peer in ("fpn", "deeplab"):
        assert same(weights(tmp_path / "cut", peer), weights(tmp_path / "whole", peer))
    assert "rolled back, frozen" in write_report(runs["whole"], whole).read_text()


def test_a_run_in_which_all_peers_are_rolled_back_does_nothing_more(
    tmp_path, datasets, monkeypatch
):
    evaluate = TransferTrainer.evaluate

    def worse(trainer, tta=False):
        return {name: 50.0 - trainer.iter for name in evaluate(trainer, tta)}

    monkeypatch.setattr(TransferTrainer, "evaluate", worse)
    settings = {"RULE": "best", "GUARD": "rollback", "GUARD_PATIENCE": 1}
    run = load_run(
        [write_run(tmp_path, GUARD_METRIC_DROP=0.5, **settings)], ["TEST.EVAL_PERIOD", 1]
    )
    trainer = TransferTrainer(run)
    trainer.train()
    assert [row["iteration"] for row in trainer.history] == [0, 1, 2, 2, 3, 3]
    assert read_file(tmp_path / "out" / checkpoints.RECORD)["iteration"] == 6
    assert same(
        weights(tmp_path / "out", "fpn"), weights(tmp_path / "out", "fpn", "model_best.pth")
    )


def test_eval_only_measures_the_weights_that_are_given(finished, datasets, capsys):
    options = ["--config-file", str(finished / "run.yaml"), "--eval-only"]
    for peer in ("fpn", "deeplab"):
        path = finished / "out" / peer / "model_final.pth"
        options += [f"PEER.{peer}.MODEL.WEIGHTS", str(path)]
    output = finished / "evaluated"
    assert main([*options, "OUTPUT_DIR", str(output)]) == 0
    header, row = (line.split(",") for line in (output / "evaluation.csv").read_text().splitlines())
    last = read_file(finished / "out" / checkpoints.RECORD)["history"][-1]
    found = dict(zip(header, map(float, row), strict=True))
    assert str(found) == str({name: x for name, x in last.items() if name != "iteration"})


def test_eval_only_with_resume_takes_the_last_checkpoint(finished, datasets):
    options = ["--config-file", str(finished / "run.yaml"), "--eval-only", "--resume"]
    assert main([*options, "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 64)"]) == 0
    text = (finished / "out" / "evaluation.csv").read_text()
    last = read_file(finished / "out" / checkpoints.RECORD)["history"][-1]
    assert str(last["fpn/mIoU"]) in text
    assert "fpn/mIoU_TTA" in (finished / "out" / "evaluation_tta.csv").read_text()


def test_three_peers_pixels_accumulation_and_a_frozen_one(tmp_path, datasets):
    run = write_run(tmp_path, ("fpn", "deeplab", "deeplab_v3"), GRANULARITY="pixel", ACCUMULATE=2)
    text = run.read_text().replace("NAME: deeplab_v3", "FROZEN: true\n    NAME: deeplab_v3")
    run.write_text(text)
    options = [
        "SOLVER.MAX_ITER",
        "2",
        "SOLVER.AMP.ENABLED",
        "True",
        "TRANSFER.AMP_DTYPE",
        "bfloat16",
    ]
    assert main(["--config-file", str(run), *options]) == 0
    assert not (tmp_path / "out" / "deeplab_v3" / "model_final.pth").exists()
    lessons = read_file(tmp_path / "out" / checkpoints.RECORD)["lessons"][-1]
    assert 0 < lessons["transfer/taught"] <= 1 + 1e-6
    assert lessons["deeplab_v3/transfer_loss"] == 0
    assert max(lessons["fpn/transfer_loss"], lessons["deeplab/transfer_loss"]) > 0


def test_deeplab_trains_on_crops_and_is_tested_at_other_sizes(tmp_path, datasets):
    options = ["SOLVER.MAX_ITER", "1", "INPUT.MIN_SIZE_TEST", "70", "TEST.EVAL_PERIOD", "0"]
    run = write_run(tmp_path, ("deeplab",), RULE="none")
    assert main(["--config-file", str(run), *options]) == 0
    config = (tmp_path / "out" / "deeplab" / "config.yaml").read_text()
    assert "CROP:\n    ENABLED: true" in config  # as the user wrote it


def test_precise_batch_norm_replaces_the_running_statistics(tmp_path, datasets):
    """At a rate of zero nothing else can differ."""
    config = write_run(tmp_path, kinds=("fpn",), RULE="none")
    common = ["SOLVER.MAX_ITER", "2", "SOLVER.BASE_LR", "0.0", "TEST.EVAL_PERIOD", "0"]
    precise = ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "3"]
    precise += ["OUTPUT_DIR", str(tmp_path / "precise")]
    assert main(["--config-file", str(config), *common]) == 0
    assert main(["--config-file", str(config), *common, *precise]) == 0
    plain, exact = (weights(tmp_path / folder, "fpn") for folder in ("out", "precise"))
    differ = {
        name.rpartition(".")[2] for name in plain if not torch.equal(plain[name], exact[name])
    }
    assert (
        {"running_mean", "running_var"}
        <= differ
        <= {
            "running_mean",
            "running_var",
            "num_batches_tracked",
        }
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_precise_batch_norm_pads_as_training_does_and_leaves_no_workers(
    tmp_path, datasets, workers
):
    config = write_run(tmp_path, kinds=("deeplab",), RULE="none")
    options = ["SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0", "INPUT.CROP.ENABLED", "False"]
    options += ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2"]
    options += ["INPUT.MIN_SIZE_TRAIN", "(70,)", "DATALOADER.NUM_WORKERS", str(workers)]
    trainer = TransferTrainer(load_run([config], options))
    trainer.train()
    assert len(multiprocessing.active_children()) == workers  # those of the training stream


def test_a_fresh_run_is_not_written_over_an_older_one(finished, datasets, capsys):
    assert main(["--config-file", str(finished / "run.yaml")]) == 1
    assert "holds an earlier run; give --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.BASE_LR", 0.5], r"PEER\.fpn\.SOLVER\.BASE_LR 0\.01 -> 0\.5"),
        (["PEER.deeplab.SOLVER.OPTIMIZER", "ADAMW"], r"OPTIMIZER 'SGD' -> 'ADAMW'"),
        (["SOLVER.IMS_PER_BATCH", 4], "SOLVER.IMS_PER_BATCH 2 -> 4"),
        (["SOLVER.AMP.ENABLED", True], r"SOLVER\.AMP\.ENABLED False -> True"),
        (["TRANSFER.ACCUMULATE", 2], "TRANSFER.ACCUMULATE 1 -> 2"),
        (["DATASETS.TRAIN", ("scenes_val",)], "DATASETS.TRAIN .*scenes_train.* -> .*scenes_val"),
    ],
)
def test_other_settings_are_refused_at_resume(finished, datasets, options, message):
    run = load_run([finished / "run.yaml"], options)
    with pytest.raises(CheckpointError, match=f"{message}.*Give its own"):
        TransferTrainer(run, resume=True)


def test_what_may_change_at_resume(finished, datasets):
    options = ["SOLVER.MAX_ITER", 9, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 5]
    options += ["DATALOADER.NUM_WORKERS", 1]
    assert TransferTrainer(load_run([finished / "run.yaml"], options), resume=True).start_iter == 6


def test_a_resume_where_no_run_is_starts_anew_and_says_so(tmp_path, datasets, caplog):
    trainer = TransferTrainer(load_run([write_run(tmp_path)]), resume=True)
    assert trainer.start_iter == 0
    assert f"no checkpoint of a run in {tmp_path / 'out'}: starting anew" in caplog.text


def test_other_peers_are_refused_at_resume(finished, datasets, tmp_path):
    options = ["OUTPUT_DIR", str(finished / "out")]
    run = load_run([write_run(tmp_path, ("deeplab", "fpn"), RULE="random")], options)
    with pytest.raises(
        CheckpointError, match="had the peers fpn, deeplab, this one has deeplab, fpn"
    ):
        TransferTrainer(run, resume=True)


def test_peers_of_two_moments_are_refused(finished, datasets, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.copy(tmp_path / "out/fpn/model_0000003.pth", tmp_path / "out/fpn/model_0000005.pth")
    run = load_run([write_run(tmp_path, RULE="random")])
    with pytest.raises(CheckpointError, match="of iteration 3, the run's record is of 5"):
        TransferTrainer(run, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["DATASETS.TRAIN", "('nothing_train',)"], "unknown dataset 'nothing_train'; choose from"),
        (["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"], "no dataset: set DATASETS.TRAIN"),
        (["DATASETS.TRAIN", "('scenes_other',)"], "has scenes_train, scenes_val; make demo"),
        (["DATASETS.TEST", "('scenes_val', 'scenes_train')"], "10 of 10 files to train on are"),
        (["DATASETS.TEST", "('ade20k_sem_seg_val',)"], "have other classes"),
        (
            ["PEER.fpn.MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7"],
            "'fpn' has 7 classes, scenes_train has 6",
        ),
        (["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "254"], "ignores the label 254, scenes_train 255"),
        (["PEER.fpn.MODEL.WEIGHTS", "none.pth"], "none.pth: no such file"),
        (["MODEL.DEVICE", "cuda"], "there is no GPU; give MODEL.DEVICE cpu"),
        (["PEER.fpn.INPUT.FORMAT", "YUV"], "'YUV'; choose from RGB, BGR"),
        (["TRANSFER.GUARD", "stop"], "GUARD is 'stop'; choose from off, warn, rollback"),
        (["SOLVER.IMS_PER_BATCH", "0"], "IMS_PER_BATCH is 0"),
        (["INPUT.RANDOM_FLIP", "up"], "'up'; choose from none, horizontal, vertical"),
        (["SOLVER.OPTIMIZER", "LION"], "'fpn': SOLVER.OPTIMIZER is 'LION'; choose from SGD, ADAMW"),
        (["DATASETS.TRAIN", "('coco_2017_train',)"], "coco_2017_train: no dataset of semantic"),
        (["DATASETS.TEST", "()"], "no dataset: set DATASETS.TRAIN and DATASETS.TEST"),
        (["SOLVER.LR_SCHEDULER_NAME", "No"], "peer 'fpn': Unknown LR scheduler: No"),
        (["PEER.fpn.MODEL.BACKBONE.NAME", "no"], "peer 'fpn': No object named 'no' found in"),
        (["PEER.fpn.MODEL.SEM_SEG_HEAD.NAME", "no"], "peer 'fpn': No object named 'no' found in"),
        (["PEER.fpn.MODEL.RESNETS.DEPTH", "51"], "peer 'fpn': KeyError: 51 in Detectron2 at:"),
        (["INPUT.CROP.TYPE", "abs"], "CROP.TYPE is 'abs'; choose from relative, relative_range"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "pick"], "INPUT: AssertionError: pick in Detectron2"),
        (["OUTPUT_DIR", f"{__file__}/out"], "cannot be written to (Not a directory); give another"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, datasets, capfd, options, message):
    if options[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["--config-file", str(write_run(tmp_path)), *options]) == 1
    told = capfd.readouterr()
    assert message in told.err + told.out
    assert "Traceback" not in told.err + told.out


def test_a_process_alone_keeps_the_gpu_that_is_named():
    found = [str(current_world(name).device) for name in ("cuda:1", "cuda", "cpu")]
    assert found == ["cuda:1", "cuda:0", "cpu"]


@pytest.mark.parametrize(
    ("there", "device", "asked", "message"),
    [
        (2, "cuda:2", 1, "MODEL.DEVICE is cuda:2; this machine has 2 GPUs"),
        (2, "cuda:1", 2, "cuda:1: with --num-gpus 2 give cuda"),
        (2, "cuda", 3, "--num-gpus 3: this machine has 2"),
        (2, "cpu", 2, "hide the GPUs too"),
        (0, "cpu", 3, None),
        (2, "cuda:1", 1, None),
        (2, "cuda", 2, None),
    ],
)
def test_what_a_machine_has(tmp_path, monkeypatch, there, device, asked, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    run = load_run([write_run(tmp_path)], ["MODEL.DEVICE", device])
    if message is None:
        check_machine(run, asked)
        return
    with pytest.raises(ConfigError, match=message):
        check_machine(run, asked)


def test_a_run_in_which_nobody_learns_is_refused(tmp_path, datasets, capsys):
    path = write_run(tmp_path)
    path.write_text(path.read_text().replace("NAME:", "FROZEN: true\n    NAME:"))
    assert main(["--config-file", str(path)]) == 1
    assert "every peer is FROZEN; nothing would be trained" in capsys.readouterr().err


def test_without_detectron2_it_is_said_how_to_get_it(tmp_path):
    """In a process of its own, where Detectron2 cannot be found."""
    script = (
        "import sys\n"
        "sys.modules['detectron2'] = None\n"
        "import common.trainer, classification.train, segmentation, saliency\n"
        "from segmentation.train_net import main\n"
        "sys.exit(main(['--config-file', 'x.yaml']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert "make setup-segmentation" in done.stderr and "Traceback" not in done.stderr
