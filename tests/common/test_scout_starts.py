"""Runs that began elsewhere than scouting sees their models."""

import pytest
import torch

from common.scout_starts import unlike_starts
from tests.common.test_realised import finished


def answers(*shares, count=400):
    """Return a model's right answers, in percent, of so many samples each."""
    return torch.stack([100.0 * (torch.arange(count) < share * count) for share in shares])


def test_a_run_that_began_elsewhere_is_told_with_model_and_both_numbers():
    runs = [finished((0, 1), (60, 60), before=50.0), finished((1, 2), (60, 60), before=43.0)]
    scouted = answers(0.5, 0.5, 0.44)
    told = unlike_starts(runs, "abc", "top1", scouted, [True, True])
    assert told == [
        "b is scouted at top1 50.0, but run began with it at 43.0 (1 of 2 runs differ): data, view "
        "or preprocessing are not the same, so the comparison is suspect"
    ]
    assert not unlike_starts(runs[:1], "abc", "top1", scouted, [True])


def test_chance_of_other_samples_is_no_difference():
    runs = [finished((0, 1), (60, 60), before=43.0)]
    scouted = answers(0.5, 0.44)
    # 3 * sqrt(2) * 50 / sqrt(400) = 10.6
    assert not unlike_starts(runs, "ab", "top1", scouted, [False])
    runs = [finished((0, 1), (60, 60), before=38.0)]
    assert len(unlike_starts(runs, "ab", "top1", scouted, [False])) == 1  # 12 and 6 points
    one = scouted.mean(dim=1, keepdim=True)
    assert not unlike_starts(runs, "ab", "top1", one, [False])  # of one part chance is not known


@pytest.mark.parametrize(
    ("metric", "value", "limit"), [("top1", 60, 2), ("cc", 0.5, 0.02), ("nss", 3, 0.06)]
)
def test_two_points_or_percent_are_allowed(metric, value, limit):
    scouted = torch.full((1, 5), float(value))
    for apart, expected in ((0.9 * limit, 0), (-0.9 * limit, 0), (1.1 * limit, 1)):
        run = finished((0,), (5,), before=value + apart)
        assert len(unlike_starts([run], "a", metric, scouted, [True])) == expected


def test_the_starts_of_another_metric_can_be_given():
    run = finished((1, 0), (60, 60), before=0.0)
    scouted = answers(0.5, 0.25)
    assert not unlike_starts([run], "ab", "pACC", scouted, [True], before=[(25.5, 50.5)])
    told = unlike_starts([run], "ab", "pACC", scouted, [True], before=[(50.5, 50.5)])
    assert len(told) == 1 and told[0].startswith("b is scouted at pACC 25.0, but run began with it")
