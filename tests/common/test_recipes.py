"""Recipes: named defaults of the transfer, under whatever is given."""

import argparse
import json

import pytest

from common import recipes
from common.experiment.plan import read_experiment
from common.experiment.work import _asked
from common.options import OptionError, add_transfer_options, parse_over_file, transfer_of
from common.recipes import RECIPES, Setting
from tests.common.test_experiment import PATH, content


def parsed(*arguments, averages=True):
    parser = argparse.ArgumentParser()
    if averages:
        parser.add_argument("--model-ema", action="store_true")
        parser.add_argument("--model-ema-span", type=float)
    parser.add_argument("-c", "--config", default="")
    parser.add_argument("--peer", action="append", dest="peers")
    parser.add_argument("--seed", type=int, default=0)
    add_transfer_options(parser)
    return parse_over_file(parser, list(arguments), lambda path: json.loads(path.read_text()))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_every_option_of_the_transfer_with_its_source(name):
    options = vars(parsed())
    averages = {"model_ema", "model_ema_span"}
    of_transfer = set(options) - {"config", "peers", "seed", "recipe", "engine", *averages}
    assert set(RECIPES[name]) - averages == of_transfer | {"calibrate_scores"}
    assert averages.isdisjoint(RECIPES[name]) == (RECIPES[name]["teachers"].value == "peers")
    assert all(setting.source for setting in RECIPES[name].values())
    taken = parsed("--recipe", name)
    assert {key: getattr(taken, key) for key in of_transfer} == {
        key: setting.value for key, setting in RECIPES[name].items() if key in of_transfer
    }
    transfer_of(taken, ["a", "b"])
    assert not hasattr(taken, "calibrate_scores")  # this command line has no such option


def test_a_script_that_keeps_no_averages_refuses_a_recipe_that_needs_them():
    with pytest.raises(OptionError, match="measured on classifiers alone"):
        parsed("--recipe", "best-known", averages=False)
    assert parsed("--recipe", "paper", averages=False).rule == "best"


def test_without_a_recipe_nothing_changes():
    options = parsed()
    assert options.recipe is None and recipes.told(options) is None
    assert (options.rule, options.temperature, options.detach_teacher) == ("best", 1.0, True)


def test_the_paper_lets_the_gradient_through_the_teacher():
    options = parsed("--recipe", "paper")
    assert (options.rule, options.temperature, options.transfer_weight) == ("best", 1.0, 1.0)
    assert not options.detach_teacher and recipes.told(options) == "paper"


def test_flags_and_files_override_it(tmp_path, monkeypatch):
    made = {**RECIPES["paper"], "temperature": Setting(5.0, "here"), "margin": Setting(0.5, "here")}
    monkeypatch.setitem(RECIPES, "paper", made)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"recipe": "paper", "margin": 0.25, "detach-teacher": True}))
    options = parsed("-c", str(path), "--rule", "mutual")
    assert (options.temperature, options.margin, options.detach_teacher) == (5.0, 0.25, True)
    assert options.rule == "mutual" and options.recipe == "paper"
    told = recipes.told(options)
    assert told == "paper, but rule mutual, detach_teacher True, margin 0.25"
    other = parsed("-c", str(path), "--recipe", "best-known")  # the flag chooses the recipe
    assert other.recipe == "best-known" and other.margin == 0.25
    assert other.temperature == RECIPES["best-known"]["temperature"].value
    assert parsed("--recipe=paper").temperature == 5.0
    assert parsed("--recipe", "paper", "--temperature", "1").temperature == 1.0


def test_an_unknown_recipe_is_refused(tmp_path):
    with pytest.raises(OptionError, match="'papers'; choose from paper, best-known"):
        parsed("--recipe", "papers")
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"recipe": "papers"}))
    with pytest.raises(OptionError, match="choose from paper, best-known"):
        parsed("-c", str(path))


def test_an_arm_can_be_a_recipe():
    arms = {"as_published": {"recipe": "paper"}, "cooler": {"recipe": "paper", "temperature": 0.5}}
    train = {"temperature": 4.0, "epochs": 3}
    experiment = read_experiment(content(arms=arms, train=train), PATH)
    options = experiment.options("as_published", 0)
    assert options["recipe"] == "paper" and options["epochs"] == 3
    assert not {"rule", "temperature"} & set(options)  # the recipe's, not those of all arms
    assert experiment.options("cooler", 0)["temperature"] == 0.5
    assert experiment.options("best", 0)["temperature"] == 4.0
    assert experiment.arms["as_published"].about == "recipe paper"
    given = content(arms={"cool": {"temperature": 1.0}})
    given["train"] = {**given.get("train", {}), "recipe": "best-known"}
    assert "rule" not in read_experiment(given, PATH).arms["cool"].options  # the recipe's


def test_the_help_tells_what_sets_them_apart():
    told = recipes.help_text()
    for name, table in RECIPES.items():
        shown = f"{name}: rule {table['rule'].value}, temperature {table['temperature'].value}"
        assert shown in told
    assert "margin" not in told  # the same in both


def test_a_result_is_of_a_recipe_s_values_not_of_its_name(monkeypatch):
    experiment = read_experiment(content(arms={"known": {"recipe": "best-known"}}), PATH)
    before = [_asked(experiment, arm, 0) for arm in ("known", "best")]
    changed = {**RECIPES["best-known"], "temperature": Setting(7.0, "here")}
    monkeypatch.setitem(RECIPES, "best-known", changed)
    after = [_asked(experiment, arm, 0) for arm in ("known", "best")]
    assert before[0] != after[0] and before[1] == after[1]
