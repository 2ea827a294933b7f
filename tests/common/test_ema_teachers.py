"""Averaged copies that teach: by hand, against a loop, in the engines, and what is refused."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from common.engine import JointEngine, TwoPassEngine
from common.peers import PeerGroup
from common.roles import assign_roles, with_own
from common.transfer import KnowledgeTransfer, PeerOutput, teacher_kl
from tests.common.test_roles import SCORE, taught
from tests.common.test_transfer import classify, random_logits
from tests.common.test_two_pass import assert_same, normed_peers
from tests.common.toy import make_batch

CPU = torch.device("cpu")


class Ema:
    def __init__(self, module, decay=0.8):
        self.module, self.decay = copy.deepcopy(module).eval(), decay

    @torch.no_grad()
    def update(self, model, step=None):
        new = model.state_dict()
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[name], 1 - self.decay)


def averaged_peers(count, frozen=()):
    group = normed_peers(count, frozen)
    for peer in group:
        peer.average = None if peer.frozen else Ema(peer.module)
    return group


def test_teachers_tell_students_by_hand():
    teachers = [torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()]
    students = [torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()]
    kl = teacher_kl(teachers, students)
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    second = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    third = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    torch.testing.assert_close(kl[:, :, 0], torch.tensor([[first, second], [0, third]]))


def test_who_teaches_teaches_its_own_peer_too():
    roles = with_own(assign_roles(SCORE, "best"))
    assert taught(roles, 0) == {(0, 0): 1, (0, 1): 1, (0, 2): 1}
    assert taught(roles, 2) == {}
    better = with_own(assign_roles(SCORE, "better"))
    assert taught(better, 0) == {(0, 0): 1, (0, 1): 1, (0, 2): 0.5, (1, 1): 0.5, (1, 2): 0.5}
    everyone = {(i, i): 1 for i in range(3)}
    assert all(taught(assign_roles(SCORE, "self"), b) == everyone for b in range(4))
    assert with_own(torch.rand(3, 3, 2, 4, 5)).shape == (3, 3, 2, 4, 5)


@pytest.mark.parametrize("peers", [2, 3, 4])
@pytest.mark.parametrize("rule", ["best", "better", "mutual", "self", "one_way:1"])
@pytest.mark.parametrize("teachers", ["ema", "ema+own"])
def test_equals_a_naive_loop(peers, rule, teachers):
    labels = torch.arange(7) % 5
    ours, theirs = random_logits(peers, 7, 5), random_logits(peers, 7, 5)
    shadows = random_logits(peers, 7, 5, seed=9)
    copies = classify(shadows, labels)
    transfer = KnowledgeTransfer(rule, 2.5, 0.7, teachers=teachers)
    result = transfer(classify(ours, labels), copies=copies)
    result.total.backward()
    roles = assign_roles(torch.stack([c.score for c in copies]), rule)
    total = sum(F.cross_entropy(z, labels) for z in theirs)
    for t in range(peers):
        for s in range(peers):
            weight = roles[t, s]
            if t == s and teachers == "ema+own" and rule != "self":
                weight = roles[t].amax(dim=0)
            teacher = torch.log_softmax(shadows[t].detach() / 2.5, dim=1)
            student = torch.log_softmax(theirs[s] / 2.5, dim=1)
            kl = (teacher.exp() * (teacher - student)).sum(dim=1) * 2.5**2
            total = total + 0.7 * (weight * kl).mean()
    total.backward()
    torch.testing.assert_close(result.total, total, rtol=1e-12, atol=1e-12)
    for a, b, shadow in zip(ours, theirs, shadows, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)
        assert shadow.grad is None
    assert torch.equal(result.score, torch.stack([c.score for c in copies]))
    assert torch.equal(result.correct, torch.stack([c.correct for c in copies]))


@pytest.mark.parametrize("rule", ["best", "better", "mutual"])
def test_copies_that_equal_the_peers_change_nothing(rule):
    labels, logits = torch.arange(6) % 4, random_logits(3, 6, 4)
    outputs = classify(logits, labels)
    plain = KnowledgeTransfer(rule)(outputs)
    copied = KnowledgeTransfer(rule, teachers="ema")(outputs, copies=outputs)
    torch.testing.assert_close(copied.total, plain.total)
    torch.testing.assert_close(copied.kl, plain.kl)
    own = KnowledgeTransfer("self", teachers="ema")(outputs, copies=outputs)
    assert own.transfer_loss.abs().max() < 1e-12


def test_maps_count_valid_positions_alone():
    logits, shadows = random_logits(2, 2, 4, 3, 5), random_logits(2, 2, 4, 3, 5, seed=3)
    mask = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    score = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    def outputs(given):
        return [PeerOutput(z.sum() * 0, s, z, mask=mask) for z, s in zip(given, score, strict=True)]

    transfer = KnowledgeTransfer(teachers="ema+own")
    result = transfer(outputs(logits), copies=outputs(shadows))
    expected = 0.0
    for b in range(2):
        teacher = shadows[b].detach()[b].log_softmax(dim=0)  # peer b does best on sample b
        for student in logits:
            kl = (teacher.exp() * (teacher - student[b].log_softmax(dim=0))).sum(dim=0)
            expected = expected + kl[mask[b]].mean() / 2
    torch.testing.assert_close(result.total, expected)
    result.total.backward()
    assert not logits[0].grad.movedim(1, -1)[~mask].any()


@pytest.mark.parametrize("rule", ["best", "self", "random"])
@pytest.mark.parametrize("count", [2, 3])
def test_two_passes_equal_one(rule, count):
    engines = []
    for kind in (JointEngine, TwoPassEngine):
        group = averaged_peers(count, frozen=("p1",) if count == 3 else ())
        transfer = KnowledgeTransfer(
            rule, names=group.names, frozen=group.frozen, teachers="ema+own"
        )
        engines.append(kind(group, transfer, CPU))
    for step in range(4):
        results = []
        for engine in engines:
            torch.manual_seed(step)
            results.append(engine.step(make_batch(12, seed=step), step=step))
        torch.testing.assert_close(results[0].kl, results[1].kl)
        torch.testing.assert_close(results[0].roles, results[1].roles)
    assert_same(*engines)
    for one, other in zip(*(engine.peers for engine in engines), strict=True):
        if one.average is not None:
            torch.testing.assert_close(
                one.average.module.state_dict(), other.average.module.state_dict()
            )


def test_a_step_forwards_each_copy_once_without_a_trace():
    group = averaged_peers(2)
    engine = JointEngine(group, KnowledgeTransfer(names=group.names, teachers="ema"), CPU)
    before = copy.deepcopy([peer.average.module.state_dict() for peer in group])
    engine.step(make_batch(12), step=0, update=False)
    for peer, old in zip(group, before, strict=True):
        now = peer.average.module.state_dict()
        assert int(now.pop("calls")) == 1 and int(old.pop("calls")) == 0
        assert all(torch.equal(now[name], old[name]) for name in old)
        assert all(p.grad is None for p in peer.average.module.parameters())
        assert any(p.grad is not None for p in peer.module.parameters())
        assert peer.model is peer.module
    engine.step(make_batch(12), step=0)
    weights = [peer.average.module.state_dict()["body.0.weight"] for peer in group]
    assert not torch.equal(weights[0], before[0]["body.0.weight"])


def test_nobody_is_asked_where_nobody_teaches():
    group = averaged_peers(2)
    engine = JointEngine(group, KnowledgeTransfer("none", names=group.names, teachers="ema"), CPU)
    engine.step(make_batch(12), step=0)
    assert all(int(peer.average.module.calls) == 0 for peer in group)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="teachers is 'x'"):
        KnowledgeTransfer(teachers="x")
    with pytest.raises(ValueError, match="needs copies that teach"):
        KnowledgeTransfer("self")
    with pytest.raises(ValueError, match="no gradient moves"):
        KnowledgeTransfer(teachers="ema", detach_teacher=False)
    transfer = KnowledgeTransfer(teachers="ema", names=["p0", "p1"])
    with pytest.raises(ValueError, match="need the outputs of the averaged copies"):
        transfer(classify(random_logits(2, 3, 4), torch.arange(3)))
    with pytest.raises(ValueError, match="no average of the weights of p0, p1"):
        JointEngine(normed_peers(2), transfer, CPU)
    alone = PeerGroup([averaged_peers(2)[0]])
    engine = JointEngine(alone, KnowledgeTransfer("self", names=["p0"], teachers="ema"), CPU)
    assert engine.step(make_batch(12), step=0).roles.all()
