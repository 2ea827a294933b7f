"""What goes wrong while a run is on its way ends in one line that names it."""

import shutil

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from segmentation.cli import main
from segmentation.config import load_run
from segmentation.errors import DataError
from segmentation.trainer import TransferTrainer
from tests.segmentation.runs import write_run

ONE_STEP = ["SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0", "SOLVER.CHECKPOINT_PERIOD", "0"]


@pytest.fixture
def own_datasets(tmp_path, datasets, monkeypatch):
    """A copy that a test may break."""
    shutil.copytree(datasets / "scenes", tmp_path / "data" / "scenes")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    return tmp_path / "data" / "scenes"


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


def test_an_empty_test_set_is_named(tmp_path, own_datasets, capfd):
    for path in (own_datasets / "val" / "images").glob("*.png"):
        path.unlink()
    assert "scenes_val: no images" in fails(write_run(tmp_path), *ONE_STEP, capfd=capfd)


def test_weights_that_are_not_finite_are_named(tmp_path, datasets, capfd):
    options = ["SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER", 3]
    line = fails(write_run(tmp_path), *ONE_STEP[2:], *options, capfd=capfd)
    assert "fpn" in line and "not finite" in line and "lower its lr" in line
    assert not (tmp_path / "out" / "run.pt").exists()


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
def test_two_processes_run_through_the_command_line(tmp_path, datasets):
    run = write_run(tmp_path, RULE="random")
    assert main(["--config-file", str(run), "--num-gpus", "2", *ONE_STEP]) == 0
    assert (tmp_path / "out" / "run.pt").is_file()
    assert main(["--config-file", str(run), "--eval-only", "--resume"]) == 0
