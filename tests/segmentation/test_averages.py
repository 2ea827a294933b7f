"""Averages of segmentors' weights: evaluated, saved, exported, resumed, and teachers themselves."""

import copy

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from common.average import WeightAverage
from common.card import from_json
from common.checkpoint import read_file
from common.engine import JointEngine
from common.guard import STOPPED, UNTAUGHT
from common.peers import PeerGroup
from common.transfer import KnowledgeTransfer
from segmentation import checkpoints
from segmentation.cli import main
from segmentation.config import load_run
from segmentation.evaluation import evaluate_group
from segmentation.models import build_module
from segmentation.peer import SegmentorPeer, make_batch
from segmentation.plan import measure_team
from segmentation.trainer import TransferTrainer, build_peer
from tests.common.toy import HERE
from tests.segmentation.runs import write_run
from tests.segmentation.test_train_net import same, weights
from tests.segmentation.toy import make_cfg, make_samples

CPU = torch.device("cpu")
TAUGHT = {"RULE": "mixture", "TEACHERS": "ema+own", "TEMPERATURE": 2.0}
AVERAGED = {"MODEL_EMA": True, "MODEL_EMA_DECAY": 0.8}


def averaged_peer(kind, seed=0, decay=0.8):
    torch.manual_seed(seed)
    cfg = make_cfg(kind)
    module = build_model(cfg)
    average = WeightAverage(module, decay)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    return SegmentorPeer(kind, module, cfg, optimizer=optimizer, average=average)


def cut_at(trainer, iteration):
    """Train, and end as if killed before an iteration."""
    run_step = trainer.run_step

    def step():
        if trainer.iter == iteration:
            raise KeyboardInterrupt
        run_step()

    trainer.run_step = step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def assert_same_peers(one, other):
    for mine, its in zip(one.peers, other.peers, strict=True):
        assert same(mine.module.state_dict(), its.module.state_dict())
        assert same(mine.best_module.state_dict(), its.best_module.state_dict())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scenes_root):
    """A run with averages that teach."""
    folder = tmp_path_factory.mktemp("averaged")
    path = write_run(folder, ("fpn", "mask2former"), **TAUGHT, **AVERAGED, SOUP=True)
    options = ["SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(scenes_root))
        assert main(["--config-file", str(path), *options]) == 0
    return folder


@pytest.mark.parametrize("kind", ["fpn", "deeplab", "point_rend", "mask2former"])
def test_an_average_teaches_as_it_is_evaluated(kind):
    """In evaluation mode, once a step, without a trace; its weights move after the step."""
    peer = averaged_peer(kind)
    with torch.no_grad():
        for p in peer.average.module.parameters():
            p += 0.01 * torch.randn_like(p)
    taught = copy.deepcopy(peer.average.module.state_dict())
    frozen = SegmentorPeer("still", build_model(peer.cfg), peer.cfg, frozen=True)
    frozen.module.load_state_dict(taught)
    batch = make_batch(make_samples(), CPU, 255)
    peer.train()
    frozen.train()
    with torch.no_grad():
        expected = frozen.forward(batch)
        with peer.averaged():
            found = peer.forward(batch)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.score, expected.score)
    assert torch.isfinite(found.task_loss) and not peer.take_losses()
    group = PeerGroup([peer])
    transfer = KnowledgeTransfer("self", names=group.names, teachers="ema")
    result = JointEngine(group, transfer, CPU).step(batch, step=0, update=False)
    assert torch.equal(result.score[0], expected.score) and result.transfer_loss[0] > 0
    assert same(peer.average.module.state_dict(), taught)
    assert all(p.grad is None for p in peer.average.module.parameters())
    assert any(p.grad is not None for p in peer.module.parameters())
    assert peer.model is peer.module and peer.module.training


