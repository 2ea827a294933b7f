"""Segmentors in processes of their own learn what they learn in one process."""

import os
import shutil

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from detectron2.utils import comm

from common.checkpoint import read_file
from segmentation.cli import main, train
from segmentation.config import load_run
from segmentation.errors import ConfigError
from segmentation.trainer import refuse_talk
from tests.launch import launch
from tests.segmentation.runs import write_run
from tests.segmentation.toy import make_peer

SEATED = ("TRANSFER.ENGINE", "peer-parallel")
OPTIONS = [
    *("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2),
    *("SOLVER.WARMUP_ITERS", 0, "TRANSFER.KEEP", 0, "TRANSFER.ACCUMULATE", 2),
    *("INPUT.MIN_SIZE_TRAIN", (64,), "TRANSFER.RULE", "random"),
    *("PEER.deeplab.MODEL.SEM_SEG_HEAD.ASPP_DROPOUT", 0.0),
    *("PEER.deeplab.INPUT.MIN_SIZE_TEST", 80),  # a test geometry of its own
]
TTA = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48,), "TEST.AUG.MAX_SIZE", 96)
# each process has statistics of batch norm of its own; so none where peers have replicas
WITHOUT_STATISTICS = [
    *("MODEL.RESNETS.NORM", "GN", "SOLVER.IMS_PER_BATCH", 4),
    *("PEER.fpn.MODEL.SEM_SEG_HEAD.NORM", "GN", "PEER.deeplab.MODEL.SEM_SEG_HEAD.NORM", "GN"),
    *("PEER.deeplab.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", [32]),
]


def run_of(run_file, output, *options, resume=False):
    return train(load_run([run_file], [*OPTIONS, *options, "OUTPUT_DIR", str(output)]), resume)


def ranked(world, run_file, output, data, options, resume=False):
    os.environ["DETECTRON2_DATASETS"] = str(data)
    comm.create_local_process_group(world.size)
    run_of(run_file, output, *options, resume=resume)


def assert_close_runs(one, two, peers=("fpn", "deeplab")):
    """Weights, optimizers, evaluations and lessons; the ensemble's evaluation too."""
    for peer in peers:
        mine, other = (read_file(folder / peer / "model_final.pth") for folder in (one, two))
        torch.testing.assert_close(other["model"], mine["model"], rtol=1e-3, atol=1e-4)
        assert (two / peer / "model_best.pth").exists()
    mine, other = (read_file(folder / "run.pt") for folder in (one, two))
    assert other["peers"] == mine["peers"] and other["iteration"] == mine["iteration"]
    for row, found in zip(mine["history"], other["history"], strict=True):
        assert list(found) == list(row)
        assert found == pytest.approx(row, abs=0.5, nan_ok=True)  # a few pixels at the edges
    for row, found in zip(mine["lessons"], other["lessons"], strict=True):
        assert found == pytest.approx(row, rel=1e-2, abs=1e-3, nan_ok=True)


def back_to(folder, iterations):
    """Let a finished run stand where it stood after some iterations, as if killed there."""
    record = read_file(folder / "run.pt")
    for peer in record["peers"]:
        for name in ("model_final.pth", f"model_{record['iteration'] - 1:07d}.pth"):
            (folder / peer / name).unlink()
    (folder / "run.pt").write_bytes((folder / f"run-{iterations}.pt").read_bytes())


@pytest.fixture
def kept(monkeypatch):
    """Keep every record of a run beside the last."""
    from segmentation import checkpoints

    written = checkpoints.save_record

    def save(folder, learning, state, *rest):
        written(folder, learning, state, *rest)
        (folder / f"run-{state['iteration']}.pt").write_bytes((folder / "run.pt").read_bytes())

    monkeypatch.setattr(checkpoints, "save_record", save)


def test_two_processes_equal_the_joint_run(tmp_path, datasets):
    run_file = write_run(tmp_path)
    joint, seated = tmp_path / "joint", tmp_path / "seated"
    run_of(run_file, joint, *TTA)
    launch(ranked, 2, run_file, seated, datasets, (*SEATED, *TTA))
    assert_close_runs(joint, seated)
    page = (seated / "report.html").read_text()
    assert "data:image/png" in page and "deeplab" in page
    told = (seated / "metrics.json").read_text()
    assert all(f"{name}/{what}" in told for name in ("fpn", "deeplab") for what in ("lr", "loss"))
    rows = [(folder / "evaluation_tta.csv").read_text() for folder in (joint, seated)]
    names, values = zip(*(row.splitlines() for row in rows), strict=True)
    assert names[0] == names[1] and "ensemble/mIoU_TTA" in names[0]
    one, two = ([float(x) for x in row.split(",")] for row in values)
    assert two == pytest.approx(one, abs=0.5, nan_ok=True)


