"""Calibration: values by hand, temperatures that are known, and what the limits are."""

import math

import pytest
import torch

from common.calibration import (
    COLDEST,
    HOTTEST,
    TemperatureFit,
    expected_calibration_error,
    fit_temperature,
)


def test_calibration_error_by_hand():
    # bins of width 1/15: 0.95, 0.97 share the last; 0.55 and 0.35 are alone in theirs
    confidence = torch.tensor([0.95, 0.97, 0.55, 0.35])
    correct = torch.tensor([True, False, True, False])
    expected = (abs(1 - 0.95 - 0.97) + abs(1 - 0.55) + abs(0 - 0.35)) / 4
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-7)


def test_bins_are_closed_above_and_their_number_counts():
    confidence, correct = torch.tensor([0.5, 0.25]), torch.tensor([True, False])
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(0.125)
    assert expected_calibration_error(confidence, correct, bins=4) == pytest.approx(0.375)


def test_a_model_that_means_what_it_says_has_no_error():
    confidence = torch.full((10,), 0.7)
    assert expected_calibration_error(confidence, torch.arange(10) < 7) == pytest.approx(
        0, abs=1e-7
    )


def test_samples_at_an_edge_share_the_bin_below_it_and_certainty_has_no_error():
    # 15 bins: (0.533, 0.6] holds two samples, half right, 0.6 sure; (0.8667, 0.9333] one, right
    confidence = torch.tensor([0.6, 0.6, 0.9], dtype=torch.float64)
    correct = torch.tensor([True, False, True])
    gap = (abs(1.2 - 1) + abs(0.9 - 1)) / 3
    assert expected_calibration_error(confidence, correct) == pytest.approx(gap)
    assert expected_calibration_error(torch.ones(2), torch.tensor([True, True])) == 0
    with pytest.raises(ValueError, match=r"same samples \[n\], got \[3\] and \[2\]"):
        expected_calibration_error(confidence, correct[:2])


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no sample"):
        expected_calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool))
    with pytest.raises(ValueError, match="no labelled sample"):
        fit_temperature(lambda: [])


def two_classes(gap, right, wrong):
    """A model that always answers class 0, `gap` ahead, and is right on some samples."""
    logits = torch.tensor([[gap, 0.0]]).expand(right + wrong, 2)
    return logits, torch.tensor([0] * right + [1] * wrong)


@pytest.mark.parametrize(("gap", "right", "wrong"), [(4.0, 3, 1), (0.5, 9, 1), (9.0, 6, 3)])
def test_temperature_of_two_classes_has_a_closed_form(gap, right, wrong):
    # the best p is right / n, so gap / T = log(right / wrong)
    found = fit_temperature(lambda: [two_classes(gap, right, wrong)])
    assert found == pytest.approx(gap / math.log(right / wrong), rel=1e-4)


def test_temperature_minimises_the_likelihood_and_batches_do_not_matter():
    torch.manual_seed(0)
    logits = 3 * torch.randn(400, 7)
    labels = torch.distributions.Categorical(logits=logits / 2.5).sample()
    found = fit_temperature(lambda: [(logits, labels)])
    halves = fit_temperature(lambda: [(logits[:90], labels[:90]), (logits[90:], labels[90:])])
    assert halves == pytest.approx(found, rel=1e-4)
    assert 2 < found < 3.1

    def nll(t):
        return torch.nn.functional.cross_entropy(logits.double() / t, labels).item()

    assert nll(found) < min(nll(found * 1.02), nll(found / 1.02))
    shifted = logits + torch.randn(400, 1)
    assert fit_temperature(lambda: [(shifted, labels)]) == pytest.approx(found, rel=1e-3)


def test_a_model_without_a_mistake_ends_at_the_limit():
    found = fit_temperature(lambda: [two_classes(1.0, 5, 0)])
    assert found == pytest.approx(COLDEST, rel=0.02)


def in_one_pass(batches):
    fit = TemperatureFit()
    for logits, labels in batches:
        fit.add(logits, labels)
    return fit


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sureness", [0.1, 0.5, 1.0, 3.0, 10.0])
def test_one_pass_finds_the_same_temperature(seed, sureness):
    torch.manual_seed(seed)
    logits = torch.randn(300, 6) * torch.rand(300, 1).mul(4).exp()
    labels = torch.distributions.Categorical(logits=logits / 6).sample()
    batches = [(sureness * logits[:77], labels[:77]), (sureness * logits[77:], labels[77:])]
    expected = fit_temperature(lambda: batches)
    assert in_one_pass(batches).temperature() == pytest.approx(expected, rel=1e-3)


def test_parts_of_the_data_add_up_and_half_precision_is_taken():
    torch.manual_seed(0)
    logits = 3 * torch.randn(400, 7).half()
    labels = torch.distributions.Categorical(logits=logits.float() / 2.5).sample()
    whole = in_one_pass([(logits, labels)])
    part, rest = (in_one_pass([(logits[p], labels[p])]) for p in (slice(90), slice(90, None)))
    part.sums += rest.sums
    torch.testing.assert_close(part.sums, whole.sums, rtol=1e-5, atol=1e-4)
    assert part.temperature() == pytest.approx(whole.temperature(), rel=1e-4)


def test_the_limits_of_one_pass():
    assert in_one_pass([two_classes(1.0, 5, 0)]).temperature() == COLDEST
    assert in_one_pass([two_classes(1.0, 1, 4)]).temperature() == HOTTEST
    with pytest.raises(ValueError, match="no labelled sample"):
        TemperatureFit().temperature()
