"""Intervals by hand-computed value, and summaries of arms over seeds."""

import json
import math

import pytest

from common.statistics import interval_of, interval_rows, paired_interval, summarise


def result(arm, seed, after, before=(70.0, 60.0), **more):
    names = ("a", "b")[: len(after)]
    return {
        "arm": arm,
        "seed": seed,
        "before": dict(zip(names, before, strict=False)),
        "after": dict(zip(names, after, strict=True)),
        **more,
    }


def arms_with_gains(gains, control=(80.0, 70.0)):
    """Build a control and ``best``, whose peers both gain the given number in each seed."""
    results = [result("none", seed, control) for seed in range(len(gains))]
    for seed, gain in enumerate(gains):
        results.append(result("best", seed, [value + gain for value in control]))
    return results


def test_interval_by_hand():
    # mean 3, s.d. sqrt(2.5), standard error sqrt(0.5); t(0.975, 4) = 2.7764451
    interval = paired_interval([1, 2, 3, 4, 5])
    assert (interval.mean, interval.count) == (3, 5)
    assert interval.low == pytest.approx(3 - 2.7764451 * math.sqrt(0.5), abs=1e-6)
    assert interval.high == pytest.approx(3 + 2.7764451 * math.sqrt(0.5), abs=1e-6)
    assert interval.excludes_zero


def test_interval_of_two_at_another_level():
    # t(0.95, 1) = 6.3137515, standard error 1
    interval = paired_interval([0, 2], level=0.9)
    assert interval.low == pytest.approx(1 - 6.3137515, abs=1e-6)
    assert not interval.excludes_zero


def test_interval_mirrors_and_ignores_order():
    interval = paired_interval([0.1, 0.5, 0.3])
    mirrored = paired_interval([-0.3, -0.1, -0.5])
    assert mirrored.low == pytest.approx(-interval.high)
    assert mirrored.excludes_zero == interval.excludes_zero


def test_one_difference_has_no_interval():
    interval = paired_interval([2.5])
    assert interval.mean == 2.5
    assert math.isnan(interval.low) and math.isnan(interval.high)
    assert not interval.excludes_zero


def test_rows_of_an_epoch_get_the_interval_of_the_seeds_that_have_them():
    runs = [
        [{"iteration": 4, "a": value}, {"iteration": 2, "a": value + 10}] for value in range(1, 6)
    ]
    runs[0][0]["a"] = math.nan
    runs[1].append({"iteration": 6, "a": 3.0})
    first, second, third = interval_rows(runs, ["a", "b"])
    whole = paired_interval([11, 12, 13, 14, 15])
    told = {"mean": 13, "low": whole.low, "high": whole.high, "count": 5}
    assert first == {"iteration": 2, "a": told, "b": None}
    assert second["a"] == interval_of([2, 3, 4, 5]) and second["a"]["count"] == 4
    assert third["a"] == {"mean": 3.0, "low": None, "high": None, "count": 1}
    assert interval_rows([], ["a"]) == interval_rows([[]], ["a"]) == []
    assert interval_of([None, math.inf]) is None


@pytest.mark.parametrize("differences", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]]])
def test_interval_refuses(differences):
    with pytest.raises(ValueError):
        paired_interval(differences)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_level_is_checked(level):
    with pytest.raises(ValueError, match="level"):
        paired_interval([1, 2], level)


def test_gains_are_paired_by_seed():
    results = arms_with_gains([1, 2, 3, 4, 5])
    summary = summarise(results[::-1], ["a", "b"], "none")
    for what in ("mean", "strongest", "weakest"):
        gain = summary["gains"]["best"][what]
        assert gain["mean"] == pytest.approx(3)
        assert gain["low"] == pytest.approx(3 - 2.7764451 * math.sqrt(0.5), abs=1e-6)
        assert gain["shown"] is True
    assert summary["peer_gains"]["best"]["a"]["mean"] == pytest.approx(3)
    assert summary["arms"]["none"]["before"]["mean"] == {"mean": 65, "sd": 0}
    assert summary["arms"]["best"]["after"]["strongest"]["mean"] == pytest.approx(83)
    assert summary["arms"]["best"]["after"]["strongest"]["sd"] == pytest.approx(math.sqrt(2.5))
    assert summary["versus"]["none"]["mean"] == summary["gains"]["best"]["mean"]


