"""Scouting: tables by hand, naive loops over samples, invariances, the search for teams."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common import survey as surveys
from common.options import OptionError
from common.report.scouting import scout_lead, write_scout_report
from common.roles import assign_roles
from common.scout_outcome import (
    describe_outcome,
    describe_ranking,
    teams_by_size,
    teams_to_train,
)
from common.scouting import (
    PREDICTORS,
    Judge,
    check_request,
    default_predictor,
    rank_teams,
    without_repeats,
)
from common.survey import (
    HeldLogits,
    describe_models,
    describe_pairs,
    ensemble_accuracy,
    fit_temperatures,
    survey,
)
from tests.common.test_report import Page


def logits_of(*probabilities):
    return torch.tensor(probabilities).log()


# two models, four samples, three classes; a is right on samples 0, 1; b on 0, 2
A = logits_of([0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.4, 0.5, 0.1])
B = logits_of([0.5, 0.4, 0.1], [0.6, 0.1, 0.3], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1])
LABELS = torch.tensor([0, 1, 2, 2])


def by_hand(**more):
    return survey(HeldLogits(["a", "b"], torch.stack([A, B])), LABELS, **more)


def random_source(models=5, count=60, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = 2 * torch.randn(models, count, classes, generator=generator)
    logits += 2 * F.one_hot(labels, classes) * torch.rand(models, 1, 1, generator=generator)
    return HeldLogits([f"m{i}" for i in range(models)], logits), labels


def test_pairs_by_hand():
    pairs = describe_pairs(by_hand())
    assert pairs.agreement.tolist() == [[1, 0.25], [0.25, 1]]
    assert pairs.flips.tolist() == [[0, 0.25], [0.25, 0]]
    assert pairs.oracle.tolist() == [[0.5, 0.75], [0.75, 0.5]]
    # sums: [1.2 ..], [.7 .7 .6] -> class 0 first, wrong; [.6 .3 1.1] right; [1.0 ..] wrong
    assert pairs.ensemble.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    kl = (A.exp() * (A - B)).sum(dim=1).mean().item()
    assert pairs.kl[0, 1].item() == pytest.approx(kl, abs=1e-6)


def test_team_by_hand_under_the_papers_rule():
    team = Judge(by_hand()).judge([0, 1])
    # true-class probabilities: a .7 .6 .3 .1, b .5 .1 .8 .1 -> a teaches 0 and 1, b 2, nobody 3
    assert team.teaches == pytest.approx([0.5, 0.25])
    assert team.taught == pytest.approx([0.25, 0.5])
    assert team.accuracy == [0.5, 0.5] and team.oracle == 0.75 and team.agreement == 0.25
    assert team.predicted["flips"] == pytest.approx([0.25, 0.25])
    assert team.predicted["complementarity"] == pytest.approx([0.25, 0.25])
    gap = [math.log(0.8 / 0.3) / 4, (math.log(0.7 / 0.5) + math.log(0.6 / 0.1)) / 4]
    assert team.predicted["loss-gap"] == pytest.approx(gap, abs=1e-6)
    kl_ab = (A.exp() * (A - B)).sum(dim=1)
    kl_ba = (B.exp() * (B - A)).sum(dim=1)
    taught = [kl_ba[2].item() / 4, (kl_ab[0] + kl_ab[1]).item() / 4]
    assert team.kl == pytest.approx(taught, abs=1e-6)
    assert team.predicted["right-kl"] == pytest.approx(taught, abs=1e-6)
    assert team.predicted["disagreement"] == pytest.approx([0.25, 0.25])
    assert team.predicted["error"] == team.predicted["strength"] == [0.5, 0.5]


def naive(source, labels, members, rule):
    """Every predictor that needs labels, by loops over samples and pairs."""
    logits = torch.stack([source.read(i, 0, source.count).double() for i in members])
    log_p = logits.log_softmax(dim=2)
    k, n = len(members), source.count
    score = torch.stack([log_p[i, torch.arange(n), labels] for i in range(k)])
    if rule == "random":
        roles = (assign_roles(score, "mutual") > 0).double() / k
    else:
        roles = assign_roles(score, rule)
    found = {name: [0.0] * k for name in ("flips", "right-kl", "loss-gap", "kl", "disagreement")}
    for b, t, s in itertools.product(range(n), range(k), range(k)):
        if t == s:
            continue
        weight = roles[t, s, b].item() / n
        says = [int(log_p[i, b].argmax()) for i in (t, s)]
        right = [int(said == labels[b]) for said in says]
        kl = (log_p[t, b].exp() * (log_p[t, b] - log_p[s, b])).sum().item()
        found["flips"][s] += weight * (right[0] - right[1])
        found["right-kl"][s] += weight * right[0] * kl
        found["kl"][s] += weight * kl
        found["loss-gap"][s] += weight * (score[t, b] - score[s, b]).item()
        found["disagreement"][s] += weight * (says[0] != says[1])
    return found


@pytest.mark.parametrize("rule", ["best", "better", "better_sum", "mutual", "random"])
@pytest.mark.parametrize("members", [(0, 3), (1, 2, 4), (4, 0, 2, 1)], ids=len)
def test_teams_equal_a_naive_loop(rule, members):
    source, labels = random_source()
    team = Judge(survey(source, labels), rule).judge(members)
    for name, expected in naive(source, labels, members, rule).items():
        assert team.predicted[name] == pytest.approx(expected, abs=1e-5), name


def test_stretches_change_nothing(monkeypatch):
    source, labels = random_source()
    whole = survey(source, labels)
    teams = [(0, 1), (0, 1, 2, 3)]
    accuracy = ensemble_accuracy(source, labels, teams)
    monkeypatch.setattr(surveys, "_STRETCH", 7 * 5 * 4)
    pieces = survey(source, labels)
    for name in ("prediction", "confidence", "kl", "correct", "log_true", "pair_accuracy"):
        assert torch.allclose(getattr(whole, name), getattr(pieces, name), atol=1e-6), name
    assert pieces.temperature.tolist() == pytest.approx(whole.temperature.tolist(), rel=1e-3)
    assert ensemble_accuracy(source, labels, teams) == accuracy
    assert accuracy[0] == pytest.approx(whole.pair_accuracy[0, 1].item())


def test_permuting_models_permutes_results():
    source, labels = random_source()
    order = [3, 0, 4, 1, 2]
    turned = HeldLogits([source.names[i] for i in order], source.logits[order])
    one, two = survey(source, labels), survey(turned, labels)
    flips = describe_pairs(one).flips
    assert torch.equal(flips[order][:, order], describe_pairs(two).flips)
    first, second = (rank_teams(Judge(s), [2, 3], "flips") for s in (one, two))
    named = [
        [([s.names[i] for i in team.members], team.gain("flips")) for team in ranking.teams]
        for s, ranking in ((one, first), (two, second))
    ]
    worth = [{frozenset(names): gain for names, gain in teams} for teams in named]
    assert worth[0].keys() == worth[1].keys() and len(worth[0]) == 20
    assert all(worth[1][key] == pytest.approx(value) for key, value in worth[0].items())


def test_agreeing_models_promise_nothing():
    logits = random_source(models=1)[0].logits.expand(3, -1, -1)
    labels = random_source(models=1)[1]
    team = Judge(survey(HeldLogits(["a", "b", "c"], logits), labels)).judge([0, 1, 2])
    assert team.taught == [0, 0, 0] and team.agreement == 1
    assert team.predicted.pop("error") == [1 - accuracy for accuracy in team.accuracy]
    assert team.predicted.pop("strength") == pytest.approx(team.accuracy)
    for name, values in team.predicted.items():
        assert values == pytest.approx([0, 0, 0], abs=1e-6), name


def test_partners_that_are_as_good_tie():
    """To the last digit, or ranks of pairs would be those of rounding."""
    judge = Judge(survey(*random_source()))
    for pair in itertools.combinations(range(5), 2):
        team = judge.judge(pair)
        assert team.predicted["strength"] == team.accuracy[::-1]


def test_flips_of_rules_that_do_not_choose_add_up_to_nothing():
    found = survey(*random_source())
    for rule in ("mutual", "random"):
        assert Judge(found, rule).judge([0, 2, 3]).gain("flips") == pytest.approx(0, abs=1e-9)
        assert default_predictor(found, rule) == "complementarity"
    assert default_predictor(found, "best") == "flips"


def test_one_way_keeps_to_teams_with_the_teacher():
    found = survey(*random_source())
    ranking = rank_teams(Judge(found, "one_way:m2"), [2, 3], "flips")
    assert ranking.possible == ranking.judged == 4 + 6
    assert rank_teams(Judge(found, "one_way:m2"), [2, 3], "flips", student=0).possible == 1 + 3
    assert len(ranking.teams) == 4 + 6 and all(2 in team.members for team in ranking.teams)
    assert all(
        team.taught[team.members.index(2)] == 0 and max(team.taught) == 1 for team in ranking.teams
    )


def test_ranking_for_one_model():
    found = survey(*random_source())
    ranking = rank_teams(Judge(found), [2], "flips", student=1)
    gains = [team.gain("flips", 1) for team in ranking.teams]
    assert len(gains) == 4 and gains == sorted(gains, reverse=True)
    flips = describe_pairs(found).flips[:, 1]
    assert ranking.possible == 4
    best = ranking.teams[0]
    other = next(i for i in best.members if i != 1)
    assert other == int(flips.argmax())


def test_search_for_large_teams_grows_the_best_small_ones():
    found = survey(*random_source(models=7))
    judge = Judge(found)
    everything = rank_teams(judge, [2, 3, 4], "complementarity")
    searched = rank_teams(judge, [2, 3, 4], "complementarity", most=20)
    assert everything.judged == everything.possible == 21 + 35 + 35
    assert searched.possible == everything.possible and searched.judged == 21 + 20 + 20
    only = rank_teams(judge, [4], "complementarity", most=20)
    assert only.judged == 20 and all(len(team.members) == 4 for team in only.teams)
    assert only.teams[0].gain("complementarity") == pytest.approx(
        rank_teams(judge, [4], "complementarity").teams[0].gain("complementarity"), rel=0.1
    )


def test_sizes_are_ranked_shown_and_trained_apart(tmp_path):
    found = survey(*random_source(models=4))
    ranking = rank_teams(Judge(found), [2, 3, 4], "flips")
    best = {size: [t for t in ranking.teams if len(t.members) == size] for size in (2, 3, 4)}
    assert ranking.teams == [*best[2], *best[3], *best[4]] and len(best[3]) == 4
    for teams in best.values():
        gains = [team.gain("flips") for team in teams]
        assert gains == sorted(gains, reverse=True)
    assert ranking.best(2) == [*best[2][:2], *best[3][:2], *best[4]]
    outcome = describe_outcome(Judge(found), ranking, "flips", None, 2)
    members = [[f"m{i}" for i in team.members] for team in ranking.best(2)]
    assert [row["members"] for row in outcome["calibration"]] == members
    assert [[t["members"] for t in g] for g in teams_by_size(outcome, 2)] == [
        *(members[:2], members[2:4], members[4:])
    ]
    # first the best of each size
    trained = [team["members"] for team in teams_to_train(outcome, 4)]
    assert trained == [members[0], members[2], members[4], members[1]]
    assert [t["members"] for t in teams_to_train(outcome, 1)] == trained[:3]
    outcome |= {"commands": [], "settings": {}, "chosen_on_test": False}
    page = Page(write_scout_report(tmp_path / "r.html", outcome, 2))
    assert "Of the teams of 3 the most is predicted" in page.text
    assert "Sizes are ranked apart" in page.text
    for group in teams_by_size(outcome, 2):
        rows = page.rows(f"The best teams of {len(group[0]['members'])};")
        assert [row[2] for row in rows[1:]] == [f"{team['value']:.4f}" for team in group]


def test_teams_that_do_not_fit_are_left_out_and_counted():
    found = survey(*random_source())
    ranking = rank_teams(Judge(found), [2], "flips", fits=lambda team: 0 not in team.members)
    assert len(ranking.teams) == 6 and ranking.too_large == 4 and ranking.judged == 10
    assert ranking.least is None


def test_what_is_too_large_for_the_budget_is_told_with_the_way_out():
    def fits(team):
        team.memory = 2**20 * 85 * sum(team.members)  # the smallest pair: models 0 and 1
        return False

    judge = Judge(survey(*random_source()))
    ranking = rank_teams(judge, [2], "flips", fits=fits)
    assert ranking.least == 85 * 2**20
    outcome = describe_ranking(judge, ranking, "flips", None)
    outcome["settings"] = {"budget_gpu_mem": 50 * 2**20}
    told = scout_lead(outcome)
    assert "No team fits. 10 teams left out: too large for --budget-gpu-mem 50.0 M." in told
    assert "The smallest takes 100.0 M, the free share counted in" in told


def test_facts_of_models_are_measured_where_the_temperature_was_not_fitted():
    generator = torch.Generator().manual_seed(1)
    logits = 6 * torch.randn(1, 4000, 5, generator=generator)
    labels = torch.distributions.Categorical(logits=logits[0] / 3)
    torch.manual_seed(0)
    found = survey(HeldLogits(["bold"], logits), labels.sample(), seed=3)
    fact = describe_models(found)[0]
    assert found.fitted.sum() == 2000
    assert fact.temperature == pytest.approx(3, rel=0.1)
    assert fact.ece_calibrated < 0.04 < 0.1 < fact.ece


def test_confidences_are_calibrated_before_they_are_compared():
    # "loud" says 0.99 and is right half the time; "calm" says 0.7 and is right 7 times of 10
    torch.manual_seed(0)
    n = 2000
    labels = torch.zeros(n, dtype=torch.long)
    loud = torch.where(torch.rand(n, 1) < 0.5, 1.0, -1.0) * torch.tensor([[2.3, -2.3]])
    calm = torch.where(torch.rand(n, 1) < 0.7, 1.0, -1.0) * torch.tensor([[0.42, -0.42]])
    found = survey(HeldLogits(["loud", "calm"], torch.stack([loud, calm])), labels)
    raw = Judge(found, "best", "raw confidence").judge([0, 1])
    calibrated = Judge(found, "best", "confidence").judge([0, 1])
    assert raw.teaches == [1, 0] and calibrated.teaches == [0, 1]
    assert calibrated.gain("flips", 0) > 0.1 > -0.1 > raw.gain("flips", 1)


def test_without_labels_only_what_needs_none_is_told():
    source, labels = random_source()
    blind = survey(source)
    pairs = describe_pairs(blind)
    assert pairs.flips is pairs.oracle is pairs.ensemble is None
    assert torch.equal(pairs.agreement, describe_pairs(survey(source, labels)).agreement)
    assert describe_models(blind)[0].accuracy is None
    assert Judge(blind, "mutual").usable == ["kl", "disagreement"]
    with pytest.raises(ValueError, match="needs labels"):
        Judge(blind, "best", "loss")
    with pytest.raises(ValueError, match="needs temperatures"):
        Judge(blind, "best", "confidence")
    assert len(rank_teams(Judge(blind, "mutual"), [2], "disagreement").teams) == 10
    told = survey(source, calibration=torch.ones(5))
    assert torch.equal(told.calibrated, told.confidence) and told.fitted is None
    assert default_predictor(told, "best") == "confidence-gap"
    assert Judge(told, "best", "confidence").judge([0, 1]).predicted["confidence-gap"][0] >= 0


def test_what_does_not_fit_is_refused_by_name():
    source, labels = random_source()
    with pytest.raises(ValueError, match="labels for 60 samples"):
        survey(source, labels[:59])
    with pytest.raises(ValueError, match="the models tell 4 classes"):
        survey(source, labels + 1)
    with pytest.raises(ValueError, match="different names"):
        HeldLogits(["a", "a"], torch.zeros(2, 3, 4))
    found = survey(source, labels)
    with pytest.raises(ValueError, match="unknown rule"):
        Judge(found, "strongest")
    with pytest.raises(ValueError, match="--team-size 6: there are 5 models"):
        rank_teams(Judge(found), [6], "flips")
    with pytest.raises(ValueError, match="choose from"):
        rank_teams(Judge(found), [2], "luck")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"sizes": [2, 4]}, "--team-size 4: there are 3 models .* or a size of 2 to 3"),
        ({"rule": "one_way:d"}, "no peer is named 'd'"),
        ({"predictor": "flips", "labelled": False}, "'flips' cannot be used; choose from kl, con"),
        (
            {"predictor": "confidence-gap", "labelled": False, "calibrated": False},
            "'confidence-gap' cannot be used; choose from kl, disagreement",
        ),
    ],
)
def test_what_no_answer_can_mend_is_refused_before(asked, told):
    given = {"names": ["a", "b", "c"], "sizes": [2, 3], "rule": "best", "predictor": None}
    check_request(**given)
    check_request(**{**given, "predictor": "flips"})
    with pytest.raises(OptionError, match=told):
        check_request(**{**given, **asked})


def test_a_model_that_is_asked_for_twice_is_scouted_once(caplog):
    caplog.set_level("INFO")
    models = [SimpleNamespace(identity=x) for x in "xyxy"]
    assert without_repeats(models, "abcd") == models[:2]
    assert "c is a; scouted once" in caplog.text and "d is b; scouted once" in caplog.text
    with pytest.raises(OptionError, match="all models are the same one"):
        without_repeats(models[::2], "ac")


def test_every_predictor_says_what_it_rests_on():
    assert all(len(predictor.why) > 20 for predictor in PREDICTORS.values())


def test_a_group_has_one_teacher_by_its_mean_score():
    source, labels = random_source(models=3)
    found = survey(source, labels)
    groups = torch.arange(60) // 20
    view = Judge(found, "best", groups=groups).view([0, 2])
    for group in range(3):
        here = groups == group
        score = found.log_true[[0, 2]][:, here].double().mean(dim=1)
        teacher = int(score.argmax())
        assert bool((view.roles[teacher, 1 - teacher, here] == 1).all())
        assert bool((view.roles[1 - teacher, teacher, here] == 0).all())
    alone = Judge(found, "best", groups=torch.arange(60)).judge([0, 2])
    assert alone.taught == Judge(found, "best").judge([0, 2]).taught


def test_temperatures_are_fitted_on_the_samples_asked_for():
    source, labels = random_source()
    half = torch.arange(60) < 30
    found = survey(source, labels, fit_on=half)
    assert torch.equal(found.fitted, half)
    assert torch.equal(found.temperature, fit_temperatures(source, labels, half))
