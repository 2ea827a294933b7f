"""A segmentor's memory layout: asked for, or tried, kept on resume, and no matter to its files."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from common import trials
from common.trials import time_layouts
from segmentation.config import load_run
from segmentation.errors import ConfigError
from segmentation.models import build_with_weights
from segmentation.trainer import TransferTrainer, trial
from tests.common.toy import HERE
from tests.segmentation.runs import write_run


def layouts(trainer):
    """Say of each peer whether its weights are in channels_last, and nothing is in neither."""
    found = []
    for peer in trainer.peers:
        weights = [p for p in peer.module.parameters() if p.dim() == 4]
        last = {p.is_contiguous(memory_format=torch.channels_last) for p in weights}
        found.append(last == {True})
    return found


def test_a_peer_has_its_own_and_the_runs_for_all(tmp_path):
    path = write_run(tmp_path, LAYOUT="channels_last")
    assert [peer.layout for peer in load_run([path]).peers] == ["channels_last"] * 2
    text = path.read_text().replace("NAME: fpn", "NAME: fpn\n    LAYOUT: auto")
    path.write_text(text)
    assert [peer.layout for peer in load_run([path]).peers] == ["auto", "channels_last"]
    path.write_text(text.replace("LAYOUT: auto", "LAYOUT: fast"))
    with pytest.raises(ConfigError, match="peer 'fpn': LAYOUT is 'fast'; choose from contiguous"):
        load_run([path])
    with pytest.raises(ConfigError, match=r"TRANSFER\.LAYOUT is 'fast'; choose from contiguous"):
        load_run([write_run(tmp_path)], ["TRANSFER.LAYOUT", "fast"])


def test_a_trial_leaves_model_and_generators_as_they_were(tmp_path, datasets):
    run = load_run([write_run(tmp_path, ("fpn", "mask2former"))])
    for config in run.peers:
        module = build_with_weights(config)[0]
        before = {name: x.clone() for name, x in module.state_dict().items()}
        strides = [p.stride() for p in module.parameters()]
        here = torch.get_rng_state()
        seconds = time_layouts(
            lambda last, config=config, module=module: trial(config, module, run, HERE, 255, last),
            HERE.device,
            repeats=1,
        )
        assert set(seconds) == {"contiguous", "channels_last"} and min(seconds.values()) > 0
        assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
        assert strides == [p.stride() for p in module.parameters()]
        assert all(p.grad is None for p in module.parameters())
        assert torch.equal(torch.get_rng_state(), here)


def test_a_run_keeps_its_choice_on_resume(tmp_path, datasets, monkeypatch):
    monkeypatch.setattr(
        trials, "time_layouts", lambda *given: {"contiguous": 1.0, "channels_last": 0.5}
    )
    path = write_run(tmp_path, LAYOUT="auto")
    options = ["SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0]
    first = TransferTrainer(load_run([path], options))
    assert first.layouts == {"fpn": True, "deeplab": True} and layouts(first) == [True, True]
    first.train()
    for peer in first.run.peers:
        peer.cfg.defrost()
        peer.cfg.MODEL.WEIGHTS = str(tmp_path / "out" / peer.name / "model_final.pth")
        module = build_with_weights(peer)[0]
        trained = first.peers[first.peers.names.index(peer.name)].module.state_dict()
        assert all(torch.equal(x, trained[name]) for name, x in module.state_dict().items())
    monkeypatch.setattr(trials, "time_layouts", None)  # not called
    again = TransferTrainer(load_run([path], ["SOLVER.MAX_ITER", 2]), resume=True)
    assert again.layouts == first.layouts and layouts(again) == [True, True]
