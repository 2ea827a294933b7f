"""Model cards: front matter that YAML reads, honest numbers, sums, what is refused."""

import hashlib

import pytest
import yaml

from common.card import Card, Evidence, card_text, file_sum, from_json, front_matter, to_json
from common.options import OptionError


@pytest.fixture
def card():
    best = Evidence(
        "After epoch 2 of 3.",
        "200 images",
        before={"top-1 (%)": 50.0},
        after={"top-1 (%)": 49.25},
        counts={"fixed": 3, "broken": 5},
        teachers={"b": 0.25, "c": 0.0},
    )
    return Card(
        peer="a",
        model="resnet18",
        about="A classifier.",
        front={"library_name": "timm", "license": None, "tags": ["x", "y: z"]},
        made={"rule": "best", "odd": "a|b\nc"},
        evidence={"best": best},
        lineage={"data": "`pets`, 40 images"},
        versions={"torch": "2"},
        loading='load("{file}")',
        loading_hub='load("hf-hub:{repo}")',
    )


def effect(mean, shown):
    return {"mean": mean, "low": -1.0, "high": 2.0, "count": 5, "p_holm": 0.5, "shown": shown}


def test_what_changed_is_told_whatever_its_sign(card):
    text = card_text(card, "best", "best.safetensors", "abc")
    assert "| top-1 (%) | 50 | 49.25 | -0.75 |" in text
    assert "Against the start, fixed: 3, broken: 5." in text
    assert "Taught by: b on 25.0 % of" in text and "c on" not in text
    assert "no proof that the peers taught anything" in text and "No such experiment" in text
    assert "| `best.safetensors` | sha256 `abc` |" in text and 'load("best.safetensors")' in text
    assert "hf-hub" not in text
    assert "| odd | a\\|b c |" in text


def test_front_matter_is_yaml_without_what_is_not_known():
    front = {"license": None, "base_model": "a/b", "tags": ["it's: # \u00fc", "- x"], "n": "no"}
    text = front_matter(front)
    assert text.startswith("---\n") and text.endswith("\n---")
    assert yaml.safe_load(text[4:-4]) == {
        "base_model": "a/b",
        "tags": ["it's: # \u00fc", "- x"],
        "n": "no",
    }


def test_an_experiment_is_told_with_what_it_does_not_show(card):
    gains = {"best": {"a": effect(0.5, False), "z": None}, "solo": {"a": effect(-0.5, True)}}
    test = {"names": ["a"], "metric": "top1", "control": "none", "level": 0.95}
    analysis = {"test": {**test, "peer_gains": gains}}
    text = card_text(card, "best", "f", "abc", repo="org/name", analysis=analysis)
    assert "gain in top1 over `none`" in text
    assert "| best | +0.5 | -1 to +2 | 5 | 0.5 | not shown |" in text
    assert "| solo | -0.5 | -1 to +2 | 5 | 0.5 | shown |" in text
    assert "No such experiment" not in text and 'load("hf-hub:org/name")' in text
    other = {"test": {**test, "names": ["z"], "peer_gains": {"best": {"z": effect(1, True)}}}}
    with pytest.raises(OptionError, match="no peer 'a', only z"):
        card_text(card, "best", "f", "abc", analysis=other)
    for wrong in ({}, [], {"test": {"names": []}}):
        with pytest.raises(OptionError, match=r"give the analysis\.json"):
            card_text(card, "best", "f", "abc", analysis=wrong)


def test_json_and_back_is_the_same_card(card):
    again = from_json(to_json(card), "card.json")
    assert again == card
    for broken in ("", "[]", "{}", '{"evidence": {"best": {}}}'):
        with pytest.raises(OptionError, match=r"^card\.json: no model card of a run"):
            from_json(broken, "card.json")


def test_weights_that_are_not_there_are_named(card):
    with pytest.raises(OptionError, match="'a' has no 'soup' weights; it has best"):
        card_text(card, "soup", "f", "abc")


def test_sums_are_those_of_the_whole_file(tmp_path):
    content = bytes(range(256)) * 9000  # more than one block
    (tmp_path / "x").write_bytes(content)
    assert file_sum(tmp_path / "x") == hashlib.sha256(content).hexdigest()
