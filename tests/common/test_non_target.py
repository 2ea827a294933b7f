"""The transfer over the non-target classes: by hand, against a loop, gradients, maps."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.roles import assign_roles
from common.transfer import KnowledgeTransfer, PeerOutput, without_target
from tests.common.test_transfer import random_logits


def outputs_of(logits, target):
    losses = [F.cross_entropy(z, target, reduction="none") for z in logits]
    return [
        PeerOutput(x.mean(), -x.detach(), z, target=target)
        for x, z in zip(losses, logits, strict=True)
    ]


def naive(logits, target, roles, temperature, detach):
    """A loop over pairs and samples that deletes the true class."""
    total = 0.0
    for t in range(len(logits)):
        for s in range(len(logits)):
            for b, label in enumerate(target.tolist()):
                others = [c for c in range(logits[t].shape[1]) if c != label]
                teacher = torch.log_softmax(logits[t][b, others] / temperature, dim=0)
                teacher = teacher.detach() if detach else teacher
                student = torch.log_softmax(logits[s][b, others] / temperature, dim=0)
                kl = (teacher.exp() * (teacher - student)).sum() * temperature**2
                total = total + roles[t, s, b] * kl / len(target)
    return total


def test_by_hand():
    teacher = torch.tensor([[0.5, 0.3, 0.2]]).log()
    student = torch.zeros(1, 3, requires_grad=True)
    result = KnowledgeTransfer(classes="non-target")(
        outputs_of([teacher, student], torch.tensor([0]))
    )
    # without the true class: 0.6 and 0.4 against halves
    assert result.transfer_loss[1].item() == pytest.approx(
        0.6 * math.log(1.2) + 0.4 * math.log(0.8)
    )


@pytest.mark.parametrize("peers", [2, 3, 4])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "through"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_a_naive_loop(peers, detach, temperature):
    target = torch.arange(7) % 5
    ours, theirs = random_logits(peers, 7, 5), random_logits(peers, 7, 5)
    transfer = KnowledgeTransfer("better", temperature, 0.7, detach, classes="non-target")
    result = transfer(outputs_of(ours, target))
    result.total.backward()
    outputs = outputs_of(theirs, target)
    roles = assign_roles(torch.stack([o.score for o in outputs]), "better")
    total = sum(o.task_loss for o in outputs)
    total = total + 0.7 * naive(theirs, target, roles, temperature, detach)
    total.backward()
    torch.testing.assert_close(result.total, total, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)


def test_the_true_class_gets_no_gradient_and_does_not_count():
    target = torch.tensor([0, 4, 2])
    logits = random_logits(2, 3, 5)
    score = torch.tensor([[1.0] * 3, [0.0] * 3])
    outputs = [
        PeerOutput(torch.zeros(()), s, z, target=target) for s, z in zip(score, logits, strict=True)
    ]
    result = KnowledgeTransfer(classes="non-target")(outputs)
    result.total.backward()
    at_target = logits[1].grad.gather(1, target[:, None])
    assert not at_target.any() and (logits[1].grad != 0).sum() == 12
    assert logits[0].grad is None or not logits[0].grad.any()
    for z in logits:
        z.data.scatter_add_(1, target[:, None], torch.full((3, 1), 7.0, dtype=z.dtype))
    again = KnowledgeTransfer(classes="non-target")(outputs)
    torch.testing.assert_close(again.transfer_loss, result.transfer_loss)


def test_renaming_the_classes_changes_nothing():
    logits, target = random_logits(3, 6, 5), torch.tensor([0, 1, 2, 3, 4, 4])
    order = torch.tensor([3, 0, 4, 1, 2])
    renamed = outputs_of([z[:, order] for z in logits], order.argsort()[target])
    transfer = KnowledgeTransfer("mutual", classes="non-target")
    one, two = transfer(outputs_of(logits, target)), transfer(renamed)
    torch.testing.assert_close(one.transfer_loss, two.transfer_loss)
    torch.testing.assert_close(one.kl, two.kl)


def test_maps_with_ignored_pixels():
    logits = random_logits(2, 2, 4, 3, 3)
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(4, (2, 3, 3), generator=generator)
    mask = torch.rand(2, 3, 3, generator=generator) > 0.3
    target[~mask] = 255
    score = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    outputs = [
        PeerOutput(z.sum() * 0, s, z, mask=mask, target=target)
        for z, s in zip(logits, score, strict=True)
    ]
    result = KnowledgeTransfer(classes="non-target")(outputs)
    expected = 0.0
    for b in range(2):
        columns = [z[b, :, mask[b]].T for z in logits]
        roles = torch.zeros(2, 2, int(mask[b].sum()))
        roles[b, 1 - b] = 1
        expected = expected + naive(columns, target[b][mask[b]], roles, 1.0, True) / 2
    torch.testing.assert_close(result.total, expected)
    result.total.backward()
    assert not logits[0].grad.movedim(1, -1)[~mask].any()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="classes is 'some'"):
        KnowledgeTransfer(classes="some")
    logits = random_logits(2, 3, 5)
    outputs = [PeerOutput(z.mean(), z.detach().amax(dim=1), z) for z in logits]
    with pytest.raises(ValueError, match="soft targets"):
        KnowledgeTransfer(classes="non-target")(outputs)
    with pytest.raises(ValueError, match="needs 3 or more"):
        without_target(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
