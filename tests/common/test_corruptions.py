"""Robustness in experiments: what is asked, what is measured again, what is told of it."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.experiment.command import run
from common.experiment.corruptions import check_corruptions, read_corruptions
from common.experiment.plan import read_experiment
from common.experiment.results import write_results
from common.experiment.work import finished, labels_of, work
from common.options import OptionError
from common.report import experiment_sentences
from tests.common.test_experiment import content, written
from tests.common.toy_experiment import ToyTask, built, right

PATH = Path("exp.yaml")


class Spoilt(ToyTask):
    """Its test set can be replaced by other samples, harder the higher the severity."""

    severities = {"other": 3, "more": 5}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.asked = []

    def measure_corrupted(self, options, files, corruptions, temperatures):
        self.asked.append((sorted(files), list(corruptions)))
        modules = {
            name: built({"name": name, "model": str(file), "width": 16 if name == "bb" else 8})
            for name, file in files.items()
        }
        return [
            {
                f"{name}/top1": 100 * right(module, 100 + severity)[0].double().mean().item()
                for name, module in modules.items()
            }
            for _, severity in corruptions
        ]


class Calibrated(Spoilt):
    """It tells calibration errors, which on the spoilt set are the severity over temperature."""

    def _measured(self, modules, seed):
        found = super()._measured(modules, seed)
        for i, name in enumerate(modules):
            told = {"ece": 5.0, "ece_calibrated": 2.0, "temperature": 2.0 + i}
            found.metrics |= {f"{name}/{key}": value for key, value in told.items()}
        return found

    def measure_corrupted(self, options, files, corruptions, temperatures):
        rows = super().measure_corrupted(options, files, corruptions, temperatures)
        for row, (_, severity) in zip(rows, corruptions, strict=True):
            for name in files:
                row[f"{name}/ece"] = float(severity)
                row[f"{name}/ece_calibrated"] = severity / temperatures[name]
        return rows


def test_calibration_on_the_spoilt_set_is_told_at_the_clean_temperatures(tmp_path):
    task = Calibrated()
    asked = [{"other": 2}, {"more": 4}]
    path = written(tmp_path, corruptions=asked, controls=["none", "best"], compare=[])
    experiment = read_experiment(task.read(path), path)
    for label in labels_of(experiment):
        metrics = work(experiment, task, label)["test" if "start" in label else "last"]["metrics"]
        assert [metrics[f"bb/ece@{x}"] for x in ("other-2", "more-4", "corrupted")] == [2, 4, 3]
        assert metrics["a/ece_calibrated@corrupted"] == 3 / 2  # the temperature of a
        assert metrics["bb/ece_calibrated@corrupted"] == pytest.approx(1)
    write_results(experiment, task)
    rows = list(csv.DictReader((tmp_path / "out/comparisons.csv").open()))
    told = {row["metric"] for row in rows if row["of"] == "robustness"}
    assert {"ece@corrupted", "ece_calibrated@corrupted"} <= told
    report = (tmp_path / "out/report.html").read_text()
    title = "Calibration on the corrupted test set"
    assert title in report and f"{title}, at a fitted temperature" in report
    analysis = json.loads((tmp_path / "out/analysis.json").read_text())
    assert [family["size"] for family in analysis["robustness"]["recalibrated"]["families"]]
    assert not any(f["primary"] for f in analysis["robustness"]["calibration"]["families"])
    analysis["robustness"]["recalibrated"]["gains"]["best"]["mean"]["shown"] = True
    told = [line for line in experiment_sentences(analysis) if "best is" in line]
    fitted = "calibrated, each at a temperature fitted on the held-out part, on the corrupted"
    assert len(told) == 1 and fitted in told[0]


def test_what_is_asked():
    assert read_corruptions(None, PATH) == []
    asked = ["blur", {"jpeg": 5}, {"noise": [1, 3]}]
    expected = [("blur", 3), ("jpeg", 5), ("noise", 1), ("noise", 3)]
    assert read_corruptions(asked, PATH) == expected
    assert read_experiment(content(corruptions=asked), PATH).corruptions == expected


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("blur", "expected a list"),
        ([3], "expected a name"),
        ([{"blur": "much"}], "whole number"),
        ([{"blur": True}], "whole number"),
        (["blur", {"blur": [1, 3]}], "blur-3 is there twice"),
    ],
)
def test_what_is_no_list_of_corruptions_is_refused(asked, says):
    with pytest.raises(OptionError, match=says):
        read_corruptions(asked, PATH)


def test_the_task_must_know_them(tmp_path):
    check_corruptions([("other", 3)], Spoilt(), PATH)
    with pytest.raises(OptionError, match="unknown corruption 'othr'; did you mean other"):
        check_corruptions([("othr", 3)], Spoilt(), PATH)
    with pytest.raises(OptionError, match="severity is 4; expected 1 to 3"):
        check_corruptions([("other", 4)], Spoilt(), PATH)
    with pytest.raises(OptionError, match="this task has none"):
        run(ToyTask(), [str(written(tmp_path, corruptions=["other"])), "--list"])


def test_weights_are_measured_under_each_and_told(tmp_path):
    task, corruptions = Spoilt(), [{"other": 2}, "more"]
    path = written(tmp_path, corruptions=corruptions, controls=["solo", "none", "best"], compare=[])
    experiment = read_experiment(task.read(path), path)
    rows = {label: work(experiment, task, label) for label in labels_of(experiment)}
    assert all(sorted(names) == ["a", "bb"] for names, _ in task.asked)
    last = rows["solo:1"]["last"]["metrics"]
    for name in ("a", "bb"):
        file = tmp_path / f"out/seed-1/solo/{name}/{name}/last.safetensors"
        module = built({"name": name, "model": str(file), "width": 16 if name == "bb" else 8})
        each = [100 * right(module, 100 + s)[0].double().mean().item() for s in (2, 3)]
        told = [last[f"{name}/top1@{label}"] for label in ("other-2", "more-3", "corrupted")]
        assert told == pytest.approx([*each, np.mean(each)])
    write_results(experiment, task)
    runs = list(csv.DictReader((tmp_path / "out/runs.csv").open()))
    assert {"start/a/top1@corrupted", "chosen/bb/top1@other-2", "last/a/top1"} <= set(runs[0])
    compared = list(csv.DictReader((tmp_path / "out/comparisons.csv").open()))
    found = {
        row["metric"]: row
        for row in compared
        if (row["of"], row["arm"], row["target"]) == ("robustness", "best", "a")
    }
    assert set(found) == {"top1@other-2", "top1@more-3", "top1@corrupted"}
    assert found["top1@corrupted"]["p_holm"] and not found["top1@more-3"]["p_holm"]
    of_best = [rows[f"best:{s}"]["chosen"]["metrics"]["a/top1@corrupted"] for s in (0, 1)]
    of_none = [rows[f"none:{s}"]["chosen"]["metrics"]["a/top1@corrupted"] for s in (0, 1)]
    gain = np.mean(np.subtract(of_best, of_none))
    assert float(found["top1@corrupted"]["mean"]) == pytest.approx(gain)
    report = (tmp_path / "out/report.html").read_text()
    assert "Calibration on the corrupted" not in report  # this task measures none
    assert "Robustness to corruptions" in report and "the mean over other-2 and more-3" in report
    analysis = json.loads((tmp_path / "out/analysis.json").read_text())
    analysis["robustness"]["mean"]["gains"]["best"]["mean"]["shown"] = True
    told = [line for line in experiment_sentences(analysis) if "corrupted test set" in line]
    assert len(told) == 1 and "in top1 on the corrupted test set than none" in told[0]


def test_a_finished_experiment_takes_corruptions_without_training_anew(tmp_path):
    task = Spoilt()
    path = written(tmp_path, controls=["none", "best"], compare=[], train={"epochs": 2})
    plain = read_experiment(task.read(path), path)
    before = {label: work(plain, task, label) for label in labels_of(plain)}
    assert task.asked == []
    more = replace(plain, corruptions=[("other", 1)])
    assert all(finished(more, *split(label)) is None for label in before)
    task.train = None  # nothing is trained any more
    for label, old in before.items():
        found = work(more, task, label)
        assert {k: v for k, v in found.items() if k in ("cost", "history", "asked")} == {
            k: v for k, v in old.items() if k in ("cost", "history", "asked")
        }
        assert finished(more, *split(label)) == found
    found = work(replace(more, corruptions=[("more", 5)]), task, "best:0")
    metrics = found["last"]["metrics"]
    assert "a/top1@more-5" in metrics and "a/top1@other-1" not in metrics
    assert work(plain, task, "best:0")["last"]["metrics"]["a/top1"] == metrics["a/top1"]


def split(label):
    arm, _, seed = label.rpartition(":")
    return arm, int(seed)
