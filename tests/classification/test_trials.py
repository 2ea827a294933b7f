"""A classifier in the faster layout, compiled where that is faster; trying it changes nothing."""

import copy

import pytest
import torch

from classification.options import parse
from classification.peer import build_modules
from classification.train import run
from classification.trials import choose_ways, trial
from common import trials
from common.checkpoint import load_run
from common.distributed import World
from common.options import OptionError
from common.trials import time_compiled, time_layouts
from tests.classification.test_train import arguments_of, vit

CPU = torch.device("cpu")
HERE = World(0, 1, 0, CPU)
LAYOUT, COMPILE = "channels_last=auto", "compile=auto"


def asked(*flags, first):
    model = "resnet10t,img_size=64,pretrained=false"
    peers = ["--peer", f"{model},name=a,{first}", "--peer", f"{model},name=b"]
    options, specs = parse(["/data", *peers, "--num-classes", "5", "-b", "2", *flags])
    return specs, *build_modules(specs, options), options


def say(monkeypatch, last):
    """Let the second way take so much of the first one's time."""
    for name in ("time_layouts", "time_compiled"):
        monkeypatch.setattr(trials, name, lambda *given: {"one": 1.0, "other": last})


def chosen(*flags, first, kept=None):
    specs, modules, views, options = asked(*flags, first=first)
    choose_ways(specs, modules, views, options, HERE, kept or {})
    ways = [(spec.options.channels_last, spec.options.torchcompile) for spec in specs]
    return ways, options.layouts, options.compiled


@pytest.mark.parametrize("taken", [True, False])
def test_the_peer_that_asks_is_given_what_is_faster(monkeypatch, taken):
    say(monkeypatch, 0.5 if taken else 1.5)
    backend = "inductor" if taken else None
    assert chosen(first=LAYOUT) == ([(taken, None), (False, None)], {"a": taken}, {})
    assert chosen(first=COMPILE) == ([(False, backend), (False, None)], {}, {"a": taken})


def test_all_peers_can_ask_at_once_and_a_resumed_run_keeps_its_own(monkeypatch):
    say(monkeypatch, 0.5)
    asking = ("--torchcompile", "auto", "--auto-layout")
    kept = {"layouts": {"a": False}, "compiled": {"a": False}}
    found = chosen(*asking, first="drop_path=0", kept=kept)[0]
    assert found == [(False, None), (True, "inductor")]


def test_nothing_is_tried_where_nobody_asks(monkeypatch):
    monkeypatch.setattr(trials, "time_layouts", None)
    monkeypatch.setattr(trials, "time_compiled", None)
    assert chosen(first="channels_last=true")[0] == [(True, None), (False, None)]


def test_trying_leaves_model_and_generators_as_they_were(monkeypatch):
    monkeypatch.setattr(trials, "BACKEND", "aot_eager")  # traces, but builds no code
    specs, modules, views, options = asked(first=LAYOUT)
    before = copy.deepcopy(modules[0].state_dict())
    strides = [p.stride() for p in modules[0].parameters()]
    here = torch.get_rng_state()

    def build(channels_last=False):
        return trial(specs[0], modules[0], views, 0, options, CPU, channels_last)

    for seconds in (time_layouts(build, CPU, repeats=1), time_compiled(build, CPU, repeats=1)):
        assert len(seconds) == 2 and min(seconds.values()) > 0
    torch.testing.assert_close(modules[0].state_dict(), before, rtol=0, atol=0)
    assert strides == [p.stride() for p in modules[0].parameters()]
    assert all(p.grad is None for p in modules[0].parameters())
    assert torch.equal(torch.get_rng_state(), here)


def test_other_words_are_refused():
    with pytest.raises(OptionError, match="expected true or false"):
        asked(first="channels_last=fastest")


def test_a_run_keeps_its_choice_on_resume(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "BACKEND", "aot_eager")
    say(monkeypatch, 0.5)
    own = ["--peer", vit("a", compile="auto"), "--peer", vit("b", img_size=24)]
    rest = arguments_of(digits, tmp_path, "--train-batches-per-epoch", "2", peers=0)
    arguments = [*rest[:1], *own, *rest[1:]]
    run([*arguments, "--experiment", "whole"], bars=False)
    assert load_run(tmp_path / "whole")["config"]["compiled"] == {"a": True}
    run([*arguments, "--experiment", "again", "--epochs", "1"], bars=False)
    monkeypatch.setattr(trials, "time_compiled", None)  # not called
    resumed = ["--resume", str(tmp_path / "again"), "--experiment", "more"]
    run([*arguments, *resumed], bars=False)
    assert load_run(tmp_path / "more")["config"]["compiled"] == {"a": True}


@pytest.mark.slow
def test_the_real_compiler_is_tried(caplog):
    caplog.set_level("INFO")
    chosen(first=COMPILE)
    assert "eager" in caplog.text and "compiled" in caplog.text
    assert "the compiler fails" not in caplog.text
