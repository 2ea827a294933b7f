"""Tests and corrections by hand-computed value, and on data without an effect."""

import math

import numpy as np
import pytest

from common.significance import holm, sign_flip_test, smallest_p
from common.statistics import corrected, headline, paired_interval, summarise
from tests.common.test_statistics import arms_with_gains, result


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),  # only + + + and - - - reach 6
        ([1.0, 2.0, -3.0], 1.0),  # the sum is 0
        ([3.0, 2.0, -1.0], 4 / 8),  # sums 6, 4, 2, 0: those of at least 4, either sign
        ([0.0, 0.0], 1.0),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 2 / 32),
        ([2.0], 1.0),
    ],
)
def test_sign_flips_by_hand(differences, p):
    test = sign_flip_test(differences)
    assert test.p == pytest.approx(p)
    assert test.exact
    assert sign_flip_test([-x for x in differences]).p == test.p
    assert sign_flip_test(differences[::-1]).p == test.p


def test_drawn_signs_agree_with_the_exact_test_within_their_error():
    differences = np.random.default_rng(5).normal(0.5, 1, 11)
    exact = sign_flip_test(differences)
    drawn = sign_flip_test(differences, exact_up_to=5, draws=40_000)
    assert 0.01 < exact.p < 0.9 and not drawn.exact
    assert abs(drawn.p - exact.p) < 4 * drawn.error
    assert drawn.error == pytest.approx(math.sqrt(drawn.p * (1 - drawn.p) / 40_000))
    assert drawn == sign_flip_test(differences, exact_up_to=5, draws=40_000)
    assert drawn != sign_flip_test(differences, exact_up_to=5, draws=40_000, seed=1)


def test_the_smallest_p():
    assert sign_flip_test([1.0] * 10).p == smallest_p(10) == 2 / 1024
    assert smallest_p(0) == smallest_p(1) == 1


@pytest.mark.parametrize("differences", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]]])
def test_sign_flips_refuse(differences):
    with pytest.raises(ValueError):
        sign_flip_test(differences)


def test_holm_by_hand():
    # 4 * 0.01, 3 * 0.02 = 0.06, 2 * 0.03 = 0.06, 1 * 0.04, which may not be below the one before
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([0.2]) == [0.2]


@pytest.mark.parametrize("count", [6, 10])
def test_without_an_effect_one_in_twenty_is_called_one(count):
    repeats, level = 4000, 0.05
    draws = np.random.default_rng(11).normal(size=(repeats, count))
    excluded = np.mean([paired_interval(row).excludes_zero for row in draws])
    rejected = np.mean([sign_flip_test(row).p <= level for row in draws])
    error = math.sqrt(level * (1 - level) / repeats)
    assert abs(excluded - level) < 3 * error
    # p takes steps of 2 / 2^n, so the rate is the largest step that is not above the level
    exact = math.floor(level * 2**count / 2) * 2 / 2**count
    assert abs(rejected - exact) < 3 * math.sqrt(exact * (1 - exact) / repeats)


def test_holm_keeps_false_claims_rare_over_the_family():
    repeats, arms = 1500, 6
    draws = np.random.default_rng(12).normal(size=(repeats, arms, 9))
    draws -= draws[:, :1]  # all arms share the control's noise
    false = np.mean([min(holm([sign_flip_test(d).p for d in row[1:]])) <= 0.05 for row in draws])
    assert false < 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)


def results_of(gains, seeds=8):
    """Build a control and one arm for each mean gain, noisy in a known way."""
    rows = [result("none", seed, [80.0, 70.0]) for seed in range(seeds)]
    for arm, gain in gains.items():
        for seed in range(seeds):
            value = gain + 0.01 * seed
            rows.append(result(arm, seed, [80 + value, 70 + value]))
    return rows


def test_a_summary_is_corrected_over_the_arms_of_each_target():
    rows = results_of({"best": 1.0, "random": -0.035})  # the latter: symmetric about zero
    summary = corrected(summarise(rows, ["a", "b"], "none", pairs=[("best", "random")]))
    best, random = (summary["gains"][arm]["mean"] for arm in ("best", "random"))
    assert best["p"] == 2 / 2**8 and best["p_holm"] == pytest.approx(2 * 2 / 2**8)
    assert best["shown"] and not random["shown"]
    assert random["p"] == random["p_holm"] == 1
    assert summary["peer_gains"]["best"]["a"]["shown"]
    pair = summary["pairs"][0]
    assert (pair["first"], pair["second"]) == ("best", "random")
    assert pair["effects"]["mean"]["mean"] == pytest.approx(1.035)
    assert pair["effects"]["mean"]["p_holm"] == pair["effects"]["mean"]["p"]  # alone
    sizes = {family["name"]: family["size"] for family in summary["families"]}
    assert sizes["arms against none, mean"] == 2 and sizes["direct comparisons, a"] == 1


