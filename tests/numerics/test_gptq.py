"""GPTQ against algorithm 1 of Frantar et al. 2022 without blocks, one input after the other, channel by channel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_formats import FLOAT32, layer_format

from distributed_adaround.formats import Strategy
from distributed_adaround.numerics.gptq import GptqFactors
from distributed_adaround.numerics.gptq import gptq_codes as codes_from_factors
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.moments import Quadratic
from distributed_adaround.numerics.ranges import choose_grid


def gptq_codes(quadratic: Quadratic, grid: Grid, damping: float) -> Tensor:
    return codes_from_factors(quadratic, grid, GptqFactors.of(quadratic.second, damping))


def make_quadratic(groups: int, channels: int, inputs: int, linear: bool, dead: int = 0) -> Quadratic:
    """Inputs of unequal size that hang together, float64; the last but one `dead` are always 0."""
    x = torch.randn(groups, 3 * inputs, inputs).double() @ torch.randn(groups, inputs, inputs).double() / inputs**0.5
    x *= 10.0 ** torch.linspace(-0.5, 0.5, inputs).double()[torch.randperm(inputs)]
    x[:, :, inputs - 1 - dead : inputs - 1] = 0
    second = x.transpose(1, 2) @ x / x.shape[1]
    weight = torch.randn(groups, channels, inputs).double()
    change = torch.randn(groups, channels, inputs).double() / 4
    return Quadratic(second, weight, change @ second if linear else None)


def grid_of(weight: Tensor, strategy: Strategy = "channel", runs: int = 1, dtype: str = "uint3") -> Grid:
    """Of a weight `(G, R, J)`; 3 bits, affine, or a float format."""
    size, symmetric = weight.shape[2] // runs, not dtype.startswith("uint")
    fmt = layer_format(dtype, strategy=strategy, group_size=size, observer="mse", symmetric=symmetric)
    return choose_grid(weight, fmt).to(weight.dtype)


def grid_of_input(grid: Grid, group: int, j: int, inputs: int) -> Grid:
    """The scales of one conv group that belong to input j; a grid per tensor stays as it is."""
    if not grid.per_channel:
        return grid
    run = j // (inputs // grid.scale.shape[2])
    own = (slice(group, group + 1), slice(None), slice(run, run + 1))
    return replace(grid, scale=grid.scale[own], zero_point=grid.zero_point[own])


def plain_gptq(quadratic: Quadratic, grid: Grid, damping: float) -> Tensor:
    """Codes `(G, R, J)`. The inverse of the inputs still to come is kept by elimination, without Cholesky factors."""
    codes = torch.empty_like(quadratic.weight)
    groups, _, inputs = codes.shape
    for g in range(groups):
        hessian = quadratic.second[g].clone()
        diagonal = hessian.diagonal().tolist()
        for j in range(inputs):
            hessian[j, j] += damping * sum(diagonal) / inputs if diagonal[j] else 1.0
        order = sorted(range(inputs), key=lambda j, size=diagonal: -size[j])
        weight = quadratic.weight[g].clone()
        if quadratic.linear is not None:
            weight += quadratic.linear[g] @ torch.linalg.inv(hessian)
        inverse = torch.linalg.inv(hessian)
        for j in order:
            own = grid_of_input(grid, g, j, inputs)
            codes[g, :, j] = own.quantize(weight[None, :, j : j + 1])[0, :, 0]
            error = (weight[:, j] - own.dequantize(codes[g : g + 1, :, j : j + 1])[0, :, 0]) / inverse[j, j]
            weight -= torch.outer(error, inverse[j])
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def test_reference_is_the_best_continuation_of_each_rounding() -> None:
    # Optimal brain surgeon: once an input is fixed, the others solve their least squares problem.
    quadratic = make_quadratic(1, 1, 3, linear=False)
    grid = grid_of(quadratic.weight)
    codes = plain_gptq(quadratic, grid, 0.0)
    second, weight = quadratic.second[0], quadratic.weight[0, 0]
    first, second_, last = second.diagonal().argsort(descending=True).tolist()
    q = grid.dequantize(grid.quantize(weight[None, None]))[0, 0]
    d = q[first] - weight[first]
    others = [second_, last]
    moved = weight.clone()
    moved[others] -= torch.linalg.solve(second[others][:, others], second[others, first] * d)
    assert codes[0, 0, first] == grid.quantize(weight[None, None])[0, 0, first]
    assert codes[0, 0, second_] == grid.quantize(moved[None, None])[0, 0, second_]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize(("groups", "channels", "inputs"), [(1, 4, 12), (3, 2, 8), (1, 3, 140), (2, 1, 260)])
def test_is_the_plain_algorithm(groups: int, channels: int, inputs: int, strategy: Strategy, linear: bool) -> None:
    quadratic = make_quadratic(groups, channels, inputs, linear)
    grid = grid_of(quadratic.weight, strategy, runs=4)
    for damping in (0.01, 0.3):
        found = gptq_codes(quadratic, grid, damping)
        assert torch.equal(found, plain_gptq(quadratic, grid, damping))


@pytest.mark.parametrize("dtype", ["fp4", "fp8"])
def test_float_formats(dtype: str) -> None:
    quadratic = make_quadratic(2, 3, 10, linear=True)
    grid = grid_of(quadratic.weight, "group", 2, dtype)
    found = gptq_codes(quadratic, grid, 0.01)
    assert torch.equal(found, plain_gptq(quadratic, grid, 0.01))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_are_always_0_keep_their_nearest_code(damping: float, linear: bool) -> None:
    quadratic = make_quadratic(2, 4, 9, linear, dead=3)
    grid = grid_of(quadratic.weight)
    found = gptq_codes(quadratic, grid, damping)
    assert torch.equal(found, plain_gptq(quadratic, grid, damping))
    nearest = grid.quantize(quadratic.weight)
    dead = slice(5, 8)
    assert torch.equal(found[:, :, dead], nearest[:, :, dead])
    # What the others do does not depend on them.
    alive = [0, 1, 2, 3, 4, 8]
    assert not torch.equal(found[:, :, alive], nearest[:, :, alive])
    if damping == 0:
        part = Quadratic(
            quadratic.second[:, alive][:, :, alive],
            quadratic.weight[:, :, alive],
            None if quadratic.linear is None else quadratic.linear[:, :, alive],
        )
        assert torch.equal(gptq_codes(part, grid, 0.0), found[:, :, alive])


def test_no_inputs_at_all() -> None:
    quadratic = replace(make_quadratic(1, 3, 5, linear=False), second=torch.zeros(1, 5, 5).double())
    grid = grid_of(quadratic.weight)
    for damping in (0.0, 0.01):
        found = gptq_codes(quadratic, grid, damping)
        assert torch.equal(found, grid.quantize(quadratic.weight))


def test_inputs_that_do_not_hang_together_are_rounded_to_the_nearest() -> None:
    quadratic = make_quadratic(1, 4, 10, linear=False)
    quadratic = replace(quadratic, second=torch.diag_embed(quadratic.second.diagonal(dim1=1, dim2=2)))
    grid = grid_of(quadratic.weight)
    found = gptq_codes(quadratic, grid, 0.01)
    assert torch.equal(found, grid.quantize(quadratic.weight))


def test_singular_moments_get_damping() -> None:
    # Two inputs that are always the same: what one rounds up the other can round down.
    quadratic = Quadratic(torch.ones(1, 2, 2).double(), torch.tensor([[[0.4, 0.4]]]).double(), None)
    grid = Grid(torch.ones(1, 1, 1).double(), torch.zeros(1, 1, 1).double(), -4, 3, FLOAT32)
    assert gptq_codes(quadratic, grid, 0.0).tolist() == [[[0, 1]]]
    assert gptq_codes(quadratic, grid, 0.01).tolist() == [[[0, 1]]]


@pytest.mark.parametrize("linear", [False, True])
def test_float32_is_better_than_nearest(linear: bool) -> None:
    exact = make_quadratic(2, 16, 64, linear)
    quadratic = Quadratic(
        exact.second.float(), exact.weight.float(), None if exact.linear is None else exact.linear.float()
    )
    grid = grid_of(quadratic.weight)
    found = gptq_codes(quadratic, grid, 0.01)
    assert found.dtype == torch.float32
    assert ((found >= 0) & (found <= 7) & (found == found.round())).all()
    nearest = grid.quantize(quadratic.weight)
    losses = [exact.loss(grid.dequantize(codes).double()).sum() for codes in (found, nearest)]
    assert losses[0] < 0.7 * losses[1] if not linear else losses[0] < losses[1]
