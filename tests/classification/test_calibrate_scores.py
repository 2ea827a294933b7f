"""Scores of different peers, compared at temperatures of their own."""

import pytest
import torch
import torch.nn.functional as F
import yaml

from classification.peer import classify
from classification.task import TransferTask
from classification.train import run
from common.calibration import HOTTEST, TemperatureFit, fit_temperature
from common.checkpoint import load_run
from common.distributed import World
from common.options import OptionError
from common.score_temperatures import ScoreTemperatures
from common.transfer import KnowledgeTransfer
from tests.classification.test_task import batches, model
from tests.classification.test_train import (
    arguments_of,
    assert_equal_weights,
    ranked,
    weights_of,
)
from tests.launch import launch

HERE = World(0, 1, 0, torch.device("cpu"))


def cross_entropy(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


def test_only_the_score_changes():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 5, requires_grad=True), torch.arange(6) % 5
    plain = classify(logits, target, cross_entropy, "loss")
    cool = classify(logits, target, cross_entropy, "loss", torch.tensor(4.0))
    assert torch.equal(cool.logits, plain.logits) and torch.equal(cool.task_loss, plain.task_loss)
    expected = (logits.detach() / 4).log_softmax(dim=1)[torch.arange(6), target]
    torch.testing.assert_close(cool.score, expected)
    assert not cool.score.requires_grad
    sure = classify(logits, target, cross_entropy, "confidence", torch.tensor(0.5)).score
    torch.testing.assert_close(sure, (logits.detach() / 0.5).softmax(dim=1).amax(dim=1))


def test_who_teaches_can_change_by_it_and_what_is_taught_does_not():
    # both are right on the sample; the first is surer, and four times too sure
    target = torch.tensor([0])
    loud, calm = torch.tensor([[8.0, 0.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0]])

    def objective(*temperatures):
        outputs = [
            classify(z, target, cross_entropy, "loss", t)
            for z, t in zip((loud, calm), temperatures, strict=True)
        ]
        return KnowledgeTransfer("best")(outputs)

    raw, calibrated = objective(None, None), objective(torch.tensor(4.0), torch.tensor(1.0))
    assert raw.roles[:, :, 0].tolist() == [[0, 1], [0, 0]]
    assert calibrated.roles[:, :, 0].tolist() == [[0, 0], [1, 0]]
    assert torch.equal(raw.kl, calibrated.kl)


def peers_temperatures(folder):
    state = load_run(folder / "run")
    rows = state["progress"]["history"]
    told = [[row[f"{name}/score_temperature"] for name in "ab"] for row in rows]
    return told, state["evaluator"]["temperatures"]["values"].tolist()


def test_a_run_fits_them_on_its_held_out_part_and_tells(digits, tmp_path, caplog):
    caplog.set_level("INFO")
    for when in ("start", "epoch"):
        more = ("--held-out", "0.2", "--calibrate-scores", when)
        progress = run(arguments_of(digits, tmp_path / when, *more), bars=False)
        told, saved = peers_temperatures(tmp_path / when)
        assert saved == told[-1] and len(told) == 3
        changes = len({tuple(row) for row in told})
        assert changes == (1 if when == "start" else 3)
        assert "Temperature of the score" in (tmp_path / when / "run/report.html").read_text()
        assert "a/score_temperature" in (tmp_path / when / "run/summary.csv").read_text()
        scalars = (tmp_path / when / "run/scalars.csv").read_text()
        assert "eval/b/score_temperature" in scalars
    assert progress.history[0]["a/score_temperature"] == told[0][0]
    assert caplog.text.count("scores are compared at the temperatures") == 4
    assert "--calibrate-scores: the temperatures are fitted on the split" not in caplog.text
    assert yaml.safe_load((tmp_path / "epoch/run/args.yaml").read_text())["calibrate_scores"]


def test_the_evaluation_split_is_taken_with_a_warning(digits, tmp_path, caplog):
    run(arguments_of(digits, tmp_path, "--calibrate-scores", "start", epochs=1), bars=False)
    assert "fitted on the split 'validation'" in caplog.text and "--held-out SHARE" in caplog.text