def test_one_family_over_all_targets_is_stricter():
    rows = results_of({"best": 1.0, "random": 0.5})
    summary = corrected(summarise(rows, ["a", "b"], "none"), together=True)
    (family,) = summary["families"]
    assert family["size"] == 2 * (3 + 2)  # mean, strongest, weakest; a, b
    assert summary["gains"]["best"]["mean"]["p_holm"] == pytest.approx(10 * 2 / 2**8)
    # 10 * 2 / 2^n <= 0.05 from n = 9 on
    assert family["least_seeds"] == 9
    assert not summary["gains"]["best"]["mean"]["shown"]


def simulated(generator, gain=0.0, arms=3, seeds=8):
    """Draw what an experiment would find if ``first`` gained so much and no other arm anything."""
    rows = []
    for arm in ["none", "first", *(f"arm{k}" for k in range(arms - 1))]:
        for seed in range(seeds):
            a, b, ensemble = generator.normal(size=3) + gain * (arm == "first")
            rows.append({**result(arm, seed, [80 + a, 70 + b]), "ensemble_after": 85 + ensemble})
    return summarise(rows, ["a", "b"], "none")


def test_where_nothing_is_true_a_headline_is_as_rare_as_the_level():
    repeats, level, generator = 400, 0.05, np.random.default_rng(13)
    found = [corrected(simulated(generator)) for _ in range(repeats)]
    first = np.mean([bool(headline(summary)) for summary in found])
    assert 0 < first <= level + 3 * math.sqrt(level * (1 - level) / repeats)
    # what is not of the primary family is shown more often: it must stay out of the headline
    some = [
        any(e["shown"] for e in [*effects.values(), *summary["peer_gains"][arm].values()] if e)
        for summary in found
        for arm, effects in summary["gains"].items()
    ]
    assert np.mean(np.reshape(some, (repeats, -1)).any(1)) > 2 * level


def test_a_true_effect_makes_the_headline_and_no_other_arm_does():
    generator = np.random.default_rng(14)
    found = [headline(corrected(simulated(generator, gain=3.0))) for _ in range(20)]
    assert sum("first" in shown for shown in found) >= 18
    assert sum(len(shown) > 1 for shown in found) <= 4
    assert all(list(effects) == ["mean"] for shown in found for effects in shown.values())


def test_measures_that_do_not_count_and_direct_comparisons_make_no_headline():
    summary = summarise(results_of({"best": 1.0}), ["a", "b"], "none", pairs=[("best", "none")])
    assert list(headline(corrected(summary))) == ["best"]
    assert headline(corrected(summary, counts=False)) == {}
    whole = headline(corrected(summary, together=True))
    assert list(whole["best"]) == ["mean", "a", "b"]  # a is the strongest, b the weakest: once
    pair = corrected(summary)["pairs"][0]["effects"]["mean"]
    assert pair["shown"] and not pair["primary"]


def test_few_or_equal_seeds_show_nothing_after_correction_either():
    few = corrected(summarise(arms_with_gains([1.0, 1.1, 1.2, 1.3]), ["a", "b"], "none"))
    assert not few["gains"]["best"]["mean"]["shown"]
    equal = corrected(summarise(arms_with_gains([1.0] * 9), ["a", "b"], "none"))
    assert not equal["gains"]["best"]["mean"]["shown"]


def test_pairs_must_be_arms():
    with pytest.raises(ValueError, match="'other'"):
        summarise(arms_with_gains([1.0]), ["a", "b"], "none", pairs=[("best", "other")])


def test_a_small_p_whose_interval_holds_zero_shows_nothing():
    gains = [0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 10.0]  # all positive, one stands apart
    summary = corrected(summarise(arms_with_gains(gains), ["a", "b"], "none"))
    effect = summary["gains"]["best"]["mean"]
    assert effect["p_holm"] <= 0.05 and effect["low"] < 0
    assert not effect["shown"]
