"""scout.py from the command line: real images, cache, wildcards, data without labels, errors."""

import argparse
import csv
import json
import re
import shlex
import shutil

import pytest
import torch
from PIL import Image, ImageOps

from classification.data import open_dataset
from classification.held_out import Part
from classification.models import ModelError, models_meant
from classification.options import build_parser, from_export, parse
from classification.peer import build_modules
from classification.plan import measure_team
from classification.realised import read_run
from classification.scout import add_scout_options, main, scout
from classification.train import run
from classification.validate import validate
from common import logit_cache
from common.checkpoint import save_weights
from common.distributed import World
from common.options import OptionError
from common.planner import engine_costs
from common.scouting import team_sizes

VIT = "kwargs.patch_size=8,kwargs.embed_dim=24,kwargs.depth=1,kwargs.num_heads=2,img_size=32"
PEERS = [
    f"vit_tiny_patch16_224,name=a,{VIT}",
    f"vit_tiny_patch16_224,name=b,{VIT},mean=0.4+0.4+0.4",
    f"vit_small_patch16_224,name=c,{VIT}",
    f"vit_tiny_patch16_224,name=d,{VIT.replace('img_size=32', 'img_size=24')}",
]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Four small models that know the digits a little: a run of train.py without transfer."""
    folder = tmp_path_factory.mktemp("trained")
    peers = [word for peer in PEERS for word in ("--peer", peer)]
    run(
        [
            *(str(digits), *peers, "--rule", "none", "--output", str(folder)),
            *"--no-pretrained --num-classes 10 --opt adamw --lr 2e-3 --epochs 2 -b 40 -j 0".split(),
            *"--warmup-epochs 0 --no-aug --experiment run --device cpu".split(),
        ],
        bars=False,
    )
    return folder / "run"


@pytest.fixture
def scouting(digits, trained, tmp_path):
    """Arguments that scout the four models."""
    return [
        *(str(digits), "--model", f"{trained}/*/last.safetensors", "-j", "0", "-b", "30"),
        *("--output", str(tmp_path), "--experiment", "s", "--cache", str(tmp_path / "cache")),
        *("--device", "cpu"),
    ]


def test_scouting_ranks_every_pair_and_leaves_its_files(digits, trained, scouting, tmp_path):
    found = scout([*scouting, "--team-size", "2..3", "--top", "1"], bars=False)
    assert all(team["ensemble"] > 0.1 for team in found["teams"])  # not of the best alone
    assert found["names"] == ["a", "b", "c", "d"] and found["samples"] == 200
    assert len(found["teams"]) == 6 + 4 and found["judged"] == 10
    assert [len(team["members"]) for team in found["teams"]] == [2] * 6 + [3] * 4
    values = [team["value"] for team in found["teams"]]
    for some in (values[:6], values[6:]):
        assert some == sorted(some, reverse=True) and some[0] > 0
    told = validate([str(digits), "-j", "0", "--peer", f"{trained}/*/last.safetensors"])
    for fact in found["models"]:
        assert 100 * fact["accuracy"] == pytest.approx(told[f"{fact['name']}/top1"], abs=1e-9)
        assert fact["loss"] == pytest.approx(told[f"{fact['name']}/loss"], abs=1e-3)
    pair = next(team for team in found["teams"] if set(team["members"]) == {"a", "c"})
    told = validate(
        [str(digits), "-j", "0"]
        + [w for n in "ac" for w in ("--peer", f"{trained}/{n}/last.safetensors")]
    )
    assert 100 * pair["ensemble"] == pytest.approx(told["ensemble/top1"], abs=1e-9)
    assert 100 * pair["oracle"] == pytest.approx(told["oracle/top1"], abs=1e-9)
    folder = tmp_path / "s"
    assert json.loads((folder / "scout.json").read_text())["teams"] == found["teams"]
    rows = list(csv.DictReader((folder / "pairs.csv").open()))
    assert len(rows) == 12 and {"teacher", "student", "flips", "kl"} <= rows[0].keys()
    assert len(list(csv.DictReader((folder / "teams.csv").open()))) == 10
    page = (folder / "report.html").read_text()
    assert page.count("<figure") == page.count('<svg role="img" aria-label="') == 3
    assert all(word in page for word in ("Heat map", "complementar", "What calibration changes"))
    assert not re.search(r"(src|href)=\"http", page)
    assert found["chosen_on_test"] and "on which training then measures them" in page


def test_numbered_names_of_a_wildcard_are_told_with_their_files(
    scouting, trained, tmp_path, caplog
):
    caplog.set_level("INFO")
    for k, name in enumerate("ac"):
        shutil.copytree(trained / name, tmp_path / "runs" / str(k) / "net")
    given = [w.replace(f"{trained}/*/last", f"{tmp_path}/runs/*/net/last") for w in scouting]
    found = scout(given, bars=False)
    files = {
        f"net{tail}": f"{tmp_path}/runs/{k}/net/last.safetensors"
        for k, tail in ((0, ""), (1, "-2"))
    }
    assert {fact["name"]: fact["file"] for fact in found["models"]} == files
    rows = csv.DictReader((tmp_path / "s" / "models.csv").open())
    assert {row["name"]: row["file"] for row in rows} == files
    assert f"net-2 is {files['net-2']}" in caplog.text and "net is" not in caplog.text
    assert all(
        f">{file}<" in (tmp_path / "s" / "report.html").read_text() for file in files.values()
    )


@pytest.mark.parametrize("split", [(), ("--held-out", "0.25")])
def test_the_printed_command_trains_the_team(scouting, tmp_path, split):
    found = scout([*scouting, *split, "--rule", "better", "--no-detach-teacher"], bars=False)
    assert found["chosen_on_test"] == (not split)
    told = "on which training then measures them"
    assert (told in (tmp_path / "s" / "report.html").read_text()) == (not split)
    words = shlex.split(found["commands"][0])
    assert words[:2] == ["python", "classification/train.py"]
    options, specs = parse(words[2:])
    assert [spec.name for spec in specs] == found["teams"][0]["members"]
    assert options.rule == "better" and not options.detach_teacher and options.workers == 0
    progress = run(
        [*words[2:], *"--lr 1e-4 --opt adamw --epochs 1 --no-aug --output".split(), str(tmp_path)],
        bars=False,
    )
    start = {fact["name"]: 100 * fact["accuracy"] for fact in found["models"]}
    for spec in specs:
        assert progress.history[0][f"{spec.name}/top1"] == pytest.approx(start[spec.name], abs=1e-6)


def test_peers_of_a_yaml_file_are_trained_from_one(trained, digits, scouting, tmp_path, no_report):
    kwargs = "{patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2, act_layer: null}"
    peers = "".join(
        f"- {{model: {model}, name: {n}, checkpoint: {trained}/{n}/last.safetensors, img_size: 32, "
        f"mean: [{mean}, {mean}, {mean}], kwargs: {kwargs}}}\n"
        for n, model, mean in (
            ("a", "vit_tiny_patch16_224", 0.5),
            ("c", "vit_small_patch16_224", 0.5),
        )
    )
    config = tmp_path / "peers.yaml"
    config.write_text(f"peers:\n{peers}rule: better\n")
    found = scout([str(digits), "-c", str(config), *scouting[3:]], bars=False)
    words = shlex.split(found["commands"][0])
    options, specs = parse(words[2:])
    assert {spec.name for spec in specs} == {"a", "c"} and options.rule == "better"
    assert specs[0].options.model_kwargs["depth"] == 1 and specs[0].options.mean == [0.5] * 3


@pytest.fixture
def counted(monkeypatch):
    """Count the images that are decoded."""
    seen = []
    plain = Part.__getitem__
    monkeypatch.setattr(Part, "__getitem__", lambda s, i: seen.append(i) or plain(s, i))
    return seen


def assert_same(one, two):
    """Equal but for rounding: normalisation may go by way of another model's statistics."""
    pairs = zip(one["teams"], two["teams"], strict=True)
    assert all(a["members"] == b["members"] for a, b in pairs)
    for a, b in zip(one["teams"], two["teams"], strict=True):
        assert a["value"] == pytest.approx(b["value"], abs=1e-6)
        assert list(a["kl"].values()) == pytest.approx(list(b["kl"].values()), abs=1e-4)


