"""Scouting segmentors: pixels that are drawn, answers that are kept, teams by image and pixel."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from common.options import OptionError
from common.planner import engine_costs
from segmentation import answers, scouting
from segmentation.answers import draw_pixels, draw_unlabelled
from segmentation.classwise import class_iou, flips_by_class, mean_iou
from segmentation.cli import end_logging
from segmentation.config import load_run
from segmentation.data import allowed, load_datasets, read_labels
from segmentation.errors import DataError
from segmentation.evaluation import evaluating, predict
from segmentation.keys import value_at
from segmentation.models import build_with_weights
from segmentation.peer import SegmentorPeer
from segmentation.plan import measure_team
from segmentation.scouting import main, scout
from segmentation.train_net import main as train_main
from tests.segmentation.runs import SHARED, write_peer
from tests.summaries import start_otherwise


def plain(items, title):
    return items


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A run file of three tiny segmentors with weights of their own."""
    folder = tmp_path_factory.mktemp("models")
    peers = []
    for i, (name, kind) in enumerate({"a": "fpn", "b": "deeplab", "c": "fpn"}.items()):
        spec = {"NAME": name, "CONFIG": write_peer(folder, kind).name}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**SHARED, "TRANSFER": {"RULE": "none", "PEERS": [spec]}}))
        torch.manual_seed(i)
        module, _ = build_with_weights(load_run([path]).peers[0])
        torch.save(module.state_dict(), folder / f"{name}.pth")
        peers.append({**spec, "WEIGHTS": f"{name}.pth"})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**SHARED, "TRANSFER": {"PEERS": peers}}))
    return path


@pytest.fixture
def scouted(models, datasets, tmp_path):
    arguments = ["--config-file", str(models), "--pixels", "256", "--team-size", "2..3"]
    places = ["--cache", str(models.parent / "cache"), "--output", str(tmp_path / "out")]
    return [*arguments, *places], scout([*arguments, *places], bars=False)


def test_intersection_over_union_by_hand():
    truth, answer = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 2, 1, 0, 1])
    weight = torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0])
    found = class_iou(answer, truth, weight, 3)
    # class 0: 1 of 1 + 1 missed + 2 told; class 1: 2 of 4; class 2 is nowhere true
    assert found[:2].tolist() == [0.25, 0.5] and bool(found[2].isnan())
    assert mean_iou(found) == 0.375


def test_pixels_are_drawn_alike_from_those_with_a_label(datasets):
    first, again, other = (draw_pixels("scenes_val", 64, 2, seed, plain) for seed in (0, 0, 1))
    assert torch.equal(first.where, again.where) and first.key == again.key
    assert first.key != other.key
    file, was = first.records[0]["file_name"], os.stat(first.records[0]["file_name"])
    os.utime(file)  # another content may have the same size
    assert draw_pixels("scenes_val", 64, 2, 0, plain).key != first.key
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert first.where.shape == (2, 64)
    for record, where, labels, weight in zip(
        first.records, first.where, first.labels, first.weight, strict=True
    ):
        truth = read_labels(record["sem_seg_file_name"], dtype=np.int64)
        assert truth.flat[where.numpy()].tolist() == labels.tolist()
        assert weight * 64 == (truth != 255).sum() and len(set(where.tolist())) == 64
    with pytest.raises(OptionError, match="power of two"):
        draw_pixels("scenes_val", 100, None, 0, plain)


def test_images_with_broken_files_are_left_out_of_what_is_scouted_on(own_datasets):
    whole = draw_pixels("scenes_val", 64, None, 0, plain)
    for k, kind in ((1, "images"), (2, "labels")):
        sorted((own_datasets / "val" / kind).iterdir())[k].write_bytes(b"no image")
    found = draw_pixels("scenes_val", 64, None, 0, plain, answers.allowed(2))
    assert [x["file_name"] for x in found.records] == [
        str(path) for path in sorted((own_datasets / "val/images").iterdir())[:1]
    ]
    assert torch.equal(found.where, whole.where[:1]) and len(found.weight) == 1
    with pytest.raises(DataError, match="2 broken files, 1 are allowed"):
        draw_pixels("scenes_val", 64, None, 0, plain, answers.allowed(1))


