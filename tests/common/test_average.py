"""Averages of weights: by hand, shared tensors, the mode, and what is refused."""

import pytest
import torch
from torch import nn

from common.average import WeightAverage, decay_of_span


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.95, 0.999, 0.9995, 0.9999])
def test_the_average_moves_by_its_decay_and_copies_whole_numbers(decay):
    module = nn.BatchNorm1d(1)
    module.register_buffer("table", torch.arange(200_000))
    average = WeightAverage(module, decay)
    nn.init.constant_(module.weight, 2.0)
    module.running_mean.fill_(1.0)
    module.num_batches_tracked.fill_(7)
    average.update(module)
    assert average.module.weight.item() == pytest.approx(2 - decay)
    assert average.module.running_mean.item() == pytest.approx(1 - decay)
    assert average.module.num_batches_tracked == 7
    assert torch.equal(average.module.table, module.table)


def test_what_two_names_share_moves_once():
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    module[1].weight = module[0].weight
    average = WeightAverage(module, 0.75)
    before = module[0].weight.item()
    with torch.no_grad():
        module[0].weight += 1
    average.update(module)
    assert average.module[0].weight.item() == pytest.approx(before + 0.25)
    assert average.module[1].weight is average.module[0].weight


def test_the_average_is_in_evaluation_mode_and_learns_nothing():
    """Its forwards as a teacher leave its statistics alone."""
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
    average = WeightAverage(module, 0.9).module
    before = average[0].running_mean.clone()
    torch.testing.assert_close(average(torch.ones(4, 2)), torch.ones(4, 2), atol=1e-4, rtol=0)
    assert torch.equal(average[0].running_mean, before)
    assert module.training and not any(p.requires_grad for p in average.parameters())


def test_a_span_is_a_share_of_the_run():
    assert decay_of_span(0.25, 400) == pytest.approx(0.99)
    assert decay_of_span(0.25, 3) == 0  # shorter than a step: the model itself


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay is {decay}; expected"):
        WeightAverage(nn.Linear(1, 1), decay)
