"""What a whole descent ends with: on the grid, near the best of all codes, each channel and conv group by itself."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_quadratics import make_grid, make_quadratic, weights_of
from toy_solving import raw_quadratic

from distributed_adaround.formats import Strategy
from distributed_adaround.numerics.descent import Descent
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.moments import Moments, Quadratic
from distributed_adaround.solve.gram import regularizer_weight


def annealed(quadratic: Quadratic, grid: Grid, sweeps: int = 60, block: int = 1, steps: int = 1) -> Descent:
    descent = Descent(quadratic, grid, block=block, steps=steps)
    for sweep in range(sweeps):
        descent.sweep(regularizer_weight(sweep, sweeps))
    descent.settle()
    return descent


def nearest_weights(quadratic: Quadratic, grid: Grid) -> Tensor:
    """Every weight at the nearest value of the grid."""
    candidates = torch.stack([grid.dequantize(torch.full_like(quadratic.weight, c)) for c in range(grid.qmax + 1)])
    place = (candidates - quadratic.weight).abs().argmin(dim=0, keepdim=True)
    return candidates.gather(0, place)[0]


def all_levels(grid: Grid, inputs: int, channel: int) -> Tensor:
    """Every choice of levels of one channel, `(codes^J, J)`."""
    ends = range(grid.qmin, grid.qmax + 1)
    zero = grid.zero_point.expand(1, 3, 1)[0, channel, 0]
    return torch.tensor(list(itertools.product(ends, repeat=inputs))).double() - zero


@pytest.mark.parametrize(("block", "steps"), [(1, 1), (3, 4)])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_close_to_the_best_of_all_codes(strategy: Strategy, block: int, steps: int) -> None:
    gaps, improvements = [], []
    for seed in range(10):
        torch.manual_seed(seed)
        quadratic = make_quadratic(1, 3, 6, linear=True)
        grid = make_grid(quadratic, strategy)
        found = annealed(quadratic, grid, block=block, steps=steps).losses()[0]
        nearest = quadratic.loss(nearest_weights(quadratic, grid))[0]
        assert quadratic.linear is not None
        aim = quadratic.weight[0] @ quadratic.second[0] + quadratic.linear[0]
        constant = ((aim + quadratic.linear[0]) * quadratic.weight[0]).sum(dim=1)
        for channel in range(3):
            levels = all_levels(grid, 6, channel)
            linear, square = levels @ aim[channel], ((levels @ quadratic.second[0]) * levels).sum(dim=1)
            scale = grid.scale.expand(1, 3, 1)[0, channel, 0]
            if strategy == "channel":
                # Each choice with its own best scale, where that is positive.
                scale = torch.where(linear > 0, linear / square, 0.0).nan_to_num(0.0)
            best = (scale**2 * square - 2 * scale * linear).min() + constant[channel]
            assert found[channel] >= best - 1e-6
            # In units of the output that is to be matched: losses less their constant can be near 0.
            size = aim[channel] @ torch.linalg.solve(quadratic.second[0], aim[channel])
            gaps.append(float((found[channel] - best) / size))
            improvements.append(float((nearest[channel] - found[channel]) / size))
    # Of what nearest rounding loses, all but a few percent; a single channel can end worse than nearest.
    assert sum(gaps) < 0.1 * sum(improvements)
    assert sum(improvement < -1e-9 for improvement in improvements) <= 2


every_format = pytest.mark.parametrize("dtype", ["uint2", "fp8", "mxfp4", "nvfp4"])
every_strategy = pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])


@every_format
@every_strategy
def test_ends_on_the_grid_and_better_than_nearest(strategy: Strategy, dtype: str) -> None:
    quadratic = make_quadratic(2, 8, 24, linear=True)
    grid = make_grid(quadratic, strategy, runs=3, dtype=dtype)
    descent = Descent(quadratic, grid, block=8, steps=4)
    for sweep in range(80):
        descent.sweep(regularizer_weight(sweep, 80))
    assert descent.unsettled(0.05) <= 0.03 * descent.levels.numel()
    descent.settle()
    assert not descent.unsettled(0.0)
    codes = descent.codes()
    assert ((codes >= grid.qmin) & (codes <= grid.qmax) & (codes == codes.round())).all()
    found = replace(grid, scale=descent.scale.view_as(grid.scale) if grid.per_channel else grid.scale)
    torch.testing.assert_close(found.dequantize(codes), weights_of(descent), rtol=1e-15, atol=0)
    assert descent.losses().sum() < quadratic.loss(nearest_weights(quadratic, grid)).sum()
    assert torch.equal(descent.scale, grid.representable(descent.scale))
    assert grid.per_channel or torch.equal(descent.scale.unique(), grid.scale.flatten())


@every_format
@every_strategy
def test_starts_from_the_levels_it_is_given_and_gives_them_back(strategy: Strategy, dtype: str) -> None:
    quadratic = make_quadratic(2, 5, 24, linear=True)
    grid = make_grid(quadratic, strategy, runs=3, dtype=dtype)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (2, 5, 24)).double()
    weights = grid.dequantize(codes)
    for block in (1, 7):
        descent = Descent(quadratic, grid, grid.levels(codes), block=block, steps=2)
        assert torch.equal(descent.codes(), codes)
        torch.testing.assert_close(weights_of(descent), weights)
        assert not descent.unsettled(0.0)
        torch.testing.assert_close(descent.losses(), quadratic.loss(weights))


@every_strategy
def test_starts_from_the_float_weights_inside_the_range(strategy: Strategy) -> None:
    quadratic = make_quadratic(2, 5, 12)
    grid = make_grid(quadratic, strategy, runs=3)
    descent = Descent(quadratic, grid, block=1, steps=1)
    ends = [grid.dequantize(torch.full((2, 5, 12), float(code)).double()) for code in (0, 3)]
    clipped = torch.minimum(torch.maximum(quadratic.weight, ends[0]), ends[1])
    assert not torch.equal(clipped, quadratic.weight)
    torch.testing.assert_close(weights_of(descent), clipped)
    # So far only those on an end have settled.
    inside = (clipped == quadratic.weight).sum()
    assert descent.unsettled(0.0) == inside
    assert descent.unsettled(0.5) == 0
    assert 0 < descent.unsettled(0.25) < inside


@every_strategy
def test_conv_groups_and_channels_are_solved_as_if_alone(strategy: Strategy) -> None:
    quadratic = make_quadratic(2, 3, 12, linear=True)
    grid = make_grid(quadratic, strategy, runs=2)
    whole = annealed(quadratic, grid, sweeps=25)
    for g in range(2):
        group = slice(g, g + 1)
        for channels in (slice(0, 3), *(slice(r, r + 1) for r in range(3))):
            place = (group, channels)
            part = annealed(quadratic.part(place), grid.part(place), sweeps=25)
            assert torch.equal(part.codes(), whole.codes()[place])
            torch.testing.assert_close(part.losses(), whole.losses()[place])


def test_conv_groups_of_one_moment_are_alone_in_blocks_too() -> None:
    # Blocks share one L over the groups: with the same inputs in all of them it is that of each.
    one = make_quadratic(1, 6, 20, linear=True)
    assert one.linear is not None
    three = Quadratic(one.second.expand(3, -1, -1), one.weight.view(3, 2, 20), one.linear.view(3, 2, 20))
    codes = [annealed(case, make_grid(case), block=8, steps=3).codes() for case in (one, three)]
    assert torch.equal(codes[0].view(3, 2, 20), codes[1])


@pytest.mark.parametrize(("block", "steps"), [(1, 1), (5, 4)])
def test_inputs_that_are_always_0_end_at_their_nearest_code(block: int, steps: int) -> None:
    quadratic = make_quadratic(2, 4, 15, linear=True, dead=4)
    grid = make_grid(quadratic, "tensor")
    found = weights_of(annealed(quadratic, grid, block=block, steps=steps))
    nearest = nearest_weights(quadratic, grid)
    torch.testing.assert_close(found[:, :, :4], nearest[:, :, :4])
    assert quadratic.linear is not None
    part = Quadratic(quadratic.second[:, 4:, 4:], quadratic.weight[:, :, 4:], quadratic.linear[:, :, 4:])
    if block == 1:
        assert torch.equal(weights_of(annealed(part, grid)), found[:, :, 4:])


def test_no_inputs_at_all() -> None:
    for strategy in ("tensor", "channel"):
        quadratic = make_quadratic(1, 4, 6, dead=6)
        grid = make_grid(quadratic, strategy)
        descent = annealed(quadratic, grid, block=2, steps=2)
        torch.testing.assert_close(weights_of(descent), nearest_weights(quadratic, grid))
        assert torch.equal(descent.scale, grid.scale)


@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-21, 1e-22, 1e-30])
def test_inputs_near_the_end_of_float32(size: float) -> None:
    # Their squares have no reciprocal, or are denormal, or 0.
    exact = make_quadratic(1, 4, 12)
    factor = torch.ones(12).double()
    factor[[2, 5]] = size
    second = (exact.second * factor[:, None] * factor).float()
    quadratic = Quadratic(second, exact.weight.float(), None)
    descent = annealed(quadratic, make_grid(quadratic), block=4, steps=4)
    assert torch.isfinite(descent.levels).all()
    assert torch.isfinite(descent.losses()).all()


def test_an_input_that_never_changes_does_not_hold_up_its_block() -> None:
    x = torch.randn(2000, 16) @ torch.randn(16, 16) / 4 + 1
    x[:, 3] = 1.0
    moments = Moments((x.T @ x).double()[None] / 2000, x.sum(dim=0).double()[None] / 2000, None, None, 2000)
    quadratic = raw_quadratic(moments, torch.randn(1, 8, 16), 1.0, True)
    grid = make_grid(quadratic)
    in_blocks, one_by_one = (annealed(quadratic, grid, block=b, steps=4).losses().sum() for b in (16, 1))
    nearest = quadratic.loss(nearest_weights(quadratic, grid)).sum()
    assert in_blocks < 0.6 * nearest
    assert in_blocks < 1.2 * one_by_one


def test_rounding_errors_beside_a_diagonal_of_0_do_not_hold_up_a_block() -> None:
    clean = make_quadratic(1, 6, 12, dead=1)
    noisy = clean.second.clone()
    noisy[:, 0, 1:] = noisy[:, 1:, 0] = 1e-9
    for diagonal in (0.0, -1e-9):
        noisy[:, 0, 0] = diagonal
        grid = make_grid(clean)
        cases = (clean, Quadratic(noisy, clean.weight, None))
        codes = [annealed(case, grid, block=12, steps=4).codes() for case in cases]
        assert torch.equal(codes[0], codes[1])
