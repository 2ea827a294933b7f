"""What goes wrong while a run is on its way ends in one line that names it."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from detectron2.engine import default_argument_parser

import common.termination
from common.termination import EXIT_STATUS, INTERRUPTED, Preempted, Termination
from segmentation import checkpoints
from segmentation.cli import main
from segmentation.config import load_run
from segmentation.data import read_labels
from segmentation.errors import DataError
from segmentation.hooks import EndIfAsked
from segmentation.peer import make_batch
from segmentation.trainer import TransferTrainer
from tests.children import alive
from tests.launch import launch
from tests.segmentation.runs import write_run

ONE_STEP = ["SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0", "SOLVER.CHECKPOINT_PERIOD", "0"]


def fails(run, *options, capfd):
    """Run; return the line of its error."""
    assert main(["--config-file", str(run), *map(str, options)]) == 1
    told = capfd.readouterr()
    assert "Traceback" not in told.out + told.err
    lines = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def cut_images(folder):
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(tmp_path, own_datasets, capfd, workers):
    cut_images(own_datasets / "train" / "images")
    line = fails(write_run(tmp_path), *ONE_STEP, "DATALOADER.NUM_WORKERS", workers, capfd=capfd)
    assert str(own_datasets / "train" / "images") in line and "cannot be read" in line


def test_a_broken_test_image_is_named(tmp_path, own_datasets, capfd):
    cut_images(own_datasets / "val" / "images")
    line = fails(write_run(tmp_path), *ONE_STEP, "DATALOADER.NUM_WORKERS", 2, capfd=capfd)
    assert str(own_datasets / "val" / "images") in line


def test_broken_files_are_replaced_left_out_and_told(tmp_path, own_datasets, capfd):
    """In evaluation as if they were not there."""
    files = [own_datasets / "train/images", own_datasets / "train/labels"]
    files = [sorted(folder.glob("*.png"))[k] for k, folder in enumerate(files)]
    files.append(sorted((own_datasets / "val/labels").glob("*.png"))[1])
    for path in files:
        path.write_bytes(path.read_bytes()[:200])
    options = ["SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "0"]
    line = fails(write_run(tmp_path, MAX_BAD_SAMPLES=2), *options, capfd=capfd)
    assert "3 broken files, 2 are allowed (TRANSFER.MAX_BAD_SAMPLES): " in line
    assert all(str(path) in line for path in files)
    run = write_run(tmp_path, output="whole", MAX_BAD_SAMPLES=3)
    assert main(["--config-file", str(run), *options, "DATALOADER.NUM_WORKERS", "1"]) == 0
    told = capfd.readouterr().out
    assert "evaluated without 1 of 3 samples" in told and "3 broken files were done" in told
    assert "left out 1 of them" in (tmp_path / "whole" / "report.html").read_text()
    record = torch.load(tmp_path / "whole" / "run.pt", weights_only=True)
    assert set(record["bad"]["found"]) == set(map(str, files))
    files[2].unlink()
    (own_datasets / "val/images" / files[2].name).unlink()
    trainer = TransferTrainer(load_run([write_run(tmp_path, output="none", MAX_BAD_SAMPLES=3)]))
    assert trainer.evaluate() == {
        key: pytest.approx(value, nan_ok=True)
        for key, value in record["history"][0].items()
        if key != "iteration"
    }


def test_a_killed_worker_ends_in_one_line(tmp_path, datasets, capfd, monkeypatch):
    def read(path, *rest, **named):
        if torch.utils.data.get_worker_info() is not None and "train" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_labels(path, *rest, **named)

    monkeypatch.setattr("segmentation.data.read_labels", read)
    line = fails(write_run(tmp_path), *ONE_STEP, "DATALOADER.NUM_WORKERS", "1", capfd=capfd)
    assert "a process that reads data" in line and "DATALOADER.NUM_WORKERS" in line


def test_an_empty_test_set_is_named(tmp_path, own_datasets, capfd):
    for path in (own_datasets / "val" / "images").glob("*.png"):
        path.unlink()
    assert "scenes_val: no images" in fails(write_run(tmp_path), *ONE_STEP, capfd=capfd)


def test_weights_that_are_not_finite_are_named(tmp_path, datasets, capfd):
    options = ["SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER", 3]
    line = fails(write_run(tmp_path), *ONE_STEP[2:], *options, capfd=capfd)
    assert "loss of fpn" in line and "not finite at optimizer step" in line
    assert f"{datasets}/scenes/train/images/" in line and "lower that peer's lr" in line
    assert not (tmp_path / "out" / "run.pt").exists()


@pytest.fixture
def nan_in_iteration_2(monkeypatch):
    """Break the second image of the second iteration; return where its file is told."""
    seen = SimpleNamespace(batches=[], file="", last=0)

    def broken(samples, *rest):
        batch = make_batch(samples, *rest)
        seen.batches.append(samples)
        if len(seen.batches) == seen.last:
            raise KeyboardInterrupt
        if len(seen.batches) == 2:
            batch.samples[1]["image"] = batch.samples[1]["image"].float() * float("nan")
            seen.file = samples[1]["file_name"]
        return batch

    monkeypatch.setattr("segmentation.trainer.make_batch", broken)
    return seen


GN = [
    *("MODEL.RESNETS.NORM", "GN", "MODEL.SEM_SEG_HEAD.NORM", "GN"),  # no statistics of the batch
    *("PEER.deeplab.MODEL.SEM_SEG_HEAD.ASPP_DROPOUT", "0.0"),
    *("PEER.deeplab.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", "[32]"),
]


def test_a_nan_in_an_image_stops_and_its_file_is_told(
    tmp_path, datasets, capfd, nan_in_iteration_2
):
    options = [*ONE_STEP[2:], *GN, "SOLVER.MAX_ITER", "3"]
    line = fails(write_run(tmp_path), *options, capfd=capfd)
    told = f"fpn, deeplab was not finite at optimizer step 2, in {nan_in_iteration_2.file};"
    assert told in line and not list((tmp_path / "out").rglob("model_0*.pth"))


@pytest.mark.parametrize("engine", ["joint", pytest.param("two-pass", marks=pytest.mark.slow)])
def test_or_is_skipped_and_the_resumed_run_is_the_same(
    tmp_path, datasets, capfd, nan_in_iteration_2, engine
):
    options = ["TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "4"]
    run = write_run(tmp_path, ON_NONFINITE="skip", MAX_SKIPS_IN_A_ROW=1, ENGINE=engine, KEEP=0)
    assert main(["--config-file", str(run), *options]) == 0
    told = capfd.readouterr()
    assert nan_in_iteration_2.file in told.out and "1 optimizer steps were skipped" in told.out
    assert "1 optimizer steps were skipped" in (tmp_path / "out" / "report.html").read_text()
    states = [torch.load(p, weights_only=True) for p in weights_of(tmp_path / "out", "fpn")]
    for one, two in ((states[0], states[1]), (states[1], states[2])):
        same = [torch.equal(x, two["model"][k]) for k, x in one["model"].items()]
        assert all(same) == (one is states[0])
    record = torch.load(tmp_path / "out" / "run.pt", weights_only=True)
    assert record["finite"]["total"] == 1 and record["lessons"][-1]["fpn/skipped"] == 1
    nan_in_iteration_2.batches.clear()
    nan_in_iteration_2.last = 3
    again = ["--config-file", str(run), "--resume", *options, "OUTPUT_DIR", str(tmp_path / "again")]
    assert main(again) == INTERRUPTED
    assert main(again) == 0 and len(nan_in_iteration_2.batches) == 5
    resumed = torch.load(tmp_path / "again" / "run.pt", weights_only=True)
    assert resumed["finite"] == record["finite"]
    last = torch.load(weights_of(tmp_path / "again", "fpn")[-1], weights_only=True)["model"]
    assert all(torch.equal(x, last[key]) for key, x in states[-1]["model"].items())


def weights_of(folder, name):
    return sorted((folder / name).glob("model_0*.pth"))


def test_a_run_that_failed_in_its_last_iteration_is_not_evaluated(tmp_path, datasets, monkeypatch):
    trainer = TransferTrainer(load_run([write_run(tmp_path)], ONE_STEP))

    def broken():
        raise DataError("x.png: cannot be read")

    monkeypatch.setattr(trainer, "run_step", broken)
    with pytest.raises(DataError, match=r"x\.png"):
        trainer.train()
    assert [row["iteration"] for row in trainer.history] == [0]


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="launch takes the GPUs")


@NO_GPU
def test_of_two_processes_one_line_is_told(tmp_path, datasets, capfd):
    missing = ["--num-gpus", "2", "PEER.fpn.MODEL.WEIGHTS", "none.pth"]
    line = fails(write_run(tmp_path), *missing, *ONE_STEP, capfd=capfd)
    assert "none.pth: no such file" in line


@NO_GPU
@pytest.mark.slow
def test_sigterm_saves_a_run_of_two_processes(tmp_path, datasets):
    run = write_run(tmp_path)
    asked = ["--config-file", str(run), "--num-gpus", "2", "MODEL.DEVICE", "cpu"]
    asked += ["SOLVER.MAX_ITER", "1000", "TEST.EVAL_PERIOD", "0"]
    command = [sys.executable, "segmentation/train_net.py", *asked]
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    while not (tmp_path / "out" / "run.pt").is_file() and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    told = tmp_path / "log.txt"
    assert process.wait() == EXIT_STATUS, told.read_text()[-3000:]
    assert "SIGTERM: saved after iteration" in told.read_text()


@NO_GPU
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGTERM, EXIT_STATUS), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_two_processes_that_read_end_with_what_started_them(tmp_path, datasets, sent, status):
    run = write_run(tmp_path)
    asked = ["--config-file", str(run), "--num-gpus", "2", "MODEL.DEVICE", "cpu"]
    asked += ["DATALOADER.NUM_WORKERS", "1", "SOLVER.MAX_ITER", "1000", "TEST.EVAL_PERIOD", "1"]
    # a shell's script ignores Ctrl-C for what it starts with &, and then its ranks do
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable]
    command += ["segmentation/train_net.py", *asked]
    told = tmp_path / "log.txt"
    with told.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        while "evaluating iteration" not in told.read_text() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(1)  # reading processes that are spawned would import for longer
        process.send_signal(sent)
        assert process.wait() == status, told.read_text()[-3000:]
        assert "Traceback" not in told.read_text()
        end = time.monotonic() + 20
        while alive(process.pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert not alive(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _slow_iterations(world, folder):
    saved = []
    with Termination() as termination:
        hook = EndIfAsked(termination, world, saved.append)
        hook.trainer = SimpleNamespace(max_iter=60)
        with pytest.raises(Preempted, match=r"saved after iteration 8;"):
            for hook.trainer.iter in range(60):
                if (world.rank, hook.trainer.iter) == (0, 7):
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
                hook.after_step()
    assert saved == [False]
    (folder / f"{world.rank}").write_text(str(hook.trainer.iter))


def test_with_slow_iterations_ranks_end_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(common.termination, "SLOW", 0.05)
    launch(_slow_iterations, 2, tmp_path)
    one, other = ((tmp_path / f"{rank}").read_text() for rank in (0, 1))
    assert one == other


@NO_GPU
@pytest.mark.slow
def test_two_processes_run_through_the_command_line(tmp_path, datasets):
    run = write_run(tmp_path, RULE="random")
    url = default_argument_parser().parse_args([]).dist_url  # the same for all runs of a user
    with socket.socket() as other:
        with suppress(OSError):  # where it is taken, the better
            other.bind(("127.0.0.1", urlsplit(url).port))
            other.listen()
        assert main(["--config-file", str(run), "--num-gpus", "2", *ONE_STEP]) == 0
    assert (tmp_path / "out" / "run.pt").is_file()
    assert main(["--config-file", str(run), "--eval-only", "--resume"]) == 0


@pytest.mark.slow
def test_a_best_file_of_a_lost_moment_is_mended_or_measured_anew(tmp_path, datasets, caplog):
    options = ["TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "4"]
    run = write_run(tmp_path, GUARD="off")

    def trainer(values, resume=False):
        built = TransferTrainer(load_run([run], options), resume)

        def evaluate():
            done = min(built.iter + 1, 4) if built.history else 0
            return {f"{name}/mIoU": value[done] for name, value in values.items()}

        built.evaluate = evaluate
        return built

    values = {"fpn": [1.0, 2.0, 3.0, 9.0, 4.0], "deeplab": [1.0, 3.0, 2.0, 9.0, 4.0]}
    first = trainer(values)
    step = first.run_step

    def killed():
        if first.iter == 3:  # evaluated after iteration 3, the best of both
            raise KeyboardInterrupt
        step()

    first.run_step = killed
    with pytest.raises(KeyboardInterrupt):
        first.train()
    best = {name: tmp_path / "out" / name / "model_best.pth" for name in values}
    assert all(torch.load(p, weights_only=True)["iteration"] == 2 for p in best.values())
    (tmp_path / "out" / "fpn" / "model_0000002.pth").write_bytes(b"")  # its checkpoint is lost
    again = trainer(values, resume="auto")
    assert again.start_iter == 2 and again.best == {"fpn": [3.0, 2]}
    mended = torch.load(best["fpn"], weights_only=True)
    assert mended["iteration"] == 1
    earlier = torch.load(tmp_path / "out" / "fpn" / "model_0000001.pth", weights_only=True)["model"]
    assert all(torch.equal(x, mended["model"][key]) for key, x in earlier.items())
    assert f"{best['fpn']} is of a later moment than the run's record; it is wr" in caplog.text
    assert f"{best['deeplab']} is of a later moment than the run's record; the b" in caplog.text
    again.train()
    assert again.best == {"fpn": [9.0, 3], "deeplab": [9.0, 3]}


def guarded(folder, resume=False):
    """A run whose fpn is worse whenever it is not what it was at the start."""
    guard = {"GUARD": "rollback", "GUARD_PATIENCE": 1, "GUARD_METRIC_DROP": 0.5}
    folder.mkdir(exist_ok=True)
    options = ["TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "4"]
    trainer = TransferTrainer(load_run([write_run(folder, **guard)], options), resume)

    def evaluate():
        best = folder / "out" / "fpn" / "model_best.pth"
        held = torch.load(best, weights_only=True)["model"] if best.exists() else None
        fpn = trainer.peers[0].module.state_dict()
        same = held is None or all(torch.equal(x, held[key]) for key, x in fpn.items())
        return {"fpn/mIoU": 50.0 if same else 40.0, "deeplab/mIoU": 50.0 + len(trainer.history)}

    trainer.evaluate = evaluate
    return trainer


@pytest.fixture(scope="module")
def guarded_whole(tmp_path_factory, scenes_root):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(scenes_root))
        trainer = guarded(folder)
        trainer.train()
    assert [event["iteration"] for event in trainer.guard.events] == [2, 4]
    assert [row["iteration"] for row in trainer.history] == [0, 2, 2, 4, 4]
    return folder, trainer


@pytest.mark.parametrize("iteration", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("point", ["second", "record"])
def test_what_the_guard_did_is_not_lost_with_a_record(
    guarded_whole, datasets, tmp_path, monkeypatch, point, iteration
):
    """Killed between the files of the save after an evaluation: each peer's one, and the record."""
    folder, whole = guarded_whole
    run = tmp_path / "run"
    trainer = guarded(run)
    written, calls = checkpoints._save_peer, []

    def save_peer(path, peer, number, kept):
        if number == iteration - 1:
            calls.append(peer.name)
            if point == "second" and calls == ["fpn", "deeplab", "fpn", "deeplab"]:
                raise KeyboardInterrupt
        written(path, peer, number, kept)

    def save_record(folder, learning, state, *rest):
        if state["iteration"] == iteration and not state["due"]:
            raise KeyboardInterrupt
        kept(folder, learning, state, *rest)

    kept = checkpoints.save_record
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_save_peer", save_peer)
        patch.setattr(checkpoints, "save_record", save_record)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    again = guarded(run, resume="auto")
    assert again.start_iter == iteration
    again.train()
    assert again.guard.events == whole.guard.events and again.history == whole.history
    for name in again.peers.names:
        one, two = (
            torch.load(path / "out" / name / "model_final.pth", weights_only=True)["model"]
            for path in (folder, run)
        )
        assert all(torch.equal(x, two[key]) for key, x in one.items()), name
