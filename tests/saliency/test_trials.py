"""A saliency model in the faster layout, compiled where that is faster; trying changes nothing."""

import copy

import pytest
import torch

from common import trials
from common.checkpoint import load_run
from common.trials import time_compiled, time_layouts
from saliency.options import parse
from saliency.peer import build_modules, build_peers
from saliency.trials import choose_ways, trial
from tests.common.toy import HERE
from tests.saliency.test_train import TOY, data, home, train  # noqa: F401

ASKING = f"{TOY}:Deep,channels_last=auto,compile=auto"


def asked(*peers):
    words = [word for peer in peers for word in ("--peer", peer)]
    options, specs = parse("dhf1k", "train_dhf1k", ["--data-root", "/data", *words, "-b", "2"])
    return specs, *build_modules(specs), options


def say(monkeypatch, last):
    """Let the second way take so much of the first one's time."""
    for name in ("time_layouts", "time_compiled"):
        monkeypatch.setattr(trials, name, lambda *given: {"one": 1.0, "other": last})


@pytest.mark.parametrize("taken", [True, False])
def test_the_peer_that_asks_is_given_what_is_faster(monkeypatch, taken):
    say(monkeypatch, 0.5 if taken else 1.5)
    specs, modules, views, options = asked(ASKING, f"{TOY}:Flat,channels_last")
    choose_ways(specs, modules, views, options, HERE, {})
    ways = [(spec.options.channels_last, spec.options.compile) for spec in specs]
    assert ways == [(taken, "inductor" if taken else None), (True, None)]
    assert options.layouts == options.compiled == {"Deep": taken}


def test_trying_leaves_model_and_generators_as_they_were(monkeypatch):
    monkeypatch.setattr(trials, "BACKEND", "aot_eager")  # traces, but builds no code
    specs, modules, views, options = asked(ASKING, f"{TOY}:Flat")
    before, here = copy.deepcopy(modules[0].state_dict()), torch.get_rng_state()

    def build(channels_last=False):
        return trial(specs[0], modules[0], views[0], options, HERE.device, channels_last)

    for seconds in (
        time_layouts(build, HERE.device, repeats=1),
        time_compiled(build, HERE.device, repeats=1),
    ):
        assert len(seconds) == 2 and min(seconds.values()) > 0
    torch.testing.assert_close(modules[0].state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None and p.is_contiguous() for p in modules[0].parameters())
    assert torch.equal(torch.get_rng_state(), here)


def test_layouts_give_the_same_loss_and_gradients():
    found = []
    for rest in ("", ",channels_last"):
        torch.manual_seed(0)
        specs, modules, views, options = asked(f"{TOY}:Deep{rest}", f"{TOY}:Flat")
        peer = build_peers(specs, modules, views, options, HERE, updates=1)[0]
        batch = trial(specs[0], modules[0], views[0], options, HERE.device, False)[1]
        output = peer.forward(batch)
        output.task_loss.backward()
        weights = list(peer.module.parameters())
        found.append([output.logits.detach(), *(p.grad for p in weights)])
        is_last = weights[0].is_contiguous(memory_format=torch.channels_last_3d)
        assert is_last == bool(rest) and weights[0].is_contiguous() != is_last
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_run_keeps_its_choice_on_resume(data, tmp_path, monkeypatch):  # noqa: F811
    say(monkeypatch, 0.5)
    monkeypatch.setattr(trials, "BACKEND", "aot_eager")
    peers = (ASKING, f"{TOY}:Flat")
    trainer = train(data, tmp_path, "--epochs", "1", peers=peers)
    kept = load_run(trainer.folder)["config"]
    assert kept["layouts"] == kept["compiled"] == {"Deep": True}
    for name in ("time_layouts", "time_compiled"):
        monkeypatch.setattr(trials, name, None)  # not called
    resumed = ("--resume", str(trainer.folder), "--experiment", "more")
    again = train(data, tmp_path, "--epochs", "2", *resumed, peers=peers)
    assert again.progress.epoch == 2
    weights = next(again.peers[0].module.parameters())
    assert weights.is_contiguous(memory_format=torch.channels_last_3d)