def test_they_are_those_of_the_peers_logits(digits, tmp_path, monkeypatch):
    seen = {}

    def add(fit, logits, target):
        seen.setdefault(id(fit), []).append((logits.clone(), target.clone()))
        whole(fit, logits, target)

    whole = TemperatureFit.add
    monkeypatch.setattr(TemperatureFit, "add", add)
    more = ("--held-out", "0.2", "--calibrate-scores", "start", "--validation-batch-size", "30")
    run(arguments_of(digits, tmp_path, *more, epochs=1), bars=False)
    (start, _), _ = peers_temperatures(tmp_path)
    expected = [fit_temperature(lambda kept=kept: kept) for kept in seen.values()]
    assert [sum(len(y) for _, y in kept) for kept in seen.values()] == [80, 80]
    assert start == pytest.approx(expected, rel=1e-3)


def test_engines_and_processes_agree(digits, tmp_path):
    def asked(name, *more):
        calibrated = ("--calibrate-scores", "epoch", "--held-out", "0.2")
        return arguments_of(digits, tmp_path / name, *calibrated, *more, epochs=1, drop_path=0)

    run(asked("joint"), bars=False)
    run(asked("two-pass", "--engine", "two-pass"), bars=False)
    launch(ranked, 2, asked("seated", "--engine", "peer-parallel"))
    launch(ranked, 2, asked("ranks", "-b", "20"))
    expected, _ = peers_temperatures(tmp_path / "joint")
    for name in ("two-pass", "seated", "ranks"):
        told, saved = peers_temperatures(tmp_path / name)
        assert told[0] == pytest.approx(expected[0], rel=1e-4)
        assert told[-1] == pytest.approx(expected[-1], rel=2e-2) and saved == told[-1]
        for peer in "ab":
            torch.testing.assert_close(
                *(weights_of(tmp_path / which, peer) for which in ("joint", name)),
                rtol=1e-3,
                atol=1e-4,
            )


def test_off_is_as_ever_and_a_run_may_begin_to_calibrate(digits, tmp_path, caplog):
    caplog.set_level("INFO")
    run(arguments_of(digits, tmp_path / "one"), bars=False)
    run(arguments_of(digits, tmp_path / "two", "--calibrate-scores", "off"), bars=False)
    assert_equal_weights(weights_of(tmp_path / "one", "a"), weights_of(tmp_path / "two", "a"))
    assert "temperatures" not in load_run(tmp_path / "one/run")["evaluator"]
    middle = tmp_path / "one/run/run-00001-00000000.pt"
    more = ("--calibrate-scores", "start", "--allow-changed-options", "--resume", str(middle))
    history = run(arguments_of(digits, tmp_path / "three", *more, epochs=3), bars=False).history
    assert "--calibrate-scores 'off' -> 'start'" in caplog.text
    assert "a/score_temperature" not in history[1]
    assert history[2]["a/score_temperature"] == history[3]["a/score_temperature"] != 1


def test_what_does_not_fit_is_refused(digits, tmp_path):
    with pytest.raises(OptionError, match="--bce-loss trains without one"):
        run(arguments_of(digits, tmp_path, "--bce-loss", "--calibrate-scores", "start"))
    with pytest.raises(ValueError, match="choose from start, epoch"):
        ScoreTemperatures("ab", "off", HERE)


def test_a_peer_at_the_limit_is_named(caplog):
    temperatures = ScoreTemperatures("ab", "start", HERE)
    guessing, sensible = TemperatureFit(), TemperatureFit()
    guessing.add(torch.tensor([[3.0, 0.0]]), torch.tensor([1]))
    sensible.add(torch.tensor([[3.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))
    held = temperatures.of("a")
    temperatures.fit([guessing, sensible])
    assert held == HOTTEST and not temperatures.due  # the peers' own elements follow
    assert "a: the score temperature is at its limit" in caplog.text
    assert "b: the score" not in caplog.text


def test_a_stock_loop_takes_temperatures():
    peers = {"a": model(0), "b": model(1)}
    task = TransferTask(peers, temperatures={"a": 5.0}, verbose=False)
    (batch,) = batches(1)
    images, target = batch
    scores = {}
    task.transfer = lambda outputs, step: (
        scores.update(enumerate(output.score for output in outputs))
        or KnowledgeTransfer(names=["a", "b"])(outputs)
    )
    told = task(images, target)
    assert torch.equal(scores[0], -cross_entropy(told["a/output"] / 5, target))
    assert torch.equal(scores[1], -cross_entropy(told["b/output"], target))
    with pytest.raises(ValueError, match="by the names of peers: a, b"):
        TransferTask(peers, temperatures={"c": 1.0}, verbose=False)
