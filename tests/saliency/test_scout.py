"""Scouting saliency models: scores by frame and small maps that are kept, wins, teams, commands."""

import csv
import json
import math
import re
import shlex

import pytest
import torch
import yaml

import saliency.scout
from common.checkpoint import save_weights
from common.distributed import World
from common.options import OptionError
from common.planner import engine_costs
from saliency import scouting
from saliency.errors import DataError
from saliency.evaluate import evaluate
from saliency.held_out import split_held_out
from saliency.layouts import open_dataset
from saliency.options import parse
from saliency.plan import measure_team
from saliency.scout import add_scout_options, main, scout
from saliency.scouting import oracles, reduced, wins
from saliency.train import run
from tests.saliency.folders import write_dataset
from tests.saliency.toy import Deep, Flat
from tests.summaries import start_otherwise

TOY = "tests.saliency.toy"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("dhf1k")
    videos = {"annotation/0001": 4, "annotation/0002": 4, "val/0601": 7, "val/0602": 6}
    return write_dataset(root, videos, fixations="png")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    asked = []
    for seed, (name, kind) in enumerate({"a": Deep, "b": Flat, "c": Flat}.items()):
        torch.manual_seed(seed)
        save_weights(folder / f"{name}.pth", kind().state_dict())
        asked += [
            "--model",
            f"{TOY}:{kind.__name__},name={name},checkpoint={folder / f'{name}.pth'}",
        ]
    return asked


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the check of the data is kept


def arguments(data, models, folder, *rest):
    return [
        *("--data-root", str(data), *models, "--workers", "0", "--device", "cpu"),
        *("--val-stride", "2", "--kept-size", "9", "16", "--cache", str(folder / "cache")),
        *("--output", str(folder / "out"), *map(str, rest)),
    ]


@pytest.fixture(scope="module")
def scouted(data, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scout")
    return folder, scout(arguments(data, models, folder, "--team-size", "2..3"), bars=False)


def test_wins_by_hand():
    nan = math.nan
    values = torch.tensor([[0.1, 0.5, 0.3, nan], [0.2, 0.4, 0.3, 0.9]])
    assert wins(values).tolist() == [[0, pytest.approx(1 / 3)], [pytest.approx(1 / 3), 0]]
    lower = wins(values, lower_is_better=True)
    assert torch.equal(lower, wins(values).T)


def test_the_oracle_takes_the_better_one_on_every_frame():
    values = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.4, 0.6]])
    expected = torch.tensor([[0.3, 1.3 / 3], [1.3 / 3, 0.4]]).double()
    torch.testing.assert_close(oracles(values), expected, atol=1e-6, rtol=0)


def test_reduced_maps_keep_their_mean():
    maps = torch.rand(2, 36, 64)
    small = reduced(maps, (9, 16))
    assert small.shape == (2, 144)
    torch.testing.assert_close(small.mean(1), maps.mean((1, 2)))


def test_scores_are_those_of_evaluate(data, models, scouted, tmp_path):
    _, outcome = scouted
    peers = ["--peer" if word == "--model" else word for word in models]
    rest = ["--val-stride", "2", "--workers", "0", "--device", "cpu", "--output", str(tmp_path)]
    scores = evaluate(["--data-root", str(data), *peers, *rest], bars=False)
    for fact in outcome["models"]:
        for metric in ("cc", "kldiv", "nss", "auc_judd", "similarity"):
            assert fact[metric] == pytest.approx(scores[fact["name"]].mean[metric], abs=1e-6)
    assert outcome["samples"] == scores["a"].frames == 7


def test_teams_pairs_and_tables(scouted):
    folder, outcome = scouted
    assert outcome["judged"] == 4 and len(outcome["teams"]) == 4
    won = torch.tensor(outcome["pairs"]["wins"])
    assert won.diagonal().tolist() == [0, 0, 0] and float((won + won.T).max()) <= 1
    best = max(fact["cc"] for fact in outcome["models"])
    whole = next(team for team in outcome["teams"] if len(team["members"]) == 3)
    assert whole["oracle"] >= best - 1e-6 and whole["ensemble"] is not None
    assert sum(fact["best_on"] for fact in outcome["models"]) == pytest.approx(1)
    # under the paper's rule two of three are taught on every frame
    assert sum(whole["taught"].values()) == pytest.approx(2)
    for team in outcome["teams"]:
        if len(team["members"]) == 2:
            i, j = (outcome["names"].index(name) for name in team["members"])
            assert outcome["pairs"]["oracle"][i][j] == pytest.approx(team["oracle"], abs=1e-6)
    overlap = outcome["pairs"]["overlap"]
    assert overlap[0][0] == pytest.approx(1, abs=1e-3) and overlap[0][1] == overlap[1][0] < 1
    rows = list(csv.DictReader((folder / "out/pairs.csv").open()))
    tables = {"wins", "oracle", "wins_kldiv", "wins_nss", "overlap", "kl"}
    assert len(rows) == 6 and tables <= set(rows[0])
    assert json.loads((folder / "out/scout.json").read_text())["metric"] == "cc"
    page = (folder / "out/report.html").read_text()
    assert "on which training then measures them" in page and outcome["chosen_on_test"]
    assert "A prediction, not a result" in page and "predicts better than the column" in page
    assert "Mean cc against complementarity of 3 pairs" in page and "Numbered: the best" in page
    assert "Its strongest member has cc" in page and "share of frames on which each" in page
    assert {"Overlap", "cc, reduced"} <= set(re.findall("<th[^>]*>([^<]+)</th>", page))


