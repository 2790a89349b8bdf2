"""Figures and standard errors against references that know no formula: each sample's weight is moved a little."""

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distributed_adaround.metrics.accuracy import Accuracy
from distributed_adaround.metrics.figures import MetricFigures, compare
from distributed_adaround.metrics.perplexity import Perplexity

BEFORE = torch.tensor([[9.0, 4], [3.0, 1], [5.5, 3], [14.0, 6], [2.5, 2]], dtype=torch.float64)
AFTER = BEFORE + torch.tensor([[0.7, 0], [0.1, 0], [0.9, 0], [1.4, 0], [0.2, 0]], dtype=torch.float64)
FIGURES = MetricFigures("perplexity", "", 40, False, 26.8412, 0.4123, 30.6149, 0.4987, 3.7737, 0.1184)


def perplexity(sums: Tensor, weights: Tensor) -> Tensor:
    return torch.exp((weights * sums[:, 0]).sum() / (weights * sums[:, 1]).sum())


def percent(sums: Tensor, weights: Tensor) -> Tensor:
    return 100 * (weights * sums[:, 0]).sum() / weights.sum()


def moved(figure: Callable[[Tensor], Tensor], samples: int) -> float:
    """Standard error of a figure of weighted samples, by how much each of them moves it."""
    weights, step = torch.ones(samples, dtype=torch.float64), 1e-5
    total = 0.0
    for place in range(samples):
        more, less = weights.clone(), weights.clone()
        more[place] += step
        less[place] -= step
        total += float((figure(more) - figure(less)) / (2 * step)) ** 2
    return math.sqrt(total * samples / (samples - 1))


def test_perplexity_its_errors_and_that_of_the_difference() -> None:
    found = compare("perplexity", "", BEFORE, AFTER, Perplexity().value, False)
    ones = torch.ones(5, dtype=torch.float64)
    assert found.float_value == pytest.approx(math.exp(34 / 16), rel=1e-12)
    assert found.quantized_value == pytest.approx(float(perplexity(AFTER, ones)), rel=1e-12)
    assert found.difference == found.quantized_value - found.float_value
    assert found.float_error == pytest.approx(moved(lambda w: perplexity(BEFORE, w), 5), rel=1e-6)
    assert found.quantized_error == pytest.approx(moved(lambda w: perplexity(AFTER, w), 5), rel=1e-6)
    pairs = moved(lambda w: perplexity(AFTER, w) - perplexity(BEFORE, w), 5)
    assert found.difference_error == pytest.approx(pairs, rel=1e-6)
    # Pairs tell more than two figures: what is hard for one model is hard for the other.
    assert found.difference_error < 0.5 * math.hypot(found.float_error, found.quantized_error)


def test_the_error_of_a_share_is_that_of_the_binomial() -> None:
    hits = torch.tensor([1.0, 1, 1, 0, 1, 0, 1, 1], dtype=torch.float64)
    sums = torch.stack([hits, torch.ones(8, dtype=torch.float64)], dim=1)
    found = compare("accuracy", "%", sums, sums, Accuracy().value, False)
    assert found.float_value == 75.0
    assert found.float_error == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 7), rel=1e-12)
    assert found.float_error == pytest.approx(moved(lambda w: percent(sums, w), 8), rel=1e-6)
    assert (found.difference, found.difference_error) == (0.0, 0.0)


def test_one_sample_has_no_error_and_what_is_not_finite_ends_nothing() -> None:
    one = compare("perplexity", "", BEFORE[:1], AFTER[:1], Perplexity().value, False)
    assert math.isnan(one.float_error)
    assert "float, 11.3 quantized, difference 1.814" in str(one)
    for bad in (math.nan, math.inf, 1e308):
        broken = AFTER.clone()
        broken[:2, 0] = bad
        found = compare("perplexity", "", BEFORE, broken, Perplexity().value, False)
        assert not math.isfinite(found.quantized_value)
        assert not found.within_noise
        assert found.float_error > 0
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["quantized_value"] is None


def test_text_of_a_metric() -> None:
    expected = "26.84 +- 0.41 float, 30.61 +- 0.50 quantized, difference 3.77 +- 0.12"
    assert str(FIGURES) == f"perplexity on 40 other samples: {expected}"
    accuracy = MetricFigures("accuracy", "%", 100, True, 87.0, 3.38, 86.0, 3.49, -1.0, 1.74)
    expected = "87.0 +- 3.4 float, 86.0 +- 3.5 quantized, difference -1.0 +- 1.7, within noise"
    assert str(accuracy) == f"accuracy in % on 100 samples of files that calibration used too: {expected}"
    large = replace(FIGURES, quantized_value=1.5e9, quantized_error=3e8, difference=1.5e9, difference_error=3e8)
    assert "26.84 +- 0.41 float, 1.5e+09 +- 3e+08 quantized" in str(large)


@pytest.mark.parametrize(("difference", "expected"), [(0.199, True), (-0.199, True), (0.201, False), (-0.201, False)])
def test_noise_is_what_is_below_two_standard_errors(difference: float, expected: bool) -> None:
    found = replace(FIGURES, difference=difference, difference_error=0.1)
    assert found.within_noise is expected
    assert ("within noise" in str(found)) is expected
    assert found.to_dict()["within_noise"] is expected