def test_a_peers_file_is_the_average_and_loads_strictly_in_plain_detectron2(finished, datasets):
    run = load_run([finished / "run.yaml"])
    history = read_file(finished / "out" / checkpoints.RECORD)["history"]
    for config in run.peers:
        for file in ("model_final.pth", "model_best.pth", "model_soup.pth"):
            held = weights(finished / "out", config.name, file)
            module = build_model(config.cfg)
            unmatched = DetectionCheckpointer(module)._load_model(
                {"model": dict(held), "matching_heuristics": False}
            )
            assert not unmatched.missing_keys and not unmatched.unexpected_keys
            assert same(module.state_dict(), held)
            if file == "model_final.pth":
                alone = SegmentorPeer(config.name, module, config.cfg, frozen=True)
                found = evaluate_group([alone], "scenes_val", HERE)
                for name, value in found.items():
                    assert value == pytest.approx(history[-1][name], abs=1e-9, nan_ok=True)
        final = read_file(finished / "out" / config.name / "model_final.pth")
        assert final["unaveraged"].keys() == final["model"].keys()
        assert not same(final["unaveraged"], final["model"])


def test_report_and_card_tell_of_averages(finished):
    report = (finished / "out" / "report.html").read_text()
    assert "model_ema_decay" in report and "ema+own" in report
    card = from_json((finished / "out/fpn/card.json").read_text(), finished)
    assert card.made["model_ema"] == "True" and card.made["teachers"] == "ema+own"
    assert "average" in card.evidence["last"].about


