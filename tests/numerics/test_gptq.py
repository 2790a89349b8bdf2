"""GPTQ against algorithm 1 of Frantar et al. 2022 without blocks, one column after the other, row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from distributed_adaround.numerics.lattice import Lattice
from torch import Tensor
from torch.linalg import LinAlgError

from distributed_adaround.numerics.floats import ElementFormat
from distributed_adaround.numerics.gptq import GptqFactors
from distributed_adaround.numerics.gptq import gptq_codes as codes_from_factors
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.moments import Quadratic
from distributed_adaround.numerics.ranges import Strategy, choose_grid


def gptq_codes(quadratic: Quadratic, lattice: Lattice, damping: float) -> Tensor:
    return codes_from_factors(quadratic, lattice, GptqFactors.of(quadratic.second, damping))


def make_quadratic(groups: int, rows: int, inputs: int, pull: bool, dead: int = 0) -> Quadratic:
    """Inputs of unequal size that hang together, float64; the last but one `dead` are always 0."""
    x = torch.randn(groups, 3 * inputs, inputs).double() @ torch.randn(groups, inputs, inputs).double() / inputs**0.5
    x *= 10.0 ** torch.linspace(-0.5, 0.5, inputs).double()[torch.randperm(inputs)]
    x[:, :, inputs - 1 - dead : inputs - 1] = 0
    second = x.transpose(1, 2) @ x / x.shape[1]
    weight = torch.randn(groups, rows, inputs).double()
    change = torch.randn(groups, rows, inputs).double() / 4
    return Quadratic(second, weight, change @ second if pull else None)


def grid_of(
    weight: Tensor, strategy: Strategy = "channel", runs: int = 1, element_format: ElementFormat | None = None
) -> Grid:
    """Of a weight `(G, R, J)`; 3 bits, affine, or a float format."""
    integers = element_format is None
    return choose_grid(
        weight.flatten(0, 1),
        qmin=0,
        qmax=7 if integers else 14,
        symmetric=not integers,
        zero_point=0,
        strategy=strategy,
        group_size=weight.shape[2] // runs,
        observer="mse",
        element_format=element_format,
    ).to(weight.dtype)


def grid_of_input(grid: Grid, rows: slice, j: int, inputs: int) -> Grid:
    """The scales of some rows that belong to input j; a grid per tensor stays as it is."""
    if grid.scale.shape[0] == 1:
        return grid
    run = j // (inputs // grid.scale.shape[1])
    own = slice(run, run + 1)
    return replace(grid, scale=grid.scale[rows, own], zero_point=grid.zero_point[rows, own])


def plain_gptq(quadratic: Quadratic, grid: Grid, damping: float) -> Tensor:
    """Codes `(G, R, J)`. The inverse of the inputs still to come is kept by elimination, without Cholesky factors."""
    codes = torch.empty_like(quadratic.weight)
    groups, rows, inputs = codes.shape
    for g in range(groups):
        hessian = quadratic.second[g].clone()
        diagonal = hessian.diagonal().tolist()
        for j in range(inputs):
            hessian[j, j] += damping * sum(diagonal) / inputs if diagonal[j] else 1.0
        order = sorted(range(inputs), key=lambda j, size=diagonal: -size[j])
        weight = quadratic.weight[g].clone()
        if quadratic.pull is not None:
            weight += quadratic.pull[g] @ torch.linalg.inv(hessian)
        inverse = torch.linalg.inv(hessian)
        for j in order:
            own = grid_of_input(grid, slice(g * rows, (g + 1) * rows), j, inputs)
            codes[g, :, j] = own.quantize(weight[:, j : j + 1])[:, 0]
            error = (weight[:, j] - own.dequantize(codes[g, :, j : j + 1])[:, 0]) / inverse[j, j]
            weight -= torch.outer(error, inverse[j])
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def test_reference_is_the_best_continuation_of_each_rounding() -> None:
    # Optimal brain surgeon: once an input is fixed, the others solve their least squares problem.
    quadratic = make_quadratic(1, 1, 3, pull=False)
    grid = grid_of(quadratic.weight)
    codes = plain_gptq(quadratic, grid, 0.0)
    second, weight = quadratic.second[0], quadratic.weight[0, 0]
    first, second_, last = second.diagonal().argsort(descending=True).tolist()
    q = grid.dequantize(grid.quantize(weight[None]))[0]
    d = q[first] - weight[first]
    others = [second_, last]
    moved = weight.clone()
    moved[others] -= torch.linalg.solve(second[others][:, others], second[others, first] * d)
    assert codes[0, 0, first] == grid.quantize(weight[None])[0, first]
    assert codes[0, 0, second_] == grid.quantize(moved[None])[0, second_]


@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize(("groups", "rows", "inputs"), [(1, 4, 12), (3, 2, 8), (1, 3, 140), (2, 1, 260)])
def test_is_the_plain_algorithm(groups: int, rows: int, inputs: int, strategy: Strategy, pull: bool) -> None:
    quadratic = make_quadratic(groups, rows, inputs, pull)
    grid = grid_of(quadratic.weight, strategy, runs=4)
    for damping in (0.01, 0.3):
        found = gptq_codes(quadratic, Lattice.of_grid(grid, groups), damping)
        assert torch.equal(found, plain_gptq(quadratic, grid, damping))


@pytest.mark.parametrize("element_format", ["e2m1", "e4m3"])
def test_float_formats(element_format: ElementFormat) -> None:
    quadratic = make_quadratic(2, 3, 10, pull=True)
    grid = grid_of(quadratic.weight, "group", 2, element_format)
    grid = replace(grid, qmax=14 if element_format == "e2m1" else 252)
    found = gptq_codes(quadratic, Lattice.of_grid(grid, 2), 0.01)
    assert torch.equal(found, plain_gptq(quadratic, grid, 0.01))


@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_are_always_0_keep_their_nearest_code(damping: float, pull: bool) -> None:
    quadratic = make_quadratic(2, 4, 9, pull, dead=3)
    grid = grid_of(quadratic.weight)
    found = gptq_codes(quadratic, Lattice.of_grid(grid, 2), damping)
    assert torch.equal(found, plain_gptq(quadratic, grid, damping))
    nearest = grid.quantize(quadratic.weight.flatten(0, 1)).view_as(found)
    dead = slice(5, 8)
    assert torch.equal(found[:, :, dead], nearest[:, :, dead])
    # What the others do does not depend on them.
    alive = [0, 1, 2, 3, 4, 8]
    assert not torch.equal(found[:, :, alive], nearest[:, :, alive])
    if damping == 0:
        part = Quadratic(
            quadratic.second[:, alive][:, :, alive],
            quadratic.weight[:, :, alive],
            None if quadratic.pull is None else quadratic.pull[:, :, alive],
        )
        assert torch.equal(gptq_codes(part, Lattice.of_grid(grid, 2), 0.0), found[:, :, alive])


def test_no_inputs_at_all() -> None:
    quadratic = replace(make_quadratic(1, 3, 5, pull=False), second=torch.zeros(1, 5, 5).double())
    grid = grid_of(quadratic.weight)
    for damping in (0.0, 0.01):
        found = gptq_codes(quadratic, Lattice.of_grid(grid, 1), damping)
        assert torch.equal(found[0], grid.quantize(quadratic.weight[0]))


def test_inputs_that_do_not_hang_together_are_rounded_to_the_nearest() -> None:
    quadratic = make_quadratic(1, 4, 10, pull=False)
    quadratic = replace(quadratic, second=torch.diag_embed(quadratic.second.diagonal(dim1=1, dim2=2)))
    grid = grid_of(quadratic.weight)
    found = gptq_codes(quadratic, Lattice.of_grid(grid, 1), 0.01)
    assert torch.equal(found[0], grid.quantize(quadratic.weight[0]))


def test_singular_moments_need_damping() -> None:
    # Two inputs that are always the same: what one rounds up the other can round down.
    quadratic = Quadratic(torch.ones(1, 2, 2).double(), torch.tensor([[[0.4, 0.4]]]).double(), None)
    grid = Grid(torch.ones(1, 1).double(), torch.zeros(1, 1).double(), -4, 3)
    lattice = Lattice.of_grid(grid, 1)
    with pytest.raises(LinAlgError):
        gptq_codes(quadratic, lattice, 0.0)
    assert gptq_codes(quadratic, lattice, 0.01).tolist() == [[[0, 1]]]


@pytest.mark.parametrize("pull", [False, True])
def test_float32_is_better_than_nearest(pull: bool) -> None:
    exact = make_quadratic(2, 16, 64, pull)
    quadratic = Quadratic(
        exact.second.float(), exact.weight.float(), None if exact.pull is None else exact.pull.float()
    )
    grid = grid_of(quadratic.weight)
    lattice = Lattice.of_grid(grid, 2)
    found = gptq_codes(quadratic, lattice, 0.01)
    assert found.dtype == torch.float32
    assert ((found >= 0) & (found <= 7) & (found == found.round())).all()
    nearest = grid.quantize(quadratic.weight.flatten(0, 1)).view_as(found)
    losses = [exact.loss(lattice.dequantize(codes).double()).sum() for codes in (found, nearest)]
    assert losses[0] < 0.7 * losses[1] if not pull else losses[0] < losses[1]
