"""What is not finite is named and stops the run, or is skipped by all peers as if it never was."""

import copy

import pytest
import torch
from torch import nn

from common.checkpoint import list_runs, load_run
from common.distributed import seat_peers
from common.engine import ENGINES, build_engine
from common.finite import FiniteCheck, _all_finite
from common.peers import PeerGroup, RemotePeer
from common.roles import NonFiniteError
from common.transfer import KnowledgeTransfer
from tests.common.test_two_pass import normed_peers
from tests.common.toy import ToyLoader, make_batch, make_peers, make_trainer
from tests.launch import launch

CPU = torch.device("cpu")
TYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Average:
    def __init__(self, module):
        self.module = copy.deepcopy(module)

    @torch.no_grad()
    def update(self, model, step=None):
        for mine, new in zip(self.module.parameters(), model.parameters(), strict=True):
            mine.lerp_(new, 0.1)


def engine_of(kind="joint", count=2, amp=None, policy="skip", most=3, frozen=()):
    peers = normed_peers(count, frozen)
    for peer in peers:
        if not peer.frozen:
            peer.average = Average(peer.module)
    transfer = KnowledgeTransfer("best", names=peers.names, frozen=peers.frozen)
    engine = ENGINES[kind](peers, transfer, CPU, amp)
    engine.finite = FiniteCheck(peers, policy, most)
    return engine


def broken(batch, row=5):
    x, y = batch
    x = x.clone()
    x[row, 2] = float("nan")
    return x, y


def states(engine):
    found = {}
    for peer in engine.peers:
        found |= {f"{peer.name}.{k}": v.clone() for k, v in peer.module.state_dict().items()}
        if peer.average is not None:
            average = peer.average.module.state_dict()
            found |= {f"{peer.name}.average.{k}": v.clone() for k, v in average.items()}
    return found


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def step(engine, batch, number, **rest):
    torch.manual_seed(number)
    names = [f"{i}.png" for i in range(len(batch[1]))]
    return engine.step(batch, step=number, names=lambda: names, **rest)


@pytest.mark.parametrize("amp", TYPES)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["joint", "two-pass"])
def test_a_skipped_step_is_as_if_it_never_was(kind, count, amp, caplog):
    one, other = (engine_of(kind, count, TYPES[amp]) for _ in range(2))
    for number in (0, 1, 2):
        step(one, make_batch(12, seed=number), number)
        if number != 1:
            step(other, make_batch(12, seed=number), number)
        else:
            step(other, broken(make_batch(12, seed=9)), 7)
            step(other, make_batch(12, seed=number), number)
    assert_equal(states(one), states(other))
    assert one.scaler.state_dict() == other.scaler.state_dict()
    assert other.finite.skipped == dict.fromkeys(other.peers.names, 1) and other.finite.total == 1
    # batch norm spreads it over all of the batch
    assert "the loss of p0, p1" in caplog.text and "at optimizer step 8, in 0.png" in caplog.text


@pytest.mark.parametrize("kind", ["joint", "two-pass"])
def test_all_batches_of_an_accumulated_step_are_skipped_with_it(kind):
    engine = engine_of(kind)
    step(engine, make_batch(12, seed=1), 0)
    before = states(engine)
    step(engine, make_batch(12, seed=2), 1, share=0.5, update=False)
    step(engine, broken(make_batch(12, seed=3)), 1, share=0.5)
    assert_equal(before, states(engine))
    assert all(p.grad is None for peer in engine.peers for p in peer.module.parameters())
    step(engine, broken(make_batch(12, seed=3)), 2, share=0.5, update=False)
    step(engine, make_batch(12, seed=2), 2, share=0.5)
    assert_equal(before, states(engine))


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("kind", ["joint", "two-pass"])
def test_gradients_alone_are_named_with_their_batch(kind, policy, caplog):
    engine = engine_of(kind, 3, policy=policy)
    before = states(engine)
    forward = engine.peers[1].forward

    def poisoned(batch):
        output = forward(batch)
        if output.logits.requires_grad:
            output.logits.register_hook(lambda gradient: gradient * float("inf"))
        return output

    engine.peers[1].forward = poisoned
    told = r"the gradients of p1 were not finite at optimizer step 1, in the batch of 0.png, 1.png"
    if policy == "stop":
        with pytest.raises(NonFiniteError, match=told + ".* and 4 more; .*skip such steps"):
            step(engine, make_batch(12), 0)
        return
    step(engine, make_batch(12), 0)
    assert told in caplog.text and engine.finite.skipped == {"p0": 0, "p1": 1, "p2": 0}
    assert_equal(before, states(engine))


