"""The benchmark that tests scouting's predictions, on next to nothing."""

import csv
import importlib
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest

from common.realised import compare, realised_gains
from common.survey import survey
from tests.common.test_realised import finished, judged
from tests.common.test_scouting import random_source

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {
    "segmentation": {
        "ITERATIONS": {"fpn": (1, 1), "deeplab": (1, 1)},
        "SCENES": {"pretrain": 8, "tune": 4, "test": 3, "scouted": 2},
        "FINETUNING": ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2],
        "PIXELS": 64,
    },
    "saliency": {
        "PRETRAIN_EPOCHS": (1, 1),
        "VIDEOS": {"pretrain": 2, "tune": 2, "test": 2, "scouted": 3, "glance": 1},
        "TUNING": ["--epochs", "1", "--lr", "1e-3"],
    },
}
NAMES = {"segmentation": ["fpn0", "deeplab0"], "saliency": ["recent0", "around0", "pair0"]}
PAIRS = {"segmentation": 1, "saliency": 2}
SAMPLES = {"segmentation": 2 * 64, "saliency": 3 * 6}  # of scenes, and of every fourth of 24 frames


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("DETECTRON2_DATASETS", "")  # set anew, and put back
    monkeypatch.setattr("saliency.train.finish", lambda trainer, *rest: trainer.folder)
    monkeypatch.setattr("common.scout_check.write_realised_report", lambda path, *rest: path)
    yield importlib.import_module("scouting")
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("task", TINY)
def test_what_is_predicted_is_compared_with_what_pairs_gained(
    task, benchmark, tmp_path, monkeypatch, capsys
):
    module = importlib.import_module(f"scouted_{task}")
    for name, value in {**TINY[task], "NAMES": NAMES[task], "SEEDS": 1}.items():
        assert type(getattr(module, name)) is type(value)
        monkeypatch.setattr(module, name, value)
    table = tmp_path / "kept" / "table.csv"
    asked = ["--task", task, "--folder", str(tmp_path), "--pairs", "2", "--table", str(table)]
    found = benchmark.main(asked)
    told = found["realised"]
    assert sorted(found["names"]) == sorted(NAMES[task]) and found["samples"] == SAMPLES[task]
    assert told["controlled"] and [row["runs"] for row in told["runs"]] == [1] * PAIRS[task]
    assert {row["rule"] for row in told["runs"]} == {"best"}
    assert any(gain for row in told["runs"] for gain in row["gains"])
    out = capsys.readouterr().out
    assert f"{PAIRS[task]} teams of {len(NAMES[task])} models; gain of {found['metric']}" in out
    benchmark.main(["--read", str(table)])
    again = capsys.readouterr().out.strip()
    assert again in out and again.count("\n") == 3 + len(told["correlations"])
    monkeypatch.setattr(module, "train", None)  # done once: nothing is trained again
    benchmark.train_all(module, tmp_path, 2, 1)


@pytest.fixture
def told():
    """Twelve of the fifteen pairs of six models, in an order drawn by lot."""
    found = survey(*random_source(models=6, count=120))
    pairs = [(j, i) for i in range(6) for j in range(i)][:12][::-1]
    gains = {pair: (7 * pair[0] % 5, 11 * pair[1] % 7 - pair[0]) for pair in pairs}
    runs = [finished(pair, [50 + x for x in gains[pair]]) for pair in pairs]
    own = found.correct.double().mean(dim=1).tolist()
    ensemble = {pair: [0.5 - own[i] for i in pair] for pair in pairs}
    realised = [replace(one, controlled=True) for one in realised_gains(runs)]
    compared = compare(realised, judged(found), ensemble)
    return {"names": found.names, "metric": "top1", "predictor": "kl", "realised": compared}


def test_a_table_of_pairs_gives_the_correlations_and_p_without_a_model(benchmark, told, tmp_path):
    benchmark.write_table(tmp_path / "t.csv", told)
    again = benchmark.read_table(tmp_path / "t.csv")
    assert {key: again[key] for key in ("names", "metric", "predictor")} == {
        "names": list(told["names"]),
        "metric": "top1",
        "predictor": "kl",
    }
    first, second = told["realised"]["correlations"], again["realised"]["correlations"]
    assert list(second) == ["kl", *(name for name in first if name != "kl")]
    for name in ("kl", "right-kl", "loss-gap"):
        for over, one in first[name].items():
            assert second[name][over] == pytest.approx(one, nan_ok=True, abs=1e-9), (name, over)
    for name in ("flips", "ensemble"):  # what is equal but for rounding is equal in the table
        rho = [found[name]["members"]["rho"] for found in (first, second)]
        assert rho[0] == pytest.approx(rho[1], abs=0.1)
    p = [second[name][over]["p"] for name in ("kl", "flips") for over in ("members", "partners")]
    assert all(map(math.isfinite, p)) and math.isnan(second["ensemble"]["teams"]["p"])


def test_a_table_holds_every_pair_with_its_members_and_short_numbers(benchmark, told, tmp_path):
    benchmark.write_table(tmp_path / "t.csv", told)
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["team", "member", "rule", "runs", "gain_top1", "kl"]
    assert len(rows) == 2 * 15 and [row["runs"] for row in rows].count("0") == 2 * 3
    a, b, *_ = told["names"]
    assert [rows[0][x] for x in ("team", "member", "gain_top1")] == [f"{a} {b}", a, "0"]
    assert rows[1]["gain_top1"] == "4" and rows[1]["member"] == b  # 11 * 1 % 7 - 0
    assert all(len(value) <= 12 for row in rows for value in list(row.values())[4:])
    assert rows[-1]["gain_top1"] == rows[-1]["ensemble"] == "" and rows[-1]["flips"]


def test_pairs_that_are_not_told_leave_no_p_and_no_table_is_refused(benchmark, told, tmp_path):
    told["realised"]["others"].pop()
    benchmark.write_table(tmp_path / "t.csv", told)
    found = benchmark.read_table(tmp_path / "t.csv")["realised"]["correlations"]["flips"]
    assert math.isfinite(found["teams"]["rho"]) and math.isnan(found["teams"]["p"])
    (tmp_path / "other.csv").write_text("team,gain\n")
    with pytest.raises(ValueError, match=r"columns are team,gain; expected team,member,rule,runs"):
        benchmark.read_table(tmp_path / "other.csv")
    with pytest.raises(SystemExit):
        benchmark.main(["--read", str(tmp_path / "none.csv")])