def test_gain_taught_is_the_rise_if_students_predicted_as_their_teachers(scouted):
    _, outcome = scouted
    pair = next(team for team in outcome["teams"] if team["members"] == ["b", "c"])
    # roles follow KL less CC, the gain is told in CC: it lies between none and the oracle's
    gains = pair["predicted"]["complementarity"]
    for name in "bc":
        assert pair["predicted"]["gain-taught"][name] <= gains[name] + 1e-6
        assert pair["oracle"] - pair["accuracy"][name] == pytest.approx(gains[name], abs=1e-6)


def test_the_printed_command_trains(data, scouted, tmp_path):
    _, outcome = scouted
    words = outcome["commands"][0].split()
    assert words[:2] == ["python", "saliency/train.py"]
    asked = [*words[2:], "--epochs", "1", "-b", "2", "--workers", "0", "--device", "cpu"]
    trainer = run(None, "train", [*asked, "--output", str(tmp_path)], bars=False)
    assert list(trainer.peers.names) == outcome["teams"][0]["members"]


def test_models_run_once_and_a_further_one_costs_only_its_own_pass(
    data, models, scouted, tmp_path, monkeypatch
):
    folder, outcome = scouted
    ran, answer = [], scouting._answer

    def count(candidate, *rest):
        ran.append(candidate.spec.name)
        answer(candidate, *rest)

    monkeypatch.setattr(scouting, "_answer", count)
    again = scout(arguments(data, models, folder, "--output", tmp_path / "x"), bars=False)
    assert ran == [] and again["models"] == outcome["models"]
    more = [*models, "--model", f"{TOY}:Flat,name=d,kwargs.width=3"]
    torch.manual_seed(7)
    rest = ("--output", tmp_path / "y", "--for", "d")
    told = scout(arguments(data, more, folder, *rest), bars=False)
    assert ran == ["d"] and told["judged"] == 3
    assert all("d" in team["members"] for team in told["teams"])
    values = [team["predicted"]["gain-taught"]["d"] for team in told["teams"]]
    assert values == sorted(values, reverse=True)


def test_chunks_join_to_the_same_answers(data, models, scouted, tmp_path, monkeypatch):
    monkeypatch.setattr("common.logit_cache.CHUNK", 3)
    parts = scout(arguments(data, models, tmp_path), bars=False)
    for mine, whole in zip(parts["models"], scouted[1]["models"], strict=True):
        assert {**mine, "cc_reduced": 0} == {**whole, "cc_reduced": 0}
        assert mine["cc_reduced"] == pytest.approx(whole["cc_reduced"], abs=1e-5)
    assert len(list(tmp_path.glob("cache/*/chunk-*"))) == 3 * 3


@pytest.fixture
def no_report(monkeypatch):
    """Draw nothing: that takes longest."""
    monkeypatch.setattr("saliency.scout.write_scout_report", lambda path, *rest, **parts: path)


def costs_of(found):
    return {tuple(team["members"]): team["memory"] for team in found["teams"]}


def test_teams_that_do_not_fit_a_gpu_are_left_out(data, models, scouted, no_report):
    def told(*rest):
        return scout(arguments(data, models, scouted[0], *rest), bars=False)

    free = told("--costs")
    need = costs_of(free)
    assert len(need) == 3 and all(team["engine"] == "joint" for team in free["teams"])
    assert all(team["step_seconds"] > 0 for team in free["teams"])
    least = min(need.values()) // 0.85 // 1024 + 1
    found = told("--budget-gpu-mem", f"{least:.0f}K")
    for team in found["teams"]:
        alone = need[tuple(team["members"])] == min(need.values())
        assert team["engine"] == ("joint" if alone else "two-pass")
    assert found["teams"] and len(found["teams"]) + found["too_large"] == found["judged"] == 3
    first = found["teams"][0]["engine"]
    assert ("--engine two-pass" in found["commands"][0]) == (first == "two-pass")
    none = told("--budget-gpu-mem", "1K")
    assert none["teams"] == [] and none["too_large"] == 3 and none["commands"] == []
    given = arguments(data, models, scouted[0], "--budget-gpu-mem", "1K")
    assert main(given) == 1 and main(given[:-2]) == 0


