"""Experiments: what a file asks for, jobs that can be killed, choices by held-out data, reports."""

import csv
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.card import file_sum
from common.checkpoint import CheckpointError, save_weights
from common.experiment import hidden_by
from common.experiment.command import run
from common.experiment.local import ClusterJob, run_local, run_submitit
from common.experiment.plan import CONTROLS, read_experiment
from common.experiment.results import analyse, comparison_rows
from common.experiment.work import labels_of, rank_at_start, work
from common.options import OptionError
from common.report import experiment_sentences, write_experiment
from common.statistics import paired_interval
from common.trainer import Trainer
from tests.common.toy_experiment import ToyTask, built

PATH = Path("exp.yaml")
PEERS = [{"model": "toy", "name": "a"}, {"model": "toy", "name": "bb", "width": 16}]


def content(**more):
    return {"peers": PEERS, "seeds": 2, "train": {"epochs": 2}, **more}


def written(folder, **more):
    path = folder / "exp.yaml"
    path.write_text(json.dumps(content(output=str(folder / "out"), **more)))
    return path


def done(path, *labels):
    """Do jobs in this process; all of them where none is named."""
    task = ToyTask()
    experiment = read_experiment(task.read(path), path)
    return [work(experiment, task, label) for label in labels or labels_of(experiment)]


def test_controls_come_by_themselves_and_arms_are_a_line():
    asked = content(
        arms={"hot": {"temperature": 2}, "odd": {"rule": "better", "transfer-weight": 3}}
    )
    experiment = read_experiment(asked, PATH)
    assert list(experiment.arms) == [*CONTROLS, "hot", "odd"]
    assert experiment.options("hot", 1)["rule"] == "best"
    assert experiment.options("hot", 1)["temperature"] == 2
    assert experiment.arms["hot"].about == "rule best, temperature 2"
    assert experiment.options("odd", 1)["transfer_weight"] == 3
    told = read_experiment({**asked, "train": {"rule": "mixture"}}, PATH)  # said for all arms
    assert (
        told.options("hot", 1)["rule"] == "mixture" and told.options("odd", 1)["rule"] == "better"
    )
    assert told.options("none", 1)["rule"] == "none"
    assert [arm for arm in experiment.arms if experiment.arms[arm].alone] == ["solo"]
    assert experiment.options("none", 4)["held_out"] == 0.1
    assert experiment.pairs == [("best", "random")]
    assert (experiment.control, experiment.primary, experiment.together) == (
        "none",
        "chosen",
        False,
    )
    assert labels_of(experiment)[:3] == ["start:0", "start:1", "solo:0"]


def test_temperatures_for_all_arms_are_for_those_whose_rule_compares_scores():
    asked = content(
        train={"calibrate_scores": "start"},
        arms={
            "hot": {"temperature": 2},
            "known": {"recipe": "best-known"},
            "far": {"rule": "mutual", "margin": 1},
            "own": {"rule": "mutual", "calibrate_scores": "epoch"},
        },
    )
    experiment = read_experiment(asked, PATH)
    told = {arm: experiment.options(arm, 0).get("calibrate_scores") for arm in experiment.arms}
    assert {arm: told[arm] for arm in CONTROLS} == {
        **dict.fromkeys(CONTROLS),
        "best": "start",
    }
    assert {told[arm] for arm in ("hot", "far")} == {"start"}
    assert told["known"] is None  # the recipe's own
    assert told["own"] == "epoch"  # which the training script refuses
    assert experiment.options("start", 0).get("calibrate_scores") is None


