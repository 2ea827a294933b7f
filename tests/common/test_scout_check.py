"""The comparison with finished runs: which runs a command line asks for."""

import math

import pytest

from common.options import OptionError
from common.report.numbers import number
from common.scout_check import check_runs, gains_of, runs_asked, write_check
from common.survey import survey
from tests.common.test_realised import finished, judged
from tests.common.test_report import Page
from tests.common.test_scouting import random_source


@pytest.mark.parametrize(
    ("given", "runs"),
    [
        ("DATA --model a", []),
        ("DATA --realised x y --top 3", ["x", "y"]),
        ("--realised=x --top 3", ["x"]),
        ("--realised=x --top 3 --realised y z", ["x", "y", "z"]),
    ],
)
def test_runs_are_found_however_they_are_given(given, runs):
    assert runs_asked(given.split()) == runs


def written(folder, same_data=False, starts=()):
    """Write the page on a control, which comes first, and two runs that lost next to nothing."""
    found = survey(*random_source(models=3, count=60))
    control = finished((0, 1, 2), (50, 50, 50), "none")
    runs = [control, finished((0, 1), (49.9999, 52)), finished((1, 2), (50, 51), "better")]
    outcome = check_runs(gains_of(runs, found.names), judged(found), lambda teams: None, None)
    more = {"samples": 60, "unit": "images", "metric": "top1", "settings": {"rule": "none", "k": 1}}
    more |= {"same_data": same_data, "starts": starts}
    return write_check(folder, outcome | more), Page(folder / "report.html")


def test_the_page_tells_the_rules_of_the_runs_and_not_that_of_a_control(tmp_path):
    outcome, page = written(tmp_path)
    rows = dict(page.rows("As the run was started"))
    assert rows["rule"] == "best, better" and rows["score"] == "loss" and rows["k"] == "1"
    assert outcome["settings"]["rule"] == ["best", "better"]


def test_nothing_is_minus_nothing(tmp_path):
    assert number(-0.00001, 4) == "0.0000" and number(-0.00001, 4, sign=True) == "+0.0000"
    assert number(-0.00006, 4) == "-0.0001" and number(2) == "2.00"
    assert "-0.00" not in written(tmp_path)[1].text


def test_the_page_says_that_teams_that_share_a_model_are_not_independent(tmp_path):
    page = written(tmp_path)[1]
    assert "Teams that share a model are not independent" in page.text
    caption = next(title for title in page.tables if title.startswith("Spearman"))
    assert "of a bootstrap of models" in caption and "share of orders of the models" in caption


def test_a_comparison_on_what_the_runs_were_evaluated_on_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    told = "made on samples on which the runs were evaluated too"
    assert told not in written(tmp_path)[1].text and told not in caplog.text
    assert told in written(tmp_path, same_data=True)[1].text and told in caplog.text


def test_a_run_that_began_elsewhere_is_a_warning_and_on_the_page(tmp_path, caplog):
    page = written(tmp_path, starts=["m0 is scouted at 3"])[1]
    assert "m0 is scouted at 3" in page.text
    assert [x.message for x in caplog.records if x.levelname == "WARNING"] == ["m0 is scouted at 3"]


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        ([finished((0, 1), (50, 50), "none")], "--realised: no run with transfer"),
        ([finished((0, 1), (50, math.nan))], r"run: what its peers gained is \[0.0, nan\]"),
        (
            [finished((0, 1), (1, 2), alike={"epochs": k}) for k in "12"],
            r"differ in epochs \(1 or 2\)",
        ),
        ([finished((0, 1), (1, 2), "one_way:z")], "no peer is named 'z'; peers: a, b"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_by_what_they_wrote(runs, told):
    with pytest.raises(OptionError, match=told):
        gains_of(runs, ["a", "b"])
