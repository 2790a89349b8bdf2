"""Grid against brute force over all its values, and against torch's fake quantization; soft rounding likewise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_formats import FLOAT32

from distributed_adaround.formats import E2M1, E4M3, SCALE_FORMATS
from distributed_adaround.numerics.grid import Grid

GROUPS, CHANNELS, INPUTS = 2, 3, 12
RANGES = {"int3": (-4, 3), "uint3": (0, 7), "int8": (-128, 127), "uint8": (0, 255), "narrow": (-3, 3)}
SHAPES = {"tensor": (1, 1, 1), "channel": (GROUPS, CHANNELS, 1), "group": (GROUPS, CHANNELS, 3)}


def make_grid(strategy: str, code_range: str, *, affine: bool = False) -> Grid:
    qmin, qmax = RANGES[code_range]
    shape = SHAPES[strategy]
    scale = torch.rand(shape, dtype=torch.float64) + 0.1
    middle = 0 if qmin < 0 else (qmax + 1) // 2
    zero_point = torch.randint(qmin, qmax + 1, shape).double() if affine else torch.full(shape, float(middle)).double()
    return Grid(scale, zero_point, qmin, qmax, FLOAT32, per_channel=strategy != "tensor")


def random_weight() -> Tensor:
    return torch.randn(GROUPS, CHANNELS, INPUTS, dtype=torch.float64)


def all_values(grid: Grid) -> Tensor:
    """Every grid value at every weight's place, `(G, R, J, codes)`, written out with loops."""
    codes = range(grid.qmin, grid.qmax + 1)
    size = INPUTS // grid.scale.shape[2]
    values = torch.empty(GROUPS, CHANNELS, INPUTS, len(codes), dtype=torch.float64)
    for g in range(GROUPS):
        for r in range(CHANNELS):
            for i in range(INPUTS):
                place = (g, r, i // size) if grid.scale.shape[0] > 1 else (0, 0, 0)
                for k, code in enumerate(codes):
                    values[g, r, i, k] = (code - grid.zero_point[place]) * grid.scale[place]
    return values


every_range = pytest.mark.parametrize(
    ("strategy", "code_range", "affine"),
    [(s, r, a) for s in SHAPES for r in RANGES for a in (False, True)],
)


@every_range
def test_against_all_values_of_the_grid(strategy: str, code_range: str, affine: bool) -> None:
    grid = make_grid(strategy, code_range, affine=affine)
    values = all_values(grid)
    first, last = values[..., 0], values[..., -1]
    # Some weights beyond both ends.
    weight = first + (last - first) * (torch.rand(GROUPS, CHANNELS, INPUTS, dtype=torch.float64) * 1.6 - 0.3)
    assert (weight < first).any()
    assert (weight > last).any()
    for k, code in enumerate(range(grid.qmin, grid.qmax + 1)):
        torch.testing.assert_close(grid.dequantize(torch.full((GROUPS, CHANNELS, INPUTS), code)), values[..., k])
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
    grid = Grid(torch.full((1, 1, 1), 0.5), torch.zeros(1, 1, 1), -4, 3, FLOAT32)
    weight = grid.dequantize(torch.arange(-4, 4)[None, None])
    below, above = grid.neighbours(weight)
    assert below.tolist() == [[[-4, -3, -2, -1, 0, 1, 2, 3]]]
    assert above.tolist() == [[[-3, -2, -1, 0, 1, 2, 3, 3]]]
    assert torch.equal(grid.quantize(weight), below)


def test_ties_go_to_even() -> None:
    grid = Grid(torch.ones(1, 1, 1), torch.full((1, 1, 1), 4.0), 0, 7, FLOAT32)
    assert (grid.quantize(torch.tensor([[[-2.5, -1.5, -0.5, 0.5, 1.5]]])) - 4).tolist() == [[[-2, -2, 0, 0, 2]]]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("code_range", ["int8", "uint8", "int3"])
def test_equals_torch_fake_quantize(code_range: str, affine: bool) -> None:
    grid = make_grid("channel", code_range, affine=affine).to(torch.float32)
    weight = torch.randn(GROUPS, CHANNELS, INPUTS) * 20
    expected = torch.fake_quantize_per_channel_affine(
        weight.flatten(0, 1), grid.scale.flatten(), grid.zero_point.flatten().int(), 0, grid.qmin, grid.qmax
    )
    torch.testing.assert_close(grid.dequantize(grid.quantize(weight)).flatten(0, 1), expected)


def test_to_changes_dtype_and_nothing_else() -> None:
    grid = make_grid("group", "uint3", affine=True).to(torch.float32)
    wide = grid.to(torch.float64)
    assert wide.scale.dtype == wide.zero_point.dtype == torch.float64
    assert torch.equal(wide.scale.float(), grid.scale)
    assert torch.equal(wide.zero_point.float(), grid.zero_point)
    assert (wide.qmin, wide.qmax) == (0, 7)


def test_quantize_leaves_its_argument_alone() -> None:
    grid, weight = make_grid("tensor", "int3"), random_weight()
    before = weight.clone()
    grid.quantize(weight)
    grid.neighbours(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("strategy", SHAPES)
def test_levels_times_scales_are_the_values(strategy: str) -> None:
    grid = make_grid(strategy, "uint3", affine=True)
    codes = grid.quantize(random_weight())
    scale = grid.scale.repeat_interleave(INPUTS // grid.scale.shape[2], dim=2)
    torch.testing.assert_close(grid.levels(codes) * scale, grid.dequantize(codes), rtol=0, atol=0)


def test_with_scale_takes_positive_numbers_in_float32_and_leaves_the_rest() -> None:
    grid = make_grid("group", "int3")
    scale = torch.rand(GROUPS, CHANNELS, 3, dtype=torch.float64)
    scale[0, 0] = torch.tensor([0.0, -1.0, torch.nan])
    scale[0, 1] = torch.tensor([torch.inf, 1e300, 1e-40])
    changed = grid.with_scale(scale)
    kept, taken = (slice(0, 1), slice(0, 2)), (slice(0, 1), slice(2, None))
    assert changed.scale.dtype == torch.float64
    assert torch.equal(changed.scale[1], scale[1].float().double())
    assert torch.equal(changed.scale[taken], scale[taken].float().double())
    assert torch.equal(changed.scale[kept], grid.scale[kept])
    assert torch.equal(changed.zero_point, grid.zero_point)


# --- grids of all kinds: parts, runs of inputs that share scales, copies

KINDS = ["symmetric", "affine", "fp8", "mxfp4", "nvfp4"]


def grid_of_kind(kind: str, strategy: str) -> Grid:
    shape = SHAPES[strategy]
    scale = torch.rand(shape).double() + 0.2
    if kind == "symmetric":
        return Grid(scale, torch.zeros_like(scale), -4, 3, FLOAT32, per_channel=strategy != "tensor")
    if kind == "affine":
        return Grid(scale, torch.randint(0, 8, shape).double(), 0, 7, FLOAT32, per_channel=strategy != "tensor")
    values = torch.tensor((E4M3 if kind == "fp8" else E2M1).values).double()
    scale_format = {"fp8": "float32", "mxfp4": "e8m0", "nvfp4": "e4m3"}[kind]
    factor = torch.full((1, 1, 1), 0.003).double() if kind == "nvfp4" else None
    grid = Grid(
        scale,
        torch.zeros_like(scale),
        0,
        len(values) - 1,
        SCALE_FORMATS[scale_format],
        values,
        factor,
        per_channel=strategy != "tensor",
    )
    return grid if kind == "fp8" else grid.with_scale(scale)


every_grid = pytest.mark.parametrize(("kind", "strategy"), [(k, s) for k in KINDS for s in SHAPES])


def random_codes(grid: Grid) -> Tensor:
    return torch.randint(grid.qmin, grid.qmax + 1, (GROUPS, CHANNELS, INPUTS)).double()


@every_grid
def test_codes_levels_and_weights_belong_together(kind: str, strategy: str) -> None:
    grid = grid_of_kind(kind, strategy)
    for _ in range(5):
        codes = random_codes(grid)
        levels, weights = grid.levels(codes), grid.dequantize(codes)
        assert torch.equal(grid.codes(levels), codes)
        for g in range(GROUPS):
            for r in range(CHANNELS):
                for j in range(INPUTS):
                    place = (g, r, j // (INPUTS // grid.scale.shape[2])) if strategy != "tensor" else (0, 0, 0)
                    code = codes[g, r, j]
                    level = code - grid.zero_point[place] if grid.values is None else grid.values[int(code)]
                    assert levels[g, r, j] == level
                    assert weights[g, r, j] == level * grid.scale[place]


@every_grid
def test_runs_hold_scale_and_range_of_their_inputs(kind: str, strategy: str) -> None:
    grid = grid_of_kind(kind, strategy)
    index = torch.randint(0, SHAPES[strategy][2], (GROUPS, 1))
    runs = grid.runs()
    assert len(runs) == SHAPES[strategy][2]
    for chosen, run in (*enumerate(runs), (index, grid.of_inputs(index))):
        for g in range(GROUPS):
            for r in range(CHANNELS):
                place = chosen if isinstance(chosen, int) else int(chosen[g, 0])
                where = (g, r, place) if strategy != "tensor" else (0, 0, 0)
                scale, low, high = (
                    torch.as_tensor(one).expand(GROUPS, 1, CHANNELS)[g, 0, r] for one in (run.scale, run.low, run.high)
                )
                assert scale == grid.scale[where]
                ends = (
                    grid.values[[0, -1]]
                    if grid.values is not None
                    else torch.tensor([grid.qmin, grid.qmax]) - grid.zero_point[where]
                )
                assert [low, high] == ends.tolist()


def test_runs_are_copies() -> None:
    grid = make_grid("group", "int3")
    before = grid.scale.clone()
    for run in grid.runs():
        run.scale.mul_(2)
    assert torch.equal(grid.scale, before)


@every_grid
def test_parts_are_parts_of_the_whole(kind: str, strategy: str) -> None:
    whole = grid_of_kind(kind, strategy)
    codes = random_codes(whole)
    for some in (slice(0, 1), slice(GROUPS - 1, GROUPS), slice(0, GROUPS)):
        for channels in (slice(0, 1), slice(1, CHANNELS)):
            part = whole.part((some, channels))
            assert part.per_channel == (strategy != "tensor")
            assert torch.equal(part.dequantize(codes[some, channels]), whole.dequantize(codes)[some, channels])
            levels = torch.randn(codes[some, channels].transpose(1, 2).shape).double() * 4
            last = SHAPES[strategy][2] - 1
            padded = torch.zeros(GROUPS, INPUTS, CHANNELS).double()
            padded[some, :, channels] = levels
            expected = whole.runs()[last].round(padded)[some, :, channels]
            found = part.of_inputs(torch.full((levels.shape[0], 1), last)).round(levels)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("strategy", ["channel", "group"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_at_shares_of_the_scale_follow_each_other(kind: str, strategy: str) -> None:
    grid = grid_of_kind(kind, strategy)
    codes = random_codes(grid)
    found = grid.at_shares([1.0, 0.4]).dequantize(codes.repeat(1, 2, 1))
    smaller = grid.with_scale(grid.scale * 0.4)
    for copy, expected in enumerate((grid.with_scale(grid.scale), smaller)):
        own = slice(copy * CHANNELS, (copy + 1) * CHANNELS)
        # with_scale rounds to float32.
        torch.testing.assert_close(found[:, own], expected.dequantize(codes), rtol=1e-6, atol=0)


@every_grid
def test_weights_are_rounded_to_the_codes_of_the_grid(kind: str, strategy: str) -> None:
    grid = grid_of_kind(kind, strategy)
    weight = random_weight() * 3
    if kind == "fp8":
        weight *= 60
    size = INPUTS // SHAPES[strategy][2]
    inputs_first = weight.transpose(1, 2)
    parts = [run.round(inputs_first[:, k * size : (k + 1) * size] / run.scale) for k, run in enumerate(grid.runs())]
    assert torch.equal(grid.codes(torch.cat(parts, dim=1).transpose(1, 2)), grid.quantize(weight))


# --- soft rounding


@pytest.mark.parametrize("softness", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["symmetric", "affine", "fp8", "mxfp4"])
def test_soft_rounding_is_the_best_point_between_neighbours(kind: str, softness: float) -> None:
    grid = grid_of_kind(kind, "channel")
    (run,) = grid.runs()
    for g in range(GROUPS):
        for r in range(CHANNELS):
            values = grid.values
            if values is None:
                values = torch.arange(grid.qmin, grid.qmax + 1).double() - grid.zero_point[g, r]
            ends = float(values[0]), float(values[-1])
            inside = torch.rand(100).double() * (ends[1] - ends[0]) + ends[0]
            if kind == "fp8":
                inside[:50] /= 300
            level = torch.cat([inside, values[[0, 1, -1]], torch.tensor([ends[0] - 3, ends[1] + 3]).double()])
            before = level.clone()
            found = run.round(level[None, :, None].expand(GROUPS, -1, CHANNELS), softness)[g, :, r]
            assert torch.equal(level, before)
            check_soft(level, found, values, softness)


def check_soft(level: Tensor, found: Tensor, values: Tensor, softness: float) -> None:
    ends = float(values[0]), float(values[-1])
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
def test_soft_rounding_of_0_moves_nothing_and_of_1_ends_on_the_grid(kind: str) -> None:
    (run,) = grid_of_kind(kind, "channel").runs()
    # No more than half the range, so that nothing is cut off.
    level = (torch.rand(GROUPS, 50, CHANNELS).double() - 0.5) * (run.high - run.low) / 2 + (run.high + run.low) / 2
    torch.testing.assert_close(run.round(level, 0.0), level, rtol=1e-14, atol=1e-14)
    hard = run.round(level)
    assert torch.equal(run.round(level, 1.0), hard)
    assert torch.equal(run.round(hard), hard)
    for softness in (0.3, 0.8):
        soft = run.round(level, softness)
        assert torch.equal(run.round(hard, softness), hard)
        assert ((soft - hard).abs() <= (level - hard).abs() + 1e-12).all()
        assert ((soft - hard).abs() < (level - hard).abs() - 1e-3).any()


# --- what a scale may be

UNUSABLE = [torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 1e-45, 1e-39, 1e300]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["symmetric", "mxfp4", "nvfp4", "float16", "bfloat16"])
def test_representable_is_the_nearest_scale_of_the_format(kind: str, dtype: torch.dtype) -> None:
    integers = kind in ("float16", "bfloat16")
    grid = grid_of_kind("symmetric" if integers else kind, "group").to(dtype)
    if integers:
        grid = replace(grid, scale_format=SCALE_FORMATS[kind])
    wanted = torch.cat([torch.rand(200) * 3, 10.0 ** torch.linspace(-37, 38, 100)]).to(dtype)
    found = grid.representable(wanted[None, :, None])[0, :, 0]
    assert found.dtype == dtype
    if kind == "symmetric":
        assert torch.equal(found, wanted.float().to(dtype))
    else:
        allowed = allowed_scales(kind, grid)
        nearest = (allowed - wanted.double()[:, None]).abs().amin(dim=1)
        away = (found.double() - wanted.double()).abs()
        assert ((away - nearest).abs() <= 1e-6 * wanted).all()
        assert ((allowed / found.double()[:, None] - 1).abs().amin(dim=1) < 1e-6).all()
    assert torch.equal(grid.representable(found[None, :, None])[0, :, 0], found)
    unusable = torch.tensor(UNUSABLE, dtype=torch.float64).to(dtype)
    assert torch.isnan(grid.representable(unusable[None, :, None])).all()


def allowed_scales(kind: str, grid: Grid) -> Tensor:
    """All positive scales that the format has, float64."""
    if kind == "mxfp4":
        return 2.0 ** torch.arange(-126, 128).double()
    if kind == "nvfp4":
        assert grid.tensor_scale is not None
        return torch.tensor(E4M3.values)[127:].double() * float(grid.tensor_scale)
    patterns = torch.arange(1, 1 << 15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.float16 if kind == "float16" else torch.bfloat16).double()
    # Denormal numbers of bfloat16 are denormal in float32 too, which jobs flush to 0.
    return values[torch.isfinite(values) & (values >= torch.finfo(torch.float32).tiny)]
