"""The objective: golden numbers, a naive loop, gradients, masks, half precision."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common.roles import assign_roles
from common.transfer import KnowledgeTransfer, PeerOutput, _full_precision, confidence, pairwise_kl

GOLDEN = json.loads(Path(__file__).with_name("objective_golden.json").read_text())["cases"]
RULES = ["best", "better", "better_sum", "mixture", "mutual", "one_way:1", "none"]


def golden_logits(case):
    peers, batch, classes, phase = (case[k] for k in ("models", "batch", "classes", "phase"))
    logits = torch.zeros(peers, batch, classes, dtype=torch.float64)
    for i in range(peers):
        for b in range(batch):
            for c in range(classes):
                logits[i, b, c] = 3 * math.sin(
                    0.7 * (b + 1) * (c + 1) / (i + 1.5) + 1.3 * i + phase
                ) + 0.8 * math.cos(0.31 * c * (i + 1) + phase * b)
    return [z.clone().requires_grad_() for z in logits]


def classify(logits, labels):
    loss = [F.cross_entropy(z, labels, reduction="none") for z in logits]
    return [
        PeerOutput(x.mean(), -x.detach(), z, correct=z.argmax(1) == labels)
        for x, z in zip(loss, logits, strict=True)
    ]


def random_logits(peers, *shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(peers, *shape, generator=generator, dtype=torch.float64)
    return [z.to(dtype).requires_grad_() for z in logits]


def naive_transfer(logits, roles, temperature, detach_teacher):
    """The textbook double loop, one KL a pair."""
    total = 0.0
    for t in range(len(logits)):
        for s in range(len(logits)):
            if t == s:
                continue
            teacher = torch.log_softmax(logits[t] / temperature, dim=1)
            if detach_teacher:
                teacher = teacher.detach()
            student = torch.log_softmax(logits[s] / temperature, dim=1)
            kl = (teacher.exp() * (teacher - student)).sum(dim=1) * temperature**2
            total = total + (roles[t, s] * kl).mean()
    return total


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['models']}x{c['batch']}x{c['classes']}")
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "through"])
def test_golden(case, detach):
    logits = golden_logits(case)
    outputs = classify(logits, torch.tensor(case["labels"]))
    result = KnowledgeTransfer(detach_teacher=detach)(outputs)
    result.total.backward()
    close = {"rel": 1e-9, "abs": 1e-12}
    assert result.total.item() == pytest.approx(case["total"], **close)
    assert result.task_loss.sum().item() == pytest.approx(case["cross_entropy"], **close)
    assert result.transfer_loss.sum().item() == pytest.approx(case["kd"], **close)
    assert result.roles.amax(dim=1).sum(dim=1).tolist() == case["taught"]
    assert result.roles.amax(dim=1).argmax(dim=0).tolist() == case["teacher"]
    variant = "detached" if detach else "through"
    norms = case[f"grad_norm_{variant}" if detach else "grad_norm_through_teacher"]
    assert [z.grad.norm().item() for z in logits] == pytest.approx(norms, **close)
    assert [z.grad[0, 0].item() for z in logits] == pytest.approx(
        case[f"grad_00_{variant}"], **close
    )


@pytest.mark.parametrize("peers", [2, 3, 4, 5])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "through"])
def test_equals_naive_loop(peers, rule, temperature, detach):
    labels = torch.arange(7) % 5
    ours, theirs = random_logits(peers, 7, 5), random_logits(peers, 7, 5)
    result = KnowledgeTransfer(rule, temperature, 0.7, detach)(classify(ours, labels))
    result.total.backward()
    outputs = classify(theirs, labels)
    roles = assign_roles(torch.stack([o.score for o in outputs]), rule)
    total = sum(o.task_loss for o in outputs)
    total = total + 0.7 * naive_transfer(theirs, roles, temperature, detach)
    total.backward()
    torch.testing.assert_close(result.total, total, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("peers", [2, 3, 4])
def test_weights_from_the_gap_equal_a_naive_loop(peers):
    labels = torch.arange(7) % 5
    ours, theirs = random_logits(peers, 7, 5), random_logits(peers, 7, 5)
    result = KnowledgeTransfer("better_sum", weight=0.7, gap_power=1.5)(classify(ours, labels))
    result.total.backward()
    losses = [F.cross_entropy(z, labels, reduction="none") for z in theirs]
    total = sum(loss.mean() for loss in losses)
    p = [(-loss).exp().detach() for loss in losses]
    for t in range(peers):
        for s in range(peers):
            share = (1 - p[s] / p[t]).clamp(min=0) ** 1.5
            teacher = torch.log_softmax(theirs[t], dim=1).detach()
            kl = (teacher.exp() * (teacher - torch.log_softmax(theirs[s], dim=1))).sum(dim=1)
            total = total + 0.7 * (share * kl).mean()
    total.backward()
    torch.testing.assert_close(result.total, total, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("granularity", ["sample", "position"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "through"])
def test_maps_with_a_mask_equal_a_loop_over_pixels(granularity, detach):
    logits = random_logits(3, 2, 4, 3, 5)
    mask = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    shape = (3, 2) if granularity == "sample" else (3, 2, 3, 5)
    score = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    outputs = [PeerOutput(z.sum() * 0, s, z, mask=mask) for z, s in zip(logits, score, strict=True)]
    result = KnowledgeTransfer("better", detach_teacher=detach)(outputs)
    result.total.backward()

    copies = [z.detach().clone().requires_grad_() for z in logits]
    roles = assign_roles(score, "better")
    expected = 0.0
    for b in range(2):
        pixels = mask[b].nonzero().tolist()
        for y, x in pixels:
            column = [z[b, :, y, x].unsqueeze(0) for z in copies]
            at = roles[:, :, b] if granularity == "sample" else roles[:, :, b, y, x]
            expected = expected + naive_transfer(column, at, 1.0, detach) / len(pixels) / 2
    expected.backward()
    torch.testing.assert_close(result.total, expected)
    for a, b in zip(logits, copies, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for z in logits:
        assert not z.grad.movedim(1, -1)[~mask].any()
    assert result.kl.shape == result.roles.shape == (3, *shape)


def test_gradcheck_through_both_sides():
    logits = random_logits(3, 2, 4)
    weight = torch.rand(3, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *z: (pairwise_kl(z, 1.7, detach_teacher=False) * weight).sum(), logits
    )


def test_only_students_get_a_gradient_when_the_teacher_is_detached():
    logits = random_logits(2, 1, 5)
    score = torch.tensor([[0.0], [-1.0]])
    outputs = [PeerOutput(torch.zeros(()), s, z) for s, z in zip(score, logits, strict=True)]
    KnowledgeTransfer()(outputs).total.backward()
    assert not logits[0].grad.any()
    assert logits[1].grad.abs().sum() > 0.1


def test_a_frozen_peer_teaches_and_learns_nothing():
    logits = random_logits(3, 6, 5)
    logits[2] = logits[2].detach()
    transfer = KnowledgeTransfer("mutual", names=["a", "b", "old"], frozen=["old"])
    outputs = classify(logits, torch.arange(6) % 5)
    result = transfer(outputs)
    result.total.backward()
    assert not result.roles[:, 2].any() and result.roles[2, :2].all()
    assert result.transfer_loss[2] == 0
    expected = outputs[0].task_loss + outputs[1].task_loss + result.transfer_loss.sum()
    torch.testing.assert_close(result.total, expected)
    assert logits[0].grad.any() and logits[1].grad.any()


def test_permuting_peers_permutes_the_result():
    logits, labels, order = random_logits(4, 6, 5), torch.arange(6) % 5, [2, 0, 3, 1]
    for rule in ("best", "better", "better_sum", "mixture", "mutual"):
        transfer = KnowledgeTransfer(rule)
        plain = transfer(classify(logits, labels))
        mixed = transfer(classify([logits[i] for i in order], labels))
        torch.testing.assert_close(mixed.transfer_loss, plain.transfer_loss[order])
        torch.testing.assert_close(mixed.roles, plain.roles[order][:, order])


def test_shifted_logits_and_agreeing_peers():
    logits, labels = random_logits(3, 6, 5), torch.arange(6) % 5
    plain = KnowledgeTransfer()(classify(logits, labels))
    shifted = KnowledgeTransfer()(classify([z + 5 for z in logits], labels))
    torch.testing.assert_close(plain.total, shifted.total)
    same = [logits[0], logits[0] + 3.0]
    kl = pairwise_kl(same)
    torch.testing.assert_close(kl, torch.zeros_like(kl))


def test_two_peers_identities():
    """With N = 2: better equals best; mutual distils the ensemble mean, up to the weight."""
    labels = torch.arange(6) % 5
    grads = {}
    for rule in ("best", "better"):
        logits = random_logits(2, 6, 5)
        KnowledgeTransfer(rule)(classify(logits, labels)).total.backward()
        grads[rule] = torch.stack([z.grad for z in logits])
    torch.testing.assert_close(grads["best"], grads["better"])
    logits = random_logits(2, 6, 5)
    (roles,) = (torch.ones(2, 2, 6) - torch.eye(2).unsqueeze(-1),)
    (pairwise_kl(logits) * roles).sum().backward()
    p = torch.stack([z.detach().softmax(1) for z in logits])
    torch.testing.assert_close(logits[0].grad, 2 * (p[0] - p.mean(0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened(dtype):
    half = random_logits(2, 8, 50, dtype=dtype)
    full = [z.detach().float().requires_grad_() for z in half]
    for logits in (half, full):
        (8 * pairwise_kl(logits)[0, 1].mean()).backward()
    torch.testing.assert_close(pairwise_kl(half), pairwise_kl(full))
    assert half[1].grad.dtype == dtype
    torch.testing.assert_close(half[1].grad.float(), full[1].grad, rtol=1e-2, atol=1e-4)


def test_autocast_does_not_narrow_the_kl():
    logits = random_logits(2, 8, 50, dtype=torch.float32)
    expected = pairwise_kl(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(pairwise_kl(logits), expected, rtol=0, atol=0)


def test_weight_warms_up():
    transfer = KnowledgeTransfer(weight=2.0, warmup_steps=4)
    assert [transfer.weight_at(i) for i in (0, 1, 3, 4, 9, None)] == [0, 0.5, 1.5, 2, 2, 2]
    outputs = classify(random_logits(2, 6, 5), torch.arange(6) % 5)
    first, full = transfer(outputs, step=0), transfer(outputs)
    torch.testing.assert_close(first.total, first.task_loss.sum())
    torch.testing.assert_close(full.total, first.total + 2 * full.transfer_loss.sum())


def test_random_draws_resume_where_they_stopped():
    outputs = classify(random_logits(3, 32, 5), torch.arange(32) % 5)
    transfer = KnowledgeTransfer("random", seed=3)
    transfer(outputs)
    state = transfer.state_dict()
    expected = transfer(outputs).roles
    other = KnowledgeTransfer("random", seed=99)
    other.load_state_dict(state)
    assert torch.equal(other(outputs).roles, expected)
    assert not torch.equal(KnowledgeTransfer("random", seed=4)(outputs).roles, expected)


def test_confidence_is_the_largest_probability():
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    torch.testing.assert_close(confidence(logits), torch.tensor([0.75, 0.5]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"weight": -1}, "weight is -1"),
        ({"warmup_steps": -2}, "warmup_steps is -2"),
        ({"rule": "bets", "names": ["a", "b"]}, "unknown rule 'bets'; choose from best"),
        ({"rule": "one_way:c", "names": ["a", "b"]}, "no peer is named 'c'; peers: a, b"),
        ({"names": ["a", "b"], "frozen": ["c"]}, "frozen peers"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        KnowledgeTransfer(**arguments)


def test_shapes_that_differ_are_named():
    outputs = classify(random_logits(2, 6, 5), torch.arange(6) % 5)
    outputs[1].logits = outputs[1].logits[:, :4]
    with pytest.raises(ValueError, match=r"logits of one shape, got a: \[6, 5\], b: \[6, 4\]"):
        KnowledgeTransfer(names=["a", "b"])(outputs)


NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")
GPU = torch.device("cuda")  # only named: the settings are there without one


@pytest.mark.skipif(not NEWER, reason="this torch has but one name for TF32")
def test_tf32_is_kept_out_and_comes_back_whoever_allowed_it():
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"  # to read allow_tf32 raises from here on
        with _full_precision(GPU):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        torch.set_float32_matmul_precision("medium")
        with _full_precision(GPU):
            assert matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium" and matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_tf32_is_kept_out_where_torch_has_its_older_name_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
    with _full_precision(GPU):
        assert vars(torch.backends.cuda.matmul) == {"allow_tf32": False}
    assert vars(torch.backends.cuda.matmul) == {"allow_tf32": True}