@pytest.fixture
def no_report(monkeypatch):
    """Draw nothing: that takes longest."""
    monkeypatch.setattr("classification.scout.write_scout_report", lambda path, *rest: path)


def test_images_are_read_once_per_geometry_and_never_again(
    scouting, counted, tmp_path, monkeypatch, no_report
):
    monkeypatch.setattr(logit_cache, "CHUNK", 64)
    first = scout(scouting, bars=False)
    assert len(counted) == 2 * 200  # a, b and c at 32 pixels, d at 24
    counted.clear()
    assert scout(scouting, bars=False)["teams"] == first["teams"] and not counted
    scout([*scouting, "--samples", "50", "--models-at-once", "1"], bars=False)
    assert len(counted) == 4 * 50
    counted.clear()
    # as after a kill: one model has lost a chunk in the middle, another all of them
    folders = sorted((tmp_path / "cache").iterdir())
    folders = [f for f in folders if len(list(f.iterdir())) == 4]
    (folders[0] / "chunk-00001.safetensors").unlink()
    assert_same(scout(scouting, bars=False), first)
    assert len(counted) == 64
    counted.clear()
    shutil.rmtree(folders[1])
    assert_same(scout(scouting, bars=False), first)
    assert len(counted) == 200


def test_ranking_for_one(scouting, trained, no_report):
    again = ["--model", f"{trained}/a/last.safetensors"]  # the wildcard means it too
    found = scout(
        [*scouting, *again, "--for", f"{trained}/c/last.safetensors", "--team-size", "2", "3"],
        bars=False,
    )
    assert found["names"] == ["a", "b", "c", "d"]
    assert len(found["teams"]) == 3 + 3 and all("c" in team["members"] for team in found["teams"])
    assert found["teams"][0]["value"] == found["teams"][0]["predicted"]["flips"]["c"]


