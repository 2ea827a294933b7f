"""Predictions against finished runs: correlations that are known, controls, the models' test."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from common.rank_correlation import rank_correlation
from common.realised import FinishedRun, compare, realised_gains
from common.scouting import Judge
from common.survey import HeldLogits, survey
from tests.common.test_scouting import random_source


def test_rank_correlation_by_hand_and_by_scipy():
    # ranks 1 2 3 4 5 and 2 1 4 3 5: 1 - 6 * 4 / (5 * 24)
    found = rank_correlation([1, 2, 3, 4, 5], [20, 10, 40, 30, 50])
    assert found.rho == pytest.approx(0.8) and found.count == 5
    random = np.random.default_rng(0)
    x, y = random.normal(size=30), random.integers(5, size=30)
    y = y + x
    found, told = rank_correlation(x, y), stats.spearmanr(x, y)
    assert found.rho == pytest.approx(told.statistic)
    assert found.p == pytest.approx(told.pvalue, abs=0.01)
    assert found.low < found.rho < found.high
    assert rank_correlation(x, y) == found  # seeded


def test_permutation_p_of_four_is_exact():
    # of 24 orders, 1 has rho 1 and 1 has rho -1
    assert rank_correlation([1, 2, 3, 4], [1, 2, 3, 4]).p == pytest.approx(2 / 24, abs=0.01)


def test_chance_gives_small_p_as_rarely_as_it_says():
    random = np.random.default_rng(1)
    p = [rank_correlation(*random.normal(size=(2, 12)), seed=k).p for k in range(40)]
    assert 0 < np.mean(np.array(p) < 0.2) < 0.4


def test_order_inside_groups_is_not_fooled_by_the_groups():
    # each group the wrong way round, the groups' levels the right way
    x, y = [1, 2, 3, 11, 12, 13], [3, 2, 1, 13, 12, 11]
    groups = [0, 0, 0, 1, 1, 1]
    assert rank_correlation(x, y).rho > 0.5
    found = rank_correlation(x, y, within=groups)
    assert found.rho == pytest.approx(-1) and found.count == 6
    assert found.p == pytest.approx(2 / 36, abs=0.01)  # 1 of 36 orders, and its mirror image
    mixed = rank_correlation([1, 2, 3, 11, 12, 13], [1, 2, 3, 12, 11, 13], within=groups)
    assert mixed.rho == pytest.approx((2 + 1) / 4)
    assert math.isnan(rank_correlation([1, 1, 2, 2], [1, 2, 3, 4], within=[0, 0, 1, 1]).rho)


def test_what_cannot_be_correlated_is_not_a_number_or_refused():
    assert math.isnan(rank_correlation([1, 2, 3], [1, 2, 3]).rho)
    assert math.isnan(rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]).p)
    with pytest.raises(ValueError, match="3 predictions for 2 outcomes"):
        rank_correlation([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="finite"):
        rank_correlation([1, 2, math.nan, 3], [1, 2, 3, 4])


def judged(found):
    return lambda one: Judge(found, one.rule, one.score, one.margin)


def finished(members, after, rule="best", before=50.0, setting="s", lr=None, alike=(), **rest):
    count = len(members)
    trained = tuple({"lr": str(value)} for value in lr or (0.1,) * count)
    return FinishedRun(
        *("run", members, (before,) * count, tuple(after), rule, "loss", None, setting),
        trained=trained,
        alike=dict(alike),
        **rest,
    )


def test_gains_are_over_the_control_with_the_same_setting_which_may_have_more_models(caplog):
    control = finished((2, 0, 1), (52, 60, 70), "none")
    runs = [
        control,
        finished((1, 0), (73, 61)),
        finished((0, 2), (60, 51)),
        finished((0, 2), (62, 51)),
        finished((0, 1), (90, 90), setting="other"),  # no control: not comparable with the rest
    ]
    found = realised_gains(runs)
    assert [(one.members, one.gain, one.runs) for one in found] == [
        ((0, 1), (1.0, 3.0), 1),
        ((0, 2), (1.0, -1.0), 2),
    ]
    assert all(one.controlled for one in found)
    assert "1 of 4 runs with transfer are left out" in caplog.text
    assert realised_gains([finished((0, 1), (49, 53))])[0].gain == (-1.0, 3.0)
    assert not realised_gains([finished((0, 1), (49, 53))])[0].controlled
    assert realised_gains([finished((0, 1), (49, 53))], lower_is_better=True)[0].gain == (1, -3)
    with pytest.raises(ValueError, match="no run with transfer"):
        realised_gains([control])


def test_a_control_trains_each_model_as_the_run_does():
    control = finished((0, 0, 1), (51, 60, 70), "none", lr=(0.1, 0.2, 0.1))
    found = realised_gains([control, finished((1, 0), (73, 61), lr=(0.1, 0.2))])
    assert found[0].controlled and found[0].gain == (1.0, 3.0)
    assert not realised_gains([control, finished((1, 0), (73, 61), lr=(0.2, 0.2))])[0].controlled


def test_runs_of_one_team_in_unlike_ways_are_not_averaged():
    control = finished((0, 1), (60, 70), "none", alike={"temperature": "9"})
    cold, warm = {"temperature": "1", "teachers": "raw"}, {"temperature": "4", "teachers": "raw"}
    runs = [control, finished((0, 1), (61, 73), alike=cold), finished((1, 0), (73, 63), alike=warm)]
    with pytest.raises(ValueError, match=r"rule best, .* differ in temperature \(1 or 4\), and"):
        realised_gains(runs)
    assert realised_gains([*runs[:2], runs[1]])[0].runs == 2
    apart = [*runs[:2], finished((0, 1), (63, 73), "better", alike=warm)]  # another rule
    assert [one.rule for one in realised_gains(apart)] == ["best", "better"]
    # what has no control is left out, whatever its options
    left = finished((0, 1), (9, 9), setting="other", alike=warm)
    assert realised_gains([*runs[:2], left])[0].gain == (1.0, 3.0)


def test_runs_of_one_team_whose_models_are_trained_in_unlike_ways_are_not_averaged():
    runs = [finished((0, 1), (61, 73), lr=(1, 2)), finished((1, 0), (73, 61), lr=(2, 1))]
    assert realised_gains(runs)[0].runs == 2
    with pytest.raises(ValueError, match=r"differ in lr \(1/2 or 2/1\)"):
        realised_gains([*runs, finished((0, 1), (61, 73), lr=(2, 1))])


def test_gains_that_follow_a_prediction_are_found_to_do_so():
    source, labels = random_source(models=7, count=150)
    found = survey(source, labels)
    judge = Judge(found)
    runs = []
    for i in range(7):
        for j in range(i):
            team = judge.judge([j, i])
            runs.append(finished((i, j), [50 + 100 * x for x in team.predicted["flips"][::-1]]))
    own = found.correct.double().mean(dim=1).tolist()
    together = {(j, i): [0.5 - own[j], 0.5 - own[i]] for i in range(7) for j in range(i)}
    told = compare(realised_gains(runs), judged(found), together)
    flips = told["correlations"]["flips"]
    # equal but for rounding, which orders some ties
    assert flips["teams"]["rho"] > 0.99 and flips["members"]["rho"] > 0.99
    assert flips["teams"]["p"] < 0.01 and flips["members"]["p"] < 0.01
    assert flips["teams"]["count"] == 21 and flips["members"]["count"] == 42
    assert flips["partners"]["rho"] > 0.99 and flips["partners"]["p"] < 0.01
    assert math.isnan(told["correlations"]["error"]["partners"]["rho"])  # the same for all partners
    assert "ensemble" in told["correlations"] and not told["controlled"]
    assert told["others"] == [] and told["correlations"]["ensemble"]["teams"]["p"] < 1
    few = compare(realised_gains(runs[1:]), judged(found), together)
    assert [row["members"] for row in few["others"]] == [list(found.names[:2])]
    del together[0, 1]  # models cannot change places where a team's ensemble is not known
    few = compare(realised_gains(runs[1:]), judged(found), together)["correlations"]
    assert math.isnan(few["ensemble"]["teams"]["p"]) and few["flips"]["teams"]["p"] < 0.05


def test_one_strong_model_does_not_pass_for_many_pairs():
    """Every pair with model 0 gains, whatever its partner: the models' test is not impressed."""
    torch.manual_seed(0)
    source, labels = random_source(models=6, count=200, seed=3)
    logits = source.logits.clone()
    logits[0] += 6 * torch.nn.functional.one_hot(labels, 4)
    found = survey(HeldLogits(source.names, logits), labels)
    runs = [
        finished((j, i), (50 + 5 * (j == 0) + 0.01 * i,) * 2) for i in range(6) for j in range(i)
    ]
    realised = realised_gains(runs)
    told = compare(realised, judged(found))
    of_models = told["correlations"]["loss-gap"]["teams"]
    predicted = [np.mean(row["predicted"]["loss-gap"]) for row in told["runs"]]
    of_pairs = rank_correlation(predicted, [row["gain"] for row in told["runs"]])
    assert of_models["rho"] == of_pairs.rho
    assert of_pairs.p < of_models["p"]
    assert of_models["high"] - of_models["low"] > of_pairs.high - of_pairs.low


