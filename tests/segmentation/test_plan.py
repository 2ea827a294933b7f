"""The plan of segmentors against a real step, and its command line."""

import logging

import pytest

pytest.importorskip("detectron2")

import torch

from common.memory import peak_saved_bytes, tensors_in
from segmentation.config import load_run
from segmentation.models import build_module
from segmentation.noise import image_size, random_batch
from segmentation.plan import measure_team, shards_of
from segmentation.train_net import main
from segmentation.trainer import build_peer
from tests.segmentation.runs import write_run


def test_activations_are_those_of_a_real_step(tmp_path, datasets):
    run = load_run([write_run(tmp_path, ("fpn", "mask2former"))])
    team = measure_team(run)
    assert team.batch == 2 and image_size(run) == (64, 64)
    for config, cost in zip(run.peers, team.peers, strict=True):
        peer = build_peer(config, build_module(config.cfg), run.transfer)
        batch = random_batch(run, 2, torch.device("cpu"), 255, not peer.dense)
        peer.train()
        known = list(tensors_in([peer.module, batch]))
        real = peak_saved_bytes(lambda peer=peer, batch=batch: peer.forward(batch), known)
        assert cost.step.saved == pytest.approx(real, rel=0.01)  # masks are matched by values
        assert cost.optimizer > 0


def test_the_command_line_tells_and_writes_nothing(tmp_path, datasets, caplog):
    file = write_run(tmp_path, ("fpn", "deeplab"))
    before = sorted(tmp_path.iterdir())
    with caplog.at_level(logging.INFO):
        asked = ["--num-gpus", "2", "--config-file", str(file), "--plan", "--gpu-mem", "380M"]
        assert main(asked) == 0
    assert "Of one process with batches of 1" in caplog.text
    assert (
        "Take two-pass" in caplog.text
        and "TRANSFER.ENGINE two-pass" in caplog.text
        and "deeplab" in caplog.text
    )
    assert "buckets" in caplog.text
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("engine", "processes", "shards"),
    [("joint", 4, 4), ("peer-parallel", 1, 1), ("peer-parallel", 2, 1), ("peer-parallel", 4, 2)],
)
def test_processes_of_other_peers_do_not_split_the_batch(
    tmp_path, datasets, engine, processes, shards
):
    run = load_run([write_run(tmp_path, ("fpn", "deeplab"))], ["TRANSFER.ENGINE", engine])
    assert shards_of(run, processes) == shards


def test_an_engine_that_the_run_would_refuse_is_not_offered(tmp_path, datasets, caplog, capsys):
    talking = ["PEER.fpn.MODEL.FPN.NORM", "naiveSyncBN"]
    file = write_run(tmp_path, ("fpn", "deeplab"))
    with caplog.at_level(logging.INFO):
        asked = ["--config-file", str(file), "--plan", "--gpu-mem", "240M", *talking]
        assert main(asked) == 0
    assert (
        "It does not fit" in caplog.text
        and "TRANSFER.ENGINE peer-parallel" not in (caplog.text.split("It does not fit")[1])
    )
    assert "peer-parallel is left out: peer 'fpn': NaiveSyncBatchNorm averages" in caplog.text
    assert main([*asked, "TRANSFER.ENGINE", "peer-parallel"]) == 1  # as the run itself
    assert "NaiveSyncBatchNorm averages over all processes" in capsys.readouterr().err
