"""Which options of a command differ from those of the run that it resumes."""

import pytest

from common.resumed import FREE, changed_options, forgotten_options

RUN = {"rule": "best", "lr": 0.1, "peers": ["vit,lr=1e-3,checkpoint=a.pt", "resnet18"]}


def changed(free=FREE, defaults=None, had=RUN, **given):
    return changed_options(had, {**RUN, **given}, defaults or {}, free)


def test_the_same_options_are_no_change():
    assert changed() == []


def test_every_change_is_told_with_both_values():
    assert changed(rule="mutual", lr=0.2) == ["--rule 'best' -> 'mutual'", "--lr 0.1 -> 0.2"]


def test_long_values_are_told_by_their_beginning():
    (told,) = changed(rule="x" * 9999)
    assert told.startswith("--rule 'best' -> 'xxx") and told.endswith("... (10001 characters)")
    assert len(told) < 600


def test_free_options_are_not_compared():
    had = {**RUN, "log_interval": 50, "epochs": 10}
    assert changed(had=had, log_interval=1, epochs=20) == []


def test_an_option_that_the_run_did_not_have_counts_where_it_is_not_at_its_default():
    defaults = {"gap_power": 0.0}
    assert changed(defaults=defaults, gap_power=0.0) == []
    assert changed(defaults=defaults, gap_power=2.0) == ["--gap-power 0.0 -> 2.0"]


def test_an_option_that_is_no_more_is_not_a_change_but_told():
    had = {**RUN, "ema": True, "origins": {"a": "b"}}
    assert changed(had=had) == []
    assert forgotten_options(had, RUN, FREE) == ["ema True"]


@pytest.mark.parametrize(
    ("peers", "told"),
    [
        (["vit,lr=0.001", "resnet18"], []),  # a checkpoint is read at the start alone
        (["vit,lr=1e-3,checkpoint=/moved/a.pt", "resnet18"], []),
        ([{"model": "vit", "lr": 0.001}, {"model": "resnet18"}], []),
        (["vit,lr=1e-3,channels-last=True", "resnet18"], []),
        (["vit,lr=1e-2", "resnet18"], ["lr of peer 1 (vit) 0.001 -> 0.01"]),
        (["vit,lr=1e-3", "resnet18,frozen"], ["frozen of peer 2 (resnet18) 'not given' -> True"]),
        (
            ["vit,lr=1e-3", "resnet34,name=b"],
            ["model of peer 2 (b) 'resnet18' -> 'resnet34'"],
        ),
        (["vit", "resnet18", "resnet34"], []),  # refused where weights are loaded, by name
    ],
)
def test_peers_are_compared_key_by_key(peers, told):
    assert changed(peers=peers) == told