def test_confidence_and_mutual_rank_too(scouting, no_report):
    found = scout([*scouting, "--score", "confidence"], bars=False)
    assert found["score"] == "confidence" and len(found["calibration"]) == 6
    assert 0 <= found["calibration"][0]["right_raw"] <= 1
    assert parse(shlex.split(found["commands"][0])[2:])[0].calibrate_scores == "start"
    for more, when in (("--bce-loss", "off"), ("--calibrate-scores=epoch", "epoch")):
        given = scout([*scouting, "--score", "confidence", more], bars=False)
        assert parse(shlex.split(given["commands"][0])[2:])[0].calibrate_scores == when
        assert given["score"] == ("raw confidence" if when == "off" else "confidence")
    found = scout([*scouting, "--rule", "mutual"], bars=False)
    assert found["predictor"] == "complementarity" and found["score"] is None
    found = scout([*scouting, "--rule", "mutual", "--score", "confidence"], bars=False)
    assert parse(shlex.split(found["commands"][0])[2:])[0].calibrate_scores == "off"


def test_teams_that_do_not_fit_a_gpu_are_left_out(scouting, tmp_path, caplog, no_report):
    free = scout([*scouting, "--costs"], bars=False)
    need = {frozenset(team["members"]): team["memory"] for team in free["teams"]}
    assert len(need) == 6 and all(team["engine"] == "joint" for team in free["teams"])
    assert all(team["step_seconds"] > 0 for team in free["teams"])
    assert "--engine" not in free["commands"][0]
    budget = sorted(need.values())[2] // 0.85 // 1024 + 1
    found = scout([*scouting, "--budget-gpu-mem", f"{budget:.0f}K"], bars=False)
    joint = {frozenset(team["members"]) for team in found["teams"] if team["engine"] == "joint"}
    assert joint == {team for team, bytes_ in need.items() if bytes_ <= sorted(need.values())[2]}
    assert len(found["teams"]) + found["too_large"] == found["judged"] == 6
    slow = [team for team in found["teams"] if team["engine"] == "two-pass"]
    assert all(team["memory"] < need[frozenset(team["members"])] for team in slow)
    first = found["teams"][0]["engine"]
    assert ("--engine two-pass" in found["commands"][0]) == (first == "two-pass")
    none = scout([*scouting, "--budget-gpu-mem", "10K"], bars=False)
    assert none["teams"] == [] and none["too_large"] == 6 and none["commands"] == []
    (tmp_path / "s" / "scout.json").unlink()
    assert main([*scouting, "--budget-gpu-mem", "10K"]) == 1
    assert "error: no team to propose" in caplog.text and (tmp_path / "s" / "scout.json").exists()
    assert main([*scouting, "--budget-gpu-mem", "10G"]) == 0


