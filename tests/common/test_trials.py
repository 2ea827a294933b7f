"""The faster way is taken, by all ranks alike, and what cannot be compiled stays as it is."""

import functools
import json
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn

from common import distributed, trials
from common.distributed import World
from common.options import OptionError
from common.probe import time_in_turns
from common.trials import choose_compilation, choose_layouts, compiled, to_layout
from tests.common.toy import ToyPeer, make_batch, make_peers
from tests.launch import launch

CPU = torch.device("cpu")
HERE = World(0, 1, 0, CPU)


def build(number, channels_last=False):
    return make_peers(2)[number], make_batch(4)


def seconds(last):
    return lambda *given: {"contiguous": 1.0, "channels_last": last}


@pytest.mark.parametrize(("last", "taken"), [(0.96, True), (0.98, False), (1.5, False)])
def test_a_way_must_be_faster_by_a_margin(monkeypatch, last, taken):
    monkeypatch.setattr(trials, "time_layouts", seconds(last))
    assert choose_layouts({0: "a"}, build, HERE) == {"a": taken}
    monkeypatch.setattr(trials, "time_compiled", seconds(last))
    assert choose_compilation({1: "b"}, build, HERE) == {"b": taken}


def test_a_resumed_run_keeps_what_was_chosen(monkeypatch):
    monkeypatch.setattr(trials, "time_layouts", None)  # not called
    assert choose_layouts({0: "a"}, build, HERE, chosen={"a": True, "b": False}) == {"a": True}
    assert choose_layouts({}, build, HERE) == {}


def _chooses(world, file, seats, chosen):
    """Choose where every rank measures something else; write down what each then has."""
    trials.time_layouts = seconds(0.5 if world.rank == 0 else 1.5)
    records = []
    trials._logger.addFilter(records.append)
    trials._logger.setLevel(logging.INFO)
    if seats > 1:
        world = distributed.seat_peers(world, seats)
    found = choose_layouts({0: "a", 1: "b"}, build, world, chosen=chosen)
    told = [record.getMessage().partition(":")[0] for record in records]
    (file / f"{world.rank}.json").write_text(json.dumps([found, told]))


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
    assert [choice for choice, _ in found] == [dict(zip("ab", taken, strict=True))] * 2
    tried = sorted(set("ab") - set(chosen or ()))
    assert [sorted(told) for _, told in found] == [tried, []]  # of both peers, by the first alone


class Talking(ToyPeer):
    """Its forward needs all processes, as that of Mask2Former or of SyncBatchNorm does."""

    calls = 0

    def forward(self, batch):
        Talking.calls += 1
        dist.all_reduce(torch.ones(3))
        return super().forward(batch)


def _takes_turns(world, file):
    """One rank would go on for long, the other not at all."""
    patience = (60.0, -1.0)[world.rank]
    trials.time_in_turns = functools.partial(time_in_turns, patience=patience)

    def talking(number, channels_last):
        return Talking("a", make_peers(1)[0].module, frozen=True), make_batch(4)

    choose_layouts({0: "a"}, talking, world)
    (file / f"{world.rank}.json").write_text(json.dumps(Talking.calls))


def test_all_ranks_take_as_many_turns(tmp_path):
    launch(_takes_turns, 2, tmp_path)
    calls = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert calls == [4, 4]  # both ways once to warm up, and once timed


def test_ways_are_timed_in_turns():
    order = []

    class Noting(ToyPeer):
        def forward(self, batch):
            order.append(self.name)
            return super().forward(batch)

    tried = {}
    for name in ("one", "other"):
        tried[name] = (Noting(name, make_peers(1)[0].module, frozen=True), make_batch(4))
    assert set(time_in_turns(tried, CPU, repeats=2)) == {"one", "other"}
    assert order == ["one", "other"] * 3  # the first of each warms up


def test_where_the_compiler_fails_the_peer_stays_eager(monkeypatch, caplog):
    monkeypatch.setattr(trials, "BACKEND", "none_such")
    assert choose_compilation({1: "b"}, build, HERE) == {"b": False}
    assert "b: not compiled, the compiler fails here" in caplog.text and "none_such" in caplog.text


def test_an_unknown_compiler_is_refused_by_name():
    with pytest.raises(OptionError, match=r"peer 'a': compile=none_such: .*none_such"):
        compiled("a", nn.Linear(2, 2), "none_such")


def test_weights_of_2d_and_of_3d_convolutions_change_their_layout_alone():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Linear(3, 4))
    parameters = list(module.parameters())
    before = [p.detach().clone() for p in parameters]
    to_layout(module, False)
    assert all(p.is_contiguous() for p in parameters)
    to_layout(module, True)
    assert [id(p) for p in module.parameters()] == [id(p) for p in parameters]
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert module[1].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not any(module[i].weight.is_contiguous() for i in (0, 1))
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