def test_models_that_matter_make_no_prediction_right():
    """Predictions and gains each depend on the models, but not on each other."""
    models, random = 8, np.random.default_rng(2)
    teams = [(i, j) for j in range(models) for i in range(j)]
    rows = [(i, j) for team in teams for i, j in (team, team[::-1])]
    each = {"models": rows, "within": [i for i, _ in rows], "relabellings": 99}
    excluded, small, naive = [], [], []
    for _ in range(60):
        effects = random.normal(size=(2, models)) + 0.5 * random.normal(size=(models, 2, models))
        x, y = ([effects[i, side, j] for i, j in rows] for side in (0, 1))

        def relabel(draw, effects=effects):
            other = draw.permutation(models)
            return [effects[other[i], 0, other[j]] for i, j in rows]

        found = rank_correlation(x, y, relabel=relabel, **each)
        excluded.append(found.low > 0 or found.high < 0)
        small.append(found.p < 0.1)
        naive.append(rank_correlation(x, y, within=each["within"]).p < 0.1)
    assert np.mean(excluded) < 0.2 and 0 < np.mean(small) < 0.2
    assert np.mean(naive) > 0.3  # as if outcomes were independent


def test_outcomes_that_share_models_which_cannot_change_places_have_no_p():
    models = [(0, 1), (0, 2), (1, 2), (2, 3)]
    found = rank_correlation([1, 2, 3, 4], [1, 2, 4, 3], models=models)
    assert found.rho == pytest.approx(0.8) and math.isnan(found.p)
    apart = [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert rank_correlation([1, 2, 3, 4], [1, 2, 4, 3], models=apart).p < 1
