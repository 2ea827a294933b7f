"""Model cards: front matter that YAML reads, honest numbers, sums, what is refused."""

import hashlib
import os

import pytest
import yaml

from common.card import (
    Card,
    Evidence,
    Files,
    card_text,
    data_rows,
    file_sum,
    from_json,
    front_matter,
    to_json,
    told_files,
)
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
    means = {"best": {"mean": effect(0.4, False)}, "solo": {"mean": effect(-0.6, True)}}
    test = {"names": ["a"], "metric": "top1", "control": "none", "level": 0.95, "gains": means}
    analysis = {"together": False, "test": {**test, "peer_gains": gains}}
    text = card_text(card, "best", "f", "abc", repo="org/name", analysis=analysis)
    assert "whether this file is of one of its runs was not looked at" in text
    assert "gain in top1 over `none`" in text
    assert "| best | +0.5 | -1 to +2 | 5 | 0.5 | not shown |" in text
    assert "| solo | -0.5 | -1 to +2 | 5 | 0.5 | shown |" in text
    assert "the mean of the peers, where shown is: solo -0.6. A single peer's rows are sec" in text
    means["solo"] = {"mean": effect(-0.6, False)}
    assert "where nothing is shown." in card_text(card, "best", "f", "abc", analysis=analysis)
    whole = card_text(card, "best", "f", "abc", analysis={**analysis, "together": True})
    assert "All targets were corrected together." in whole and "secondary" not in whole
    assert "No such experiment" not in text and 'load("hf-hub:org/name")' in text
    other = {
        "together": False,
        "test": {**test, "names": ["z"], "peer_gains": {"best": {"z": effect(1, True)}}},
    }
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


def listed(root, sizes):
    for name, size in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(size))
    return [str(root / name) for name in sizes]


SIZES = {"b/1.png": 3, "b/10.png": 0, "a \u00fc.png": 12}
LINES = b"0 b/10.png\x0012 a \xc3\xbc.png\x003 b/1.png\x00"  # in the order of bytes


def test_the_sum_of_names_and_sizes_is_that_of_the_sorted_listing(tmp_path):
    told = told_files(Files(listed(tmp_path, SIZES), str(tmp_path)))
    assert told.startswith(f"sum of names and sizes sha256 `{hashlib.sha256(LINES).hexdigest()}`")
    assert ": 3 files, 15 bytes" in told and "content was not read" in told


def test_the_sum_is_the_same_elsewhere_in_any_order_and_twice(tmp_path, monkeypatch):
    here, there = listed(tmp_path / "x", SIZES), listed(tmp_path / "y" / "z", SIZES)
    told = told_files(Files(here, str(tmp_path / "x")))
    assert told_files(Files(there[::-1] + there[:2], f"{tmp_path}/y/z/")) == told
    assert told_files(Files(there)) == told  # the folder that holds all
    monkeypatch.chdir(tmp_path)
    assert told_files(Files([os.path.relpath(path) for path in here], "x")) == told
    assert told_files(Files(here, "x")) == told
    assert told_files(Files([os.path.relpath(here[0]), *here[1:]])) == told


@pytest.mark.parametrize(
    "other",
    [
        {**SIZES, "c.png": 0},
        {name: SIZES[name] for name in ("b/1.png", "a \u00fc.png")},
        {"b/2.png": 3, "b/10.png": 0, "a \u00fc.png": 12},
        {**SIZES, "b/1.png": 4},
        {"b/1.png": 0, "b/10.png": 3, "a \u00fc.png": 12},  # as many bytes in all
    ],
    ids=("added", "removed", "renamed", "longer", "swapped"),
)
def test_another_listing_has_another_sum(tmp_path, other):
    digests = {
        told_files(Files(listed(tmp_path / name, sizes), str(tmp_path / name))).split("`")[1]
        for name, sizes in (("x", SIZES), ("y", other))
    }
    assert len(digests) == 2


def test_a_file_that_is_gone_is_counted_and_no_files_have_no_sum(tmp_path):
    paths = listed(tmp_path, SIZES)
    (tmp_path / "b/10.png").unlink()
    lines = b"12 a \xc3\xbc.png\x003 b/1.png\x00? b/10.png\x00"
    told = told_files(Files(paths, str(tmp_path)))
    assert hashlib.sha256(lines).hexdigest() in told
    assert "3 files, 1 of them not found, 15 bytes" in told
    rows = data_rows(None, Files([]))
    assert rows["files trained on"].startswith("no sum")
    assert rows["files measured on"].startswith("no sum")
    assert (
        told_files(Files(paths[:1])).split(":")[1] == " 1 files, 3 bytes at the run's end; their"
        " content was not read"
    )