def test_costs_are_those_of_the_plan_with_copies_that_teach(scouting, no_report):
    given = [*scouting, *"--model-ema --teachers ema --rule better --opt adamw --lr 1e-3".split()]
    found = scout([*given, "--costs"], bars=False)
    needs = {frozenset(team["members"]): team["memory"] for team in found["teams"]}
    options, specs = parse(given, "scout", add_scout_options)
    pair = [from_export(spec) for spec in specs if spec.name in "ab"]
    modules, views = build_modules(pair, argparse.Namespace(**{**vars(options), "num_classes": 10}))
    world = World(0, 1, 0, torch.device("cpu"))
    plan = measure_team(options, pair, modules, views, world)
    assert all(peer.copy > 0 for peer in plan.peers)
    assert needs[frozenset("ab")] == engine_costs(plan)["joint"].peak


def test_broken_images_are_named_or_left_out(scouting, digits, tmp_path, caplog, no_report):
    shutil.copytree(digits / "validation", tmp_path / "data" / "validation")
    broken = tmp_path / "data" / "validation" / "3" / "5.png"
    broken.write_bytes(broken.read_bytes()[:40])
    given = [str(tmp_path / "data"), *scouting[1:]]
    assert main(given) == 1 and str(broken) in caplog.text
    found = scout([*given, "--max-bad-samples", "1"], bars=False)
    assert found["samples"] == 199 and "without 1 of 200" in caplog.text


def flat_folder(digits, folder):
    folder.mkdir()
    for k, path in enumerate(sorted((digits / "validation").rglob("*.png"))[::4]):
        shutil.copy(path, folder / f"{k}.png")
    return folder


def test_images_without_labels(digits, scouting, tmp_path, caplog):
    folder = flat_folder(digits, tmp_path / "flat")
    found = scout([*scouting, "--unlabelled", str(folder)], bars=False)
    assert found["samples"] == 50 and not found["labelled"] and found["score"] == "confidence"
    assert found["predictor"] == "confidence-gap" and found["models"][0]["temperature"] > 0
    assert not found["chosen_on_test"]
    assert found["models"][0]["accuracy"] is None and found["pairs"]["flips"] is None
    blind = scout([*scouting[1:], "--unlabelled", str(folder)], bars=False)
    assert blind["rule"] == "mutual" and blind["predictor"] == "disagreement"
    assert blind["models"][0]["temperature"] is None and blind["calibration"] == []
    assert "cannot be compared" in caplog.text
    assert blind["pairs"]["kl"] == found["pairs"]["kl"]
    assert blind["commands"][0].startswith("python classification/train.py DATA ")


