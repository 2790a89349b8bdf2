"""The lattice against the grid it comes from, and its soft rounding against brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distributed_adaround.numerics.floats import float_values
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.lattice import Lattice

OUT, INPUTS = 4, 6
SHAPES = {"tensor": (1, 1), "channel": (OUT, 1), "group": (OUT, 3)}
KINDS = ["symmetric", "affine", "fp8", "mxfp4", "nvfp4"]


def make_grid(kind: str, strategy: str) -> Grid:
    shape = SHAPES[strategy]
    scale = torch.rand(shape).double() + 0.2
    if kind == "symmetric":
        return Grid(scale, torch.zeros_like(scale), -4, 3)
    if kind == "affine":
        return Grid(scale, torch.randint(0, 8, shape).double(), 0, 7)
    values = float_values("e4m3" if kind == "fp8" else "e2m1").double()
    grid = Grid(scale, torch.zeros_like(scale), 0, len(values) - 1, values)
    if kind == "fp8":
        return grid
    if kind == "mxfp4":
        return replace(grid, scale_format="e8m0").with_scale(scale)
    return replace(grid, scale_format="e4m3", tensor_scale=torch.full((1, 1), 0.003).double()).with_scale(scale)


every_grid = pytest.mark.parametrize(
    ("kind", "strategy", "groups"), [(k, s, g) for k in KINDS for s in SHAPES for g in (1, 2)]
)


def split(matrix: Tensor, groups: int) -> Tensor:
    """`(O, I)` to `(G, R, J)`."""
    return matrix.reshape(groups, OUT // groups, INPUTS)


def random_codes(grid: Grid) -> Tensor:
    return torch.randint(grid.qmin, grid.qmax + 1, (OUT, INPUTS)).double()


@every_grid
def test_codes_levels_and_weights_are_those_of_the_grid(kind: str, strategy: str, groups: int) -> None:
    grid = make_grid(kind, strategy)
    lattice = Lattice.of_grid(grid, groups)
    assert lattice.per_row == (strategy != "tensor")
    for _ in range(5):
        codes = random_codes(grid)
        assert torch.equal(lattice.dequantize(split(codes, groups)), split(grid.dequantize(codes), groups))
        levels = split(grid.levels(codes), groups).transpose(1, 2)
        assert torch.equal(lattice.codes(levels), split(codes, groups).transpose(1, 2))


@every_grid
def test_runs_hold_scale_and_range_of_their_inputs(kind: str, strategy: str, groups: int) -> None:
    grid = make_grid(kind, strategy)
    lattice = Lattice.of_grid(grid, groups)
    runs, rows = SHAPES[strategy][1], OUT // groups
    index = torch.randint(0, runs, (groups, 1))
    for chosen in (*range(runs), index):
        run = lattice.run(chosen) if isinstance(chosen, int) else lattice.of_inputs(chosen)
        for g in range(groups):
            for r in range(rows):
                place = chosen if isinstance(chosen, int) else int(chosen[g, 0])
                where = (g * rows + r, place) if strategy != "tensor" else (0, 0)
                scale, low, high = (
                    torch.as_tensor(one).expand(groups, 1, rows)[g, 0, r] for one in (run.scale, run.low, run.high)
                )
                assert scale == grid.scale[where]
                first, last = (0, -1) if grid.values is not None else (grid.qmin, grid.qmax)
                ends = (
                    grid.values[[first, last]]
                    if grid.values is not None
                    else torch.tensor([first, last]) - grid.zero_point[where]
                )
                assert [low, high] == ends.tolist()


@every_grid
def test_rows_are_parts_of_the_whole(kind: str, strategy: str, groups: int) -> None:
    grid = make_grid(kind, strategy)
    whole, codes = Lattice.of_grid(grid, groups), split(random_codes(grid), groups)
    for some in (slice(0, 1), slice(groups - 1, groups), slice(0, groups)):
        for rows in (slice(0, 1), slice(1, OUT // groups)):
            part = whole.rows(some, rows)
            assert torch.equal(part.dequantize(codes[some, rows]), whole.dequantize(codes)[some, rows])
            levels = torch.randn(codes[some, rows].transpose(1, 2).shape).double() * 4
            index = torch.full((levels.shape[0], 1), SHAPES[strategy][1] - 1)
            padded = torch.zeros(groups, INPUTS, OUT // groups).double()
            padded[some, :, rows] = levels
            expected = whole.run(int(index[0])).round(padded)[some, :, rows]
            assert torch.equal(part.of_inputs(index).round(levels), expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("strategy", ["channel", "group"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_at_shares_of_the_scale_are_those_of_the_grid(kind: str, strategy: str, groups: int) -> None:
    grid = make_grid(kind, strategy)
    codes = random_codes(grid)
    copies = Lattice.of_grid(grid, groups).at_shares([1.0, 0.4])
    found = copies.dequantize(split(codes, groups).repeat(1, 2, 1))
    smaller = grid.with_scale(grid.scale * 0.4)
    for copy, expected in enumerate((grid.with_scale(grid.scale), smaller)):
        rows = slice(copy * OUT // groups, (copy + 1) * OUT // groups)
        # with_scale rounds to float32.
        torch.testing.assert_close(found[:, rows], split(expected.dequantize(codes), groups), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", SHAPES)
def test_weights_are_rounded_to_the_codes_of_the_grid(kind: str, strategy: str) -> None:
    grid = make_grid(kind, strategy)
    lattice = Lattice.of_grid(grid, 2)
    weight = torch.randn(OUT, INPUTS).double() * 3
    if kind == "fp8":
        weight *= 60
    codes, runs = split(grid.quantize(weight), 2), SHAPES[strategy][1]
    size = INPUTS // runs
    inputs_first = split(weight, 2).transpose(1, 2)
    parts = [
        run.round(inputs_first[:, k * size : (k + 1) * size] / run.scale)
        for k, run in ((k, lattice.run(k)) for k in range(runs))
    ]
    assert torch.equal(lattice.codes(torch.cat(parts, dim=1)).transpose(1, 2), codes)


@pytest.mark.parametrize("softness", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["symmetric", "affine", "fp8", "mxfp4"])
def test_soft_rounding_is_the_best_point_between_neighbours(kind: str, softness: float) -> None:
    grid = make_grid(kind, "channel")
    run = Lattice.of_grid(grid, 1).run(0)
    for row in range(OUT):
        values = grid.values
        if values is None:
            values = torch.arange(grid.qmin, grid.qmax + 1).double() - grid.zero_point[row]
        ends = float(values[0]), float(values[-1])
        inside = torch.rand(100).double() * (ends[1] - ends[0]) + ends[0]
        if kind == "fp8":
            inside[:50] /= 300
        level = torch.cat([inside, values[[0, 1, -1]], torch.tensor([ends[0] - 3, ends[1] + 3]).double()])
        before = level.clone()
        found = run.round(level[None, :, None].expand(1, -1, OUT), softness)[0, :, row]
        assert torch.equal(level, before)
        for c, v in zip(level.tolist(), found.tolist(), strict=True):
            lo = float(values[values <= c].max()) if c >= ends[0] else ends[0]
            hi = float(values[values >= c].min()) if c <= ends[1] else ends[1]
            assert lo - 1e-12 <= v <= hi + 1e-12, (c, v)
            if hi == lo:
                continue

            def cost(points: Tensor, c: float = c, lo: float = lo, hi: float = hi) -> Tensor:
                f = (points - lo) / (hi - lo)
                return (points - c) ** 2 + softness * (hi - lo) ** 2 * f * (1 - f)

            best = cost(torch.linspace(lo, hi, 1001, dtype=torch.float64)).min()
            assert cost(torch.tensor(v, dtype=torch.float64)) <= best + 1e-12 * max(1.0, (hi - lo) ** 2), (c, v)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_rounding_of_0_moves_nothing_and_of_1_ends_on_the_lattice(kind: str) -> None:
    grid = make_grid(kind, "channel")
    run = Lattice.of_grid(grid, 1).run(0)
    # No more than half the range, so that nothing is cut off.
    level = (torch.rand(1, 50, OUT).double() - 0.5) * (run.high - run.low) / 2 + (run.high + run.low) / 2
    torch.testing.assert_close(run.round(level, 0.0), level, rtol=1e-14, atol=1e-14)
    hard = run.round(level)
    assert torch.equal(run.round(level, 1.0), hard)
    assert torch.equal(run.round(hard), hard)
    for softness in (0.3, 0.8):
        soft = run.round(level, softness)
        assert torch.equal(run.round(hard, softness), hard)
        assert ((soft - hard).abs() <= (level - hard).abs() + 1e-12).all()
        assert ((soft - hard).abs() < (level - hard).abs() - 1e-3).any()


UNUSABLE = [torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 1e-45, 1e-39, 1e300]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["symmetric", "mxfp4", "nvfp4"])
def test_representable_is_the_nearest_scale_of_the_format(kind: str, dtype: torch.dtype) -> None:
    lattice = Lattice.of_grid(make_grid(kind, "group").to(dtype), 1)
    wanted = torch.cat([torch.rand(200) * 3, 10.0 ** torch.linspace(-37, 38, 100)]).to(dtype)
    found = lattice.representable(wanted[None, :, None])[0, :, 0]
    assert found.dtype == dtype
    if kind == "symmetric":
        assert torch.equal(found, wanted.float().to(dtype))
    else:
        if kind == "mxfp4":
            allowed = 2.0 ** torch.arange(-126, 128).double()
        else:
            assert lattice.tensor_scale is not None
            allowed = float_values("e4m3")[127:].double() * float(lattice.tensor_scale)
        nearest = (allowed - wanted.double()[:, None]).abs().amin(dim=1)
        away = (found.double() - wanted.double()).abs()
        assert ((away - nearest).abs() <= 1e-6 * wanted).all()
        assert ((allowed / found.double()[:, None] - 1).abs().amin(dim=1) < 1e-6).all()
    unusable = torch.tensor(UNUSABLE, dtype=torch.float64).to(dtype)
    assert torch.isnan(lattice.representable(unusable[None, :, None])).all()
