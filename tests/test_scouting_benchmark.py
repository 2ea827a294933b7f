"""The benchmark that tests scouting's predictions, on next to nothing."""

import importlib
import logging
from pathlib import Path

import pytest

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
    found = benchmark.main(["--task", task, "--folder", str(tmp_path), "--pairs", "2"])
    told = found["realised"]
    assert sorted(found["names"]) == sorted(NAMES[task]) and found["samples"] == SAMPLES[task]
    assert told["controlled"] and [row["runs"] for row in told["runs"]] == [1] * PAIRS[task]
    assert {row["rule"] for row in told["runs"]} == {"best"}
    assert any(gain for row in told["runs"] for gain in row["gains"])
    assert f"{PAIRS[task]} teams; " in capsys.readouterr().out
    monkeypatch.setattr(module, "train", None)  # done once: nothing is trained again
    benchmark.train_all(module, tmp_path, 2, 1)