@pytest.mark.parametrize("rest", [(), ("--model-ema", "--teachers", "ema", "--opt", "sgd")])
def test_costs_are_those_of_the_plan(data, models, scouted, no_report, rest):
    given = arguments(data, models, scouted[0], "-b", 3, *rest)
    needs = costs_of(scout([*given, "--costs"], bars=False))
    options, specs = parse(None, "scout", given, add_scout_options)
    for pair in ("ab", "bc"):  # beside a, b has larger maps
        team = [spec for spec in specs if spec.name in pair]
        plan = measure_team(options, team, World(0, 1, 0, torch.device("cpu")), None)
        assert needs[tuple(pair)] == engine_costs(plan)["joint"].peak
        assert all(peer.copy > 0 for peer in plan.peers) == bool(rest)


def test_models_of_a_yaml_file_are_trained_from_one(data, models, scouted, tmp_path, no_report):
    file = tmp_path / "peers.yaml"
    entries = [model.split(",") for model in models[1::2]]
    content = [dict(model=m, **dict(pair.split("=") for pair in pairs)) for m, *pairs in entries]
    file.write_text(yaml.safe_dump({"peers": content, "rule": "better"}))
    given = [*arguments(data, [], scouted[0]), "-c", str(file), "--clip-grad", "2"]
    words = shlex.split(scout(given, bars=False)["commands"][0])
    options, specs = parse(None, "train", words[2:])
    assert len(specs) == 2 and {spec.name for spec in specs} < {"a", "b", "c"}
    assert options.rule == "better" and options.clip_grad == 2 and options.val_stride == 2


def test_the_held_out_part_is_scouted(data, models, scouted, no_report):
    given = arguments(data, models, scouted[0], "--held-out", "0.5", "--seed", 3)
    found = scout(given, bars=False)
    part = split_held_out(open_dataset("dhf1k", data, "train"), 0.5, 3)[1]
    assert found["samples"] == len(part.videos) * 2 and "--held-out 0.5" in found["commands"][0]
    assert not found["chosen_on_test"]