def test_the_average_moves_by_its_decay_once_an_iteration(tmp_path, datasets):
    path = write_run(tmp_path, ("fpn",), RULE="none", ACCUMULATE=2, MODEL_EMA=True)
    options = ["SOLVER.MAX_ITER", 8, "TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 0]
    trainer = TransferTrainer(load_run([path], options))
    peer = trainer.peers[0]
    expected = {k: x.double() for k, x in peer.module.state_dict().items()}
    run_step = trainer.run_step

    def step():
        run_step()
        for name, x in peer.module.state_dict().items():
            moved = 0.5 * expected[name] + 0.5 * x  # a quarter of 8: 1 - 1 / 2
            expected[name] = moved if x.is_floating_point() else x.double()

    trainer.run_step = step
    trainer.train()
    for name, x in peer.average.module.state_dict().items():
        torch.testing.assert_close(x.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_run_with_averages_that_teach_goes_on_bit_for_bit(tmp_path, datasets):
    path = write_run(tmp_path, ("fpn", "mask2former"), **AVERAGED, **TAUGHT | {"RULE": "random"})
    options = ["SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 2]
    whole, cut = (
        load_run([path], [*options, "OUTPUT_DIR", str(tmp_path / name)])
        for name in ("whole", "cut")
    )
    uninterrupted = TransferTrainer(whole)
    uninterrupted.train()
    cut_at(TransferTrainer(cut), 2)
    torch.manual_seed(99)  # a process of its own would have other draws
    again = TransferTrainer(cut, resume=True)
    assert again.start_iter == 2
    for peer in again.peers:
        assert not same(peer.module.state_dict(), peer.average.module.state_dict())
    again.train()
    assert_same_peers(uninterrupted, again)
    assert str(uninterrupted.history) == str(again.history)
    assert str(uninterrupted.lessons) == str(again.lessons)
    for name in whole.names:
        for file in ("model_final.pth", "model_best.pth"):
            mine, its = (weights(tmp_path / x, name, file) for x in ("whole", "cut"))
            assert same(mine, its)


def test_two_passes_with_averages_that_teach_equal_one(tmp_path, datasets):
    """Up to rounding: batch norm and all that is drawn are replayed."""
    path = write_run(tmp_path, **TAUGHT, **AVERAGED)
    trainers = []
    for engine in ("joint", "two-pass"):
        options = ["TRANSFER.ENGINE", engine, "OUTPUT_DIR", str(tmp_path / engine)]
        options += ["SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 0]
        trainers.append(TransferTrainer(load_run([path], options)))
        trainers[-1].train()
    one, two = trainers
    assert two.lessons[-1] == pytest.approx(one.lessons[-1], rel=1e-4, nan_ok=True)
    for mine, its in zip(one.peers, two.peers, strict=True):
        for module, other in ((mine.module, its.module), (mine.best_module, its.best_module)):
            torch.testing.assert_close(
                other.state_dict(), module.state_dict(), rtol=1e-3, atol=1e-5
            )


def test_a_peer_that_gets_worse_goes_back_with_its_average(tmp_path, datasets, monkeypatch):
    evaluate = TransferTrainer.evaluate

    def worse(trainer, tta=False):
        metrics = evaluate(trainer, tta)
        told = len(trainer.history)
        return {**metrics, "fpn/mIoU": 50.0 - told, "deeplab/mIoU": 50.0 + told}

    monkeypatch.setattr(TransferTrainer, "evaluate", worse)
    guard = {"GUARD": "rollback", "GUARD_PATIENCE": 1, "GUARD_METRIC_DROP": 0.5}
    path = write_run(tmp_path, **TAUGHT, **AVERAGED, **guard)
    periods = ["TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 3]
    whole, cut = (
        load_run([path], [*periods, "OUTPUT_DIR", str(tmp_path / name)])
        for name in ("whole", "cut")
    )
    uninterrupted = TransferTrainer(whole)
    start = copy.deepcopy(uninterrupted.peers[0].module.state_dict())
    uninterrupted.train()
    actions = [(e["peer"], e["iteration"], e["action"]) for e in uninterrupted.guard.events]
    assert actions == [("fpn", 1, UNTAUGHT), ("fpn", 2, STOPPED)]
    fpn, deeplab = uninterrupted.peers
    assert fpn.average is None and same(fpn.module.state_dict(), start)
    assert not same(deeplab.module.state_dict(), deeplab.average.module.state_dict())
    for iteration in (1, 2):  # rolled back once; frozen
        cut_at(TransferTrainer(cut, resume=iteration > 1), iteration)
    again = TransferTrainer(cut, resume=True)
    assert again.peers[0].frozen
    again.train()
    assert_same_peers(uninterrupted, again)
    assert again.guard.events == uninterrupted.guard.events


def test_a_best_file_that_is_lost_is_the_average_again(finished, tmp_path, datasets):
    run = load_run([finished / "run.yaml"], ["SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 2])
    trainer = TransferTrainer(run, resume=True)
    held = weights(finished / "out", "fpn")
    trainer.folder, trainer.max_iter = tmp_path, 9  # what cannot be mended is measured anew
    trainer.best["fpn"][1] = 3
    trainer._mend_best({"iteration": 3}, {"fpn": {}, "mask2former": {}})
    assert same(weights(tmp_path, "fpn", checkpoints.BEST), held)
    both = {"module": read_file(finished / "out/fpn/model_final.pth")["unaveraged"]}
    trainer.best["fpn"][1] = 2  # kept by the guard
    kept = {"fpn": {"best": {**both, "average": held}}, "mask2former": {}}
    trainer._mend_best({"iteration": 3}, kept)
    assert same(weights(tmp_path, "fpn", checkpoints.BEST), held)


def test_the_plan_counts_averages_and_their_forwards(tmp_path, datasets):
    path = write_run(tmp_path)
    plain, averaged, teaching = (
        measure_team(load_run([write_run(tmp_path, **settings)])).peers[0]
        for settings in ({}, AVERAGED, {**AVERAGED, **TAUGHT})
    )
    assert path.is_file() and plain.average == 0 and averaged.copy == 0
    assert averaged.average == teaching.average == plain.weights
    assert 0 < teaching.copy < teaching.step.peak


def test_a_frozen_peer_has_no_average(tmp_path):
    text = write_run(tmp_path, **AVERAGED).read_text()
    path = tmp_path / "frozen.yaml"
    path.write_text(text.replace("NAME: fpn", "FROZEN: true\n    NAME: fpn"))
    run = load_run([path])
    built = [build_peer(peer, build_module(peer.cfg), run.transfer) for peer in run.peers]
    assert [peer.average is None for peer in built] == [True, False]
