"""What a plan says against what steps really take, and its verdicts by hand."""

import argparse
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from common.costs import Activations, PeerCost, measure_peer, measure_transfer
from common.engine import ENGINES
from common.memory import bytes_of, peak_bytes, peak_saved_bytes, tensors_in
from common.options import OptionError
from common.planner import (
    SAFETY,
    Flags,
    TeamCost,
    advise,
    engine_costs,
    engine_rows,
    notes,
    peer_rows,
    read_size,
    usable,
    with_batch,
)
from common.seeding import Draws
from common.transfer import KnowledgeTransfer
from tests.common.test_guard import Average
from tests.common.toy import FEATURES, ToyPeer, make_batch, make_peers

CPU = torch.device("cpu")
BATCH = 64


def draw(samples, device):
    x = torch.rand(samples, FEATURES, device=device)
    return x, torch.randint(5, (samples,), device=device)


def team_of(peers, batch=BATCH, teachers="peers", **rest):
    copies = teachers != "peers"
    costs = [
        measure_peer(peer, draw, batch, CPU, timed=False, copies=copies, few=8) for peer in peers
    ]
    transfer = transfer_of(peers, teachers)
    return TeamCost(costs, batch, 0, measure_transfer(transfer, costs, batch), **rest)


def transfer_of(peers, teachers="peers"):
    return KnowledgeTransfer("best", names=peers.names, frozen=peers.frozen, teachers=teachers)


def real_step(engine, peers, measure, teachers="peers"):
    """Measure a real step, where the optimizers have their states already."""
    transfer = transfer_of(peers, teachers)
    built, batch = ENGINES[engine](peers, transfer, CPU), make_batch(BATCH)
    for peer in peers:
        peer.train()
    built.step(batch, step=0)
    states = [x for peer in peers if peer.optimizer for x in tensors_in(peer.optimizer.state)]
    modules = [module for peer in peers for module in (peer.module, peer.best_module)]
    known = [*tensors_in(modules), *states, *batch]
    return measure(lambda: built.step(batch, step=1), known)


@pytest.mark.parametrize("frozen", [(), ("p1",)])
@pytest.mark.parametrize("engine", ["joint", "two-pass"])
def test_activations_are_those_of_a_real_step(engine, frozen):
    peers = make_peers(3, dropout=0.3, frozen=frozen)
    planned = engine_costs(team_of(peers))[engine].activations
    assert planned == real_step(engine, peers, peak_saved_bytes)


@pytest.mark.parametrize("engine", ["joint", "two-pass"])
def test_the_peak_is_near_that_of_a_real_step(engine):
    peers = make_peers(3, dropout=0.3)
    cost = engine_costs(team_of(peers))[engine]
    real = real_step(engine, peers, peak_bytes)
    assert cost.peak - cost.states == pytest.approx(real, rel=0.15)


def wide_peers(frozen=()):
    """Peers whose averaged copies' forwards hold more than the objective does."""
    peers = make_peers(3, frozen=frozen)
    for peer in peers:
        peer.module[0] = nn.Linear(FEATURES, 4096)
        peer.module[3] = nn.Linear(4096, 5)
        if not peer.frozen:
            peer.optimizer = torch.optim.SGD(peer.module.parameters(), lr=0.1, momentum=0.9)
            peer.average = Average(peer.module)
    return peers


@pytest.mark.parametrize("frozen", [(), ("p1",)])
@pytest.mark.parametrize("engine", ["joint", "two-pass"])
def test_copies_that_teach_are_in_the_peak(engine, frozen):
    peers = wide_peers(frozen)
    cost = engine_costs(team_of(peers, teachers="ema"))[engine]
    real = real_step(engine, peers, peak_bytes, "ema")
    assert cost.peak - cost.states == pytest.approx(real, rel=0.15)
    without = engine_costs(team_of(peers))[engine].peak
    assert cost.peak > without or (engine == "two-pass" and cost.peak == without)
    assert [peer.frozen for peer in peers] == [peer.name in frozen for peer in peers]