def test_seeds_of_different_starts_are_not_mixed(tmp_path):
    starts = [tmp_path / name for name in ("a.safetensors", "bb-0.safetensors", "bb-1.safetensors")]
    for k, file in enumerate(starts):
        entry = PEERS[min(k, 1)]
        save_weights(file, {name: x + k for name, x in built(entry).state_dict().items()})
    peers = [
        {**PEERS[0], "model": str(starts[0])},
        {**PEERS[1], "model": str(tmp_path / "bb-{seed}.safetensors")},
    ]
    path = written(tmp_path, peers=peers, controls=["none"], arms={"best": {}})
    done(path)
    analysis = json.loads(run(ToyTask(), [str(path)]).with_name("analysis.json").read_text())
    assert analysis["sources"] == {
        str(file): file_sum(file) for file in starts
    }  # each seed its own
    assert analysis["versions"]["torch"] == torch.__version__
    page = (tmp_path / "out/report.html").read_text()
    assert file_sum(starts[0]) in page and "Files and versions" in page
    shutil.copy(starts[1], tmp_path / "bb-2.safetensors")
    save_weights(starts[0], {name: x + 1 for name, x in built(PEERS[0]).state_dict().items()})
    assert run(ToyTask(), [str(path)])  # all is finished: nothing is mixed
    path.write_text(path.read_text().replace('"seeds": 2', '"seeds": 3'))
    for more in ([], ["--only", "start:2"]):
        with pytest.raises(
            OptionError, match=r"a\.safetensors: changed since seed 0 .* put it back"
        ):
            run(ToyTask(), [str(path), *more])
    assert not (tmp_path / "out/seed-2").exists()