def test_only_common_seeds_are_paired():
    results = [*arms_with_gains([1, 2, 3]), result("best", 7, [0.0, 0.0])]
    gain = summarise(results, ["a", "b"], "none")["gains"]["best"]["mean"]
    assert (gain["count"], gain["mean"]) == (3, pytest.approx(2))
    apart = [result("none", 0, [80, 70]), result("best", 1, [81, 71])]
    assert summarise(apart, ["a", "b"], "none")["gains"]["best"]["mean"] is None


def test_strongest_is_found_at_the_start_of_each_seed():
    results = [
        result("none", 0, [80, 70], before=[70, 60]),
        result("best", 0, [81, 75], before=[70, 60]),
        result("none", 1, [70, 80], before=[60, 70]),
        result("best", 1, [75, 81], before=[60, 70]),
    ]
    summary = summarise(results, ["a", "b"], "none")
    assert summary["strongest"] == {"0": "a", "1": "b"}
    assert summary["gains"]["best"]["strongest"]["mean"] == 1
    assert summary["gains"]["best"]["weakest"]["mean"] == 5


def test_lower_is_better_turns_gains_and_ranks():
    results = arms_with_gains([-1, -2, -3, -4, -5])
    summary = summarise(results, ["a", "b"], "none", lower_is_better=True)
    assert summary["gains"]["best"]["mean"]["mean"] == pytest.approx(3)
    assert summary["strongest"]["0"] == "b"


def test_shown_needs_seeds_that_are_enough_and_differ():
    def shown(gains):
        return summarise(arms_with_gains(gains), ["a", "b"], "none")["gains"]["best"]["mean"]

    assert shown([3.0, 3.1, 3.2, 3.1, 3.0])["shown"]
    assert not shown([3.0, 3.1, 3.2, 3.1])["shown"]
    assert not shown([3.0] * 6)["shown"]
    assert not shown([-3.0, 3.1, 3.2, -3.1, 0.1])["shown"]
    assert shown([3.0])["low"] is None


def test_permuting_peers_changes_nothing():
    results = arms_with_gains([1, 2, 4])
    one, other = (summarise(results, names, "none") for names in (["a", "b"], ["b", "a"]))
    assert one["gains"] == other["gains"]
    assert one["arms"]["best"]["peers"] == other["arms"]["best"]["peers"]


def test_ensemble_flips_and_lessons():
    rows = [{"epoch": 1, "a/teaches": 0.2}, {"epoch": 2, "a/teaches": 0.4, "x": math.nan}]
    more = {"ensemble_before": 75.0, "oracle_before": 85.0, "oracle_after": 95.0}
    results = [
        result("none", 0, [80, 70], ensemble_after=82.0, **more),
        result("best", 0, [80, 70], ensemble_after=83.0, fixed={"a": 3}, lessons=rows, **more),
        result("none", 1, [80, 70], ensemble_after=82.0, **more),
        result("best", 1, [80, 70], ensemble_after=85.0, fixed={"a": 4}, lessons=rows[:1], **more),
    ]
    summary = summarise(results, ["a", "b"], "none")
    best = summary["arms"]["best"]
    assert summary["gains"]["best"]["ensemble"]["mean"] == 2
    assert best["after"]["oracle"]["mean"] == 95
    assert best["peers"]["a"]["fixed"] == 3.5
    assert best["peers"]["b"]["fixed"] is None and best["peers"]["a"]["broken"] is None
    assert best["lessons"] == [
        {"epoch": 1, "a/teaches": 0.2},
        {"epoch": 2, "a/teaches": 0.4, "x": None},
    ]
    assert summary["arms"]["none"]["lessons"] == []


def test_summary_is_strict_json():
    summary = summarise(arms_with_gains([1.0]), ["a", "b"], "none")
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_one_peer_is_its_own_mean():
    results = [result(arm, seed, [80 + seed]) for arm in ("none", "best") for seed in (0, 1)]
    assert summarise(results, ["a"], "none")["targets"] == ["mean"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.clear(), "nothing to compare"),
        (lambda r: r.append(r[0]), "two results"),
        (lambda r: r[0]["after"].pop("a"), "peer 'a'"),
        (lambda r: r[0]["after"].update(a=math.nan), "peer 'a' is nan"),
    ],
)
def test_summary_refuses(change, message):
    results = arms_with_gains([1, 2])
    change(results)
    with pytest.raises(ValueError, match=message):
        summarise(results, ["a", "b"], "none")


def test_summary_lists_the_arms():
    with pytest.raises(ValueError, match="'other'; there are: none, best"):
        summarise(arms_with_gains([1]), ["a", "b"], "other")
    with pytest.raises(ValueError, match="'missing'"):
        summarise(arms_with_gains([1]), ["a", "b"], "none", arms=["none", "missing"])
