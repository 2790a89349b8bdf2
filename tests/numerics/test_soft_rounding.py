"""The learned part against autograd and against the formulas of the paper, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toy_formats import FLOAT32

from distributed_adaround.numerics import soft_rounding as rounding
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.soft_rounding import (
    OutputTransform,
    RoundingSchedule,
    SoftRounding,
    add_regularizer_gradient,
    initial_alpha,
    pieces,
    rectified_sigmoid,
    regularizer,
)


def paper_h(alpha: Tensor) -> Tensor:
    return (torch.sigmoid(alpha) * 1.2 - 0.1).clamp(0, 1)


def test_rectified_sigmoid() -> None:
    alpha = torch.linspace(-6, 6, 101, dtype=torch.float64)
    before = alpha.clone()
    h = rectified_sigmoid(alpha)
    torch.testing.assert_close(h, paper_h(alpha), rtol=1e-14, atol=1e-15)
    assert torch.equal(alpha, before)
    # Reaches both ends at finite alpha, which a plain sigmoid does not.
    assert h[0] == 0
    assert h[-1] == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_soft_weight_starts_at_the_float_weight(dtype: torch.dtype, tolerance: float) -> None:
    grid = Grid(torch.full((1, 1, 1), 0.25, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype), -4, 3, FLOAT32)
    weight = torch.cat([torch.linspace(-1, 0.75, 200), torch.tensor([0.0, 0.25, -1.0, 0.125])])[None, None].to(dtype)
    lo, hi = (grid.dequantize(codes) for codes in grid.neighbours(weight))
    soft = SoftRounding(weight, lo, hi)
    # All lie between their neighbours: the difference is exactly 0, and alpha really stands for the float weight.
    assert torch.equal(soft.refresh(), torch.zeros_like(weight))
    torch.testing.assert_close(lo + rectified_sigmoid(soft.alpha) * (hi - lo), weight, rtol=0, atol=tolerance)
    # Before any step the hard decision is nearest rounding (no ties among these weights but the last).
    hard = torch.where(soft.rounds_up, hi, lo)
    assert torch.equal(hard[..., :-1], grid.dequantize(grid.quantize(weight))[..., :-1])


def test_clamped_weights_start_finite_at_the_end_of_the_range() -> None:
    grid = Grid(torch.full((1, 1, 1), 0.25), torch.zeros(1, 1, 1), -4, 3, FLOAT32)
    weight = torch.tensor([[[-100.0, -1.01, 0.76, 0.8, 1e30, 0.75]]])
    lo, hi = (grid.dequantize(codes) for codes in grid.neighbours(weight))
    soft = SoftRounding(weight, lo, hi)
    assert torch.isfinite(soft.alpha).all()
    ends = torch.tensor([[[-1.0, -1.0, 0.75, 0.75, 0.75, 0.75]]])
    assert torch.equal(soft.refresh(), ends - weight)
    assert torch.equal(lo + rectified_sigmoid(soft.alpha) * (hi - lo), ends)
    # Nothing to choose, so nothing can be unsettled.
    assert not soft.unsettled.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_difference_is_exact_at_the_start(dtype: torch.dtype) -> None:
    # Scales that are no powers of two: lo + h (hi - lo) is the weight only up to rounding.
    grid = Grid(torch.rand(1, 40, 1, dtype=dtype) + 0.1, torch.zeros(1, 40, 1, dtype=dtype), -4, 3, FLOAT32)
    weight = torch.randn(1, 40, 500, dtype=dtype)
    weight[:, :, :8] = grid.scale * torch.arange(-4, 4)
    lo, hi = (grid.dequantize(codes) for codes in grid.neighbours(weight))
    between = (lo <= weight) & (weight <= hi)
    assert 1000 < int(between.sum()) < weight.numel() - 1000
    expected = torch.where(between, 0.0, torch.where(weight < lo, lo, hi) - weight)
    soft = SoftRounding(weight, lo, hi)
    assert (lo + soft.delta * rectified_sigmoid(soft.alpha) - weight)[between].any(), "too easy: nothing is rounded"
    assert torch.equal(soft.refresh(), expected)
    assert torch.equal(soft.refresh(), expected), "nothing may add up"
    start = soft.alpha.clone()
    soft.alpha.normal_(0, 3)
    moved = soft.refresh().clone()
    reference = lo + paper_h(soft.alpha) * (hi - lo) - weight
    # A few roundings of numbers up to the largest weight.
    exactness = 8 * torch.finfo(dtype).eps * float(weight.abs().max())
    torch.testing.assert_close(moved, reference, rtol=0, atol=exactness)
    assert torch.equal(moved[lo == hi], expected[lo == hi]), "there is nothing to choose"
    soft.alpha.copy_(start)
    assert torch.equal(soft.refresh(), expected)


def test_initial_alpha_of_weights_outside_their_neighbours() -> None:
    alpha = initial_alpha(torch.tensor([-3.0, 5.0]), torch.zeros(2), torch.ones(2))
    assert torch.isfinite(alpha).all()
    torch.testing.assert_close(paper_h(alpha), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-6)


def test_unsettled_counts_choices_in_between() -> None:
    soft = SoftRounding(torch.zeros(6), torch.zeros(6), torch.tensor([1.0, 1, 1, 1, 1, 0]))
    soft.alpha.copy_(torch.tensor([-9.0, 9, 0, 1, -2.38, 0]))
    assert soft.unsettled.tolist() == [False, False, True, True, False, False]
    assert soft.rounds_up.tolist() == [False, True, True, True, False, True]


@pytest.mark.parametrize("num_steps", [10, 1000, 2001])
def test_schedule_is_a_cosine_after_the_warm_up(num_steps: int) -> None:
    schedule = RoundingSchedule(num_steps, 0.2, 20.0, 2.0, 0.01)
    warm = 0.2 * num_steps
    for step in range(num_steps):
        progress = min(1.0, max(0.0, (step - warm) / (num_steps - 1 - warm)))
        assert schedule.beta(step) == pytest.approx(2 + 18 * 0.5 * (1 + math.cos(math.pi * progress)), abs=1e-12)
        assert schedule.weight(step) == (0.0 if step < warm else 0.01)
    assert schedule.beta(0) == 20
    assert schedule.beta(num_steps - 1) == pytest.approx(2, abs=1e-12)
    betas = [schedule.beta(step) for step in range(num_steps)]
    assert betas == sorted(betas, reverse=True)


def test_schedule_has_the_middle_at_half_time() -> None:
    # Worked by hand: 101 steps without warm-up, the cosine is 0 at step 50.
    schedule = RoundingSchedule(101, 0.0, 20.0, 2.0, 0.5)
    assert schedule.beta(50) == pytest.approx(11.0)
    assert schedule.weight(0) == 0.5


@pytest.mark.parametrize("warm_start", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_schedule_of_very_few_steps_stays_in_its_range(num_steps: int, warm_start: float) -> None:
    schedule = RoundingSchedule(num_steps, warm_start, 20.0, 2.0, 0.01)
    for step in range(num_steps):
        assert 2 <= schedule.beta(step) <= 20
        assert schedule.weight(step) in (0.0, 0.01)


@pytest.mark.parametrize("beta", [1.1, 2.0, 2.5, 7.3, 20.0])
def test_regularizer_against_autograd(beta: float) -> None:
    sigmoid = torch.cat([torch.linspace(1 / 12, 11 / 12, 51, dtype=torch.float64), torch.rand(50).double() / 2 + 0.25])
    sigmoid[25] = 0.5
    sigmoid.requires_grad_()
    expected = (1 - (2 * (1.2 * sigmoid - 0.1) - 1).abs().pow(beta)).sum()
    (gradient,) = torch.autograd.grad(expected, sigmoid)
    before = torch.randn(101, dtype=torch.float64)
    derivative = before.clone()
    add_regularizer_gradient(derivative, sigmoid.detach(), beta, 0.7)
    torch.testing.assert_close(regularizer(sigmoid.detach(), beta), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(derivative - before, 0.7 * gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("beta", [1.0 + 1e-6, 2.0, 1e3])
def test_regularizer_is_finite_for_every_exponent(beta: float) -> None:
    sigmoid = torch.cat([torch.linspace(1 / 12, 11 / 12, 1001), torch.tensor([0.5, 0.5 + 2**-24, 0.5 - 2**-25])])
    gradient = torch.zeros_like(sigmoid)
    add_regularizer_gradient(gradient, sigmoid, beta, 1.0)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(regularizer(sigmoid, beta))


def test_regularizer_of_nothing() -> None:
    assert regularizer(torch.empty(0), 2.0) == 0
    add_regularizer_gradient(torch.empty(0), torch.empty(0), 2.0, 1.0)


def reference_transform(y: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str) -> Tensor:
    """y `(N, O, L)` through torch's own batch norm (running mean 0, variance 1) and activation."""
    if scale is not None:
        channels = y.shape[1]
        y = F.batch_norm(y, y.new_zeros(channels), y.new_ones(channels), scale, shift, eps=0.0)
    return {"relu": F.relu, "relu6": F.relu6, "identity": lambda z: z}[activation](y)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6"])
