"""The faster layout is taken, kept, and trying it changes nothing."""

import copy
import json

import pytest
import torch

from classification import layouts
from classification.layouts import choose_layouts, time_layouts
from classification.options import parse
from classification.peer import build_modules
from common import distributed
from common.distributed import World
from common.options import OptionError
from common.probe import time_in_turns
from tests.common.toy import ToyPeer, make_batch, make_peers
from tests.launch import launch

CPU = torch.device("cpu")
HERE = World(0, 1, 0, CPU)


def asked(*flags, first="channels_last=auto"):
    model = "resnet10t,img_size=64,pretrained=false"
    peers = ["--peer", f"{model},name=a,{first}", "--peer", f"{model},name=b"]
    options, specs = parse(["/data", *peers, "--num-classes", "5", "-b", "2", *flags])
    return options, specs, *build_modules(specs, options)


@pytest.mark.parametrize(("last", "taken"), [(0.96, True), (0.98, False), (1.5, False)])
def test_channels_last_must_be_faster_by_a_margin(monkeypatch, last, taken):
    times = {"contiguous": 1.0, "channels_last": last}
    monkeypatch.setattr(layouts, "time_layouts", lambda *given: times)
    options, specs, modules, views = asked()
    choose_layouts(specs, modules, views, options, HERE)
    assert [spec.options.channels_last for spec in specs] == [taken, False]
    assert options.layouts == {"a": taken}


def test_a_resumed_run_keeps_what_was_chosen(monkeypatch):
    monkeypatch.setattr(layouts, "time_layouts", None)  # not called
    options, specs, modules, views = asked()
    choose_layouts(specs, modules, views, options, HERE, {"a": True})
    assert specs[0].options.channels_last and options.layouts == {"a": True}


def _chooses(world, file, seats, chosen):
    """Choose where every rank measures something else; write down what each then has."""
    last = 0.5 if world.rank == 0 else 1.5
    layouts.time_layouts = lambda *given: {"contiguous": 1.0, "channels_last": last}
    options, specs, modules, views = asked("--auto-layout")
    if seats > 1:
        world = distributed.seat_peers(world, seats)
    choose_layouts(specs, modules, views, options, world, chosen)
    taken = [spec.options.channels_last for spec in specs]
    (file / f"{world.rank}.json").write_text(json.dumps([taken, options.layouts]))


@pytest.mark.parametrize(
    ("seats", "chosen", "taken"),
    [
        (1, None, [True, True]),  # the first rank's
        (2, None, [True, False]),  # that of the rank which holds the peer
        (1, {"a": False, "b": True}, [False, True]),  # the resumed run's
        (1, {"a": False}, [False, True]),  # a peer of which it had none is tried
    ],
)
def test_all_ranks_take_the_same_choice(tmp_path, seats, chosen, taken):
    launch(_chooses, 2, tmp_path, seats, chosen)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [[taken, dict(zip("ab", taken, strict=True))]] * 2


def test_layouts_are_timed_in_turns():
    order = []

    class Noting(ToyPeer):
        def forward(self, batch):
            order.append(self.name)
            return super().forward(batch)

    trials = {}
    for name in ("one", "other"):
        trials[name] = (Noting(name, make_peers(1)[0].module, frozen=True), make_batch(4))
    assert set(time_in_turns(trials, CPU, repeats=2)) == {"one", "other"}
    assert order == ["one", "other"] * 3  # the first of each warms up


def test_nothing_is_tried_where_nobody_asks(monkeypatch):
    monkeypatch.setattr(layouts, "time_layouts", None)
    options, specs, modules, views = asked(first="channels_last=true")
    choose_layouts(specs, modules, views, options, HERE)
    assert [spec.options.channels_last for spec in specs] == [True, False]


def test_trying_leaves_model_and_generators_as_they_were():
    options, specs, modules, views = asked("--auto-layout")
    assert all(spec.options.auto_layout for spec in specs)
    before = copy.deepcopy(modules[0].state_dict())
    strides = [p.stride() for p in modules[0].parameters()]
    here = torch.get_rng_state()
    seconds = time_layouts(specs[0], modules[0], views, 0, options, CPU, repeats=1)
    assert set(seconds) == {"contiguous", "channels_last"} and min(seconds.values()) > 0
    torch.testing.assert_close(modules[0].state_dict(), before, rtol=0, atol=0)
    assert strides == [p.stride() for p in modules[0].parameters()]
    assert all(p.grad is None for p in modules[0].parameters())
    assert torch.equal(torch.get_rng_state(), here)


def test_other_words_are_refused():
    with pytest.raises(OptionError, match="expected true or false"):
        asked(first="channels_last=fastest")