def test_images_without_labels_are_listed_once_and_read_as_the_models_see_them(
    digits, tmp_path, monkeypatch, no_report
):
    folder, listed = flat_folder(digits, tmp_path / "flat"), []

    def listing(*given):
        listed.append(open_dataset(*given))
        return listed[-1]

    monkeypatch.setattr("classification.scout.open_dataset", listing)
    shape = "kwargs.embed_dim=24,kwargs.depth=1,kwargs.num_heads=2,img_size=32"
    peers = [f"vit_tiny_patch16_224,name={name},{shape}" for name in "ab"]
    grey = ["--num-classes", "10", "--in-chans", "1"]
    words = [word for peer in peers for word in ("--peer", peer)]
    options, specs = parse([str(digits), *words, *grey, "--no-pretrained"])
    asked = ["--unlabelled", str(folder), *grey, "--device", "cpu", "-j", "0"]
    asked += ["--output", str(tmp_path), "--cache", str(tmp_path / "cache")]
    for k, module in enumerate(build_modules(specs, options)[0]):
        file = tmp_path / f"{k}.safetensors"
        save_weights(file, module.state_dict())
        asked += ["--model", f"{peers[k]},checkpoint={file}"]
    assert scout(asked, bars=False)["samples"] == 50
    assert [dataset.input_img_mode for dataset in listed] == ["L"]


def test_what_cannot_be_scouted_is_named_and_never_dropped_in_silence(
    scouting, caplog, monkeypatch, no_report
):
    monkeypatch.setattr("classification.timm_models.is_hub_reachable", lambda: False)
    more = ["--model", "pit_x*", "--model", "vit_tiny_patch16_224,pretrained=false"]
    with pytest.raises(OptionError, match="3 of 7 models cannot be scouted") as error:
        scout([*scouting, *more], bars=False)
    told = str(error.value)
    assert "pit_xs_224.in1k,checkpoint=/path/to/file" in told and "--no-pretrained" in told
    caplog.clear()
    found = scout([*scouting, *more, "--skip-unfit"], bars=False)
    assert found["names"] == ["a", "b", "c", "d"]
    assert "left out" in caplog.text and "pit_xs_distilled_224" in caplog.text


def test_broken_files_that_a_wildcard_meets_are_named_or_left_out(
    scouting, trained, tmp_path, caplog, no_report
):
    for name in "abcd":
        shutil.copytree(trained / name, tmp_path / "run" / name)
    broken = tmp_path / "run" / "b" / "last.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    given = [word.replace(str(trained), str(tmp_path / "run")) for word in scouting]
    given += ["--model", "resnet18x"]
    with pytest.raises(OptionError, match="2 of 5 models cannot be scouted") as error:
        scout(given, bars=False)
    assert f"  b: {broken}: " in str(error.value) and "\n  resnet18x: unknown" in str(error.value)
    assert scout([*given, "--skip-unfit"], bars=False)["names"] == ["a", "c", "d"]
    assert str(broken) in caplog.text


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--team-size", "4..2"], "--team-size 4..2"),
        (["--team-size", "one"], "--team-size one"),
        (["--team-size", "7"], "--team-size 7: there are 4 models to choose from"),
        (["--for", "nobody"], "--for nobody: 0 models"),
        (["--for", "vit_tiny_patch16_224"], "3 models are called so"),
        (["--num-classes", "7"], "knows 10 classes, not the 7"),
        (["--team-size", "2..3", "--most-teams", "0"], "--most-teams is 0"),
        (["--rule", "one_way:nobody"], "no peer is named"),
        (["--unlabelled", "/nowhere"], "--unlabelled /nowhere: no such data folder"),
        (["--cache", __file__], f"--cache {__file__}: File exists; give a folder"),
        (["--predictor", "confidence-gap", "--model", "no_such_*"], "stands for no file"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_no_folder(scouting, tmp_path, more, told, caplog):
    assert main([*scouting, *more]) == 1
    assert told in caplog.text and "Traceback" not in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--team-size", "5"], "--team-size 5: there are 4 models"),
        (["--rule", "one_way:z"], "no peer is named"),
        (["--predictor", "flips", "--unlabelled", "FLAT"], "predictor 'flips' cannot be used"),
    ],
)
def test_what_cannot_be_ranked_is_refused_before_any_model_is_asked(
    scouting, digits, more, told, monkeypatch
):
    monkeypatch.setattr("classification.scout.ask", None)
    more = [str(digits / "validation") if word == "FLAT" else word for word in more]
    with pytest.raises(OptionError, match=told):
        scout([*scouting, *more], bars=False)