def test_copies_that_teach_by_hand():
    a = cost("a", saved=100, peak=120, forward=1.0, train=3.0, average=10, copy=500, output=4)
    b = cost("b", saved=200, peak=210, gradients=30, forward=2.0, train=6.0, output=4)
    found = engine_costs(TeamCost([a, b], 8, inputs=7, transfer=Activations(5, 9)))
    # b's copy is itself; a's forwards while both peers wait, and is more than any backward
    assert found["joint"].peak == 130 + 7 + (104 + 204) + 4 + 500
    assert found["joint"].seconds == 10.0
    assert found["two-pass"].peak == 130 + 7 + 2 * 8 + 200 + 4 + 500
    assert found["two-pass"].seconds == 9.0 + 1.0 + 1.0
    half = with_batch(TeamCost([a, b], 8, 0, Activations(0, 0)), 4, 2).peers[0]
    assert (half.copy, half.average) == (250, 10)


def test_an_engine_that_the_run_refuses_is_not_offered():
    team = two_peers(refused={"peer-parallel": "its layers talk"})
    assert list(engine_costs(team)) == ["joint", "two-pass"]
    assert "peer-parallel is left out: its layers talk." in notes(team, CPU, None)
    told = advise(team, memory_for(engine_costs(two_peers())["peer-parallel"].peak), Flags())
    assert told[0].startswith("It does not fit") and "peer-parallel" not in " ".join(told)


def test_measuring_leaves_a_peer_as_it_was():
    peers = make_peers(2, dropout=0.3)
    peer = peers[0]
    peer.module.eval()
    peer.module.register_buffer("seen", torch.zeros(3))
    before = copy.deepcopy(peer.state_dict())
    peer.module[0].weight.grad = gradient = torch.ones_like(peer.module[0].weight)
    here = Draws(CPU)._states[2].clone()
    measure_peer(peer, draw, BATCH, CPU)
    after = peer.state_dict()
    torch.testing.assert_close(after["module"], before["module"], rtol=0, atol=0)
    assert after["optimizer"] == before["optimizer"]
    assert peer.module[0].weight.grad is gradient and peer.module[3].weight.grad is None
    assert peer.model is peer.module and not peer.module.training
    assert torch.equal(torch.get_rng_state(), here)
    assert all(type(p) is nn.Parameter for p in peer.module.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.AdamW(p),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.AdamW(p, foreach=True, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.RMSprop(p, centered=True),
    ],
)
def test_the_optimizers_state_is_that_after_a_real_step(build):
    peer = make_peers(1)[0]
    peer.optimizer = build(peer.module.parameters())
    planned = measure_peer(peer, draw, BATCH, CPU, timed=False)
    peer.forward(make_batch(8)).task_loss.backward()
    peer.optimizer.step()
    assert planned.optimizer == bytes_of(peer.optimizer.state)


def test_foreach_holds_temporaries_for_a_moment():
    peer = make_peers(1)[0]
    weights = bytes_of(peer.module)
    peer.optimizer = torch.optim.AdamW(peer.module.parameters(), foreach=True)
    assert measure_peer(peer, draw, BATCH, CPU, timed=False).update >= weights
    peer.optimizer = torch.optim.AdamW(peer.module.parameters(), fused=True)
    assert measure_peer(peer, draw, BATCH, CPU, timed=False).update < weights


class Looking(torch.optim.SGD):
    """Looks at values, as no fake tensor allows."""

    def step(self, closure=None):
        assert float(self.param_groups[0]["params"][0].detach().sum()) != 7
        return super().step(closure)


