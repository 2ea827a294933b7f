"""The two-pass engine makes the joint engine's step, with one peer's activations at a time."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from common.engine import JointEngine, TwoPassEngine
from common.peers import PeerGroup
from common.transfer import KnowledgeTransfer
from tests.common.toy import FEATURES, ToyPeer, make_batch, make_peers
from tests.launch import launch

CPU = torch.device("cpu")


class Normed(nn.Module):
    """Batch norm, dropout and a buffer of its own that counts forwards."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(FEATURES, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(width, 5),
        )
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.body(x)


def normed_peers(count, frozen=()):
    peers = []
    for i in range(count):
        torch.manual_seed(i)
        module = Normed(16 + 8 * (i % 2))
        rest = {"frozen": f"p{i}" in frozen}
        if not rest["frozen"]:
            rest["optimizer"] = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        peers.append(ToyPeer(f"p{i}", module, **rest))
    group = PeerGroup(peers)
    for peer in group:
        peer.train()
    return group


def both(peers, rule="best", detach=True, transfer=None, **rest):
    engines, more = [], transfer or {}
    for kind in (JointEngine, TwoPassEngine):
        group = copy.deepcopy(peers)
        transfer = KnowledgeTransfer(
            rule, detach_teacher=detach, names=group.names, frozen=group.frozen, **more
        )
        engines.append(kind(group, transfer, CPU, **rest))
    return engines


def assert_same(one, other, **tolerance):
    for a, b in zip(one.peers, other.peers, strict=True):
        for name, value in a.module.state_dict().items():
            torch.testing.assert_close(b.module.state_dict()[name], value, **tolerance)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("rule", ["best", "better", "mutual", "random", "none", "one_way:p0"])
def test_steps_equal_those_of_the_joint_engine(count, rule):
    joint, two = both(normed_peers(count), rule)
    for step in range(4):
        batch, results, states = make_batch(12, seed=step), [], []
        for engine in (joint, two):
            torch.manual_seed(step)
            results.append(engine.step(batch, step=step))
            states.append(torch.get_rng_state())
        for name in ("total", "task_loss", "transfer_loss", "roles", "score", "kl"):
            one, other = (getattr(result, name) for result in results)
            torch.testing.assert_close(other, one)
            assert not other.requires_grad
        assert torch.equal(*states)
    assert_same(joint, two)
    assert [int(peer.module.calls) for peer in two.peers] == [4] * count


def test_the_teachers_gradient_too():
    joint, two = both(make_peers(3), "mutual", detach=False)
    for step in range(3):
        for engine in (joint, two):
            engine.step(make_batch(12, seed=step), step=step)
    assert_same(joint, two)


def test_the_non_target_transfer_too():
    joint, two = both(make_peers(3), "better", transfer={"classes": "non-target"})
    for step in range(3):
        for engine in (joint, two):
            engine.step(make_batch(12, seed=step), step=step)
    assert_same(joint, two)
    plain = both(make_peers(3), "better")[0]
    plain.step(make_batch(12), step=0)
    assert not torch.equal(plain.peers[0].module[0].weight, joint.peers[0].module[0].weight)


def test_frozen_peers_and_accumulation():
    joint, two = both(normed_peers(3, frozen=("p1",)))
    for engine in (joint, two):
        torch.manual_seed(0)
        for step in range(2):
            engine.step(make_batch(12, seed=step), step=0, share=0.5, update=step == 1)
    assert_same(joint, two)


def test_clipping_and_loss_scaling():
    peers = make_peers(2)
    joint, two = both(peers, amp_dtype=torch.bfloat16)
    for engine in (joint, two):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=True)
        for peer in engine.peers:
            parameters = list(peer.module.parameters())
            peer.clip = lambda given=parameters: nn.utils.clip_grad_norm_(given, 0.01)
        engine.step(make_batch(12), step=0)
    assert_same(joint, two, rtol=1e-4, atol=1e-6)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(peers[0].module.parameters(), two.peers[0].module.parameters(), strict=True)
    )


class HalfPeer(ToyPeer):
    """Gives float16 logits, as a dense segmentor does under autocast, and has no task loss."""

    def forward(self, batch):
        output = super().forward(batch)
        return replace(output, task_loss=0 * output.task_loss, logits=output.logits.half())


def test_a_small_transfer_is_not_lost_in_float16():
    peers = make_peers(2)
    for peer in peers:
        peer.__class__ = HalfPeer
        peer.optimizer = torch.optim.SGD(peer.module.parameters(), lr=1e6)
    joint, two = both(peers, "mutual", transfer={"weight": 1e-6})
    for engine in (joint, two):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=True)
        engine.step(make_batch(12), step=0, share=0.5)
    assert_same(joint, two, rtol=1e-3, atol=1e-5)
    for one, other in zip(peers, two.peers, strict=True):
        assert not torch.equal(one.module[3].weight, other.module[3].weight)


def saved_bytes(engine, batch):
    """Count the bytes that autograd holds for backward, at the most at any one time."""
    held, most = [0], [0]

    class Kept:
        def __init__(self, x):
            self.x = x
            held[0] += x.numel() * x.element_size()
            most[0] = max(most[0], held[0])

        def __del__(self):
            held[0] -= self.x.numel() * self.x.element_size()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        engine.step(batch, step=0)
    return most[0]


def test_activations_of_one_peer_at_a_time():
    peers = []
    for i, depth in enumerate((4, 6, 5)):
        layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(depth)]
        module = nn.Sequential(nn.Linear(FEATURES, 64), *layers, nn.Linear(64, 5))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        peers.append(ToyPeer(f"p{i}", module, optimizer=optimizer))
    group = PeerGroup(peers)
    batch = make_batch(512)
    joint, two = both(group)
    alone = max(
        saved_bytes(JointEngine(PeerGroup([p]), KnowledgeTransfer("none"), CPU), batch)
        for p in copy.deepcopy(peers)
    )
    assert saved_bytes(two, batch) <= 1.1 * alone
    assert saved_bytes(joint, batch) > 2 * alone


def _in_a_process(world, folder):
    from common.engine import TwoPassEngine

    peers = normed_peers(2)
    for peer in peers:
        peer.module.body[3].p = 0.0
        peer.distribute(world)
    engine = TwoPassEngine(peers, KnowledgeTransfer("best", names=peers.names), CPU)
    x, y = make_batch(24)
    mine = slice(world.rank, None, world.size)
    engine.step((x[mine], y[mine]), step=0, share=0.5, update=False)
    engine.step((x[mine], y[mine]), step=0, share=0.5)
    torch.save([p.module.state_dict() for p in peers], folder / f"{world.rank}.pt")


def test_ranks_agree_under_data_parallelism(tmp_path):
    launch(_in_a_process, 2, tmp_path)
    one, two = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    begun = normed_peers(2)
    for a, b, peer in zip(one, two, begun, strict=True):
        assert all(torch.equal(a[name], b[name]) for name, _ in peer.module.named_parameters())
        assert not torch.equal(a["body.4.weight"], peer.module.body[4].weight)