def test_a_folder_without_labels_that_cannot_be_read_is_refused_before_models_are_looked_at(
    scouting, tmp_path, monkeypatch
):
    monkeypatch.setattr("classification.scout.find_candidates", None)
    for given in (scouting, scouting[1:]):  # with labelled data and without
        with pytest.raises(OptionError, match="--unlabelled /nowhere: no such data folder"):
            scout([*given, "--unlabelled", "/nowhere"], bars=False)
        with pytest.raises(OptionError, match=f"--unlabelled {tmp_path}: no image there, at any"):
            scout([*given, "--unlabelled", str(tmp_path)], bars=False)


def test_fewer_models_than_a_team_are_told_in_scoutings_words(tmp_path):
    for given, told in (([], "no model"), (["--model", "resnet18"], "1 model")):
        with pytest.raises(OptionError, match=f"^{told} to choose from, .* give --model MODEL"):
            scout([str(tmp_path), *given], bars=False)


def test_wildcards_stand_for_published_models():
    names = models_meant("pit_*")
    assert "pit_xs_224.in1k" in names and all(name.startswith("pit_") for name in names)
    assert models_meant("resnet18") == ["resnet18"]
    with pytest.raises(ModelError, match="stands for no file"):
        models_meant("/nowhere/*.safetensors")
    peers = parse(["/data", "--peer", "pit_x?_224*,lr=0.5,frozen", "--rule", "none"])[1]
    assert [spec.model for spec in peers] == ["pit_xs_224.in1k"] and peers[0].options.lr == 0.5


def test_team_sizes_and_the_parsers_own_options():
    assert team_sizes(["2..4"]) == [2, 3, 4] and team_sizes(["4", "2"]) == [2, 4]
    taken = build_parser("scout", add_scout_options).parse_args(["D", "--model", "a"])
    assert taken.peers == ["a"]
    with pytest.raises(SystemExit):
        build_parser().parse_args(["D", "--model", "a"])
    assert torch.get_num_threads() == 1