@pytest.mark.parametrize("amp", TYPES)
@pytest.mark.parametrize("kind", ["joint", "two-pass"])
def test_stop_names_peer_step_and_sample_and_leaves_weights_alone(kind, amp):
    peers = make_peers(3, frozen=("p2",))
    transfer = KnowledgeTransfer("mutual", names=peers.names, frozen=peers.frozen)
    engine = ENGINES[kind](peers, transfer, CPU, TYPES[amp])
    step(engine, make_batch(12), 0)
    before = states(engine)
    told = "loss of p0, p1, p2 was not finite at optimizer step 2, in 5.png, 7.png; look at these"
    with pytest.raises(NonFiniteError, match=told):
        step(engine, broken(broken(make_batch(12), 7)), 1)
    assert_equal(before, states(engine))


def test_only_the_peer_at_fault_is_named():
    engine = engine_of(policy="stop", frozen=("p1",))
    with torch.no_grad():
        engine.peers[1].module.body[0].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the loss of p1 was"):
        step(engine, make_batch(4), 0)


def later(engine, monkeypatch):
    """Let the check find out as it does on an accelerator."""
    monkeypatch.setattr(engine.finite, "_at_once", lambda flags: False)


@pytest.mark.parametrize("amp", TYPES)
def test_on_an_accelerator_the_first_bad_step_is_named_when_it_is_looked_for(amp, monkeypatch):
    engine = engine_of(policy="stop", amp=TYPES[amp])
    later(engine, monkeypatch)
    for number in range(2):
        step(engine, make_batch(12, seed=number), number)
    engine.finite.check(engine.scaler)
    for number in (2, 4):
        step(engine, make_batch(12, seed=number), number)
        step(engine, broken(make_batch(12)), number + 1)
    with pytest.raises(NonFiniteError, match=r"the loss of p0, p1 was not .* step 4, in 0\.png"):
        engine.finite.check(engine.scaler)


def test_more_skips_in_a_row_than_allowed_stop_and_a_good_step_starts_anew():
    engine = engine_of(most=2)
    for number, is_bad in enumerate([1, 1, 0, 1, 1]):
        batch = make_batch(12)
        step(engine, broken(batch) if is_bad else batch, number)
    assert engine.finite.total == 4
    with pytest.raises(NonFiniteError, match=r"3 optimizer steps in a row .* 2 may be; .*step 6"):
        step(engine, broken(make_batch(12)), 5)


def test_an_overflow_of_scaled_gradients_is_the_scalers(caplog):
    engine = engine_of(amp=torch.float16)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    before = states(engine)["p0.body.0.weight"]
    step(engine, make_batch(12), 0)
    assert torch.equal(before, engine.peers[0].module.body[0].weight)
    assert engine.finite.total == 0 and engine.scaler.get_scale() == 2.0**126
    engine.finite.check(engine.scaler)
    assert "overflow in float16, steps skipped: {'p0': 1, 'p1': 1}" in caplog.text


def test_a_scale_below_one_that_still_overflows_stops():
    engine = engine_of(amp=torch.float16)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    weight = engine.peers[1].module.body[0].weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    step(engine, make_batch(12), 0)
    with pytest.raises(NonFiniteError, match="gradients of p1 overflow float16 in every step"):
        engine.finite.check(engine.scaler)


def test_statistics_that_are_not_finite_are_not_saved(tmp_path):
    peers = make_peers(2)
    peers[1].module.append(nn.BatchNorm1d(5))
    trainer = make_trainer(tmp_path, peers=peers)
    peers[1].module[-1].running_var[0] = float("inf")
    with pytest.raises(NonFiniteError, match="weights of p1 are not finite"):
        trainer.save()


class Broken(ToyLoader):
    """Batches 1 and 4 of the second epoch hold a NaN."""

    def __iter__(self):
        for k, batch in enumerate(super().__iter__(), self.start):
            yield broken(batch) if self.epoch == 1 and k in (1, 4) else batch


def skipping(folder, **plan):
    torch.manual_seed(0)
    trainer = make_trainer(
        folder, loader=Broken(), on_nonfinite="skip", save_every=1, keep=99, **plan
    )
    trainer.names_of = lambda batch: lambda: [f"{i}.png" for i in range(len(batch[1]))]
    return trainer


