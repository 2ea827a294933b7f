"""Losses of saliency maps: golden numbers, hand-computed values, degenerate maps, gradients."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from common.transfer import KnowledgeTransfer, PeerOutput
from saliency import losses
from saliency.losses import cc, kldiv, l1, nss, saliency_loss, similarity
from saliency.peer import log_map
from tests.saliency.maps import golden, make_fixations, make_map, mix, random_maps

GOLDEN = golden("losses")
EDGES = golden("losses_edge_cases")
PAIRWISE = {"kldiv": kldiv, "cc": cc, "similarity": similarity, "l1": l1}
ALL = {**PAIRWISE, "nss": nss}
SHAPE = (4, 24, 32)
TARGET = make_map(SHAPE, "gt")
FIXATIONS = make_fixations(SHAPE, "fix", 0.03)


def predictions():
    weights = torch.tensor(GOLDEN["W"])
    return [mix(weights[:, i], TARGET, make_map(SHAPE, f"pred{i + 1}")) for i in range(3)]


def close(values, expected, rel=1e-6, abs=1e-12):
    flat = torch.tensor(expected, dtype=torch.float64).flatten().tolist()
    assert values.flatten().tolist() == pytest.approx(flat, rel=rel, abs=abs)


# golden numbers


@pytest.mark.parametrize("i", range(3))
def test_losses_are_the_references(i):
    pred, expected = predictions()[i], GOLDEN["metrics"][f"P{i + 1}"]
    close(kldiv(pred, TARGET), expected["kldiv_gt"])
    close(cc(pred, TARGET), expected["cc_gt"])
    close(similarity(pred, TARGET), expected["similarity_gt_per_sample"])
    close(similarity(pred, TARGET).mean(), expected["similarity_gt_batch_mean"])
    close(saliency_loss(pred, TARGET), expected["loss_func_default"])
    # a mean of 24 standardised values that cancel; the reference has float32's last digits
    close(nss(pred, FIXATIONS), expected["nss_per_sample"], abs=1e-6)
    close(nss(pred, FIXATIONS).mean(), [expected["nss_batch_mean"]], abs=1e-6)


def test_kl_between_models_is_the_references():
    maps = dict(zip(("P1", "P2", "P3"), predictions(), strict=True))
    for pair, expected in GOLDEN["pairwise_kldiv"].items():
        first, second = pair.removeprefix("kldiv(").removesuffix(")").split(",")
        close(kldiv(maps[first], maps[second]), expected)


def test_a_float64_target_is_computed_in_float64():
    loss = saliency_loss(predictions()[0], TARGET.double())
    assert loss.dtype == torch.float64
    close(loss, GOLDEN["gt_float64_loss"])


def test_weights_are_the_references_but_for_the_mean_over_the_batch():
    pred = predictions()[0]
    ours = saliency_loss(pred, TARGET, similarity=-0.5, l1=2.0)
    share = similarity(pred, TARGET)
    theirs = ours + 0.5 * share - 0.5 * share.mean()
    close(theirs, GOLDEN["get_loss_with_sim_-0.5_l1_2.0_on_P1"])


def test_gradients_of_two_models_that_teach_each_other_are_the_references():
    expected = GOLDEN["bi(t=P1,s=P2)"]
    teacher, student = (p.requires_grad_() for p in predictions()[:2])
    ours, theirs = saliency_loss(teacher, TARGET), saliency_loss(student, TARGET)
    better = (ours < theirs).float()
    transfer = better * kldiv(student, teacher) + (1 - better) * kldiv(teacher, student)
    total = (ours + theirs + transfer).mean()
    total.backward()
    close(total, expected["total"])
    close(teacher.grad.norm(), [expected["grad_t_l2"]], rel=1e-5)
    close(student.grad.norm(), [expected["grad_s_l2"]], rel=1e-5)


def test_gradients_of_three_models_are_the_references():
    expected = GOLDEN["tri(P1,P2,P3)"]
    maps = [p.requires_grad_() for p in predictions()]
    loss = torch.stack([saliency_loss(p, TARGET) for p in maps])
    mask = F.one_hot(loss.argmin(dim=0), 3).T
    pulls = [sum(kldiv(s, t) for s in maps if s is not t) for t in maps]
    total = (loss.sum(0) + (mask * torch.stack(pulls)).sum(0)).mean()
    total.backward()
    assert mask.tolist() == expected["mask"]
    close(total, expected["total"])
    close(torch.stack([p.grad.norm() for p in maps]), expected["grad_l2"], rel=1e-5)


@pytest.mark.parametrize(
    ("case", "chosen"),
    [("bi(t=P1,s=P2)", [0, 1]), ("tri(P1,P2,P3)", [0, 1, 2]), ("tri_tie(P1,P1,P3)", [0, 0, 2])],
)
def test_the_published_objectives_are_our_transfer_without_detaching(case, chosen):
    expected = GOLDEN[case]
    maps = [predictions()[i].clone().requires_grad_() for i in chosen]
    outputs = []
    for map_ in maps:
        per_sample = saliency_loss(map_, TARGET)
        logits = log_map(map_).flatten(1)
        outputs.append(PeerOutput(per_sample.mean(), -per_sample.detach().float(), logits))
    result = KnowledgeTransfer("best", detach_teacher=False)(outputs)
    result.total.backward()
    close(result.total.detach(), expected["total"], rel=1e-5)
    told = expected.get("grad_l2") or [expected["grad_t_l2"], expected["grad_s_l2"]]
    close(torch.stack([m.grad.norm() for m in maps]), told, rel=1e-4)


def test_edges_where_the_reference_is_defined():
    points = torch.zeros(2, 1, 6)
    points[0, 0, 0] = points[1, 0, 5] = 1
    close(kldiv(points[:1], points[1:]), EDGES["kldiv(onehot0,onehot5)"])
    close(kldiv(TARGET[:1], TARGET[:1]), EDGES["kldiv(gt,gt)"], abs=1e-6)
    close(nss(torch.ones(1, 24, 32), FIXATIONS[:1]), EDGES["nss(const,one_fix)"])


# by hand


def row(*values, dtype=torch.float64):
    return torch.tensor([[values]], dtype=dtype)


def test_kl_by_hand():
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kldiv(row(7, 7), row(1, 3)).item() == pytest.approx(expected)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kldiv(row(1, 3), row(7, 7)).item() == pytest.approx(expected)


def test_cc_similarity_l1_by_hand():
    assert cc(row(1, 2, 3), row(10, 30, 20)).item() == pytest.approx(0.5)
    assert cc(row(1, 2), row(5, 3)).item() == pytest.approx(-1)
    # (0, 1/3, 2/3) and (2/3, 1/3, 0) after the minimum and the sum
    assert similarity(row(1, 2, 3), row(6, 5, 4)).item() == pytest.approx(1 / 3)
    assert l1(row(1, 2), row(2, 4)).item() == pytest.approx(1.5)


def test_nss_by_hand():
    # mean 2, sample standard deviation 1
    assert nss(row(1, 2, 3), row(0, 0, 1)).item() == pytest.approx(1)
    assert nss(row(1, 2, 3), row(1, 0, 3)).item() == pytest.approx(0.5)
    assert nss(row(1, 2, 3), row(0, 0, 255)).item() == pytest.approx(1)


def test_the_loss_adds_its_weighted_terms():
    p, g, f = random_maps(3, 4, 5), random_maps(3, 4, 5, seed=1), random_maps(3, 4, 5, seed=2)
    loss = saliency_loss(p, g, f, kl=0.5, cc=-2, similarity=-3, nss=-0.25, l1=4)
    expected = 0.5 * kldiv(p, g) - 2 * cc(p, g) - 3 * similarity(p, g) - 0.25 * nss(p, f)
    torch.testing.assert_close(loss, expected + 4 * l1(p, g))
    torch.testing.assert_close(saliency_loss(p, g), kldiv(p, g) - cc(p, g))


def test_a_term_of_weight_0_is_not_computed(monkeypatch):
    def refuse(*maps):
        raise AssertionError("computed")

    for name in ("similarity", "l1"):
        monkeypatch.setitem(losses._TERMS, name, refuse)
    monkeypatch.setattr(losses, "nss", refuse)
    assert saliency_loss(TARGET, TARGET, FIXATIONS).shape == (4,)
    with pytest.raises(AssertionError, match="computed"):
        saliency_loss(TARGET, TARGET, FIXATIONS, nss=-1)


# invariances


@pytest.mark.parametrize("loss", [kldiv, cc, similarity])
def test_scale_does_not_matter(loss):
    p, g = random_maps(2, 5, 6), random_maps(2, 5, 6, seed=1)
    torch.testing.assert_close(loss(1e-3 * p, 255 * g), loss(p, g))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_neither_underflows_nor_overflows(scale):
    p, g = (random_maps(2, 5, 6, seed=i, dtype=torch.float32) for i in range(2))
    for loss in (cc, similarity, nss, kldiv):
        torch.testing.assert_close(loss(scale * p, g), loss(p, g), rtol=1e-4, atol=1e-5)


def test_a_nearly_constant_map_keeps_its_digits_in_float32():
    g = random_maps(1, 200, 200)
    p = (0.5 + 1e-4 * random_maps(1, 200, 200, seed=1)).float()
    torch.testing.assert_close(cc(p, g.float()).double(), cc(p.double(), g), atol=1e-6, rtol=0)
    torch.testing.assert_close(nss(p, g).double(), nss(p.double(), g), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_each_sample_stands_alone(name):
    p, g = random_maps(5, 6, 7), random_maps(5, 6, 7, seed=1)
    order = torch.tensor([3, 0, 4, 2, 1])
    loss = ALL[name](p, g)
    assert loss.shape == (5,)
    assert torch.equal(ALL[name](p[order], g[order]), loss[order])
    torch.testing.assert_close(ALL[name](p[2:3], g[2:3]), loss[2:3])
    assert ALL[name](p[:0], g[:0]).shape == (0,)


def test_similarity_tells_samples_apart():
    values = similarity(torch.stack([TARGET[0], 1 - TARGET[0]]), TARGET[:1].expand(2, -1, -1))
    assert values[0] == pytest.approx(1) and values[1] < 0.9


# degenerate maps


def degenerate():
    ordinary = random_maps(1, 4, 5)
    return {
        "zeros": torch.zeros_like(ordinary),
        "ones": torch.ones_like(ordinary),
        "tenths": torch.full_like(ordinary, 0.1),
        "tiny": torch.full_like(ordinary, 1e-40),
        "one hot": F.one_hot(torch.tensor([[3]]), 20).double().view(1, 4, 5),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients_are_finite_on_constant_and_empty_maps(name, dtype):
    maps = {**degenerate(), "ordinary": random_maps(1, 4, 5, seed=3)}
    for first, p in maps.items():
        for second, g in maps.items():
            pred, target = (x.to(dtype).clone().requires_grad_() for x in (p, g))
            value = ALL[name](pred, target)
            value.sum().backward()
            assert value.isfinite().all(), (first, second)
            # float16 cannot hold the slope of the KL where a prediction is 0
            if (dtype, first) != (torch.float16, "one hot"):
                assert pred.grad.isfinite().all(), (first, second)
            assert target.grad.isfinite().all(), (first, second)


def test_values_of_constant_and_empty_maps():
    ordinary, zeros, ones = random_maps(1, 4, 5), torch.zeros(1, 4, 5), torch.ones(1, 4, 5)
    for flat in (zeros, ones):
        assert cc(flat, ordinary).item() == cc(ordinary, flat).item() == 0
        assert similarity(flat, ordinary).item() == similarity(ordinary, flat).item() == 0
        assert nss(flat, ordinary).item() == 0
    assert nss(ordinary, zeros).item() == 0
    assert kldiv(ordinary, zeros).item() == kldiv(zeros, zeros).item() == 0
    share = ordinary / ordinary.sum()
    entropy = -(share * share.log()).sum().item()
    expected = -math.log(losses.EPS) - entropy
    assert kldiv(zeros, ordinary).item() == pytest.approx(expected)
    # a constant map is the uniform distribution
    assert kldiv(ones, ordinary).item() == pytest.approx(math.log(20) - entropy)


def test_one_bad_sample_harms_no_other():
    pred = random_maps(3, 4, 5).requires_grad_()
    target = random_maps(3, 4, 5, seed=1)
    target[1] = 0
    loss = saliency_loss(pred, target)
    loss.mean().backward()
    assert loss[1] == 0 and not pred.grad[1].any()
    assert (pred.grad[[0, 2]].flatten(1).norm(dim=1) > 1e-4).all()


def test_a_prediction_that_is_not_finite_is_not_hidden():
    pred = random_maps(1, 4, 5)
    pred[0, 0, 0] = math.nan
    for loss in ALL.values():
        assert loss(pred, random_maps(1, 4, 5, seed=1)).isnan().all()


# gradients


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradients_reach_both_maps(name):
    p = random_maps(2, 3, 4).requires_grad_()
    g = random_maps(2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(PAIRWISE[name], (p, g))
    PAIRWISE[name](p, g).sum().backward()
    assert (p.grad.flatten(1).norm(dim=1) > 1e-4).all()
    assert (g.grad.flatten(1).norm(dim=1) > 1e-4).all()


def test_nss_teaches():
    p = random_maps(2, 3, 4).requires_grad_()
    fixations = make_fixations((2, 3, 4), "few", 0.4)
    assert torch.autograd.gradcheck(lambda x: nss(x, fixations), (p,))
    saliency_loss(p, random_maps(2, 3, 4), fixations, kl=0, cc=0, nss=-1).sum().backward()
    # more at the fixations, less elsewhere
    assert (p.grad[fixations > 0] < 0).all() and (p.grad[fixations == 0] > 0).sum() > 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_computed_in_float32(name, dtype):
    p, g = random_maps(2, 40, 50).to(dtype), random_maps(2, 40, 50, seed=1).to(dtype)
    loss = ALL[name](p.requires_grad_(), 1000 * g)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ALL[name](p.float(), (1000 * g).float()))
    loss.sum().backward()
    assert p.grad.dtype == dtype and p.grad.isfinite().all()


def test_autocast_changes_nothing():
    p, g = random_maps(2, 40, 50).float(), random_maps(2, 40, 50, seed=1).float()
    expected = saliency_loss(p, g, g, similarity=-1, nss=-1, l1=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(saliency_loss(p, g, g, similarity=-1, nss=-1, l1=1), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_targets_of_any_dtype(dtype):
    pred = random_maps(2, 5, 6).float()
    target = make_fixations((2, 5, 6), "few", 0.4)
    for loss in (nss, cc, kldiv):
        torch.testing.assert_close(loss(pred, target.to(dtype)).float(), loss(pred, target))


# errors


def test_shapes_that_differ():
    for loss in ALL.values():
        with pytest.raises(ValueError, match=r"\(2, 3, 4\).*resize pred first"):
            loss(torch.rand(2, 3, 4), torch.rand(2, 3, 5))


@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 3, 4), (2, 0, 4)])
def test_shapes_that_are_not_maps(shape):
    for loss in ALL.values():
        with pytest.raises(ValueError, match=r"pred has shape .* expected"):
            loss(torch.rand(shape), torch.rand(shape))


def test_a_prediction_of_whole_numbers():
    with pytest.raises(ValueError, match=r"dtype torch.uint8.*pred\.float\(\)"):
        kldiv(torch.ones(1, 2, 3, dtype=torch.uint8), torch.ones(1, 2, 3))


def test_fixation_maps_may_be_there_or_missing():
    assert saliency_loss(TARGET, TARGET, FIXATIONS, nss=-1).shape == (4,)
    assert saliency_loss(TARGET, TARGET).shape == (4,)
    with pytest.raises(ValueError, match="fixations=, or nss=0"):
        saliency_loss(TARGET, TARGET, nss=-1)
    with pytest.raises(ValueError, match="fixations has shape"):
        saliency_loss(TARGET, TARGET, FIXATIONS[:, :5], nss=-1)


def test_nothing_to_learn_from():
    with pytest.raises(ValueError, match="every weight"):
        saliency_loss(TARGET, TARGET, kl=0, cc=0)


def test_defaults_are_kl_minus_cc():
    weights = inspect.signature(saliency_loss).parameters
    assert {k: p.default for k, p in weights.items() if p.kind is p.KEYWORD_ONLY} == {
        "kl": 1.0,
        "cc": -1.0,
        "similarity": 0.0,
        "nss": 0.0,
        "l1": 0.0,
    }