def test_what_is_told_equals_a_forward_by_hand(models, scouted):
    _, outcome = scouted
    pixels = draw_pixels("scenes_val", 256, None, 0, plain)
    config = load_run([models]).peers[1]
    module, cfg = build_with_weights(config)
    peer = SegmentorPeer("b", module, cfg, frozen=True)
    right, told = [], []
    with torch.no_grad(), evaluating([peer]):
        mapper = answers.test_samples
        samples = mapper(
            [peer],
            load_datasets(["scenes_val"]),
            scouting.current_world("cpu"),
            False,
            answers.allowed(),
        )
        for (sample,), where, labels in zip(samples, pixels.where, pixels.labels, strict=True):
            answer = predict(peer, sample).argmax(dim=0).flatten()[where]
            right.append(answer == labels)
            told.append(answer)
    facts = outcome["models"][1]
    assert facts["accuracy"] == pytest.approx(torch.stack(right).double().mean().item())
    weight = pixels.weight[:, None].expand(-1, 256).flatten()
    iou = class_iou(torch.cat(told), pixels.labels.flatten(), weight, 6)
    assert facts["miou"] == pytest.approx(mean_iou(iou))


def test_teams_are_ranked_and_come_with_what_trains_them(models, scouted, tmp_path):
    _, outcome = scouted
    teams = outcome["teams"]
    assert len(teams) == 4 and {len(team["members"]) for team in teams} == {2, 3}
    values = [team["value"] for team in teams[:3]]
    assert values == sorted(values, reverse=True) and len(teams[3]["members"]) == 3
    for team in teams:
        assert team["oracle_miou"] >= max(team["ensemble_miou"], *team["miou"].values()) - 1e-9
        assert set(team["taught_by"]) == {"image", "pixel"}
        assert team["taught"] == team["taught_by"]["image"]
        assert sum(team["taught_by"]["pixel"].values()) <= len(team["members"]) - 1 + 1e-9
    run = load_run([tmp_path / "out/team-1.yaml"])
    assert run.names == teams[0]["members"] and run.transfer.RULE == "best"
    original = {peer.name: peer.cfg for peer in load_run([models]).peers}
    for peer in run.peers:
        for key in ("MODEL.WEIGHTS", "MODEL.SEM_SEG_HEAD", "SOLVER", "INPUT.FORMAT"):
            assert value_at(peer.cfg, key) == value_at(original[peer.name], key)
    page = (tmp_path / "out/report.html").read_text()
    assert "By image and by pixel" in page and "on which training then measures them" in page
    told = json.loads((tmp_path / "out/scout.json").read_text())
    assert told["samples"] == 3 * 256
    rows = list(csv.DictReader((tmp_path / "out/pairs_by_class.csv").open()))
    assert len(rows) == 6 * 6


def test_answers_are_kept_and_a_further_model_costs_its_own_pass_alone(scouted, monkeypatch):
    arguments, first = scouted
    held_out = ["SEED", "0", "TRANSFER.HELD_OUT", "0.5"]
    assert not scout([*arguments, *held_out], bars=False)["chosen_on_test"]
    asked = []
    monkeypatch.setattr(answers, "_compute", lambda *given: asked.append(given))
    again = scout([*arguments, "TRANSFER.GRANULARITY", "pixel"], bars=False)
    assert not asked
    assert [fact["accuracy"] for fact in again["models"]] == [
        fact["accuracy"] for fact in first["models"]
    ]
    assert again["teams"][0]["taught"] == again["teams"][0]["taught_by"]["pixel"]
    sure = scout([*arguments, "TRANSFER.SCORE", "confidence"], bars=False)
    assert sure["score"] == "raw confidence"  # as training compares them


