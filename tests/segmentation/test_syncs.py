"""No iteration waits for its device but where its host does; see ``tests.syncs``."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

import torch
from detectron2.utils.events import EventStorage

from segmentation import solver
from segmentation.config import load_run
from segmentation.peer import make_batch
from segmentation.trainer import TransferTrainer
from tests.segmentation.runs import write_run
from tests.segmentation.toy import make_peer, make_samples
from tests.syncs import META, no_autocast, no_sync


@pytest.mark.parametrize(
    ("optimizer", "clip", "granularity"),
    [
        ("SGD", "full_model", "image"),
        ("ADAMW", "none", "pixel"),
        pytest.param("SGD", "value", "pixel", marks=pytest.mark.slow),
        pytest.param("ADAMW", "norm", "image", marks=pytest.mark.slow),
    ],
)
def test_an_iteration_does_not_wait(tmp_path, datasets, monkeypatch, optimizer, clip, granularity):
    # fused ones refuse this device
    monkeypatch.setattr(solver, "_kernels", lambda cfg: {"foreach": True})
    path = write_run(tmp_path, GRANULARITY=granularity, ACCUMULATE=2)
    options = ["MODEL.DEVICE", "meta", "SOLVER.OPTIMIZER", optimizer, "SOLVER.MAX_ITER", 4]
    options += ["SOLVER.CLIP_GRADIENTS.ENABLED", clip != "none"]
    if clip != "none":
        options += ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip]
    trainer = TransferTrainer(load_run([path], options))
    for peer in trainer.peers:
        peer.train()
    trainer.iter = 0
    schedules = next(hook for hook in trainer._hooks if type(hook).__name__ == "PeerSchedules")
    with EventStorage() as trainer.storage:
        with no_autocast():
            trainer.run_step()  # the first may bring constants to the device
        with no_sync():
            trainer.run_step()
            schedules.after_step()


@pytest.mark.parametrize(
    ("kind", "score"),
    [("fpn", "loss"), ("deeplab", "confidence"), ("deeplab_v3", "loss"), ("point_rend", "loss")],
)
def test_the_forward_of_a_segmentor_does_not_wait(kind, score):
    peer = make_peer(kind, score=score)
    peer.module.to(META)
    peer.train()
    with no_autocast():
        peer.forward(make_batch(make_samples(), META, 255))  # brings constants to the device
    with no_sync():
        output = peer.forward(make_batch(make_samples(), META, 255))
        (output.task_loss + output.logits.mean()).backward()


@pytest.mark.parametrize("kind", ["mask2former", "swin"])
def test_mask2former_waits_in_its_hosts_code_alone(kind):
    peer = make_peer(kind, frozen=True)  # catches the prediction and ends before the matching
    peer.module.to(META)
    peer.train()
    with no_sync(hosts=["transformers"]), torch.no_grad():
        peer.forward(make_batch(make_samples(), META, 255))