def test_skipped_then_resumed_equals_the_uninterrupted_run(tmp_path, caplog):
    whole = skipping(tmp_path / "whole")
    seen = []
    whole.writers = [lambda scalars, step: seen.append(scalars.get("p1/skipped"))]
    whole.fit()
    assert whole.notes() == [
        "2 optimizer steps were skipped by all peers, because of losses or gradients that were "
        "not finite (p0 2, p1 2, p2 2)"
    ]
    assert [row["p0/skipped"] for row in whole.progress.lessons] == [0, 2, 2] and 1.0 in seen
    assert "step 8, in 5.png" in caplog.text
    last = load_run(list_runs(tmp_path / "whole")[-1])
    for run in list_runs(tmp_path / "whole")[6:14]:
        again = skipping(tmp_path / "again")
        again.resume(load_run(run), source=tmp_path / "whole")
        again.fit()
        assert again.progress == whole.progress and again.notes() == whole.notes()
        for name, peer in last["peers"].items():
            own = again.peers[again.peers.names.index(name)].module.state_dict()
            assert all(torch.equal(own[key], value) for key, value in peer["module"].items())


def test_lessons_leave_out_what_was_not_finite(tmp_path):
    trainer = skipping(tmp_path, epochs=2)
    trainer.fit()
    assert all(value == value for row in trainer.progress.lessons for value in row.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_value_among_many_is_found(value, dtype):
    tensors = [torch.zeros(3, 4, dtype=dtype), torch.full((7,), 1e30, dtype=dtype), torch.ones(())]
    assert _all_finite([*tensors, torch.zeros(0)])
    for tensor in tensors:
        before = tensor.clone()
        tensor.view(-1)[-1] = value
        assert not _all_finite(tensors)
        tensor.copy_(before)
    on_device = [torch.ones(3, device="meta"), torch.ones(4, device="meta")]
    assert _all_finite(on_device).device.type == "meta"


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_unknown_policy_is_refused(policy):
    peers = make_peers(2)
    with pytest.raises(ValueError, match="policy is 'go'; choose from stop, skip"):
        FiniteCheck(peers, "go")
    with pytest.raises(ValueError, match="most is -1"):
        FiniteCheck(peers, policy, -1)


def _half_broken(world, folder, kind):
    found = {policy: _one_bad_batch(world, policy, kind) for policy in ("stop", "skip")}
    torch.save(found, folder / f"{world.rank}.pt")


def _one_bad_batch(world, policy, kind):
    peers = make_peers(2)
    if kind == "peer-parallel":
        world = seat_peers(world, 2)
        seated = [p if world.holds(i) else RemotePeer(p.name) for i, p in enumerate(peers)]
        peers = PeerGroup(seated)
    for peer in peers.here:
        peer.distribute(world)
    transfer = KnowledgeTransfer("best", names=peers.names)
    engine = build_engine(kind, peers, transfer, world)
    engine.finite = FiniteCheck(peers, policy)
    for number in range(3):
        batch = tuple(x[world.shard :: world.shards] for x in make_batch(24, seed=number))
        if number == 1 and world.shard == world.shards - 1:
            batch = broken(batch)
        names = [f"rank{world.shard}-{i}.png" for i in range(len(batch[1]))]
        engine.step(batch, step=number, names=lambda names=names: names)
    told = ""
    try:
        engine.finite.check(engine.scaler)
    except NonFiniteError as error:
        told = str(error)
    weights = {peer.name: peer.module.state_dict() for peer in peers.here}
    return told, weights, engine.finite.state_dict()


@pytest.mark.parametrize("kind", ["joint", "two-pass", "peer-parallel"])
def test_two_processes_stop_or_skip_together(tmp_path, kind):
    launch(_half_broken, 2, tmp_path, kind)
    one, two = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    sample = "rank0-5.png" if kind == "peer-parallel" else "rank1-5.png"
    assert one["stop"][0] == two["stop"][0]
    told = f"the loss of p0, p1 was not finite at optimizer step 2, in {sample};"
    assert told in one["stop"][0]
    (told, mine, guard), (same, other, counts) = one["skip"], two["skip"]
    assert told == same == "" and guard == counts
    assert guard["total"] == 1 and guard["skipped"] == {"p0": 1, "p1": 1}
    for name in mine.keys() & other.keys():
        assert all(torch.equal(x, other[name][key]) for key, x in mine[name].items())
    for weights in (*mine.values(), *other.values()):
        assert all(x.isfinite().all() for x in weights.values())
