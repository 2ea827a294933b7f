"""Roles by hand-computed value, and what they refuse."""

import math

import pytest
import torch

from common.roles import RULES, assign_roles, with_own

# three peers, four samples: a winner, another winner, a tie at the top, a tie below the top
SCORE = torch.tensor([[3.0, 1.0, 2.0, 5.0], [2.0, 4.0, 2.0, 1.0], [1.0, 3.0, 0.0, 1.0]])


def taught(roles, sample):
    """Return the nonzero weights of one sample as {(teacher, student): weight}."""
    return {
        (t, s): round(roles[t, s, sample].item(), 4)
        for t in range(roles.shape[0])
        for s in range(roles.shape[1])
        if roles[t, s, sample] != 0
    }


def test_best():
    roles = assign_roles(SCORE, "best")
    assert taught(roles, 0) == {(0, 1): 1, (0, 2): 1}
    assert taught(roles, 1) == {(1, 0): 1, (1, 2): 1}
    assert taught(roles, 2) == {}
    assert taught(roles, 3) == {(0, 1): 1, (0, 2): 1}


def test_better():
    roles = assign_roles(SCORE, "better")
    assert taught(roles, 0) == {(0, 1): 1, (0, 2): 0.5, (1, 2): 0.5}
    assert taught(roles, 2) == {(0, 2): 0.5, (1, 2): 0.5}
    assert taught(roles, 3) == {(0, 1): 1, (0, 2): 1}


def test_better_sum():
    roles = assign_roles(SCORE, "better_sum")
    assert taught(roles, 0) == {(0, 1): 1, (0, 2): 1, (1, 2): 1}


def test_mixture_weighs_by_the_likelihood_of_the_true_class():
    probability = torch.tensor([[0.6, 0.1], [0.3, 0.1], [0.1, 0.2]])
    roles = assign_roles(probability.log(), "mixture")
    w = {(0, 1): 0.6, (0, 2): 0.6, (1, 0): 0.3, (1, 2): 0.3, (2, 0): 0.1, (2, 1): 0.1}
    assert taught(roles, 0) == w
    assert taught(roles, 1)[2, 0] == 0.5  # what counts is how likely one is against the others
    torch.testing.assert_close(roles.sum(dim=(0, 1)), torch.full((2,), 2.0))  # N - 1, as under best


def test_with_own_copies_every_student_of_a_mixture_learns_from_all_of_it():
    roles = with_own(assign_roles(SCORE, "mixture"))
    torch.testing.assert_close(roles.sum(dim=0), torch.ones(3, 4))
    torch.testing.assert_close(roles[:, 0], SCORE.softmax(dim=0))


def test_mutual_one_way_none():
    everyone = {(t, s): 0.5 for t in range(3) for s in range(3) if t != s}
    assert taught(assign_roles(SCORE, "mutual"), 2) == everyone
    assert taught(assign_roles(SCORE, "one_way:1"), 0) == {(1, 0): 1, (1, 2): 1}
    named = assign_roles(SCORE, "one_way:c", names=["a", "b", "c"])
    assert taught(named, 0) == {(2, 0): 1, (2, 1): 1}
    assert not assign_roles(SCORE, "none").any()


def test_random_is_uniform_seeded_and_one_teacher_a_sample():
    score = torch.zeros(4, 4000)
    roles = assign_roles(score, "random", generator=torch.Generator().manual_seed(0))
    again = assign_roles(score, "random", generator=torch.Generator().manual_seed(0))
    assert torch.equal(roles, again)
    teaches = roles.amax(dim=1)
    assert (teaches.sum(dim=0) == 1).all()
    assert (roles.sum(dim=(0, 1)) == 3).all()
    assert ((teaches.mean(dim=1) - 0.25).abs() < 0.03).all()


@pytest.mark.parametrize("rule", ["best", "better", "mixture", "mutual", "one_way:0", "random"])
def test_margin_silences_small_gaps(rule):
    generator = torch.Generator().manual_seed(0)
    roles = assign_roles(SCORE, rule, margin=1.5, generator=generator)
    gap = SCORE.unsqueeze(1) - SCORE.unsqueeze(0)
    assert not roles[gap <= 1.5].any()
    assert rule == "random" or roles[0, 1, 3] > 0


def test_margin_renormalises_better():
    assert taught(assign_roles(SCORE, "better", margin=1.5), 0) == {(0, 2): 1}


def test_the_gap_weighs_by_hand():
    roles = assign_roles(SCORE, "best", gap_power=1)
    one, two = 1 - math.exp(-1), 1 - math.exp(-2)
    assert taught(roles, 0) == {(0, 1): round(one, 4), (0, 2): round(two, 4)}
    squared = assign_roles(SCORE, "best", gap_power=2)
    assert squared[0, 2, 0].item() == pytest.approx(two**2)
    # where everyone teaches, only who does better still does
    mutual = assign_roles(SCORE, "mutual", gap_power=1)
    expected = {(0, 1): one / 2, (0, 2): two / 2, (1, 2): one / 2}
    assert taught(mutual, 0) == {pair: round(x, 4) for pair, x in expected.items()}


@pytest.mark.parametrize("rule", [*RULES, "one_way:0"])
@pytest.mark.parametrize("peers", [2, 3, 4])
def test_the_gaps_weight_is_bounded_grows_and_is_a_share_of_probability(rule, peers):
    score = -torch.rand(peers, 50, generator=torch.Generator().manual_seed(1)).double() * 5
    plain, weighed = (
        assign_roles(score, rule, gap_power=power, generator=torch.Generator().manual_seed(0))
        for power in (0, 1)
    )
    p = score.exp()  # of the true class, where the score is minus the cross entropy
    for t in range(peers):
        for s in range(peers):
            share = (1 - p[s] / p[t]).clamp(min=0)
            torch.testing.assert_close(weighed[t, s], plain[t, s] * share)
    assert ((weighed <= plain) & (weighed >= 0)).all()
    far = assign_roles(score * 1e4, rule, gap_power=3)
    assert torch.isfinite(far).all() and far.max() <= 1


@pytest.mark.parametrize("rule", [*RULES, "one_way:0"])
def test_every_rule_on_maps_has_a_zero_diagonal_and_no_gradient(rule):
    score = torch.randn(3, 2, 4, 5, requires_grad=True)
    roles = assign_roles(score, rule)
    assert roles.shape == (3, 3, 2, 4, 5) and not roles.requires_grad
    assert not roles.diagonal().any() and (roles >= 0).all()


def test_one_peer_has_only_none():
    assert assign_roles(torch.zeros(1, 3), "none").shape == (1, 1, 3)
    with pytest.raises(ValueError, match="'best' needs two peers or more, got 1"):
        assign_roles(torch.zeros(1, 3), "best")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_names_the_peer(bad):
    score = SCORE.clone()
    score[1, 3] = bad
    with pytest.raises(ValueError, match="peer 'b' is not finite at sample 3"):
        assign_roles(score, "best", names=["a", "b", "c"])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="unknown rule 'worst'; choose from best, better"):
        assign_roles(SCORE, "worst")
    with pytest.raises(ValueError, match="margin is -1"):
        assign_roles(SCORE, "best", margin=-1)
    with pytest.raises(ValueError, match="gap_power is -1"):
        assign_roles(SCORE, "best", gap_power=-1)
    with pytest.raises(ValueError, match="2 names for 3 peers"):
        assign_roles(SCORE, "best", names=["a", "b"])
