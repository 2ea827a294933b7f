"""Finished runs read back: whose models are the same, which settings count, what is refused."""

from argparse import Namespace
from dataclasses import dataclass

import pytest

from common.finished import ReadRun, read_ends, read_run, refuse_other_data, shared_models
from common.options import OptionError


@dataclass
class Spec:
    name: str
    model: str
    checkpoint: str | None
    frozen: bool
    options: Namespace


def write_run(folder, **options):
    """A run of two peers; returns what its command line gives."""
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    (folder / "args.yaml").write_text("")
    (folder / "summary.csv").write_text("epoch,a/m,b/m\n0,1,2\n1,3,4\n2,5,7\n")
    for name in "ab":
        (folder / name / "last").touch()
    given = {"rule": "best", "score": "loss", "margin": None, "lr": 0.1, "epochs": 2, "size": 8}
    given |= options
    run = Namespace(**given)
    return lambda words: (run, [Spec(name, "net", f"{name}.pt", False, run) for name in "ab"])


def read(folder, parse, metric="m", **rest):
    return read_run(folder, parse, metric, "last", own=("lr", "size"), at_start=("size",), **rest)


def test_a_run_is_read_with_its_first_and_last_evaluation(tmp_path):
    run = read(tmp_path / "x", write_run(tmp_path / "x"))
    assert (run.before, run.after) == ((1, 2), (5, 7))
    assert (run.rule, run.score, run.margin) == ("best", "loss", None)
    assert run.models[0] != run.models[1]


def test_only_what_changes_what_is_learned_is_a_setting(tmp_path):
    def setting(title, **options):
        more = {"not_setting": ("pin",)}
        return read(tmp_path / title, write_run(tmp_path / title, **options), **more).setting

    base = setting("base")
    assert "seed" not in read(tmp_path / "s", write_run(tmp_path / "s", seed=3)).alike
    other = read(tmp_path / "o", write_run(tmp_path / "o", temperature=4.0))
    assert other.alike["temperature"] == "4.0" and other.alike["epochs"] == "2"
    alike = {"rule": "none", "score": "confidence", "teachers": "ema", "recipe": "r", "lr": 9.0}
    assert setting("alike", pin=3, device="cuda", soup=True, **alike) == base
    assert setting("longer", epochs=3) != base


def test_the_same_start_is_one_model_however_trained_and_another_view_makes_another(tmp_path):
    one = read(tmp_path / "x", write_run(tmp_path / "x"))
    same = ReadRun(**{**vars(one), "specs": one.specs[::-1], "models": one.models[::-1]})
    faster = read(tmp_path / "y", write_run(tmp_path / "y", lr=0.2))
    larger = read(tmp_path / "z", write_run(tmp_path / "z", size=16))
    specs, names, finished = shared_models([one, same, faster, larger])
    assert [run.members for run in finished] == [(0, 1), (1, 0), (0, 1), (2, 3)]
    assert names == ["a", "b", "a-2", "b-2"] and len(specs) == 4
    assert finished[0].trained[0] == finished[3].trained[0] != finished[2].trained[0]


def test_a_file_and_data_are_the_same_by_whatever_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt", "data"):
        (tmp_path / name).touch()
    runs = []
    for title, before in (("x", ""), ("y", "./"), ("z", f"{tmp_path}/../{tmp_path.name}/")):
        parse = write_run(tmp_path / title, data=f"{before}data")
        options, specs = parse(())
        moved = [Spec(s.name, "net", f"{before}{s.checkpoint}", False, options) for s in specs]
        runs.append(read(tmp_path / title, lambda words, told=(options, moved): told))
    assert [run.members for run in shared_models(runs)[2]] == [(0, 1)] * 3
    assert len({run.setting for run in runs}) == 1


def test_two_peers_that_start_as_one_model_are_for_controls_alone(tmp_path):
    run = read(tmp_path / "x", write_run(tmp_path / "x"))
    twins = {**vars(run), "models": run.models[:1] * 2}
    assert shared_models([ReadRun(**{**twins, "rule": "none"})])[2][0].members == (0, 0)
    with pytest.raises(OptionError, match="x: a and b start as the same model"):
        shared_models([ReadRun(**twins)])


def test_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(
        OptionError, match=r"it has no args\.yaml; give the folder that training wrote"
    ):
        read(tmp_path, None)
    parse = write_run(tmp_path / "x")
    with pytest.raises(OptionError, match="other of a, b cannot be read"):
        read(tmp_path / "x", parse, metric="other")
    (tmp_path / "x" / "b" / "last").unlink()
    with pytest.raises(OptionError, match="did not finish: b has no last"):
        read(tmp_path / "x", parse)
    (tmp_path / "empty.csv").write_text("a/m\n")
    with pytest.raises(OptionError, match=r"empty.csv: m of a cannot"):
        read_ends(tmp_path / "empty.csv", ["a"], "m")


def test_runs_of_other_data_need_a_choice():
    refuse_other_data("x", ["x", "x"], "DATA")
    refuse_other_data("z", ["x", "y"], "DATA")
    with pytest.raises(OptionError, match="different data, x, y; give DATA"):
        refuse_other_data("x", ["x", "y"], "DATA")
