"""No step waits for its device; see ``tests.syncs`` for how a CPU can tell."""

import pytest
import torch
from torch import nn

from common.engine import JointEngine, TwoPassEngine
from common.ledger import Ledger
from common.roles import RULES
from common.transfer import KnowledgeTransfer, PeerOutput, confidence, pairwise_kl
from tests.common.toy import CLASSES, FEATURES, ToyLoader, make_peers, make_trainer
from tests.syncs import META, HostSyncError, meta_world, no_sync


def batch_on_meta(size=12):
    return torch.empty(size, FEATURES, device=META), torch.empty(size, device=META).long()


def on_meta(peers):
    for peer in peers:
        peer.module.to(META)
        peer.train()
    return peers


def transfer_of(peers, rule, **rest):
    transfer = KnowledgeTransfer(rule, names=peers.names, frozen=peers.frozen, **rest)
    transfer._generator_on = lambda device: None  # the meta device has no generators
    return transfer


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", non_blocking=True),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "index of the device": lambda x: [1, 2, 3][x.sum().long()],
    "where": lambda x: torch.where(x > 0),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor(3.0, device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "from the host": lambda x: torch.ones(3).to(x.device),
    "copy from the host": lambda x: x.copy_(torch.ones(3)),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_is_caught(what):
    x = torch.empty(3, device=META)
    with no_sync(), pytest.raises((HostSyncError, RuntimeError, NotImplementedError, TypeError)):
        WAITS[what](x)


def test_what_does_not_wait_is_let_through():
    counter, x = torch.ones(()), torch.empty(3, device=META, requires_grad=True)
    with no_sync():
        counter += 1
        assert counter.item() == 2
        x.sub(torch.ones(3).to(META, non_blocking=True)).clamp(min=2.0).sum().backward()
        torch.where(x > 0, x, torch.zeros_like(x)).new_full((2,), 3.0)


@pytest.mark.parametrize("engine", [JointEngine, TwoPassEngine])
@pytest.mark.parametrize("rule", [*RULES, "one_way:p1"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "not-detached"])
def test_no_engine_waits_under_any_rule(engine, rule, detach):
    peers = on_meta(make_peers(3, frozen=("p2",), dropout=0.3))
    transfer = transfer_of(
        peers, rule, detach_teacher=detach, margin=0.1, temperature=2.0, warmup_steps=4
    )
    engine, ledger = engine(peers, transfer, META), Ledger(peers.names, META)
    with no_sync():
        for step in range(2):
            ledger.add(engine.step(batch_on_meta(), step=step, share=0.5, update=step == 1))


def test_clipping_the_norm_does_not_wait():
    peers = on_meta(make_peers(2))
    for peer in peers:
        peer.clip = lambda peer=peer: nn.utils.clip_grad_norm_(peer.module.parameters(), 1.0)
    engine = JointEngine(peers, transfer_of(peers, "best"), META)
    with no_sync():
        engine.step(batch_on_meta(), step=0)


@pytest.mark.parametrize("at_positions", [False, True], ids=["sample", "position"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("score", ["loss", "confidence"])
def test_a_dense_prediction_does_not_wait(at_positions, masked, score):
    def output():
        logits = torch.empty(2, CLASSES, 4, 6, device=META, requires_grad=True)
        told = confidence(logits) if score == "confidence" else -logits.detach().amax(dim=1)
        return PeerOutput(
            task_loss=logits.mean(),
            score=told if at_positions else told.flatten(1).mean(dim=1),
            logits=logits,
            mask=torch.empty(2, 4, 6, device=META).bool() if masked else None,
            correct=told.bool() if at_positions else None,
        )

    ledger = Ledger(["a", "b", "c"], META)
    with no_sync():
        result = KnowledgeTransfer("best")([output() for _ in range(3)])
        result.total.backward()
        ledger.add(result)


def test_the_gradient_of_the_transfer_does_not_wait_where_the_teacher_gets_one():
    logits = [torch.empty(2, CLASSES, 8, device=META, requires_grad=True) for _ in range(3)]
    with no_sync():
        pairwise_kl(logits, 2.0, detach_teacher=False).sum().backward()


def test_the_loop_does_not_wait_between_its_log_lines(tmp_path):
    class OnMeta(ToyLoader):
        def __iter__(self):
            for _ in range(self.batches):
                yield batch_on_meta(self.size)

    peers = on_meta(make_peers(3))
    trainer = make_trainer(
        tmp_path, peers, loader=OnMeta(), world=meta_world(), log_every=100, accumulate=2
    )
    trainer.engine = JointEngine(peers, transfer_of(peers, "best"), META)
    with no_sync():
        trainer._train_epoch()
    assert trainer.progress.updates == 3