def test_a_model_is_no_team_with_itself(models, datasets, tmp_path, monkeypatch):
    monkeypatch.setattr("segmentation.scouting._ask", None)
    content = yaml.safe_load(models.read_text())
    peer = content["TRANSFER"]["PEERS"][0]
    content["TRANSFER"]["PEERS"] = [peer, {**peer, "NAME": "again"}]
    file = models.parent / "twice.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(OptionError, match="all models are the same one"):
        scout(["--config-file", str(file), "--output", str(tmp_path / "out")], bars=False)


def test_the_ranking_for_one_model_has_it_in_every_team(scouted):
    arguments, _ = scouted
    outcome = scout([*arguments, "--for", "b"], bars=False)
    assert outcome["for"] == "b" and all("b" in team["members"] for team in outcome["teams"])


@pytest.fixture
def no_report(monkeypatch):
    """Draw nothing: that takes longest."""
    monkeypatch.setattr("segmentation.scouting.write_scout_report", lambda path, *rest: path)


def test_teams_that_do_not_fit_a_gpu_are_left_out(models, scouted, no_report):
    arguments, _ = scouted
    pairs = [*arguments, "--team-size", "2"]
    free = scout([*pairs, "--costs"], bars=False)
    need = {tuple(team["members"]): team["memory"] for team in free["teams"]}
    assert len(need) == 3 and all(team["engine"] == "joint" for team in free["teams"])
    assert all(team["step_seconds"] > 0 for team in free["teams"])
    least = min(need.values()) // 0.85 // 1024 + 1
    found = scout([*pairs, "--budget-gpu-mem", f"{least:.0f}K"], bars=False)
    for team in found["teams"]:
        alone = need[tuple(team["members"])] == min(need.values())
        assert team["engine"] == ("joint" if alone else "two-pass")
    assert found["teams"] and len(found["teams"]) + found["too_large"] == found["judged"] == 3
    file = arguments[arguments.index("--output") + 1] + "/team-1.yaml"
    assert found["teams"][0]["engine"] == load_run([file]).transfer.ENGINE
    none = scout([*pairs, "--budget-gpu-mem", "10K"], bars=False)
    assert none["teams"] == [] and none["too_large"] == 3 and none["commands"] == []
    assert main([*pairs, "--budget-gpu-mem", "10K"]) == 1 and main(pairs) == 0


@pytest.fixture
def unlabelled(datasets, tmp_path):
    """Images without labels: those of the validation set, and one of another size."""
    folder = tmp_path / "images"
    for k, record in enumerate(load_datasets(["scenes_val"])):
        (folder / str(k)).mkdir(parents=True)
        shutil.copy(record["file_name"], folder / str(k))
    Image.new("RGB", (48, 40), (90, 120, 30)).save(folder / "0" / "small.png")
    (folder / "notes.txt").touch()
    return folder


def test_images_without_labels_are_judged_by_calibrated_confidences(
    models, scouted, unlabelled, caplog
):
    arguments, labelled = scouted
    found = scout([*arguments, "--unlabelled", str(unlabelled)], bars=False)
    assert found["samples"] == 4 * 256 and not found["labelled"] and found["score"] == "confidence"
    assert found["predictor"] == "confidence-gap" and "iou" not in found
    for mine, other in zip(found["models"], labelled["models"], strict=True):
        assert mine["temperature"] == other["temperature"] and mine["accuracy"] is None
    for team in found["teams"]:
        assert team["ensemble"] is None and team["taught"] == team["taught_by"]["image"]
        assert 0 < sum(team["taught"].values()) <= len(team["members"]) - 1 + 1e-9
    folder = Path(arguments[arguments.index("--output") + 1])
    assert "mIoU" not in (folder / "report.html").read_text().split("Settings")[0]
    assert "cannot be compared" not in caplog.text
    # nothing of the labels is left to calibrate by
    arguments = [*arguments, "--unlabelled", str(unlabelled), "DATASETS.TEST", "()"]
    blind = scout(arguments, bars=False)
    assert blind["rule"] == "mutual" and blind["predictor"] == "disagreement"
    assert blind["models"][0]["temperature"] is None and "cannot be compared" in caplog.text
    assert blind["pairs"] == found["pairs"]


