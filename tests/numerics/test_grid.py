"""Grid against brute force over all its values, and against torch's fake quantization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distributed_adaround.numerics.grid import Grid

ROWS, INPUTS = 5, 12
RANGES = {"int3": (-4, 3), "uint3": (0, 7), "int8": (-128, 127), "uint8": (0, 255), "narrow": (-3, 3)}
NUM_GROUPS = {"tensor": (1, 1), "channel": (ROWS, 1), "group": (ROWS, 3)}


def make_grid(strategy: str, code_range: str, *, affine: bool = False) -> Grid:
    qmin, qmax = RANGES[code_range]
    shape = NUM_GROUPS[strategy]
    scale = torch.rand(shape, dtype=torch.float64) + 0.1
    middle = 0 if qmin < 0 else (qmax + 1) // 2
    zero_point = torch.randint(qmin, qmax + 1, shape).double() if affine else torch.full(shape, float(middle)).double()
    return Grid(scale, zero_point, qmin, qmax)


def all_values(grid: Grid) -> Tensor:
    """Every grid value at every weight's place, `(O, I, codes)`, written out with loops."""
    codes = range(grid.qmin, grid.qmax + 1)
    groups = grid.scale.shape[1]
    values = torch.empty(ROWS, INPUTS, len(codes), dtype=torch.float64)
    for o in range(ROWS):
        for i in range(INPUTS):
            place = (o if grid.scale.shape[0] > 1 else 0, i // (INPUTS // groups))
            for k, code in enumerate(codes):
                values[o, i, k] = (code - grid.zero_point[place]) * grid.scale[place]
    return values


every_grid = pytest.mark.parametrize(
    ("strategy", "code_range", "affine"),
    [(s, r, a) for s in NUM_GROUPS for r in RANGES for a in (False, True)],
)


@every_grid
def test_against_all_values_of_the_grid(strategy: str, code_range: str, affine: bool) -> None:
    grid = make_grid(strategy, code_range, affine=affine)
    values = all_values(grid)
    first, last = values[..., 0], values[..., -1]
    # Some weights beyond both ends.
    weight = first + (last - first) * (torch.rand(ROWS, INPUTS, dtype=torch.float64) * 1.6 - 0.3)
    assert (weight < first).any()
    assert (weight > last).any()
    for k, code in enumerate(range(grid.qmin, grid.qmax + 1)):
        torch.testing.assert_close(grid.dequantize(torch.full((ROWS, INPUTS), code)), values[..., k])
    nearest = (values - weight[..., None]).abs().argmin(dim=-1) + grid.qmin
    assert torch.equal(grid.quantize(weight), nearest.double())
    below, above = grid.neighbours(weight)
    count = (values <= weight[..., None]).sum(dim=-1)
    assert torch.equal(below, (count - 1).clamp(min=0).double() + grid.qmin)
    assert torch.equal(above, count.clamp(max=values.shape[-1] - 1).double() + grid.qmin)
    # Nearest rounding is always one of the two choices, and beyond the ends there is none.
    assert ((nearest == below) | (nearest == above)).all()
    beyond = (weight < first) | (weight > last)
    assert torch.equal(below[beyond], above[beyond])
    assert (above[~beyond] == below[~beyond] + 1).all()


def test_weights_on_the_grid_keep_their_code() -> None:
    grid = Grid(torch.full((1, 1), 0.5), torch.zeros(1, 1), -4, 3)
    weight = grid.dequantize(torch.arange(-4, 4)[None])
    below, above = grid.neighbours(weight)
    assert below.tolist() == [[-4, -3, -2, -1, 0, 1, 2, 3]]
    assert above.tolist() == [[-3, -2, -1, 0, 1, 2, 3, 3]]
    assert torch.equal(grid.quantize(weight), below)


def test_ties_go_to_even() -> None:
    grid = Grid(torch.ones(1, 1), torch.full((1, 1), 4.0), 0, 7)
    assert (grid.quantize(torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5]])) - 4).tolist() == [[-2, -2, 0, 0, 2]]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("code_range", ["int8", "uint8", "int3"])
def test_equals_torch_fake_quantize(code_range: str, affine: bool) -> None:
    grid = make_grid("channel", code_range, affine=affine).to(torch.float32)
    weight = torch.randn(ROWS, INPUTS) * 20
    expected = torch.fake_quantize_per_channel_affine(
        weight, grid.scale[:, 0], grid.zero_point[:, 0].int(), 0, grid.qmin, grid.qmax
    )
    torch.testing.assert_close(grid.dequantize(grid.quantize(weight)), expected)


def test_to_changes_dtype_and_nothing_else() -> None:
    grid = make_grid("group", "uint3", affine=True).to(torch.float32)
    wide = grid.to(torch.float64)
    assert wide.scale.dtype == wide.zero_point.dtype == torch.float64
    assert torch.equal(wide.scale.float(), grid.scale)
    assert torch.equal(wide.zero_point.float(), grid.zero_point)
    assert (wide.qmin, wide.qmax) == (0, 7)


def test_quantize_leaves_its_argument_alone() -> None:
    grid, weight = make_grid("tensor", "int3"), torch.randn(ROWS, INPUTS, dtype=torch.float64)
    before = weight.clone()
    grid.quantize(weight)
    grid.neighbours(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("strategy", NUM_GROUPS)
def test_levels_times_scales_are_the_values(strategy: str) -> None:
    grid = make_grid(strategy, "uint3", affine=True)
    codes = grid.quantize(torch.randn(ROWS, INPUTS, dtype=torch.float64))
    torch.testing.assert_close(grid.levels(codes) * grid.scale_like(codes), grid.dequantize(codes), rtol=0, atol=0)


def test_with_scale_takes_positive_numbers_in_float32_and_leaves_the_rest() -> None:
    grid = make_grid("group", "int3")
    scale = torch.rand(ROWS, 3, dtype=torch.float64)
    scale[0] = torch.tensor([0.0, -1.0, torch.nan])
    scale[1] = torch.tensor([torch.inf, 1e300, 1e-40])
    changed = grid.with_scale(scale)
    assert changed.scale.dtype == torch.float64
    assert torch.equal(changed.scale[2:], scale[2:].float().double())
    assert torch.equal(changed.scale[:2], grid.scale[:2].float().double())
    assert torch.equal(changed.zero_point, grid.zero_point)
