"""Two gloo processes do what one does."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from detectron2.utils import comm

from common import distributed
from common.checkpoint import read_file
from segmentation.cli import evaluate_only
from segmentation.config import load_run
from segmentation.scenes import write_scenes
from segmentation.trainer import TransferTrainer
from tests.launch import launch
from tests.segmentation.conftest import forget_scenes
from tests.segmentation.runs import write_run

# batch norm has its own statistics in each process, as in Detectron2; so none here
OPTIONS = [
    *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 0),
    *("SOLVER.WARMUP_ITERS", 0, "INPUT.MIN_SIZE_TRAIN", (64,)),
    *("MODEL.RESNETS.NORM", "GN"),
    *("PEER.fpn.MODEL.SEM_SEG_HEAD.NORM", "GN", "PEER.deeplab.MODEL.SEM_SEG_HEAD.NORM", "GN"),
    *("PEER.deeplab.MODEL.SEM_SEG_HEAD.ASPP_DROPOUT", 0.0),
    *("PEER.deeplab.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", [32]),
]


@pytest.fixture
def scenes_without_edges(tmp_path):
    """Scenes in which nothing is ignored.

    The hosts' losses are means over the pixels that count of each process; the means of two equal
    those of one where both have as many.
    """
    for split in ("train", "val"):
        folder = write_scenes(tmp_path / "data" / "scenes", split, 8)
        for path in (folder / "labels").glob("*.png"):
            labels = np.array(Image.open(path))
            Image.fromarray(np.where(labels == 255, 0, labels)).save(path)
    forget_scenes()
    yield tmp_path / "data"
    forget_scenes()


def _train(run_file, output, granularity):
    options = [*OPTIONS, "TRANSFER.GRANULARITY", granularity, "OUTPUT_DIR", str(output)]
    trainer = TransferTrainer(load_run([run_file], options))
    trainer.train()
    return trainer


def _weights(trainer):
    return {
        peer.name: {name: value.clone() for name, value in peer.best_module.state_dict().items()}
        for peer in trainer.peers
    }


def _in_a_process(world, run_file, output, data, granularity):
    os.environ["DETECTRON2_DATASETS"] = str(data)
    comm.create_local_process_group(world.size)
    trainer = _train(run_file, output, granularity)
    torch.save(_weights(trainer), Path(output).parent / f"rank{world.rank}.pt")


@pytest.mark.parametrize("granularity", ["image", "pixel"])
def test_two_processes_equal_one(tmp_path, monkeypatch, scenes_without_edges, granularity):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(scenes_without_edges))
    run_file = write_run(tmp_path)
    start = _weights(TransferTrainer(load_run([run_file], [*OPTIONS, "OUTPUT_DIR", str(tmp_path)])))
    alone = _train(run_file, tmp_path / "one", granularity)
    arguments = (run_file, tmp_path / "two", scenes_without_edges, granularity)
    launch(_in_a_process, 2, *arguments)
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2)]
    for one, other in zip(
        *([v for peer in rank.values() for v in peer.values()] for rank in ranks), strict=True
    ):
        assert torch.equal(one, other)
    for peer in alone.peers:
        saved = read_file(tmp_path / "two" / peer.name / "model_final.pth")["model"]
        learned = peer.module.state_dict()
        for name, begun in start[peer.name].items():
            moved = float((learned[name] - begun).norm())
            assert float((saved[name] - learned[name]).norm()) <= 1e-2 * moved + 1e-6, name
            assert moved > 0, name
    records = [read_file(tmp_path / name / "run.pt") for name in ("one", "two")]
    one, two = (record["lessons"][-1] for record in records)
    assert one["transfer/taught"] > 0
    assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    one, two = (record["history"][-1] for record in records)
    assert two["fpn/mIoU"] == pytest.approx(one["fpn/mIoU"], abs=0.5)


def _with_batch_norm(world, run_file, data):
    os.environ["DETECTRON2_DATASETS"] = str(data)
    comm.create_local_process_group(world.size)
    options = ["SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 0.05]
    trainer = TransferTrainer(load_run([run_file], [*options, "TEST.EVAL_PERIOD", 0]))
    differ = []
    run_step = trainer.run_step

    def step():
        run_step()
        found = distributed.gather_objects(dict(trainer.peers[0].module.named_buffers()))
        differ.append(any(not torch.equal(found[0][n], found[1][n]) for n in found[0]))

    trainer.run_step = step
    trainer.train()
    assert all(differ)  # on the way each rank has its own
    torch.save(_weights(trainer), run_file.parent / f"rank{world.rank}.pt")


@pytest.mark.parametrize(
    "settings",
    [{}, {"MODEL_EMA": True, "MODEL_EMA_DECAY": 0.5, "TEACHERS": "ema+own"}],
    ids=["plain", "averages"],
)
def test_with_batch_norm_what_is_evaluated_is_what_is_saved(tmp_path, datasets, settings):
    run_file = write_run(tmp_path, ("fpn", "deeplab"), **settings)
    launch(_with_batch_norm, 2, run_file, datasets)
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2)]
    for peer in ("fpn", "deeplab"):
        saved = read_file(tmp_path / "out" / peer / "model_final.pth")["model"]
        for rank in ranks:
            assert all(torch.equal(rank[peer][name], x) for name, x in saved.items())
    run = load_run([run_file])
    record = read_file(tmp_path / "out" / "run.pt")
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    told = next(row for row in map(json.loads, lines) if "fpn/loss_sem_seg" in row)
    lessons = record["lessons"][-1]
    for peer in ("fpn", "deeplab"):  # the host's one loss, and the ledger's: over both ranks
        assert told[f"{peer}/loss_sem_seg"] == pytest.approx(lessons[f"{peer}/task_loss"])
    measured = evaluate_only(run, resume=True)
    last = {name: x for name, x in record["history"][-1].items() if name != "iteration"}
    assert str(measured) == str(last)  # as text: NaN where a class is not there