def test_an_optimizer_that_looks_at_values_makes_a_real_step_on_copies():
    peer = make_peers(1)[0]
    peer.optimizer = Looking(peer.module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = copy.deepcopy(peer.module.state_dict())
    cost = measure_peer(peer, draw, BATCH, CPU, timed=False)
    assert cost.optimizer == cost.weights
    torch.testing.assert_close(peer.module.state_dict(), before, rtol=0, atol=0)


def test_an_optimizer_that_cannot_step_is_named():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no such luck")

    peer = make_peers(1)[0]
    peer.optimizer = Failing(peer.module.parameters(), lr=0.1)
    with pytest.raises(OptionError, match="Failing: its step fails: no such luck"):
        measure_peer(peer, draw, BATCH, CPU, timed=False)


class LookingPeer(ToyPeer):
    def forward(self, batch):
        assert float(batch[0].sum()) != 7
        return super().forward(batch)


def test_a_scaled_step_holds_what_is_saved_at_least():
    assert Activations(60, 100).scaled(4, gradients=40) == Activations(240, 40 + 240)
    assert Activations(60, 70).scaled(4, gradients=60) == Activations(240, 240)
    assert Activations(60, 100).scaled(0.5, gradients=40) == Activations(30, 40 + 30)


def test_a_forward_that_looks_at_values_is_measured_on_few_samples_and_scaled():
    module = make_peers(1, dropout=0.3)[0].module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    exact = measure_peer(ToyPeer("p", module, optimizer=optimizer), draw, BATCH, CPU, timed=False)
    looking = LookingPeer("p", module, optimizer=optimizer)
    scaled = measure_peer(looking, draw, BATCH, CPU, timed=False, few=4)
    assert exact.scaled_from is None and scaled.scaled_from == 4
    assert scaled.step.saved == pytest.approx(exact.step.saved, rel=0.05)
    assert scaled.shapes == exact.shapes
    assert "p (4)" in " ".join(notes(TeamCost([scaled], BATCH, 0, Activations(0, 0)), CPU, None))


def test_a_fault_of_the_model_is_not_hidden():
    peer = make_peers(1)[0]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        measure_peer(peer, lambda n, d: (torch.rand(n, 3), torch.zeros(n).long()), 4, CPU)


def test_autocast_halves_what_is_saved_of_linear_layers():
    peer = make_peers(1)[0]
    peer.module[0] = nn.Linear(FEATURES, 4096)
    peer.module[3] = nn.Linear(4096, 5)
    full = measure_peer(peer, draw, BATCH, CPU, timed=False).step.saved
    half = measure_peer(peer, draw, BATCH, CPU, torch.bfloat16, timed=False).step.saved
    assert half < 0.65 * full


@pytest.mark.parametrize("peer_type", [ToyPeer, LookingPeer])
def test_on_a_cpu_bfloat16_stands_in_for_float16(peer_type):
    module = make_peers(1)[0].module
    peer = peer_type("p", module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    seen = set()
    module.register_forward_hook(lambda *given: seen.add(given[-1].dtype))
    found = measure_peer(peer, draw, BATCH, CPU, torch.float16)
    assert seen == {torch.bfloat16}
    assert found.step == measure_peer(peer, draw, BATCH, CPU, torch.bfloat16).step
    assert "in bfloat16" in " ".join(notes(two_peers(), CPU, torch.float16))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.Linear(8, 512), nn.GELU(), nn.Linear(512, 8))])
        self.parts.extend(copy.deepcopy(self.parts[0]) for _ in range(7))
        self.head = nn.Linear(8, 5)
        self.on = False

    def set_grad_checkpointing(self, enable=True):
        self.on = enable

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=False) if self.on else part(x)
        return self.head(x)


