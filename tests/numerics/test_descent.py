"""Sweeps of the descent against a plain loop that computes every gradient afresh, and against least squares."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_quadratics import make_grid, make_quadratic, weights_of

from distributed_adaround.formats import SCALE_FORMATS, Strategy
from distributed_adaround.numerics.descent import Descent
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.moments import Quadratic


def soft_rounded(c: Tensor, low: float, high: float, m: float) -> Tensor:
    """S_m on the integers low..high, as the formula in grid.py has it."""
    lo = c.floor()
    f = c - lo
    soft = (f > 0.5).double() if m >= 1 else ((f - m / 2) / (1 - m)).clamp(0, 1)
    return (lo + soft).clamp(low, high)


def plain_blocks(diagonal: list[float], runs: int, block: int) -> list[list[int]]:
    """Blocks of inputs in the order of their visits: by falling A_jj inside each run, dealt like cards to piles."""
    size = len(diagonal) // runs
    blocks = []
    for run in range(runs):
        ranked = sorted(range(run * size, (run + 1) * size), key=lambda j: -diagonal[j])
        piles = -(-size // block)
        blocks += [ranked[pile::piles] for pile in range(piles)]
    return blocks


def plain_sweep(
    quadratic: Quadratic, grid: Grid, levels: Tensor, scale: Tensor, mu: float, block: int, steps: int
) -> None:
    """One sweep of one conv group, every gradient computed afresh. levels `(R, J)`, scale `(R, n)`: changed."""
    second, weight = quadratic.second[0], quadratic.weight[0]
    linear = torch.zeros_like(weight) if quadratic.linear is None else quadratic.linear[0]
    runs = scale.shape[1]
    size = weight.shape[1] // runs
    seen = set()
    for own in plain_blocks(second.diagonal().tolist(), runs, block):
        run = own[0] // size
        mine = slice(run * size, (run + 1) * size)
        if grid.per_channel and run not in seen:
            seen.add(run)
            gradient = (levels * scale.repeat_interleave(size, dim=1) - weight) @ second - linear
            for r in range(len(levels)):
                q = levels[r, mine]
                scale[r, run] -= (q @ gradient[r, mine]) / (q @ second[mine, mine] @ q)
        root = second[own][:, own].diagonal().sqrt()
        lipschitz = 1.0
        if block > 1:
            lipschitz = max(1.0, float(torch.linalg.eigvalsh(second[own][:, own] / torch.outer(root, root))[-1]))
        for _ in range(steps if len(own) > 1 else 1):
            gradient = ((levels * scale.repeat_interleave(size, dim=1) - weight) @ second - linear)[:, own]
            for k, j in enumerate(own):
                c = levels[:, j] - gradient[:, k] / (lipschitz * second[j, j]) / scale[:, run]
                for r in range(len(levels)):
                    zero = grid.zero_point.expand(-1, len(levels), -1)[0, r, run]
                    ends = float(grid.qmin - zero), float(grid.qmax - zero)
                    levels[r, j] = soft_rounded(c[r : r + 1], *ends, min(1.0, mu / lipschitz))[0]


@pytest.mark.parametrize(
    ("inputs", "runs", "block", "steps"),
    [(7, 1, 1, 1), (12, 3, 1, 1), (12, 3, 3, 2), (21, 1, 8, 4), (150, 1, 1, 1), (270, 2, 32, 2), (300, 1, 64, 1)],
)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_sweeps_are_those_of_a_plain_loop(
    inputs: int, runs: int, block: int, steps: int, linear: bool, per_channel: bool
) -> None:
    quadratic = make_quadratic(1, 2, inputs, linear=linear)
    if not per_channel:
        runs = 1
    grid = make_grid(quadratic, "group" if per_channel else "tensor", runs=runs, dtype="uint3")
    descent = Descent(quadratic, grid, block=block, steps=steps)
    scale = grid.scale[0].expand(2, -1).clone()
    size = inputs // runs
    zeros = grid.zero_point[0].expand(2, -1).repeat_interleave(size, dim=1)
    wanted = quadratic.weight[0] / scale.repeat_interleave(size, dim=1)
    levels = torch.minimum(torch.maximum(wanted, grid.qmin - zeros), grid.qmax - zeros)
    for mu in (0.0, 0.4, 1.0):
        descent.sweep(mu)
        plain_sweep(quadratic, grid, levels, scale, mu, block, steps)
        # Refitted scales are kept in float32.
        found = descent.scale[0].expand(2, -1)
        torch.testing.assert_close(found, scale, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            weights_of(descent)[0], levels * scale.repeat_interleave(size, dim=1), rtol=1e-4, atol=1e-4
        )
        scale = found.clone()
    moved = (descent.scale - grid.scale).abs().max()
    assert moved > 1e-6 if per_channel else moved == 0


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("block", "steps"), [(1, 1), (4, 4), (32, 2)])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_without_the_regularizer_it_solves_least_squares(
    strategy: Strategy, block: int, steps: int, linear: bool
) -> None:
    quadratic = make_quadratic(2, 3, 12, linear=linear)
    grid = make_grid(quadratic, strategy, runs=3, dtype="uint8")
    # Room for the solution, and a start away from it.
    grid = replace(grid, scale=grid.scale * 4, zero_point=torch.full_like(grid.zero_point, 128))
    start = (torch.randn_like(quadratic.weight) * 10).round()
    descent = Descent(quadratic, grid, start, block=block, steps=steps)
    solution = quadratic.weight
    if quadratic.linear is not None:
        solution = solution + torch.linalg.solve(quadratic.second, quadratic.linear, left=False)
    before = (weights_of(descent) - solution).abs().max()
    for _ in range(150):
        descent.sweep(0.0)
    assert before > 1
    torch.testing.assert_close(weights_of(descent), solution, rtol=0, atol=1e-6)


def test_one_visit_of_one_input_is_the_exact_minimum_over_it() -> None:
    quadratic = make_quadratic(2, 3, 9, linear=True)
    grid = make_grid(quadratic, "tensor", dtype="uint8")
    descent = Descent(quadratic, replace(grid, scale=grid.scale * 4), block=1, steps=1)
    descent.sweep(0.0)
    # The last one visited: autograd knows of nothing but the loss.
    weights = weights_of(descent).clone().requires_grad_()
    (slope,) = torch.autograd.grad(quadratic.loss(weights).sum(), weights)
    last = quadratic.second.diagonal(dim1=1, dim2=2).argmin(dim=1)
    for g in range(2):
        assert slope[g, :, last[g]].abs().max() < 1e-12
        assert slope[g].abs().max() > 1e-3


def penalty(quadratic: Quadratic, grid: Grid, weights: Tensor) -> Tensor:
    """The regularizer `sum A_jj s² f (1 - f)` of each channel, `(G, R)`; scales per tensor or per channel."""
    scale = grid.scale
    levels = weights / scale
    if grid.values is None:
        f, width = levels - levels.floor(), torch.ones_like(levels)
    else:
        above = torch.searchsorted(grid.values, levels.contiguous()).clamp(1, len(grid.values) - 1)
        lo, hi = grid.values[above - 1], grid.values[above]
        width = hi - lo
        f = (levels - lo) / width
    return (quadratic.second.diagonal(dim1=1, dim2=2)[:, None] * (scale * width).square() * f * (1 - f)).sum(dim=2)


@pytest.mark.parametrize("mu", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize(("block", "steps"), [(1, 1), (8, 1), (8, 4)])
@pytest.mark.parametrize("dtype", ["uint2", "fp4"])
def test_loss_and_regularizer_never_rise_under_one_mu(mu: float, block: int, steps: int, dtype: str) -> None:
    quadratic = make_quadratic(1, 6, 30, linear=True)
    grid = make_grid(quadratic, dtype=dtype)
    descent = Descent(quadratic, grid, block=block, steps=steps)

    def goal() -> Tensor:
        return descent.losses() + mu * penalty(quadratic, grid, weights_of(descent))

    goals = [goal()]
    for _ in range(12):
        descent.sweep(mu, refit=False)
        goals.append(goal())
    for before, after in itertools.pairwise(goals):
        assert (after <= before + 1e-10).all()
    assert (goals[-1] < goals[0] - 1e-3).all()


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("scales", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["uint3", "mxfp4", "nvfp4", "fp8"])
def test_polishing_sweeps_never_raise_the_loss_and_end_where_no_scale_is_better(
    dtype: str, scales: str, strategy: Strategy
) -> None:
    if dtype in ("mxfp4", "nvfp4") and scales != "float32":
        return  # they have their own
    quadratic = make_quadratic(2, 4, 24, linear=True)
    grid = make_grid(quadratic, strategy, runs=3, dtype=dtype)
    if scales != "float32":
        grid = replace(grid, scale_format=SCALE_FORMATS[scales])
    # Scales far from the best ones.
    grid = replace(grid, scale=grid.representable(grid.scale * 4))
    before = grid.scale.clone()
    descent = Descent(quadratic, grid, block=1, steps=1)
    descent.settle()
    losses = [descent.losses()]
    for _ in range(30):
        descent.sweep(1.0)
        assert not descent.unsettled(0.0)
        losses.append(descent.losses())
    for earlier, later in itertools.pairwise(losses):
        assert (later <= earlier + 1e-10).all()
    assert (losses[-1] < losses[0]).all()
    assert torch.equal(losses[-1], losses[-2]), "it still moves"
    assert torch.equal(grid.scale, before), "the caller's scales are not to change"
    found = descent.scale
    assert torch.equal(found, grid.representable(found))
    if strategy == "tensor":
        assert torch.equal(found, before)
        return
    # Steps of the other formats are wide: many scales stay.
    assert (found != before).float().mean() > (0.1 if dtype in ("mxfp4", "nvfp4") else 0.9)
    # Another scale of one run, its levels kept, is no better.
    codes = descent.codes()
    for index in range(found.shape[2]):
        for factor in (0.5, 0.93, 0.999, 1.001, 1.07, 2.0):
            other = found.clone()
            other[:, :, index] = grid.representable(other[:, :, index] * factor)
            worse = quadratic.loss(replace(grid, scale=other).dequantize(codes))
            assert (worse >= losses[-1] - 1e-7).all(), (index, factor)
