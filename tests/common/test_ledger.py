"""The ledger: counts by hand, collapse, ranks and intervals."""

import math
import weakref

import pytest
import torch

from common.ledger import Ledger
from common.transfer import KnowledgeTransfer, PeerOutput, TransferResult


def result_of(roles, score, kl, correct, task_loss=(1.0, 2.0)):
    return TransferResult(
        total=torch.zeros(()),
        task_loss=torch.tensor(task_loss),
        transfer_loss=torch.tensor([0.25, 0.5]),
        roles=torch.tensor(roles),
        score=torch.tensor(score),
        kl=torch.tensor(kl),
        correct=None if correct is None else torch.tensor(correct),
    )


# four samples: p0 teaches p1 on two, p1 teaches p0 on one, nobody on the last
ROLES = [[[0.0] * 4, [1.0, 1.0, 0, 0]], [[0.0, 0, 1.0, 0], [0.0] * 4]]
SCORE = [[-1.0, -1.0, -3.0, -2.0], [-2.0, -4.0, -1.0, -2.0]]
KL = [[[0.0] * 4, [0.5, 1.5, 9, 9]], [[9.0, 9, 2.0, 9], [0.0] * 4]]
CORRECT = [[True, True, False, True], [False, True, True, True]]


def test_hand_computed_lessons():
    ledger = Ledger(["a", "b"])
    ledger.add(result_of(ROLES, SCORE, KL, CORRECT))
    ledger.add(result_of(ROLES, SCORE, KL, CORRECT, task_loss=(3.0, 2.0)))
    lessons = ledger.read()
    assert lessons.samples == 8 and lessons.taught == 0.75
    assert lessons.task_loss == {"a": 2.0, "b": 2.0}
    assert lessons.transfer_loss == {"a": 0.25, "b": 0.5}
    assert lessons.teaches == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(2)
    assert lessons.entropy == pytest.approx(entropy)
    to_b, to_a = lessons.pairs
    assert (to_b.teacher, to_b.student, to_b.share) == ("a", "b", 0.5)
    assert (to_b.gap, to_b.kl) == (2.0, 1.0)
    assert (to_b.teacher_right, to_b.student_right) == (0.5, 0.5)
    assert (to_a.share, to_a.gap, to_a.kl) == (0.25, 2.0, 2.0)
    assert (to_a.teacher_right, to_a.student_right) == (1.0, 0.0)
    scalars = lessons.scalars()
    assert scalars["transfer/a->b/share"] == 0.5 and scalars["b/teaches"] == pytest.approx(1 / 3)


def test_intervals_add_up_to_the_epoch_and_survive_a_resume():
    ledger = Ledger(["a", "b"])
    ledger.add(result_of(ROLES, SCORE, KL, CORRECT))
    assert ledger.read().samples == 4
    ledger.add(result_of(ROLES, SCORE, KL, CORRECT))
    other = Ledger(["a", "b"])
    other.load_state_dict(ledger.state_dict())
    assert ledger.read_epoch() == other.read_epoch()
    assert ledger.read_epoch().samples == 0


@pytest.mark.parametrize("batches", [1, 15, 16, 17, 40])
def test_batches_that_wait_are_counted_wherever_counts_are_read(batches):
    ledger, other = Ledger(["a", "b"]), Ledger(["a", "b"])
    for _ in range(batches):
        ledger.add(result_of(ROLES, SCORE, KL, CORRECT))
    other.load_state_dict(ledger.state_dict())
    assert other.read() == ledger.read()
    assert ledger.read_epoch().batches == batches


def test_a_loaded_state_replaces_batches_that_wait():
    ledger = Ledger(["a", "b"])
    ledger.add(result_of(ROLES, SCORE, KL, CORRECT))
    ledger.load_state_dict(Ledger(["a", "b"]).state_dict())
    assert ledger.read().batches == 0


def test_large_batches_are_not_kept():
    ledger = Ledger(["a", "b"])
    result = result_of(ROLES, SCORE, KL, None)
    result.roles = result.kl = torch.zeros(2, 2, 3, 80, 80)
    result.score = torch.zeros(2, 3, 80, 80)
    kept = weakref.ref(result)
    ledger.add(result)
    del result
    assert kept() is None


def test_maps_count_as_shares_of_a_sample():
    roles = torch.zeros(2, 2, 3, 4, 5)
    roles[0, 1, :, :2] = 1
    result = result_of(ROLES, SCORE, KL, None)
    result.roles, result.score, result.kl = roles, torch.zeros(2, 3, 4, 5), roles * 3
    ledger = Ledger(["a", "b"])
    ledger.add(result)
    lessons = ledger.read()
    assert lessons.samples == 3 and lessons.taught == pytest.approx(0.5)
    assert lessons.pairs[0].share == pytest.approx(0.5)
    assert lessons.pairs[0].kl == pytest.approx(3.0)
    assert math.isnan(lessons.pairs[0].teacher_right)
    assert "transfer/a->b/teacher_right" not in lessons.scalars()


def test_collapse_is_told():
    one_sided = [[[0.0] * 4, [1.0] * 4], [[0.0] * 4, [0.0] * 4]]
    ledger = Ledger(["a", "b"])
    ledger.add(result_of(one_sided, SCORE, KL, CORRECT))
    lessons = ledger.read()
    assert lessons.collapsed() == "a" and lessons.entropy == 0
    ledger.add(result_of(ROLES, SCORE, KL, CORRECT))
    assert ledger.read().collapsed() is None


def test_losses_that_are_not_finite_are_counted():
    ledger = Ledger(["a", "b"])
    ledger.add(result_of(ROLES, SCORE, KL, CORRECT, task_loss=(float("nan"), 1.0)))
    ledger.add(result_of(ROLES, SCORE, KL, CORRECT))
    assert ledger.read().not_finite == {"a": 1, "b": 0}


def test_positions_that_do_not_count_take_no_share():
    """Two samples of 4 positions; 2 of the first count, 1 of them taught; none of the second."""
    score = torch.zeros(2, 2, 4)
    score[0, 0] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    outputs = [
        PeerOutput(torch.zeros(()), s, torch.randn(2, 3, 4), mask=mask, correct=s > 0)
        for s in score
    ]
    result = KnowledgeTransfer("best")(outputs)
    assert torch.equal(result.mask, mask)
    ledger = Ledger(["a", "b"])
    ledger.add(result)
    lessons = ledger.read()
    assert lessons.samples == 2
    assert lessons.taught == pytest.approx(0.5 / 2)
    assert lessons.teaches == {"a": 1.0, "b": 0.0}
    pair = lessons.pairs[0]
    assert (pair.share, pair.gap, pair.teacher_right) == pytest.approx((0.25, 1.0, 1.0))
    assert pair.kl == pytest.approx(float(result.kl[0, 1, 0, 0]))


def test_a_smaller_batch_counts_for_its_samples_alone():
    ledger = Ledger(["a", "b"])
    transfer = KnowledgeTransfer("none", names=["a", "b"])
    for size, loss in ((4, 1.0), (1, 11.0)):
        outputs = [
            PeerOutput(torch.tensor(loss), torch.zeros(size), torch.zeros(size, 3)) for _ in "ab"
        ]
        ledger.add(transfer(outputs))
    assert ledger.read().task_loss == {"a": 3.0, "b": 3.0}