def test_predictions_are_compared_with_finished_runs(trained, digits, tmp_path, monkeypatch):
    file = {name: f"{trained}/{name}/last.safetensors" for name in "abcd"}

    def train(title, rule, *names):
        peers = [word for name in names for word in ("--peer", f"{file[name]},name=x{name}")]
        fixed = "--opt adamw --lr 1e-3 --epochs 1 -b 40 -j 0 --warmup-epochs 0 --no-aug".split()
        run(
            [
                *(str(digits), *peers, *fixed, "--rule", rule, "--output", str(tmp_path)),
                *("--experiment", title, "--device", "cpu"),
            ],
            bars=False,
        )
        return str(tmp_path / title)

    pairs = ["ab", "cd", "ad", "bc"]
    control = train("control", "none", *"abcd")
    runs = [train(pair, "best", *pair) for pair in pairs]
    more = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path), "--experiment", "test"]
    found = scout(["--realised", control, *runs, *more], bars=False)
    told = found["realised"]
    assert told["controlled"] and found["samples"] == 200 and len(found["names"]) == 4
    assert {frozenset(row["members"]) for row in told["runs"]} == {
        frozenset(f"x{name}" for name in pair) for pair in pairs
    }
    ends = {}
    for title in ("control", "cd"):
        rows = list(csv.DictReader((tmp_path / title / "summary.csv").open()))
        ends[title] = {n: float(rows[-1][f"x{n}/top1"]) for n in "cd"}
    row = next(row for row in told["runs"] if set(row["members"]) == {"xc", "xd"})
    expected = {f"x{n}": ends["cd"][n] - ends["control"][n] for n in "cd"}
    assert dict(zip(row["members"], row["gains"], strict=True)) == pytest.approx(expected)
    assert {"flips", "right-kl", "ensemble"} <= told["correlations"].keys()
    assert told["correlations"]["kl"]["teams"]["count"] == 4
    page = (tmp_path / "test" / "report.html").read_text()
    assert "orders of the models" in page and page.count("<figure") == 2
    assert found["same_data"] and found["starts"] == []
    shutil.copytree(digits, tmp_path / "own")
    for other in ([str(tmp_path / "own")], ["--held-out", "0.1"], ["--val-split", "train"]):
        assert not scout([*other, "--realised", control, *runs, *more], bars=False)["same_data"]
    for path in (tmp_path / "own").rglob("*.png"):
        ImageOps.invert(Image.open(path)).save(path)
    starts = scout([str(tmp_path / "own"), "--realised", control, *runs, *more], bars=False)[
        "starts"
    ]
    assert starts and all("of 3 runs differ): data, view or" in told for told in starts)
    monkeypatch.setattr("classification.scout.find_candidates", None)  # no model is loaded
    for bad, words in (
        ([str(tmp_path)], "it has no args.yaml"),
        ([control], "no run with transfer"),
        ([control, *runs, "--unlabelled", "/x"], "tested on labelled data"),
        ([control, *runs, "--skip-unfit"], "every model of the runs is needed"),
    ):
        with pytest.raises(OptionError, match=words):
            scout(["--realised", *bad, *more], bars=False)
    (tmp_path / "cd" / "xc" / "last.safetensors").unlink()
    with pytest.raises(OptionError, match="did not finish: xc"):
        scout(["--realised", control, *runs, *more], bars=False)


def test_images_that_change_or_are_read_otherwise_are_computed_anew(digits, scouting, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    for path in data.rglob("*.png"):
        Image.open(path).save(path, compress_level=0)  # so that the size says nothing
    asked = [str(data), *scouting[1:]]
    before = scout(asked, bars=False)["models"]
    assert scout(asked, bars=False)["models"] == before
    for path in data.rglob("*.png"):
        size = path.stat().st_size
        ImageOps.invert(Image.open(path)).save(path, compress_level=0)
        assert path.stat().st_size == size
    assert scout(asked, bars=False)["models"] != before
    with pytest.raises(OptionError, match="L has 1 channels, the models take 3"):
        scout([*asked, "--input-img-mode", "L"], bars=False)
    with pytest.raises(OptionError, match="--input-img-mode X: no mode of PIL"):
        scout([*asked, "--input-img-mode", "X"], bars=False)


def test_runs_are_asked_for_with_an_equals_sign_too(tmp_path):
    for given in ([f"--realised={tmp_path}"], [f"--realised={tmp_path}", "--realised", "x"]):
        with pytest.raises(OptionError, match=r"it has no args\.yaml"):
            scout(given, bars=False)


@pytest.mark.parametrize(
    ("options", "score"),
    [
        ("score: confidence", "raw confidence"),
        ("score: confidence\ncalibrate_scores: start", "confidence"),
        ("score: loss", "loss"),
    ],
)
def test_a_finished_run_is_judged_by_confidences_as_it_compared_them(tmp_path, options, score):
    peers = "".join(f"- {{model: resnet18, name: {n}, checkpoint: {n}.pth}}\n" for n in "ab")
    (tmp_path / "args.yaml").write_text(f"data: D\npeers:\n{peers}{options}\n")
    (tmp_path / "summary.csv").write_text("a/top1,b/top1\n50,51\n52,53\n")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.safetensors").touch()
    assert read_run(tmp_path).score == score