def test_checkpointing_is_measured_with_what_is_made_again():
    module = Deep()
    peer = ToyPeer("p", module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    cost = measure_peer(peer, draw, 256, CPU, timed=False)
    one_block = 2 * 256 * 512 * 4  # before and after GELU
    assert cost.step.saved >= 8 * one_block
    assert cost.checkpointed.saved < one_block
    assert one_block < cost.checkpointed.peak < 4 * one_block
    assert not module.on


def cost(name, saved, peak=None, gradients=10, train=None, forward=None, **rest):
    """A peer with round numbers: weights as many bytes as gradients, twice that of optimizer."""
    given = {
        "frozen": False,
        "parameters": gradients,
        "weights": gradients,
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "update": 0,
        "average": 0,
        "checkpointed": None,
        "output": 1,
        "shapes": {},
        **rest,
    }
    step = Activations(saved, saved if peak is None else peak)
    return PeerCost(name=name, step=step, train=train, forward=forward, **given)


def test_engines_by_hand():
    a = cost("a", saved=100, peak=120, gradients=10, forward=1.0, train=3.0)
    b = cost("b", saved=200, peak=210, gradients=30, forward=2.0, train=6.0)
    found = engine_costs(TeamCost([a, b], 8, inputs=7, transfer=Activations(5, 9)))
    joint, two, parallel = (found[name] for name in ENGINES)
    # states 3 * 10 + 3 * 30; a's own peak while b waits with activations and output, which is more
    # than b's 210 while a waits with 101
    assert (joint.states, joint.activations) == (120, 305)
    assert joint.peak == 120 + 7 + 9 + 120 + 201
    # b is kept, and has its activations beside the transfer
    assert two.activations == 205
    assert two.peak == 120 + 7 + 2 * 2 + 210
    # of the larger one: its state, its own peak, the exchanged outputs, the transfer
    assert (parallel.states, parallel.processes) == (90, 2)
    assert parallel.peak == 90 + 7 + 210 + 2 * 1 + 9
    # all steps; those and the forward of the peer whose graph is not kept; the slower one
    assert (joint.seconds, two.seconds, parallel.seconds) == (9.0, 10.0, 6.0)


def test_gradients_outlive_a_step_where_batches_are_accumulated():
    team = TeamCost([cost("a", 100), cost("b", 200, gradients=30)], 8, 0, Activations(0, 0))
    kept = TeamCost(team.peers, 8, 0, Activations(0, 0), accumulate=2)
    grown = {
        name: engine_costs(kept)[name].peak - found.peak
        for name, found in engine_costs(team).items()
    }
    assert grown == {"joint": 10 + 30, "two-pass": 10 + 30, "peer-parallel": 30}


def test_two_pass_holds_all_gradients_where_steps_may_be_skipped():
    team = TeamCost([cost("a", 100), cost("b", 200, gradients=30)], 8, 0, Activations(0, 0))
    found, skipping = engine_costs(team), engine_costs(replace(team, skips=True))
    grown = {name: skipping[name].peak - found[name].peak for name in found}
    assert grown == {"joint": 0, "two-pass": 10 + 30, "peer-parallel": 0}


def test_a_frozen_peer_costs_no_step_twice():
    a = cost("a", 100, forward=1.0, train=3.0)
    b = cost("b", 0, 50, gradients=0, frozen=True, forward=2.0, train=2.0)
    found = engine_costs(TeamCost([a, b], 8, 0, Activations(0, 0)))
    assert found["two-pass"].seconds == found["joint"].seconds == 5.0


def test_copies_that_teach_are_asked_and_sent_by_each_process():
    plain = cost("a", 100, output=7, forward=1.0, train=3.0)
    team = TeamCost([plain, plain], 8, 0, Activations(0, 0))
    before = engine_costs(team)["peer-parallel"]
    copied = replace(plain, copy=5)
    sent = engine_costs(replace(team, peers=[copied, copied]))["peer-parallel"]
    assert sent.seconds == before.seconds + 1.0
    assert sent.peak == before.peak + 2 * 7  # the outputs of both copies
    larger = replace(plain, copy=1000)
    forwards = engine_costs(replace(team, peers=[larger, larger]))["peer-parallel"]
    assert forwards.peak == plain.state + 100 + 7 + 1000


def test_a_single_peer_has_one_engine():
    assert list(engine_costs(TeamCost([cost("a", 100)], 8, 0, Activations(0, 0)))) == ["joint"]


def memory_for(peak):
    """The least memory of which ``peak`` bytes leave the safety share free."""
    memory = int(peak / (1 - SAFETY)) - 2
    while usable(memory) < peak:
        memory += 1
    return memory


def two_peers(**rest):
    peers = [
        cost("a", 4000, 4200, train=1.0, forward=0.5),
        cost("b", 8000, 8400, train=1.0, forward=0.5, gradients=20),
    ]
    return TeamCost(peers, 8, 16, Activations(8, 8), **rest)


@pytest.mark.parametrize("engine", ["joint", "two-pass"])
def test_it_fits_to_the_byte(engine):
    found = engine_costs(two_peers())[engine]
    memory = memory_for(found.peak)
    assert found.fits(memory) and not found.fits(memory - 1)


def test_advice_follows_the_memory():
    team = two_peers()
    costs = engine_costs(team)
    told = {
        memory: " ".join(advise(team, memory, Flags()))
        for memory in (memory_for(costs["joint"].peak), memory_for(costs["joint"].peak) - 1)
    }
    first, second = told.values()
    assert "Take joint" in first and "Nothing to add" in first
    assert "Take two-pass" in second and "--engine two-pass" in second and "1.25 times" in second


def test_where_neither_fits_every_way_out_is_told_with_its_flags():
    team = two_peers()
    smaller = [
        cost(p.name, p.step.saved, p.step.peak, checkpointed=Activations(500, 600))
        for p in team.peers
    ]
    team = TeamCost(smaller, 8, 16, Activations(8, 8))
    memory = memory_for(engine_costs(team)["two-pass"].peak) - 1
    told = advise(team, memory, Flags())
    assert told[0].startswith("It does not fit: joint needs")
    assert "--engine joint --grad-checkpointing" in told[1]
    assert "-b 4 --grad-accum-steps 2" in told[2]
    assert engine_costs(with_batch(team, 4, 2))["joint"].fits(memory)
    assert "--engine joint" in told[2]
    assert "torchrun --nproc-per-node=2" in told[3] and "peer-parallel" in told[3]


def test_several_processes_with_all_peers_become_as_many_of_each_peer():
    memory = memory_for(engine_costs(two_peers())["peer-parallel"].peak)
    flags = Flags(engine="ENGINE {}", launch="--num-gpus {}", processes=2)
    told = advise(two_peers(reduced=True), memory + 30, flags)
    assert "On 4 GPUs" in told[-1]
    assert told[-1].endswith("Start with --num-gpus 4 and add: ENGINE peer-parallel")


def test_where_nothing_fits_that_is_told():
    told = advise(two_peers(), 60, Flags())
    assert len(told) == 2 and told[1].startswith("Nothing fits")


def test_without_a_memory_there_is_no_verdict():
    (told,) = advise(two_peers(), None, Flags())
    assert "--gpu-mem" in told
    assert {row["fits"] for row in engine_rows(two_peers(), None)} == {"?"}


def test_tables_have_one_set_of_columns():
    team = two_peers()
    for rows in (peer_rows(team), engine_rows(team, 10**9)):
        assert len({tuple(row) for row in rows}) == 1
    assert {row["fits"] for row in engine_rows(team, 10**9)} == {"yes"}


def test_the_safety_share_is_told():
    assert "15%" in " ".join(notes(two_peers(), CPU, None))


@pytest.mark.parametrize(
    ("text", "size"), [("24G", 24 * 2**30), ("1.5M", 3 * 2**19), ("512k", 2**19)]
)
def test_sizes(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "24", "G", "-3G", "24GB", "infG", "nanG"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected one such as 24G"):
        read_size(text)