@pytest.mark.slow
def test_averages_teach_across_processes_and_go_on(tmp_path, datasets, kept):
    run_file = write_run(tmp_path, TEACHERS="ema+own", MODEL_EMA=True, MODEL_EMA_DECAY=0.8)
    joint, seated, again = (tmp_path / name for name in ("joint", "seated", "again"))
    run_of(run_file, joint)
    shutil.copytree(joint, again)
    back_to(again, 2)
    launch(ranked, 2, run_file, seated, datasets, SEATED)
    launch(ranked, 2, run_file, again, datasets, SEATED, True)
    for found in (seated, again):
        assert_close_runs(joint, found)
        for peer in ("fpn", "deeplab"):
            one, two = (read_file(f / peer / "model_final.pth") for f in (joint, found))
            torch.testing.assert_close(two["unaveraged"], one["unaveraged"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_go_on_with_a_joint_run(tmp_path, datasets, kept):
    run_file = write_run(tmp_path)
    joint, seated = tmp_path / "joint", tmp_path / "seated"
    run_of(run_file, joint)
    shutil.copytree(joint, seated)
    back_to(seated, 2)
    launch(ranked, 2, run_file, seated, datasets, SEATED, True)
    assert_close_runs(joint, seated)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(tmp_path, datasets):
    run_file = write_run(tmp_path)
    whole, seated = tmp_path / "whole", tmp_path / "seated"
    run_of(run_file, whole)
    launch(ranked, 2, run_file, seated, datasets, (*SEATED, "SOLVER.MAX_ITER", 2))
    run_of(run_file, seated, "TRANSFER.ENGINE", "two-pass", resume=True)
    for peer in ("fpn", "deeplab"):
        one, two = (read_file(f / peer / "model_final.pth")["model"] for f in (whole, seated))
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["image", "pixel"])
def test_teams_of_replicas_equal_data_parallelism(tmp_path, datasets, granularity):
    run_file = write_run(tmp_path)
    joint, seated = tmp_path / "joint", tmp_path / "seated"
    options = (*WITHOUT_STATISTICS, "TRANSFER.GRANULARITY", granularity)
    launch(ranked, 2, run_file, joint, datasets, options)
    launch(ranked, 4, run_file, seated, datasets, (*options, *SEATED))
    assert_close_runs(joint, seated)


@pytest.mark.slow
def test_hosts_that_talk_to_their_replicas_do_not_wait_for_other_peers(tmp_path, datasets):
    """Mask2Former counts masks over ranks; SemanticSegmentor does not."""
    run_file = write_run(tmp_path, ("fpn", "mask2former"))
    options = ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 4, "TEST.EVAL_PERIOD", 0]
    options += ["TRANSFER.GRANULARITY", "pixel", *SEATED]
    launch(mixed, 4, run_file, tmp_path / "out", datasets, options)
    assert read_file(tmp_path / "out" / "run.pt")["iteration"] == 2


def mixed(world, run_file, output, data, options):
    os.environ["DETECTRON2_DATASETS"] = str(data)
    comm.create_local_process_group(world.size)
    train(load_run([run_file], [*options, "OUTPUT_DIR", str(output)]))


@pytest.mark.slow
def test_the_command_line_starts_it(tmp_path, datasets):
    run_file = write_run(tmp_path)
    asked = ["--config-file", str(run_file), "--num-gpus", "2", "MODEL.DEVICE", "cpu"]
    assert main([*asked, *map(str, SEATED), "SOLVER.MAX_ITER", "2"]) == 0
    assert (tmp_path / "out" / "report.html").exists()


def test_a_wrong_number_of_processes_says_how_to_start(tmp_path, datasets, capsys):
    run_file = write_run(tmp_path)
    for count in (1, 3):
        asked = ["--config-file", str(run_file), "--num-gpus", str(count), "MODEL.DEVICE", "cpu"]
        assert main([*asked, *SEATED]) == 1
        told = capsys.readouterr().err
        assert f"2 peers in {count} processes" in told and "start it with --num-gpus 2" in told
    assert not (tmp_path / "out").exists()


def test_layers_that_would_wait_for_other_peers_are_refused():
    refuse_talk(make_peer("fpn").module, "fpn")
    with pytest.raises(ConfigError, match="'fpn': NaiveSyncBatchNorm averages over all processes"):
        refuse_talk(make_peer("fpn", "MODEL.RESNETS.NORM", "naiveSyncBN").module, "fpn")
