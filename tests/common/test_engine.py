"""The joint engine: one backward, N steps, whatever N; accumulation, scaling, frozen peers."""

import copy

import pytest
import torch

from common.engine import JointEngine
from common.transfer import KnowledgeTransfer
from tests.common.toy import make_batch, make_peers

CPU = torch.device("cpu")


def engine_of(peers, rule="best", **rest):
    transfer = KnowledgeTransfer(rule, names=peers.names, frozen=peers.frozen)
    return JointEngine(peers, transfer, CPU, **rest)


def weights(peers):
    return [p.detach().clone() for peer in peers for p in peer.module.parameters()]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_step_is_sgd_on_the_total(count):
    peers, batch = make_peers(count), make_batch(12)
    copies = make_peers(count)
    result = engine_of(peers).step(batch, step=0)
    outputs = [peer.forward(batch) for peer in copies]
    total = KnowledgeTransfer("best")(outputs).total
    total.backward()
    torch.testing.assert_close(result.total, total.detach())
    for peer, other in zip(peers, copies, strict=True):
        for p, q in zip(peer.module.parameters(), other.module.parameters(), strict=True):
            torch.testing.assert_close(p, q - 0.1 * q.grad)
    assert not result.total.requires_grad and not result.kl.requires_grad


def test_without_transfer_each_peer_trains_as_alone():
    together, batch = make_peers(3), make_batch(12)
    engine_of(together, "none").step(batch, step=0)
    for i in range(3):
        alone = make_peers(3)[i]
        alone.forward(batch).task_loss.backward()
        alone.optimizer.step()
        for p, q in zip(alone.module.parameters(), together[i].module.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_accumulated_batches_equal_one_large_batch():
    large, small, (x, y) = make_peers(2), make_peers(2), make_batch(12)
    engine_of(large).step((x, y), step=0)
    engine = engine_of(small)
    before = weights(small)
    engine.step((x[:6], y[:6]), step=0, share=0.5, update=False)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(small), strict=True))
    engine.step((x[6:], y[6:]), step=0, share=0.5)
    for a, b in zip(weights(large), weights(small), strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_peer_stays_as_it_is_and_still_teaches():
    peers = make_peers(3, frozen=("p2",))
    before = copy.deepcopy(peers[2].module.state_dict())
    result = engine_of(peers, "mutual").step(make_batch(12), step=0)
    assert result.roles[2, :2].all() and not result.roles[:, 2].any()
    assert all(torch.equal(before[k], v) for k, v in peers[2].module.state_dict().items())
    assert not any(p.requires_grad for p in peers[2].module.parameters())
    assert peers[2].lr == 0


def test_each_peer_is_clipped_by_its_own_gradient():
    peers = make_peers(2)
    norms = []
    for peer in peers:

        def clip(peer=peer):
            norms.append(torch.nn.utils.clip_grad_norm_(peer.module.parameters(), 1e-3))

        peer.clip = clip
    before = weights(peers)
    engine_of(peers).step(make_batch(12), step=0)
    moved = [a - b for a, b in zip(before, weights(peers), strict=True)]
    halves = moved[:4], moved[4:]
    for half in halves:
        norm = torch.cat([x.flatten() for x in half]).norm()
        torch.testing.assert_close(norm, torch.tensor(1e-4), rtol=1e-3, atol=0)
    assert all(norm > 1e-2 for norm in norms)


def test_float16_scales_the_loss_and_skips_only_the_peer_that_overflows():
    peers = make_peers(2)
    engine = engine_of(peers, "none", amp_dtype=torch.float16)
    assert engine.scaler.is_enabled()
    scale = engine.scaler.get_scale()
    peers[0].module[3].weight.register_hook(lambda g: g * float("inf"))
    before = weights(peers)
    engine.step(make_batch(12), step=0)
    after = weights(peers)
    assert all(torch.equal(a, b) for a, b in zip(before[:4], after[:4], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before[4:], after[4:], strict=True))
    assert engine.scaler.get_scale() == scale / 2


def test_bfloat16_autocast_reaches_the_models():
    peers, seen = make_peers(2), []
    peers[0].module[0].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    engine_of(peers, amp_dtype=torch.bfloat16).step(make_batch(12), step=0)
    assert seen == [torch.bfloat16]


def test_group_refuses_names_that_cannot_be_used():
    from common.peers import PeerGroup, check_names

    with pytest.raises(ValueError, match="two peers are named 'a'"):
        check_names(["a", "b", "a"])
    for bad in ("a/b", "", "..", "ensemble", "x,y"):
        with pytest.raises(ValueError, match="cannot be a peer's name"):
            check_names([bad])
    with pytest.raises(ValueError, match="no peers"):
        PeerGroup([])
    with pytest.raises(ValueError, match="every peer is frozen"):
        PeerGroup(list(make_peers(3, frozen=("p1",)))[1:2])
