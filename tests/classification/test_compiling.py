"""Compiled is taken where it is faster, kept, and trying it changes nothing."""

import copy

import pytest
import torch

from classification import compiling
from classification.compiling import choose_compilation, time_both
from classification.train import run
from common.checkpoint import load_run
from tests.classification.test_layouts import CPU, HERE, asked
from tests.classification.test_train import arguments_of, vit

AUTO = "compile=auto"


@pytest.mark.parametrize(("last", "taken"), [(0.96, True), (0.98, False), (1.5, False)])
def test_compiled_must_be_faster_by_a_margin(monkeypatch, last, taken):
    monkeypatch.setattr(compiling, "time_both", lambda *given: {"eager": 1.0, "compiled": last})
    options, specs, modules, views = asked(first=AUTO)
    choose_compilation(specs, modules, views, options, HERE)
    assert [spec.options.torchcompile for spec in specs] == ["inductor" if taken else None, None]
    assert options.compiled == {"a": taken}


def test_all_peers_can_ask_at_once(monkeypatch):
    monkeypatch.setattr(compiling, "time_both", lambda *given: {"eager": 1.0, "compiled": 0.5})
    options, specs, modules, views = asked("--torchcompile", "auto", first="drop_path=0")
    choose_compilation(specs, modules, views, options, HERE, {"a": False})
    assert [spec.options.torchcompile for spec in specs] == [None, "inductor"]


def test_where_the_compiler_fails_the_peer_stays_eager(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "BACKEND", "none_such")
    options, specs, modules, views = asked(first=AUTO)
    choose_compilation(specs, modules, views, options, HERE)
    assert specs[0].options.torchcompile is None and options.compiled == {"a": False}
    assert "a: not compiled, the compiler fails here" in caplog.text and "none_such" in caplog.text


def test_trying_leaves_model_and_generators_as_they_were(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")  # traces, but builds no code
    options, specs, modules, views = asked(first=AUTO)
    before, here = copy.deepcopy(modules[0].state_dict()), torch.get_rng_state()
    seconds = time_both(specs[0], modules[0], views, 0, options, CPU, repeats=1)
    assert set(seconds) == {"eager", "compiled"} and min(seconds.values()) > 0
    torch.testing.assert_close(modules[0].state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), here)


def test_a_run_keeps_its_choice_on_resume(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    monkeypatch.setattr(compiling, "time_both", lambda *given: {"eager": 1.0, "compiled": 0.5})
    own = ["--peer", vit("a", compile="auto"), "--peer", vit("b", img_size=24)]
    rest = arguments_of(digits, tmp_path, "--train-batches-per-epoch", "2", peers=0)
    arguments = [*rest[:1], *own, *rest[1:]]
    run([*arguments, "--experiment", "whole"], bars=False)
    assert load_run(tmp_path / "whole")["config"]["compiled"] == {"a": True}
    run([*arguments, "--experiment", "again", "--epochs", "1"], bars=False)
    monkeypatch.setattr(compiling, "time_both", None)  # not called
    resumed = ["--resume", str(tmp_path / "again"), "--experiment", "more"]
    run([*arguments, *resumed], bars=False)
    assert load_run(tmp_path / "more")["config"]["compiled"] == {"a": True}


@pytest.mark.slow
def test_the_real_compiler_is_tried(caplog):
    caplog.set_level("INFO")
    options, specs, modules, views = asked(first=AUTO)
    choose_compilation(specs, modules, views, options, HERE)
    assert "eager" in caplog.text and "compiled" in caplog.text
    assert "the compiler fails" not in caplog.text