def test_pixels_without_labels_are_drawn_from_whole_images(unlabelled, tmp_path):
    classes = [str(k) for k in range(6)]
    found = draw_unlabelled(unlabelled, classes, 512, None, 0, plain)
    assert not found.labelled and found.where.shape == (4, 512)
    small = [record["file_name"].endswith("small.png") for record in found.records].index(True)
    assert found.where[small].max() < 48 * 40 and len(set(found.where[small].tolist())) == 512
    assert found.weight[small] * 512 == 48 * 40
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="no image there, at any depth; give"):
        draw_unlabelled(tmp_path / "empty", classes, 64, None, 0, plain)
    (unlabelled / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        draw_unlabelled(unlabelled, classes, 64, None, 0, plain)
    assert len(draw_unlabelled(unlabelled, classes, 64, None, 0, plain, allowed(1)).records) == 4


@pytest.mark.parametrize("more", [(), ("TRANSFER.MODEL_EMA", "True", "TRANSFER.TEACHERS", "ema")])
def test_costs_are_those_of_the_plan(models, scouted, no_report, more):
    arguments, _ = scouted
    teams = scout([*arguments, "--costs", *more], bars=False)["teams"]
    run = load_run([models], more)
    for members in (["a", "b"], ["a", "b", "c"]):
        plan = measure_team(replace(run, peers=[p for p in run.peers if p.name in members]))
        assert all(peer.copy > 0 for peer in plan.peers) == bool(more)
        told = next(team["memory"] for team in teams if team["members"] == members)
        assert told == engine_costs(plan)["joint"].peak


def test_flips_by_class_add_up_to_those_of_all():
    class Found:
        correct = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).bool()

    truth = torch.tensor([0, 0, 2, 2])
    found = flips_by_class(Found, truth, 3)
    assert found[0, 1].tolist()[::2] == [0.5, 0.5] and bool(found[0, 1, 1].isnan())
    assert found[1, 0].tolist()[::2] == [0.0, 0.0]


