"""Teams of small pretrained models: what is pretrained on what, and where it lies."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from classification import prepare_digits
from classification.demo import OWN_CLASSES, settings_of
from classification.digits import SOURCES
from classification.options import parse
from classification.prepare_digits import TEAMS, main


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Collect what would be split and pretrained."""
    splits, jobs = {}, {}

    class Workers:
        def run(self, title, function, given):
            jobs.update(given)

    @contextmanager
    def side_by_side(count, total):
        yield Workers()

    monkeypatch.setattr(prepare_digits, "write_digits", lambda folder, source: {})
    monkeypatch.setattr(
        prepare_digits,
        "write_splits",
        lambda _, place, skews, seed, source: splits.update({place: skews}),
    )
    monkeypatch.setattr(prepare_digits, "side_by_side", side_by_side)
    return splits, jobs


def test_without_a_team_it_is_the_demos_own_in_the_folder_itself(asked):
    splits, jobs = asked
    assert main(["there", "--seeds", "2"]) == 0
    assert splits == {Path("there/seed-0"): OWN_CLASSES, Path("there/seed-1"): OWN_CLASSES}
    assert jobs[1, "levit"] == (Path("there"), 1, "levit", "levit", 0, 1)
    assert list(jobs) == [(seed, name) for seed in (0, 1) for name in ("resnet", "levit")]


def test_seeds_may_begin_later(asked):
    splits, jobs = asked
    assert main(["there", "--seeds", "2", "--first-seed", "40", "--team", "equal"]) == 0
    assert list(splits) == [Path("there/equal/seed-40"), Path("there/equal/seed-41")]
    assert {seed for seed, _ in jobs} == {40, 41}


def test_another_source_lies_in_a_folder_of_its_own_and_is_pretrained_longer(asked):
    splits, jobs = asked
    assert main(["there", "--seeds", "1", "--source", "uci", "--team", "equal"]) == 0
    assert list(splits) == [Path("there/uci/equal/seed-0")]
    assert {longer for *_, longer in jobs.values()} == {SOURCES["uci"].longer} == {3}


@pytest.mark.parametrize("team", ["equal", "three"])
def test_other_teams_lie_in_folders_of_their_own(asked, team):
    splits, jobs = asked
    assert main(["there", "--seeds", "1", "--team", team]) == 0
    assert list(splits) == [Path(f"there/{team}/seed-0")]
    assert sorted({k for skew in splits[Path(f"there/{team}/seed-0")].values() for k in skew}) == [
        *range(10)
    ]
    starts = [(family, twin) for _, _, _, family, twin, _ in jobs.values()]
    assert len(set(starts)) == len(starts)  # models of one family do not start alike


@pytest.mark.parametrize("team", TEAMS)
def test_every_member_is_pretrained_as_its_family_under_its_own_name(team, tmp_path):
    for name, member in TEAMS[team].items():
        peer, first = (
            parse(["/data", "-c", str(settings_of(tmp_path, who, member.family))])[1][0]
            for who in (name, member.family)
        )
        assert (peer.name, peer.model) == (name, first.model)
        assert peer.options.model_kwargs == first.options.model_kwargs != {}