def test_seed_and_rank_fill_texts_anywhere():
    asked = content(seeds=[3, 8], train={"data": "d/{seed}", "more": [{"x": "{seed}"}]})
    experiment = read_experiment(asked, PATH)
    options = experiment.options("one_way", 8, ranked=["bb", "a"])
    assert options["rule"] == "one_way:bb"
    assert options["data"] == "d/8" and options["more"] == [{"x": "8"}] and options["seed"] == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seedz": 3}, "unknown key 'seedz'; did you mean seeds"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": [1, 1]}, "different ones"),
        ({"peers": PEERS[:1]}, "two or more"),
        ({"held_out": 0}, "the test set would choose"),
        ({"controls": ["none", "x"]}, "controls is"),
        ({"control": "x"}, "arms: solo, none"),
        ({"controls": ["none"]}, "no arm to compare with the control 'none'"),
        ({"arms": {"best": {}}}, "there already"),
        ({"arms": {"a/b": {}}}, "arm 'a/b'"),
        ({"arms": {"x": {"seed": 3}}}, "same peers and seeds"),
        ({"arms": {"x": 3}}, "expected {option: value}"),
        ({"compare": [["best", "y"]]}, "compare is"),
        ({"compare": [["best", "best"]]}, "two different arms"),
        ({"compare": [["best", "random"], ["random", "best"]]}, "no pair twice"),
        ({"primary": "best"}, "choose from chosen, last"),
        ({"tune": {"lr": 0.1}}, "expected a list of values"),
        ({"train": 3}, "train is 3"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(OptionError, match=message):
        read_experiment(content(**change), PATH)


def test_options_of_every_arm_are_tried_before_any_work(tmp_path):
    path = written(tmp_path, train={"temprature": 2})
    with pytest.raises(OptionError, match=rf"{path.name}: .*temprature"):
        run(ToyTask(), [str(path)])
    path = written(tmp_path, arms={"typo": {"temprature": 2}})
    with pytest.raises(OptionError, match=r"arm .typo.*temprature"):
        run(ToyTask(), [str(path)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "change", "told"),
    [
        (["--threads", "0"], {}, "--threads is 0; expected 1 or more"),
        ([], {"output": "exp.yaml/out"}, r"exp.yaml: output exp.yaml/out: Not a directory; give"),
    ],
)
def test_what_no_job_could_do_is_refused_first(tmp_path, monkeypatch, more, change, told):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "exp.yaml"
    path.write_text(json.dumps(content(**{"output": "out", **change})))
    with pytest.raises(OptionError, match=told):
        run(ToyTask(), ["exp.yaml", "--only", "none:0", *more])


def test_a_peers_file_that_cannot_be_read_is_told_with_the_experiments(tmp_path, monkeypatch):
    path = written(tmp_path)
    for told in ("a.pt: no such file", f"{path}: a.pt: no such file"):  # the file's name once
        monkeypatch.setattr(ToyTask, "check", raising(CheckpointError(told)))
        with pytest.raises(OptionError) as caught:
            run(ToyTask(), [str(path)])
        assert str(caught.value) == f"{path}: a.pt: no such file"


def raising(error):
    def method(self, options):
        raise error

    return method


def test_an_option_that_a_peer_has_of_its_own_is_refused_in_an_arm(tmp_path):
    peers = [PEERS[0], {**PEERS[1], "rate": 0.2}]
    assert not hidden_by(peers[1], {"rule": "best"}, {})
    assert not hidden_by({"kwargs": {"depth": 2}}, {"kwargs": {"width": 3}}, {})
    assert hidden_by({"kwargs": {"depth": 2}}, {"kwargs": {"depth": 3}}, {})
    for more in ({"arms": {"fast": {"lr": 0.3}}}, {"tune": {"lr": [0.1, 0.3]}}):
        path = written(tmp_path, **{"peers": peers, **more})
        with pytest.raises(OptionError, match=r"arm '\w+': lr 0\.\d would not reach peer 'bb'"):
            run(ToyTask(), [str(path), "--list"])
    path = written(tmp_path, peers=peers, train={"epochs": 2, "lr": 0.3})
    run(ToyTask(), [str(path), "--list"])  # what is for all may be another's


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every job of a small experiment, done."""
    path = written(tmp_path_factory.mktemp("experiment"), arms={"loud": {"lr": 0.3}})
    return path, {(row["arm"], row["seed"]): row for row in done(path)}


def test_arms_share_their_starts_and_solo_equals_none(whole):
    _, rows = whole
    for seed in (0, 1):
        solo, none = rows["solo", seed], rows["none", seed]
        assert solo["last"] == none["last"] and solo["epochs"] == none["epochs"]
        start = {arm: rows[arm, seed]["history"][0] for arm in ("none", "best", "loud")}
        assert start["none"] == start["best"] == start["loud"]
        assert rows["best", seed]["last"] != none["last"]
        assert solo["cost"]["updates"] == 2 * none["cost"]["updates"] == 16
    assert rows["none", 0]["last"] != rows["none", 1]["last"]


def test_the_chosen_epoch_is_the_held_out_parts(whole):
    _, rows = whole
    for row in rows.values():
        for name, epoch in row.get("epochs", {}).items():
            values = [evaluation[f"{name}/top1"] for evaluation in row["history"]]
            assert values.index(max(values)) == epoch


def test_the_one_teacher_is_the_strongest_on_the_held_out_part():
    metrics = {"held_out": {"metrics": {"a/top1": 50, "bb/top1": 60}}}
    metrics["test"] = {"metrics": {"a/top1": 70, "bb/top1": 60}}
    assert rank_at_start(metrics, ["a", "bb"], ToyTask()) == ["bb", "a"]


def test_the_test_set_is_measured_at_the_end_alone(tmp_path):
    path, task = written(tmp_path), ToyTask()
    experiment = read_experiment(task.read(path), path)
    for label in ("start:0", "best:0", "best:0"):
        work(experiment, task, label)
    assert task.measurements == 2  # chosen and last, once


def test_the_setting_is_chosen_by_the_held_out_part(tmp_path):
    path = written(tmp_path, tune={"lr": [1e-6, 0.2]}, seeds=[1])
    start, none, solo = done(path, "start:1", "none:1", "solo:1")
    assert none["settings"]["a"] == none["settings"]["bb"] == {"lr": 0.2}
    assert solo["settings"]["a"] == {"lr": 0.2}
    assert none["cost"]["updates"] == 16  # both settings count
    assert none["last"]["metrics"] != start["test"]["metrics"]


def test_a_killed_job_goes_on_and_ends_the_same(tmp_path, monkeypatch, whole):
    path = written(tmp_path)
    done(path, "start:0")
    finish = Trainer._finish_epoch

    def killed(trainer):
        finish(trainer)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_finish_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        done(path, "best:0")
    monkeypatch.setattr(Trainer, "_finish_epoch", finish)
    assert not (tmp_path / "out/seed-0/best/result.json").exists()
    (again,) = done(path, "best:0")
    unbroken = whole[1]["best", 0]
    for what in ("chosen", "last", "history", "lessons", "epochs"):
        assert again[what] == unbroken[what]
    assert "cpu_seconds" in unbroken["cost"] and "cpu_seconds" not in again["cost"]


def test_results_of_other_options_are_refused(tmp_path):
    done(written(tmp_path), "start:0", "none:0")
    path = written(tmp_path, arms={"more": {"lr": 0.2}})
    done(path, "none:0", "more:0")  # another arm changes nothing about this one
    path.write_text(json.dumps(content(output=str(tmp_path / "out"), train={"epochs": 3})))
    with pytest.raises(OptionError, match="of other options"):
        done(path, "none:0")


def test_starts_come_first(tmp_path):
    with pytest.raises(OptionError, match="run start:0 first"):
        done(written(tmp_path), "none:0")
    with pytest.raises(OptionError, match="no job 'x:0'"):
        done(written(tmp_path), "x:0")


def test_report_and_tables(whole):
    path, rows_of = whole
    report = run(ToyTask(), [str(path), "--report"])
    text = report.read_text()
    for part in ("2 seeds prove nothing", "Cost", "loud", "Every class", "Held-out top1"):
        assert part in text
    # strongest and weakest are one peer for all seeds: beside the mean there are two peers, and
    # three targets of the direct comparison
    assert "up to 25 in 100 experiments of this size show at least one (5 such" in text
    assert "The primary target, named in advance, is the mean of the peers, in top1" in text
    rows = list(csv.DictReader((report.parent / "runs.csv").open()))
    assert len(rows) == 14 and float(rows[0]["start/a/top1"]) > 0
    tested = list(csv.DictReader((report.parent / "comparisons.csv").open()))
    # two kinds of weights; six arms against none and one pair; mean, strongest, weakest, a, bb
    assert len(tested) == 2 * 7 * 5
    assert {row["shown"] for row in tested} == {"False"}
    analysis = json.loads((report.parent / "analysis.json").read_text())
    assert analysis["missing"] == []
    gain = analysis["test"]["peer_gains"]["solo"]["a"]
    assert gain["mean"] == 0 and gain["p"] == 1
    ends = [rows_of["loud", seed]["history"][-1]["a/top1"] for seed in (0, 1)]
    band, told = analysis["bands"]["loud"][-1]["a/top1"], paired_interval(ends)
    assert (band["mean"], band["low"], band["high"]) == (told.mean, told.low, told.high)
    assert analysis["bands"]["loud"][-1]["epoch"] == 2 and "fill-opacity" in text
    kinds = {
        (arm, seed): rows_of[arm, seed]["chosen"]["classes"]["bb"]["1"]
        for arm in ("loud", "none")
        for seed in (0, 1)
    }
    gains = [kinds["loud", seed] - kinds["none", seed] for seed in (0, 1)]
    found, told = analysis["classes"]["loud"]["bb"]["1"], paired_interval(gains)
    assert (found["mean"], found["low"], found["high"]) == (told.mean, told.low, told.high)
    assert "95 % intervals of each mean" in text and "uncorrected: of many classes" in text


def test_what_is_not_finished_is_told_and_left_out(tmp_path):
    path = written(tmp_path, controls=["none", "best"])
    with pytest.raises(OptionError, match="nothing to compare yet"):
        run(ToyTask(), [str(path), "--report"])
    done(path, "start:0", "none:0", "best:0")
    text = run(ToyTask(), [str(path), "--report"]).read_text()
    assert "2 jobs are not finished (none:1 and best:1)" in text
    assert "1 seed proves nothing" in text and "at the epoch that the held-out part" in text
    done(path, "start:1", "none:1")
    text = run(ToyTask(), [str(path), "--report"]).read_text()
    assert "1 job is not finished (best:1): each difference is over" in text


def trained(arm, seed, start, end):
    """What a job of the peers a and bb left, with measurements of its start and its end."""
    return {
        "arm": arm,
        "seed": seed,
        "epochs": {"a": 1, "bb": 2},
        "history": [{"epoch": 0, "a/top1": 1.0}],
        "lessons": [],
        "cost": {"updates": 5},
        "start": {"test": start},
        "chosen": end,
        "last": end,
    }


def test_sentences_claim_what_survives_correction_alone(tmp_path):
    path = written(tmp_path, seeds=8, controls=["none", "best", "random"], arms={"worse": {}})
    task = ToyTask()
    experiment = read_experiment(task.read(path), path)

    def measured(value):
        return {"metrics": {"a/top1": value, "bb/top1": value}, "classes": {}}

    gains = {
        "none": lambda seed: 0.0,
        "best": lambda seed: 1 + 0.01 * seed,
        "random": lambda seed: 0.01 * (-1) ** seed,
        "worse": lambda seed: -2 + 0.01 * seed,
    }
    found = [
        trained(arm, seed, measured(50), measured(60 + gain(seed)))
        for arm, gain in gains.items()
        for seed in range(8)
    ]
    told = experiment_sentences(analyse(experiment, task, found))
    assert any(x.startswith("best is better in top1 than none for the mean") for x in told)
    assert any(x.startswith("worse is worse in top1 than none for the mean") for x in told)
    assert not any(x.startswith("random") for x in told)
    # three arms against none and a pair, of the mean and two peers, which are strongest and weakest
    assert [x.split(" is ")[0] for x in told[:2]] == ["best", "worse"]
    assert told[2].startswith("Secondary: 7 of 9 other comparisons are shown")
    assert "(5 such corrections, 5 % each)" in told[2]
    assert all(x.startswith("Secondary: ") for x in told[3:10])
    assert told[-1].startswith("3 of 12 comparisons are not shown") and len(told) == 11


def test_errors_at_a_fitted_temperature_are_a_family_of_their_own(tmp_path):
    path = written(tmp_path, seeds=8, controls=["none", "best"], family="target")
    task = ToyTask()
    experiment = read_experiment(task.read(path), path)

    def measured(ece, calibrated, temperature):
        found = {"top1": 60.0, "ece": ece, "ece_calibrated": calibrated, "temperature": temperature}
        metrics = {f"{name}/{key}": value for name in ("a", "bb") for key, value in found.items()}
        return {"metrics": metrics, "classes": {}}

    found = [
        trained(
            arm,
            seed,
            measured(9.0, 8.0, 1.0),
            measured(ece + seed / 10, 3 + (arm == "none" and seed / 10), 1 + seed),
        )
        for arm, ece in (("none", 6.0), ("best", 16.0))
        for seed in range(8)
    ]
    analysis = analyse(experiment, task, found)
    raw, mended = (analysis[x]["peer_gains"]["best"]["a"] for x in ("calibration", "recalibrated"))
    assert raw["mean"] == pytest.approx(-10) and mended["mean"] == pytest.approx(0.35)
    assert analysis["temperatures"]["best"]["a"] == {"mean": 4.5, "least": 1, "largest": 8}
    # seven seeds better, one the same: 2 * 2 of 2^8 patterns are as far from zero
    assert mended["p"] == mended["p_holm"] == 4 / 256
    told = experiment_sentences(analysis)
    at = "best is better calibrated, each at a temperature fitted on the held-out part, than none"
    at = f"Secondary: {at}"
    assert any(x.startswith(at) for x in told)
    rows = [row for row in comparison_rows(analysis) if row["metric"] == "ece_calibrated"]
    assert {row["of"] for row in rows} == {"calibration"} and len(rows) == 5
    page = write_experiment(tmp_path / "report.html", "Errors", analysis).read_text()
    assert "What one temperature mends" in page and "4.50 (1.00 to 8.00)" in page
    for row in found[:1]:  # a run from before temperatures were fitted
        row["last"] = row["chosen"] = {"metrics": {"a/top1": 1.0, "bb/top1": 1.0}, "classes": {}}
    assert analyse(experiment, task, found)["recalibrated"] is None


def test_local_jobs_run_side_by_side_and_failures_are_told(tmp_path):
    say = "import sys; print(sys.argv[1:]); sys.exit(int(sys.argv[1]))"
    commands = {str(i): [sys.executable, "-c", say, str(i % 2)] for i in range(3)}
    logs = {label: tmp_path / label / "log.txt" for label in commands}
    statuses = run_local(commands, logs, [["--slot", "x"], ["--slot", "y"]], "jobs")
    assert statuses == {"0": 0, "1": 1, "2": 0}
    slots = {label: log.read_text().split("'")[5] for label, log in logs.items()}
    assert slots["0"] == "x" and slots["1"] == "y"


class FakeExecutor:
    """Runs what it is given when the batch ends, as submitit's does."""

    def __init__(self):
        self.given = []

    @contextmanager
    def batch(self):
        yield
        for job in self.given:
            job.status = job.work()

    def submit(self, work):
        self.given.append(FakeJob(work))
        return self.given[-1]


class FakeJob:
    def __init__(self, work):
        self.work = work

    def done(self):
        return True

    def exception(self):
        return None

    def result(self):
        return self.status


@pytest.mark.slow
def test_a_cluster_does_the_same_as_this_machine(tmp_path, whole):
    path = written(tmp_path, seeds=1, controls=["none", "best"])
    executor = FakeExecutor()
    report = run(ToyTask(), [str(path), "--submitit"], executor)
    assert report.is_file()
    assert [job.work.command[-1] for job in executor.given] == ["start:0", "none:0", "best:0"]
    result = json.loads((tmp_path / "out/seed-0/best/result.json").read_text())
    assert result["last"] == whole[1]["best", 0]["last"]


@pytest.mark.slow
def test_local_processes_do_the_same_and_a_failed_job_is_named(tmp_path, whole):
    path = written(tmp_path, seeds=1, controls=["none", "best"])
    (tmp_path / "out/seed-0/best/run").mkdir(parents=True)
    (tmp_path / "out/seed-0/best/run/run-00001-00000000.pt").write_bytes(b"broken")
    with pytest.raises(OptionError, match=r"1 of 2 jobs failed \(best:0\)"):
        run(ToyTask(), [str(path), "--jobs", "2"])
    result = json.loads((tmp_path / "out/seed-0/none/result.json").read_text())
    assert result["last"] == whole[1]["none", 0]["last"]


def test_a_clusters_job_gets_the_cpus_that_it_asks_for(tmp_path, monkeypatch):
    """From sbatch's options alone srun takes one CPU, since Slurm 22.05."""
    wanted = {}

    class Refused(FakeExecutor):
        def __init__(self, folder, cluster):
            super().__init__()

        def update_parameters(self, **options):
            wanted.update(options)
            raise OptionError("seen enough")

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Refused))
    with pytest.raises(OptionError, match="seen enough"):
        run(ToyTask(), [str(written(tmp_path)), "--submitit", "--cpus", "5"])
    assert wanted["cpus_per_task"] == 5
    assert wanted["slurm_srun_args"] == ["--cpus-per-task=5"]


@pytest.mark.slow
def test_submitits_own_executor_takes_the_jobs(tmp_path):
    submitit = pytest.importorskip("submitit")
    executor = submitit.AutoExecutor(folder=tmp_path / "submitit", cluster="local")
    executor.update_parameters(timeout_min=5)
    commands = {x: [sys.executable, "-c", f"raise SystemExit({x})"] for x in ("0", "3")}
    logs = {label: tmp_path / f"{label}.txt" for label in commands}
    assert run_submitit(executor, commands, logs, "jobs") == {"0": 0, "3": 3}
    job = ClusterJob(["true"], tmp_path / "x.txt")
    assert job.checkpoint().function is job