def test_predictions_are_compared_with_finished_runs(data, models, tmp_path, monkeypatch):
    monkeypatch.setattr("saliency.train.finish", lambda trainer, *rest: trainer.folder)
    asked = {entry.split("name=")[1][0]: entry for entry in models[1::2]}
    fixed = "--epochs 1 -b 2 --workers 0 --device cpu --lr 1e-2 --val-stride 2".split()

    def train(team, rule, *more):
        peers = [f"{asked[name]}".replace("name=", "name=x") for name in team]
        words = [word for peer in peers for word in ("--peer", peer)]
        places = ["--output", str(tmp_path), "--experiment", team + rule]
        given = ["--data-root", str(data), *words, *fixed, "--rule", rule, *places, *more]
        run(None, "train", given, bars=False)
        return str(tmp_path / (team + rule))

    control = train("abc", "none")
    runs = [train(team, "best") for team in ("ab", "ac", "bc")]
    runs.append(train("abc", "better", "--teachers", "ema", "--model-ema", "--score", "confidence"))
    # averaged weights are evaluated: its control is another
    controls = [control, train("abc", "none", "--model-ema", "--experiment", "ema")]
    controls[1] = str(tmp_path / "ema")
    places = ["--kept-size", "9", "16", "--cache", str(tmp_path / "cache")]
    places += ["--output", str(tmp_path / "out")]
    found = scout(["--realised", *controls, *runs, *places], bars=False)
    told = found["realised"]
    assert told["controlled"] and found["metric"] == "cc" and found["samples"] == 7
    assert found["same_data"] and found["starts"] == []
    other = scout(["--realised", *controls, *runs, *places, "--held-out", "0.5"], bars=False)
    assert not other["same_data"]
    start_otherwise(tmp_path / "abbest" / "summary.csv", "xb/cc", "-1")
    told = scout(["--realised", *controls, *runs, *places], bars=False)["starts"]
    assert len(told) == 1 and f"{tmp_path}/abbest began with it at -1.000 (1 of" in told[0]
    told = found["realised"]
    assert len(told["runs"]) == 4 and found["predictor"] == "gain-taught"
    ends = {}
    for title in ("abcnone", "bcbest"):
        rows = list(csv.DictReader((tmp_path / title / "summary.csv").open()))
        ends[title] = {n: float(rows[-1][f"{n}/cc"]) for n in ("xb", "xc")}
    row = next(row for row in told["runs"] if row["members"] == ["xb", "xc"])
    expected = [ends["bcbest"][n] - ends["abcnone"][n] for n in row["members"]]
    assert row["gains"] == pytest.approx(expected) and any(expected)
    assert {"gain-taught", "kl", "ensemble"} <= told["correlations"].keys()
    assert told["correlations"]["kl"]["teams"]["count"] == 4
    assert "gains of cc (no unit)" in (tmp_path / "out" / "report.html").read_text()
    inspect = saliency.scout.inspect
    monkeypatch.setattr("saliency.scout.inspect", None)  # no model is loaded
    for bad, words in (
        ([str(tmp_path)], "it has no args.yaml"),
        ([control], "no run with transfer"),
        ([*runs, "--data-root", "/nowhere"], "no such folder"),
        ([*controls, *runs, "--skip-unfit"], "every model of the runs is needed"),
    ):
        with pytest.raises((OptionError, DataError), match=words):
            scout(["--realised", *bad, *places], bars=False)
    file = tmp_path / "abbest" / "args.yaml"  # as of train_dhf1k.py
    file.write_text(file.read_text().replace("dataset: dhf1k\n", ""))
    with pytest.raises(OptionError, match="give --dataset"):
        scout(["--realised", control, *runs, *places], bars=False)
    monkeypatch.setattr("saliency.scout.inspect", inspect)
    scout(["--realised", *controls, *runs, "--dataset", "dhf1k", *places], bars=False)
    monkeypatch.setattr("saliency.scout.inspect", None)
    (tmp_path / "acbest" / "xc" / "last.pth").unlink()
    with pytest.raises(OptionError, match="did not finish: xc"):
        scout(["--realised", control, *runs, "--dataset", "dhf1k", *places], bars=False)


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        (("--for", "z"), "--for z: no such model"),
        (("--rule", "fairest"), "fairest"),
        (("--team-size", "9"), "--team-size 9: there are 3 models"),
        (("--max-bad-samples", "1"), "leaves no frame out"),
        (("--unlabelled", "/x"), "--unlabelled /x: not offered for saliency"),
        (("--kept-size", "0", "4"), "--kept-size"),
    ],
)
def test_faults_end_in_one_line(data, models, scouted, caplog, rest, told):
    assert main(arguments(data, models, scouted[0], *rest)) == 1
    assert told in caplog.text


def test_what_cannot_be_ranked_is_refused_before_any_model_is_asked(
    data, models, tmp_path, monkeypatch
):
    monkeypatch.setattr("saliency.scout.cached_answers", None)
    for more, told in (
        (("--team-size", "2..4"), "--team-size 4: there are 3 models"),
        (("--team-size", "1"), "--team-size 1"),
        (("--rule", "one_way:z"), "no peer is named"),
    ):
        with pytest.raises(OptionError, match=told):
            scout(arguments(data, models, tmp_path / "out", *more), bars=False)
    assert not (tmp_path / "out").exists()


def test_a_model_is_no_team_with_itself(data, models, scouted, caplog, no_report):
    again = [models[0], models[1].replace("name=a", "name=again")]
    outcome = scout(arguments(data, [*models, *again], scouted[0]), bars=False)
    assert outcome["names"] == ["a", "b", "c"] and outcome["judged"] == 3
    caplog.clear()
    assert main(arguments(data, [*models[:2], *again], scouted[0])) == 1
    assert "all models are the same one" in caplog.text


def test_fewer_models_than_a_team_are_told_in_scoutings_words(data, tmp_path):
    for given, told in (([], "no model"), (["--model", "vinet_s"], "1 model")):
        with pytest.raises(OptionError, match=f"^{told} to choose from, .* give --model MODEL"):
            scout(arguments(data, given, tmp_path), bars=False)


def test_models_that_cannot_be_had_are_all_named_or_left_out(data, models, scouted, caplog):
    bad = [*models, "--model", "no_such_model", "--model", f"{TOY}:no_view"]
    with pytest.raises(OptionError, match="2 of 5 models cannot be scouted"):
        scout(arguments(data, bad, scouted[0]), bars=False)
    outcome = scout(arguments(data, bad, scouted[0], "--skip-unfit"), bars=False)
    assert outcome["names"] == ["a", "b", "c"] and "left out" in caplog.text


def test_runs_are_asked_for_with_an_equals_sign_too(tmp_path):
    for given in ([f"--realised={tmp_path}"], [f"--realised={tmp_path}", "--realised", "x"]):
        with pytest.raises(OptionError, match=r"it has no args\.yaml"):
            scout(given, bars=False)
