"""Float grids against torch's own cast, values written out by hand, and reference quantizers in plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_formats import FLOAT32, layer_format

from distributed_adaround.formats import E2M1, E4M3, SCALE_FORMATS
from distributed_adaround.numerics.grid import Grid, decode, encode, nearest_values
from distributed_adaround.numerics.ranges import choose_grid

ELEMENTS = {"e4m3": E4M3, "e2m1": E2M1}

E2M1_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3_VALUES = sorted({float(v) for v in torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float() if v == v})
VALUES = {"e4m3": E4M3_VALUES, "e2m1": sorted({sign * value for value in E2M1_MAGNITUDES for sign in (-1, 1)})}
LARGEST = {"e4m3": 448.0, "e2m1": 6.0}

every_element = pytest.mark.parametrize("element", ["e4m3", "e2m1"])


def plain_grid(element: str, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Grid:
    values = torch.tensor(ELEMENTS[element].values)
    ones = torch.ones(1, 1, 1)
    return Grid(ones * scale, ones * 0, 0, len(values) - 1, FLOAT32, values).to(dtype)


def numbers_of(element: str) -> Tensor:
    """`(1, 1, n)`: all values, all ties between them, both their float neighbours, numbers beyond the ends, -0."""
    values = torch.tensor(VALUES[element])
    exact = torch.cat([values, (values[1:] + values[:-1]) / 2])
    around = [torch.nextafter(exact, torch.full_like(exact, end)) for end in (-math.inf, math.inf)]
    beyond = torch.tensor([1.01, 1.2, 100.0, 1e30]) * values[-1]
    odd = torch.tensor([-0.0, 1e-30, -1e-30])
    return torch.cat([exact, *around, beyond, -beyond, odd, torch.randn(2000) * values[-1] / 3])[None, None]


@every_element
def test_values_are_those_of_torch_and_of_the_specification(element: Any) -> None:
    values = ELEMENTS[element].values
    assert list(values) == VALUES[element]
    assert math.copysign(1.0, values[len(values) // 2]) == 1


def test_quantize_is_the_cast_of_torch_with_saturation() -> None:
    numbers = numbers_of("e4m3")
    expected = numbers.clamp(-448, 448).to(torch.float8_e4m3fn)
    grid = plain_grid("e4m3")
    codes = grid.quantize(numbers)
    assert torch.equal(grid.levels(codes), expected.float())
    # The patterns too, but for -0, which becomes 0.
    patterns = expected.view(torch.uint8)
    patterns = torch.where(patterns == 0x80, 0, patterns)
    assert torch.equal(encode(codes, E4M3).view(torch.uint8), patterns)


def test_ties_of_e2m1_go_to_the_even_pattern() -> None:
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    grid = plain_grid("e2m1")
    numbers = torch.tensor([[[*ties, *(-tie for tie in ties)]]])
    expected = [*ties.values(), *(-value for value in ties.values())]
    assert grid.levels(grid.quantize(numbers)).tolist() == [[expected]]


@every_element
def test_quantize_and_neighbours_against_all_values(element: Any) -> None:
    numbers = numbers_of(element).double() * 0.7
    grid = plain_grid(element, 0.7, torch.float64)
    # The grid's own quotient: 0.7 times a tie is not quite a tie any more.
    steps = (numbers / grid.scale)[0, 0].tolist()
    below, above = (grid.levels(codes)[0, 0].tolist() for codes in grid.neighbours(numbers))
    nearest = grid.levels(grid.quantize(numbers))[0, 0].tolist()
    values = VALUES[element]
    for step, low, high, best in zip(steps, below, above, nearest, strict=True):
        assert low == max((v for v in values if v <= step), default=values[0])
        assert high == min((v for v in values if v > step), default=values[-1])
        assert abs(best - step) == min(abs(v - step) for v in values)
        assert best in (low, high)


@every_element
def test_a_weight_on_the_grid_is_its_own_lower_neighbour(element: Any) -> None:
    grid = plain_grid(element)
    codes = torch.arange(grid.qmax + 1.0)[None, None]
    weight = grid.dequantize(codes)
    below, above = grid.neighbours(weight)
    assert torch.equal(below, codes)
    assert torch.equal(above, (codes + 1).clamp(max=grid.qmax))
    assert torch.equal(grid.quantize(weight), codes)
    zero = float(grid.qmax // 2)
    for number in (0.0, -0.0):
        below, above = grid.neighbours(torch.tensor([[[number]]]))
        assert (below.item(), above.item(), grid.quantize(torch.tensor([[[number]]])).item()) == (zero, zero + 1, zero)


@every_element
def test_nearest_values_are_those_of_the_grid(element: Any) -> None:
    grid, numbers = plain_grid(element), numbers_of(element)
    assert torch.equal(nearest_values(numbers, ELEMENTS[element]), grid.levels(grid.quantize(numbers)))


def test_bit_patterns_of_e2m1_by_hand() -> None:
    patterns = torch.tensor([*range(8), *range(9, 16)], dtype=torch.uint8)
    values = torch.tensor([*E2M1_MAGNITUDES, *(-value for value in E2M1_MAGNITUDES[1:])])
    codes = plain_grid("e2m1").quantize(values[None, None])[0, 0]
    assert torch.equal(encode(codes, E2M1), patterns)
    assert torch.equal(decode(patterns, E2M1), codes)


@every_element
def test_every_code_comes_back_from_its_pattern(element: Any) -> None:
    codes, fmt = torch.arange(len(VALUES[element])), ELEMENTS[element]
    for dtype in (torch.float32, torch.float64, torch.int64):
        assert torch.equal(decode(encode(codes.to(dtype), fmt), fmt), codes.float())
    assert encode(codes[:6].reshape(1, 2, 3), fmt).shape == (1, 2, 3)


def test_patterns_from_elsewhere() -> None:
    negative_zero = torch.tensor([0x80], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert decode(negative_zero, E4M3).item() == E4M3_VALUES.index(0.0)
    assert decode(torch.tensor([8], dtype=torch.uint8), E2M1).item() == 7
    for bad in (0x7F, 0xFF):
        with pytest.raises(ValueError, match="no finite value of e4m3"):
            decode(torch.tensor([0, bad], dtype=torch.uint8).view(torch.float8_e4m3fn), E4M3)
    with pytest.raises(ValueError, match="no finite value of e2m1"):
        decode(torch.tensor([16], dtype=torch.uint8), E2M1)
    with pytest.raises(ValueError, match=r"uint8, not the torch\.float8_e4m3fn"):
        decode(torch.tensor([0], dtype=torch.uint8), E4M3)


# --- scales ---


def block_grid(weight: Tensor, dtype: str, **settings: Any) -> Grid:
    """Of a weight `(1, R, J)`; plain floats in blocks of 16."""
    plain = {"strategy": "group", "group_size": 16} if dtype in ("fp4", "fp8") else {}
    return choose_grid(weight, layer_format(dtype, **plain | settings))


def nearest(number: float, values: list[float]) -> float:
    return min(values, key=lambda value: abs(value - number))


def reference(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Scales and rounded weights with the minmax observer, one number at a time."""
    element, size = ("e4m3" if kind == "mxfp8" else "e2m1"), (16 if kind == "nvfp4" else 32)
    values = VALUES[element]
    end = {"e2m1": 7.0, "e4m3": 464.0}[element]
    factor = torch.tensor(2.0 ** math.ceil(math.log2(float(weight.abs().max()) / (6 * 448))))
    scales, rounded = torch.empty(1, weight.shape[1], weight.shape[2] // size), torch.empty_like(weight)
    for o, row in enumerate(weight[0]):
        for g, block in enumerate(row.split(size)):
            largest = float(block.abs().max())
            if kind == "nvfp4":
                scale = float(
                    torch.tensor(nearest(largest / 6 / float(factor), [v for v in E4M3_VALUES if v > 0])) * factor
                )
            else:
                scale = next(2.0**k for k in range(-40, 40) if largest < end * 2.0**k)
            scales[0, o, g] = scale
            for i, number in enumerate(block.tolist()):
                rounded[0, o, g * size + i] = nearest(number / scale, values) * scale
    return scales, rounded


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp8", "nvfp4"])
def test_block_formats_against_the_reference(kind: str) -> None:
    weight = torch.distributions.StudentT(4.0).sample((1, 6, 96)) * torch.logspace(-3, 2, 6)[:, None]
    grid = block_grid(weight, kind)
    scales, rounded = reference(weight, kind)
    assert grid.scale.shape == scales.shape
    torch.testing.assert_close(grid.scale, scales, rtol=1e-6, atol=0)
    codes = grid.quantize(weight)
    torch.testing.assert_close(grid.dequantize(codes), rounded, rtol=1e-6, atol=0)
    below, above = (grid.dequantize(codes) for codes in grid.neighbours(weight))
    # What is cut lies beyond both neighbours, which are one.
    inside = (below <= weight) & (weight <= above)
    assert torch.equal(below[~inside], above[~inside])
    assert inside.float().mean() > 0.9


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
def test_scales_are_of_their_format(kind: str, observer: str) -> None:
    weight = torch.randn(1, 8, 64) * torch.logspace(-6, 3, 8)[:, None]
    weight[0, 1, :32] = 0
    grid = block_grid(weight, kind, observer=observer)
    assert_scales_fit(grid)
    # Whatever is asked for: between, far beyond, and not at all a scale.
    asked = grid.scale * torch.rand_like(grid.scale).mul(4).exp()
    asked[0, 0] = 1e38
    asked[0, 1] = 1e-37
    asked[0, 2, 0], asked[0, 2, 1] = 0.0, -1.0
    asked[0, 3, 0], asked[0, 3, 1] = torch.nan, torch.inf
    for precise in (grid, grid.to(torch.float64)):
        changed = precise.with_scale(asked.to(precise.scale.dtype))
        assert_scales_fit(changed)
        assert torch.equal(changed.scale[:, 2:4, :2], precise.scale[:, 2:4, :2])
        # Nothing that can be a scale lies nearer.
        if kind == "nvfp4":
            options = torch.tensor([v for v in E4M3_VALUES if v > 0]) * grid.tensor_scale
        else:
            options = 2.0 ** torch.arange(-126, 128)
        found = (changed.scale.float() - asked).abs()[:, 4:]
        assert torch.equal(found, (options.flatten() - asked[:, 4:, :, None]).abs().amin(dim=-1))
        assert torch.equal(changed.with_scale(changed.scale).scale, changed.scale)


def assert_scales_fit(grid: Grid) -> None:
    assert torch.isfinite(grid.scale).all()
    assert (grid.scale >= torch.finfo(torch.float32).tiny).all()
    assert torch.equal(grid.scale, grid.scale.float().to(grid.scale.dtype))
    if grid.scale_format == SCALE_FORMATS["e8m0"]:
        assert torch.equal(torch.frexp(grid.scale).mantissa, torch.full_like(grid.scale, 0.5))
        return
    assert grid.tensor_scale is not None
    factor = grid.tensor_scale.float()
    e4m3 = (grid.scale.float() / factor).to(torch.float8_e4m3fn)
    assert torch.equal(e4m3.float() * factor, grid.scale.float())


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp8", "nvfp4"])
def test_mse_finds_the_best_scale_that_can_be(kind: str) -> None:
    weight = torch.distributions.StudentT(3.0).sample((1, 16, 64))
    grid = block_grid(weight, kind, observer="mse")
    size = 64 // grid.scale.shape[2]

    def error(grid: Grid) -> Tensor:
        return (grid.dequantize(grid.quantize(weight)) - weight).square().reshape(1, 16, -1, size).sum(dim=3)

    best = torch.full_like(grid.scale, torch.inf)
    if kind == "nvfp4":
        assert grid.tensor_scale is not None
        options = (torch.tensor([v for v in E4M3_VALUES if v > 0]) * grid.tensor_scale).flatten().tolist()
    else:
        options = [2.0**k for k in range(-30, 30)]
    for option in options:
        best = torch.minimum(best, error(grid.with_scale(torch.full_like(grid.scale, option))))
    # The search covers 0.3 to 2.1 of the range: a block may do a little better outside.
    assert error(grid).sum() <= best.sum() * (1.005 if kind == "nvfp4" else 1.0)
    assert error(grid).sum() < error(block_grid(weight, kind)).sum() or kind == "mxfp8"


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp8", "nvfp4", "fp4", "fp8"])
@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-41, 1e-38, 1e-37, 1e-30, 1e30])
def test_channels_without_a_range(kind: str, observer: str, size: float) -> None:
    weight = (torch.linspace(-1, 1, 64)[None] * torch.tensor([[1.0], [size]]))[None]
    for part in (weight, weight[:, 1:]):
        grid = block_grid(part, kind, observer=observer)
        below, above = grid.neighbours(part)
        for values in (grid.scale, grid.quantize(part), below, above, grid.dequantize(above)):
            assert torch.isfinite(values).all()
        assert (grid.scale >= torch.finfo(torch.float32).tiny).all()
        back = grid.dequantize(grid.quantize(part))
        if part.shape[1] == 1 or kind != "nvfp4":
            assert (back[:, -1] - part[:, -1]).abs().max() <= max(0.2 * size, 1e-35)
        assert not grid.dequantize(grid.quantize(torch.zeros_like(part))).any()


@every_element
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_minmax_reaches_to_the_largest_weight(element: Any, strategy: str) -> None:
    weight = torch.randn(1, 4, 30)
    dtype = "fp4" if element == "e2m1" else "fp8"
    grid = block_grid(weight, dtype, strategy=strategy)
    largest = weight.abs().amax(dim=2, keepdim=True) if strategy == "channel" else weight.abs().max().reshape(1, 1, 1)
    torch.testing.assert_close(grid.scale * LARGEST[element], largest)
    assert grid.scale.shape == grid.zero_point.shape == largest.shape
    cut = block_grid(weight, dtype, strategy=strategy, observer="percentile", percentile=60.0)
    assert (cut.scale < grid.scale).all()