def test_predictions_are_compared_with_finished_runs(models, datasets, tmp_path, monkeypatch):
    monkeypatch.setattr("segmentation.cli.write_report", lambda run, trainer: run.output_dir)
    monkeypatch.setattr("segmentation.cli.collect_env_info", str)
    peers = yaml.safe_load(models.read_text())["TRANSFER"]["PEERS"]
    keep = "DATALOADER.NUM_WORKERS 0 SOLVER.MAX_ITER 1 TEST.EVAL_PERIOD 0".split()

    def train(title, rule, *more):
        file = models.parent / f"{title}.yaml"
        chosen = [{**peer, "NAME": "x" + peer["NAME"]} for peer in peers if peer["NAME"] in title]
        file.write_text(yaml.safe_dump({**SHARED, "TRANSFER": {"PEERS": chosen}}))
        places = ["OUTPUT_DIR", str(tmp_path / (title + rule)), "TRANSFER.RULE", rule]
        assert train_main(["--config-file", str(file), *keep, *places, *more]) == 0
        end_logging()
        return str(tmp_path / (title + rule))

    control = train("abc", "none")
    runs = [train(team, "best") for team in ("ac", "abc")]
    runs.append(train("ab", "best", "TRANSFER.RECIPE", "paper"))  # the same control, without one
    runs.append(train("bc", "better", "TRANSFER.GRANULARITY", "pixel"))
    places = ["--cache", str(models.parent / "cache"), "--output", str(tmp_path / "out")]
    found = scout(["--realised", control, *runs, "--pixels", "256", *places], bars=False)
    told = found["realised"]
    assert told["controlled"] and found["metric"] == "mIoU" and found["samples"] == 3 * 256
    assert found["names"] == ["xa", "xb", "xc"] and found["same_data"]
    assert found["starts"] == []
    other = ["--pixels", "256", *places, "SEED", "0", "TRANSFER.HELD_OUT", "0.5"]
    start_otherwise(tmp_path / "abbest" / "summary.csv", "xb/pACC", "999")
    found_elsewhere = scout(["--realised", control, *runs, *other], bars=False)
    assert not found_elsewhere["same_data"]
    assert f"{tmp_path}/abbest began with it at 999.0" in found_elsewhere["starts"][0]
    ends = {}
    for title in ("abcnone", "bcbetter"):
        rows = list(csv.DictReader((tmp_path / title / "summary.csv").open()))
        ends[title] = {n: float(rows[-1][f"{n}/mIoU"]) for n in ("xb", "xc")}
    row = next(row for row in told["runs"] if row["members"] == ["xb", "xc"])
    expected = [ends["bcbetter"][n] - ends["abcnone"][n] for n in row["members"]]
    assert row["gains"] == pytest.approx(expected) and any(expected)
    # judged as its run taught: one teacher a pixel
    arguments = ["--config-file", str(models), "--pixels", "256", *places]
    monkeypatch.setattr("segmentation.scouting.write_scout_report", lambda path, *rest: path)
    flips = {}
    for kind in ("pixel", "image"):
        rules = ["TRANSFER.RULE", "better", "TRANSFER.GRANULARITY", kind]
        teams = scout([*arguments, *rules], bars=False)["teams"]
        same = next(team["predicted"] for team in teams if team["members"] == ["b", "c"])
        flips[kind] = pytest.approx(list(same["flips"].values()))
    assert row["predicted"]["flips"] == flips["pixel"]
    assert row["predicted"]["flips"] != flips["image"]
    assert {"flips", "right-kl", "ensemble"} <= told["correlations"].keys()
    assert told["correlations"]["kl"]["teams"]["count"] == 4
    assert "gains of mIoU (points)" in (tmp_path / "out" / "report.html").read_text()
    monkeypatch.setattr("segmentation.scouting.inspect", None)  # no model is loaded
    for bad, words in (
        ([str(tmp_path)], "it has no transfer.yaml"),
        ([control], "no run with transfer"),
        ([control, *runs, "--unlabelled", "/x"], "tested on labelled data"),
        ([control, *runs, "--skip-unfit"], "every model of the runs is needed"),
        ([control, *runs, "--config-file", str(models)], "leave --config-file out"),
    ):
        with pytest.raises(OptionError, match=words):
            scout(["--realised", *bad, *places], bars=False)
    (tmp_path / "acbest" / "xc" / "model_final.pth").unlink()
    with pytest.raises(OptionError, match="did not finish: xc"):
        scout(["--realised", control, *runs, *places], bars=False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--for", "x"], "there are a, b, c"),
        (["PEER.a.MODEL.WEIGHTS", "no.pth"], "a: no.pth: no such file"),
        (["PEER.a.MODEL.WEIGHTS", ""], "has no WEIGHTS"),
        (["TRANSFER.RULE", "beste"], "beste"),
    ],
)
def test_faults_end_in_one_line(models, datasets, tmp_path, caplog, more, message):
    places = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    assert main(["--config-file", str(models), *places, *more]) == 1
    assert message in caplog.text and not (tmp_path / "out").exists()


def test_what_cannot_be_ranked_is_refused_before_any_model_is_asked(
    models, datasets, unlabelled, tmp_path, monkeypatch
):
    monkeypatch.setattr("segmentation.scouting._ask", None)
    arguments = ["--config-file", str(models), "--output", str(tmp_path / "out")]
    for more, told in (
        (["--team-size", "4"], "--team-size 4: there are 3 models"),
        (["--team-size", "1"], "--team-size 1"),
        (["--unlabelled", str(unlabelled), "--predictor", "flips"], "'flips' cannot be used"),
    ):
        with pytest.raises(OptionError, match=told):
            scout([*arguments, *more], bars=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("segmentation.scouting.inspect", None)  # nor is one looked at
    for folder, told in (
        ("none", "no such folder"),
        ("empty", "no image there, at any depth; give"),
    ):
        with pytest.raises(OptionError, match=f"--unlabelled {tmp_path}/{folder}: {told}"):
            scout([*arguments, "--unlabelled", f"{tmp_path}/{folder}"], bars=False)
