"""The held-out part of training data, pixels that flip, and an experiment from its YAML on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from common.checkpoint import read_file
from common.experiment import read_experiment
from common.experiment.work import labels_of, work
from common.options import OptionError
from segmentation import prepare_scenes
from segmentation.config import load_run
from segmentation.data import load_datasets
from segmentation.errors import ConfigError, DataError
from segmentation.held_out import Part, hold_out, part_of
from segmentation.pixels import PixelRecord, PixelTemperatures, confidence_at, flips
from segmentation.trainer import TransferTrainer
from segmentation.trials import Segmentation, main
from tests.segmentation.runs import SHARED, write_peer, write_run

CONFIGS = Path(__file__).parents[2] / "segmentation/configs/experiments"


def written(folder, **more):
    peers = [
        {"NAME": kind, "CONFIG": write_peer(folder, kind).name, "WEIGHTS": ""}
        for kind in ("fpn", "deeplab")
    ]
    peers[1]["OPTS"] = ["SOLVER.MOMENTUM", 0.8]
    train = {key: value for key, value in SHARED.items() if key != "SEED"}
    train["SOLVER"] = {**train["SOLVER"], "MAX_ITER": 4, "CHECKPOINT_PERIOD": 0}
    content = {
        "output": str(folder / "out"),
        "seeds": [3],
        "held_out": 0.3,
        "peers": peers,
        "train": {**train, "TEST.EVAL_PERIOD": 2},
        "controls": ["solo", "none", "one_way"],
        "arms": {"pixel": {"TRANSFER": {"GRANULARITY": "pixel"}, "PEER.fpn.SOLVER.BASE_LR": 0.02}},
        **more,
    }
    path = folder / "exp.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_part_is_drawn_by_the_seed_alone_and_told_by_its_name(datasets):
    rest, part = (Part(("scenes_train",), kind, 0.3, 3) for kind in ("rest", "held_out"))
    whole = [record["file_name"] for record in load_datasets(["scenes_train"])]
    found = [[x["file_name"] for x in load_datasets([p.name])] for p in (rest, part)]
    assert [len(x) for x in found] == [7, 3]
    assert sorted(found[0] + found[1]) == whole
    assert part_of(part.name) == part and part_of("scenes_train") is None
    other = Part(("scenes_train",), "held_out", 0.3, 4)
    assert not np.array_equal(part.indices(10), other.indices(10))
    both = Part(("scenes_train", "scenes_val"), "held_out", 0.5, 0)
    assert len(load_datasets([both.name])) == 6
    twice = [Part(("scenes_train",) * 2, kind, 0.3, 3) for kind in ("rest", "held_out")]
    files = [{x["file_name"] for x in load_datasets([p.name])} for p in twice]
    assert not files[0] & files[1]  # an image that is listed twice is on one side
    with pytest.raises(DataError, match="nothing would be left"):
        rest.indices(1)


def test_a_run_trains_on_the_rest_and_chooses_by_the_held_out_part(datasets, tmp_path):
    path = write_run(tmp_path, kinds=("fpn",), RULE="none", HELD_OUT=0.3)
    run = load_run([path], ["SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0"])
    trainer = TransferTrainer(run)
    held_out = {record["file_name"] for record in load_datasets(trainer.run.cfg.DATASETS.TEST)}
    assert len(held_out) == 3 and len(trainer.dataset) == 7
    assert not held_out & {record["file_name"] for record in trainer.dataset}
    assert hold_out(trainer.run) is trainer.run
    with pytest.raises(ConfigError, match="give a SEED"):
        hold_out(load_run([path], ["SEED", "-1"]))
    with pytest.raises(ConfigError, match="HELD_OUT is 1"):
        load_run([path], ["TRANSFER.HELD_OUT", "1.0"])


def test_pixels_by_hand(datasets):
    pixels, right = PixelRecord("scenes_val"), 0
    for record in load_datasets(["scenes_val"]):
        labels = pixels._labels_of(record["file_name"])
        p = torch.full((6, *labels.shape), 0.1)
        p[0] = 0.5  # background is the answer everywhere
        pixels("a", record, p)
        pixels("b", record, 7 * p)  # a sum of several
        right += int((labels == 0).sum())
        truth = torch.nn.functional.one_hot(labels.clamp(max=5), 6)
        pixels("c", record, truth.permute(2, 0, 1).float())
    a, c = (torch.from_numpy(np.unpackbits(pixels.right(x).numpy())) for x in "ac")
    assert a.sum() == right < c.sum()
    assert flips(pixels.right("a"), pixels.right("c")) == (int(c.sum() - a.sum()), 0)
    assert pixels.calibration_error("c") == 0
    share = a.sum().item() / c.sum().item()
    assert pixels.calibration_error("a") == pytest.approx(100 * abs(share - 0.5))
    assert pixels.calibration_error("b") == pytest.approx(pixels.calibration_error("a"))
    with pytest.raises(ValueError, match="same images"):
        flips(pixels.right("a"), pixels.right("a")[1:])


def test_temperatures_of_pixels_undo_how_loud_a_model_is(datasets):
    fits, pixels = PixelTemperatures("scenes_val"), None
    for _ in range(2):  # first the temperatures, then what is left of the error at them
        generator = torch.Generator().manual_seed(0)
        for record in load_datasets(["scenes_val"]):
            labels = fits._labels_of(record["file_name"])
            hint = torch.nn.functional.one_hot(labels.clamp(max=5), 6).permute(2, 0, 1)
            z = hint + torch.randn(hint.shape, generator=generator)
            for name, loud in (("plain", 1.0), ("loud", 3.0)):
                p = (loud * z).softmax(dim=0)
                (fits if pixels is None else pixels)(name, record, 7 * p)
        temperatures = fits.values()
        pixels = pixels or PixelRecord("scenes_val", temperatures)
    # z is the hint plus noise of variance 1: the truth of it is softmax(z), so T is about 1
    assert temperatures["plain"] == pytest.approx(1, rel=0.1)
    assert temperatures["loud"] / temperatures["plain"] == pytest.approx(3, rel=2e-3)
    assert torch.equal(pixels.right("plain"), pixels.right("loud"))
    assert pixels.calibration_error("loud") > 3 * pixels.recalibrated_error("loud")
    same = pytest.approx(pixels.recalibrated_error("plain"), abs=0.1)
    assert pixels.recalibrated_error("loud") == same


def test_confidence_at_a_temperature_by_hand():
    p = torch.tensor([0.64, 0.36, 0.0]).view(3, 1, 1)
    assert confidence_at(p, 1.0).item() == pytest.approx(0.64)
    assert confidence_at(5 * p, 2.0).item() == pytest.approx(0.8 / 1.4)  # roots of both


def test_keys_are_nested_or_dotted_and_an_arm_changes_one_of_them(datasets, tmp_path):
    path = written(tmp_path, arms={"own": {"TRANSFER": {"RULE": "mutual", "WEIGHT": 0.5}}})
    task = Segmentation()
    experiment = read_experiment(task.read(path), path)
    options = experiment.options("own", 3)
    assert options["rule"] == "mutual" and options["TRANSFER.WEIGHT"] == 0.5
    run = task._run(options)
    assert run.transfer.RULE == "mutual" and run.transfer.HELD_OUT == 0.3 and run.cfg.SEED == 3
    assert run.cfg.SOLVER.MAX_ITER == 4 and run.cfg.SOLVER.IMS_PER_BATCH == 2
    assert task.check(options) == ["fpn", "deeplab"]


def test_an_arm_can_be_a_recipe_which_comes_before_what_is_given_for_all(datasets, tmp_path):
    best = {"TRANSFER": {"RECIPE": "best-known", "WEIGHT": 0.5}}
    path = written(tmp_path, arms={"known": best, "plain": {}})
    content = yaml.safe_load(path.read_text())
    content["train"]["TRANSFER"] = {"TEMPERATURE": 4.0}
    path.write_text(yaml.safe_dump(content))
    task = Segmentation()
    experiment = read_experiment(task.read(path), path)
    node = task._run(experiment.options("known", 3)).transfer
    assert (node.RULE, node.TEMPERATURE, node.WEIGHT) == ("mixture", 2.0, 0.5)
    assert (node.TEACHERS, node.MODEL_EMA, node.RECIPE) == ("ema+own", True, "best-known")
    plain = task._run(experiment.options("plain", 3)).transfer
    assert (plain.RULE, plain.TEMPERATURE, plain.MODEL_EMA) == ("best", 4.0, False)
    content["train"]["TRANSFER"] = {"RECIPE": "best-known"}
    path.write_text(yaml.safe_dump(content))
    experiment = read_experiment(task.read(path), path)
    assert task._run(experiment.options("plain", 3)).transfer.RULE == "mixture"
    assert task._run(experiment.options("none", 3)).transfer.RULE == "none"


def test_arms_switch_averages_that_are_chosen_and_measured(datasets, tmp_path):
    averaged = {"TRANSFER": {"TEACHERS": "ema", "MODEL_EMA": True, "MODEL_EMA_DECAY": 0.8}}
    averaged["TRANSFER"]["RULE"] = "self"
    path = written(tmp_path, controls=["none"], arms={"ema_self": averaged})
    task = Segmentation()
    experiment = read_experiment(task.read(path), path)
    row = [work(experiment, task, label) for label in ("start:3", "ema_self:3")][1]
    folder = tmp_path / "out/seed-3/ema_self/run/fpn"
    final = read_file(folder / "model_final.pth")
    weights = {"fpn": tmp_path / "average.pth"}
    torch.save({"model": final["model"]}, weights["fpn"])
    options = experiment.options("ema_self", 3)
    start = {"fpn": tmp_path / "out/seed-3/start/fpn.pth"}
    (tmp_path / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    found = task.measure(options, weights, start).metrics
    assert found["fpn/mIoU"] == row["last"]["metrics"]["fpn/mIoU"]
    assert not all(torch.equal(x, final["model"][k]) for k, x in final["unaveraged"].items())


def test_an_experiment_from_its_yaml_to_its_report(datasets, tmp_path):
    path = written(tmp_path)
    task = Segmentation()
    experiment = read_experiment(task.read(path), path)
    rows = {label: work(experiment, task, label) for label in labels_of(experiment)}
    start = rows["start:3"]
    for arm in ("solo", "none", "one_way", "pixel"):
        row = rows[f"{arm}:3"]
        for name in ("fpn", "deeplab"):
            assert row["history"][0][f"{name}/mIoU"] == start["held_out"]["metrics"][f"{name}/mIoU"]
            values = [evaluation[f"{name}/mIoU"] for evaluation in row["history"]]
            assert row["epochs"][name] == (0, 2, 4)[values.index(max(values))]
            last = row["last"]["metrics"]
            right = read_file(tmp_path / f"out/seed-3/start/{name}.right.pt")["right"]
            pixels = int(np.unpackbits(right.numpy()).sum())
            accuracy = start["test"]["metrics"][f"{name}/pACC"]
            gained = (last[f"{name}/fixed"] - last[f"{name}/broken"]) / pixels * accuracy
            assert gained == pytest.approx(last[f"{name}/pACC"] - accuracy, abs=1e-6)
            assert 0 <= last[f"{name}/ece"] <= 100 and 0 <= last[f"{name}/ece_calibrated"] <= 100
            assert start["test"]["metrics"][f"{name}/temperature"] > 0
            assert f"{name}/temperature" not in start["held_out"]["metrics"]
            classes = row["last"]["classes"][name]
            assert np.mean(list(classes.values())) == pytest.approx(last[f"{name}/mIoU"])
    solo, none = (rows[f"{arm}:3"]["last"]["metrics"]["fpn/mIoU"] for arm in ("solo", "none"))
    assert solo == none
    config = (tmp_path / "out/seed-3/pixel/run/fpn/config.yaml").read_text()
    assert yaml.safe_load(config)["SOLVER"]["BASE_LR"] == 0.02
    strongest = max(("fpn", "deeplab"), key=lambda x: start["held_out"]["metrics"][f"{x}/mIoU"])
    transfer = yaml.safe_load((tmp_path / "out/seed-3/one_way/run/transfer.yaml").read_text())
    assert transfer["TRANSFER"]["RULE"] == f"one_way:{strongest}"
    assert main([str(path), "--report"]) == 0
    report = (tmp_path / "out/report.html").read_text()
    assert "Calibration" in report and "labelled pixels" in report and "Other metrics" in report
    assert "at the iteration that the held-out part chose" in report and "epoch" not in report
    analysis = json.loads((tmp_path / "out/analysis.json").read_text())
    assert analysis["test"]["metric"] == "mIoU" and analysis["classes"]["pixel"]["fpn"]
    assert analysis["recalibrated"]["gains"]["pixel"]["ensemble"]


def test_a_frozen_peer_teaches_and_is_measured_as_it_was(datasets, tmp_path):
    path = written(tmp_path, controls=["none", "solo"], arms={"best": {}})
    content = yaml.safe_load(path.read_text())
    content["peers"][1]["FROZEN"] = True
    content["train"]["SOLVER"]["MAX_ITER"] = 1
    path.write_text(yaml.safe_dump(content))
    task = Segmentation()
    experiment = read_experiment(task.read(path), path)
    labels = ("start:3", "solo:3", "best:3")
    start, solo, row = (work(experiment, task, label) for label in labels)
    for which in ("chosen", "last"):
        for found in (row[which]["metrics"], solo[which]["metrics"]):
            assert found["deeplab/mIoU"] == start["test"]["metrics"]["deeplab/mIoU"]
            assert found["deeplab/fixed"] == found["deeplab/broken"] == 0
    for found in (row["last"]["metrics"], solo["last"]["metrics"]):
        assert found["fpn/fixed"] + found["fpn/broken"] > 0


def test_broken_files_are_left_out_of_what_is_measured(own_datasets, tmp_path):
    """Of the held-out part and of the test set, at the start and at the end."""
    held_out = load_datasets([Part(("scenes_train",), "held_out", 0.3, 3).name])
    for broken in (held_out[0]["sem_seg_file_name"], load_datasets(["scenes_val"])[1]["file_name"]):
        Path(broken).write_bytes(b"no image")
    path = written(tmp_path, controls=["none"], arms={"best": {}})
    content = yaml.safe_load(path.read_text())
    content["train"]["SOLVER"]["MAX_ITER"] = 1
    for most in (1, 2):
        content["train"]["TRANSFER"] = {"MAX_BAD_SAMPLES": most}
        path.write_text(yaml.safe_dump(content))
        task = Segmentation()
        experiment = read_experiment(task.read(path), path)
        if most == 1:
            with pytest.raises(DataError, match="2 broken files, 1 are allowed"):
                work(experiment, task, "start:3")
    start, row = (work(experiment, task, label) for label in ("start:3", "best:3"))
    assert row["history"][0]["fpn/mIoU"] == start["held_out"]["metrics"]["fpn/mIoU"]
    assert row["last"]["metrics"]["fpn/fixed"] + row["last"]["metrics"]["fpn/broken"] > 0


def test_an_experiment_in_which_nobody_learns_is_refused(datasets, tmp_path):
    path = written(tmp_path)
    content = yaml.safe_load(path.read_text())
    for peer in content["peers"]:
        peer["FROZEN"] = True
    path.write_text(yaml.safe_dump(content))
    task = Segmentation()
    with pytest.raises(OptionError, match="every peer is frozen"):
        task.check(read_experiment(task.read(path), path).options("none", 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"x": {"TRANSFER.TEMPRATURE": 1}}}, "did you mean TEMPERATURE"),
        ({"arms": {"x": {"TRANSFER": 3}}}, "arm 'x'"),
        ({"train": {"SEED": 1}}, "list them under seeds"),
        ({"train": {"DATASETS": {"TRAIN": ["none"], "TEST": ["none"]}}}, "unknown dataset 'none'"),
        (
            {"arms": {"x": {"SOLVER": {"MOMENTUM": 0.5}}}},
            "SOLVER.MOMENTUM 0.5 would not reach peer",
        ),
        ({"tune": {"SOLVER.MOMENTUM": [0.5]}}, "give PEER.deeplab.SOLVER.MOMENTUM in the arm too"),
        (
            {"train": {"DATASETS": {"TRAIN": ["scenes_train"], "TEST": ["scenes_train"]}}},
            "10 of 10 files to train on are measured on too",
        ),
        ({"peers": [{"NAME": "a"}, {"NAME": "b"}]}, "has no CONFIG"),
        ({"seeds": [3, 4], "arms": {"x": {"PEER.a.SOLVER.BASE_LR": 1}}}, "no such peer"),
    ],
)
def test_faults_end_in_one_line_before_any_work(datasets, tmp_path, caplog, change, message):
    assert main([str(written(tmp_path, **change))]) == 1
    assert message in caplog.text
    assert not (tmp_path / "out").exists()


def test_what_a_peer_has_of_its_own_hides_an_arms_option():
    task, peer = Segmentation(), {"NAME": "a", "OPTS": ["SOLVER.BASE_LR", 0.1]}
    told = task.hidden(peer, {"PEER.a.SEED": 3}, {"SOLVER.BASE_LR": 0.2, "SEED": 4, "rule": "best"})
    assert told.keys() == {"SOLVER.BASE_LR", "SEED"}
    assert "OPTS of its entry" in told["SOLVER.BASE_LR"] and "train's PEER.a.SEED" in told["SEED"]
    both = {"SOLVER.BASE_LR": 0.2, "PEER.a.SOLVER.BASE_LR": 0.3}
    assert not task.hidden(peer, {}, both) and not task.hidden({"NAME": "b"}, {}, both)


def test_starts_that_are_not_there_are_told_for_every_seed(datasets, tmp_path, caplog):
    path = written(tmp_path, seeds=[3, 4])
    content = yaml.safe_load(path.read_text())
    (tmp_path / "fpn-3.pth").touch()
    content["peers"][0]["WEIGHTS"] = str(tmp_path / "fpn-{seed}.pth")
    path.write_text(yaml.safe_dump(content))
    assert main([str(path)]) == 1
    assert "fpn-4.pth: no such file" in caplog.text


def test_what_ships_is_understood():
    for path in CONFIGS.glob("*.yaml"):
        experiment = read_experiment(Segmentation().read(path), path)
        assert len(experiment.seeds) >= 5 and "none" in experiment.arms


def test_scenes_for_experiments_are_written_for_every_seed(tmp_path):
    assert prepare_scenes.main(["--root", str(tmp_path), "--seeds", "1", "2"]) == 0
    splits = sorted(path.name for path in (tmp_path / "scenes").iterdir())
    assert splits == ["s1-tune", "s1-val", "s2-tune", "s2-val"]
    images = [list((tmp_path / f"scenes/s1-{x}/images").iterdir()) for x in ("tune", "val")]
    assert [len(x) for x in images] == [prepare_scenes.TUNE, prepare_scenes.TEST]