class TestOutputTransform:
    def test_call(self, activation: str, affine: bool) -> None:
        y = torch.randn(3, 4, 7, dtype=torch.float64) * 5
        scale, shift = (torch.randn(2, 4, dtype=torch.float64)) if affine else (None, None)
        transform = OutputTransform(scale, shift, activation)
        before = y.clone()
        expected = reference_transform(y, scale, shift, activation)
        torch.testing.assert_close(transform(y, channel_dim=1), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(transform(y.movedim(1, -1)).movedim(-1, 1), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(y, before)

    def test_forward_backward_against_autograd(self, activation: str, affine: bool) -> None:
        y = (torch.randn(9, 4, dtype=torch.float64) * 5).requires_grad_()
        scale, shift = (torch.randn(2, 4, dtype=torch.float64)) if affine else (None, None)
        target, weight = torch.randn(9, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
        transformed = reference_transform(y[:, :, None], scale, shift, activation)[:, :, 0]
        expected = ((transformed - target).square() * weight).sum()
        (gradient,) = torch.autograd.grad(expected, y)
        kept = [t.clone() for t in (y.detach(), target, weight)]
        loss, derivative = OutputTransform(scale, shift, activation).forward_backward(y.detach(), target, weight)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(derivative, gradient, rtol=1e-12, atol=1e-14)
        for tensor, before in zip((y.detach(), target, weight), kept, strict=True):
            assert torch.equal(tensor, before)

    def test_no_rows(self, activation: str, affine: bool) -> None:
        scale, shift = (torch.randn(2, 4)) if affine else (None, None)
        loss, gradient = OutputTransform(scale, shift, activation).forward_backward(
            torch.empty(0, 4), torch.empty(0, 4), torch.ones(4)
        )
        assert loss == 0
        assert gradient.shape == (0, 4)


@pytest.mark.parametrize("affine", [False, True])
def test_linear_part_is_the_transform_of_differences(affine: bool) -> None:
    a, b = torch.randn(2, 3, 4, 7, dtype=torch.float64) * 5
    scale, shift = (torch.randn(2, 4, dtype=torch.float64)) if affine else (None, None)
    expected = reference_transform(a, scale, shift, "identity") - reference_transform(b, scale, shift, "identity")
    for activation in ("identity", "relu", "relu6"):
        transform = OutputTransform(scale, shift, activation)
        assert transform.is_affine == (activation == "identity")
        linear = transform.linear_part()
        torch.testing.assert_close(linear(a - b, channel_dim=1), expected, rtol=1e-12, atol=1e-12)
        assert not linear(torch.zeros_like(a), channel_dim=1).any()
    assert scale is None or shift.all(), "the transform itself is left alone"


def test_gradient_by_alpha_against_autograd() -> None:
    lo, hi = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64) + 4
    weight = lo + torch.rand(3, 5, dtype=torch.float64) * (hi - lo)
    soft = SoftRounding(weight, lo, hi)
    alpha = (torch.randn(3, 5, dtype=torch.float64) * 2.5).requires_grad_()
    soft.alpha.copy_(alpha.detach())
    probe = torch.randn(3, 5, dtype=torch.float64)
    h = paper_h(alpha)
    assert ((h == 0) | (h == 1)).any()
    (gradient,) = torch.autograd.grad(((h + 0.1) / 1.2 * probe).sum(), alpha)
    torch.testing.assert_close(soft.refresh(), (lo + h * (hi - lo) - weight).detach(), rtol=1e-13, atol=1e-13)
    found = probe.clone()
    rounding._to_gradient_by_alpha(found, soft.sigmoid)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("piece", [7, 1 << 18])
def test_descend_is_torchs_adam(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_PIECE", piece)
    lo = torch.randn(3, 5, dtype=torch.float64)
    hi = lo + 0.5
    hi[1] = lo[1]
    weight = lo + torch.rand(3, 5, dtype=torch.float64)  # half of them beyond their neighbours
    soft = SoftRounding(weight, lo, hi)
    alpha = soft.alpha.clone().requires_grad_()
    adam = torch.optim.Adam([alpha], lr=0.3, eps=1e-3, foreach=False)
    start = soft.difference.clone()
    for _ in range(20):
        probe = torch.randn(3, 5, dtype=torch.float64)
        adam.zero_grad()
        ((torch.sigmoid(alpha).clamp(1 / 12, 11 / 12)) * probe).sum().backward()
        adam.step()
        soft.descend(probe, 0.3, 1e-3)
        torch.testing.assert_close(soft.alpha, alpha.detach(), rtol=1e-11, atol=1e-13)
    moved = soft.difference.clone()
    assert (moved != start).any()
    assert torch.equal(moved, soft.refresh()), "nothing was left to refresh"


def test_pieces_are_views_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_PIECE", 7)
    tensor = torch.arange(30.0).view(2, 15)
    parts = pieces(tensor)
    assert [part.numel() for part in parts] == [7, 7, 7, 7, 2]
    for part in parts:
        part.neg_()
    assert torch.equal(tensor.flatten(), -torch.arange(30.0))
