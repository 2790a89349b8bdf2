"""Observers against torch's own, against brute force, and on weights without a range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver
from toy_formats import layer_format

from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.ranges import choose_grid

FORMATS: dict[str, dict[str, Any]] = {
    "symmetric": {"dtype": "int4"},
    "affine": {"dtype": "uint4", "symmetric": False},
    "unsigned": {"dtype": "uint4"},
}
LIMITS = {"symmetric": (-8, 7, 0), "affine": (0, 15, None), "unsigned": (0, 15, 8)}


def grid_of(weight: Tensor, importance: Tensor | None = None, **settings: Any) -> Grid:
    """Of a weight `(R, J)`, as the only conv group."""
    return choose_grid(weight[None], layer_format(**settings), None if importance is None else importance[None])


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest values of a weight `(R, J)`."""
    return grid.dequantize(grid.quantize(weight[None]))[0]


def square_error(weight: Tensor, grid: Grid) -> Tensor:
    return (rounded(weight, grid) - weight).square().sum(dim=1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("dtype", "qmin", "zero_point"), [(torch.qint8, -128, 0), (torch.quint8, 0, 128)])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("shift", [0.0, 1.5, -9.0])
def test_minmax_is_the_observer_of_torch(
    symmetric: bool, dtype: torch.dtype, qmin: int, zero_point: int, strategy: str, shift: float
) -> None:
    weight = torch.randn(6, 40) * torch.logspace(-3, 2, 6)[:, None] + shift
    kind = "symmetric" if symmetric else "affine"
    observer: Any
    if strategy == "tensor":
        observer = MinMaxObserver(dtype=dtype, qscheme=getattr(torch, f"per_tensor_{kind}"))
    else:
        observer = PerChannelMinMaxObserver(ch_axis=0, dtype=dtype, qscheme=getattr(torch, f"per_channel_{kind}"))
    observer(weight)
    scale, zeros = observer.calculate_qparams()
    name = str(dtype).removeprefix("torch.")
    grid = grid_of(weight, dtype=name, symmetric=symmetric, strategy=strategy)
    assert (grid.qmin, grid.qmax, grid.per_channel) == (qmin, qmin + 255, strategy == "channel")
    assert not symmetric or (grid.zero_point == zero_point).all()
    torch.testing.assert_close(grid.scale.flatten(), scale, rtol=1e-6, atol=0)
    assert torch.equal(grid.zero_point.flatten(), zeros.flatten().float())


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_groups_are_channels_of_the_split_weight(observer: str, fmt: str) -> None:
    weight = torch.randn(5, 24)
    grid = grid_of(weight, strategy="group", group_size=8, observer=observer, **FORMATS[fmt])
    split = grid_of(weight.reshape(15, 8), observer=observer, **FORMATS[fmt])
    assert grid.scale.shape == grid.zero_point.shape == (1, 5, 3)
    assert torch.equal(grid.scale.reshape(1, 15, 1), split.scale)
    assert torch.equal(grid.zero_point.reshape(1, 15, 1), split.zero_point)


@pytest.mark.parametrize("strategy", ["channel", "group"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_conv_groups_only_tell_where_a_channel_lies(fmt: str, strategy: str) -> None:
    weight = torch.randn(6, 24)
    settings = {"observer": "mse", "strategy": strategy, "group_size": 8, **FORMATS[fmt]}
    found, whole = choose_grid(weight.view(2, 3, 24), layer_format(**settings)), grid_of(weight, **settings)
    assert found.scale.shape == (2, 3, 1 if strategy == "channel" else 3)
    assert torch.equal(found.scale.flatten(0, 1), whole.scale[0])
    assert torch.equal(found.zero_point.flatten(0, 1), whole.zero_point[0])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_mse_is_at_least_as_good_as_minmax(fmt: str, strategy: str) -> None:
    # Heavy tails: cutting off the largest weights pays.
    weight = torch.distributions.StudentT(3.0).sample((16, 256))
    common = {"strategy": strategy, "group_size": 64 if strategy == "group" else None, **FORMATS[fmt]}
    by_mse, by_range = (grid_of(weight, observer=observer, **common) for observer in ("mse", "minmax"))
    blocks = {"tensor": (1, -1), "channel": (16, 256), "group": (64, 64)}[strategy]

    def error(grid: Grid) -> Tensor:
        return (rounded(weight, grid) - weight).square().reshape(blocks).sum(dim=1)

    assert (error(by_mse) <= error(by_range)).all()
    assert error(by_mse).sum() < 0.97 * error(by_range).sum()


@pytest.mark.parametrize("fmt", FORMATS)
def test_mse_is_near_the_best_share_of_the_range(fmt: str) -> None:
    weight = torch.randn(8, 100) + 0.3
    weight[3] = torch.distributions.StudentT(2.0).sample((100,))
    found = square_error(weight, grid_of(weight, observer="mse", **FORMATS[fmt]))
    low, high = weight.amin(dim=1, keepdim=True).clamp(max=0), weight.amax(dim=1, keepdim=True).clamp(min=0)
    qmin, qmax, middle = LIMITS[fmt]
    best = torch.full((8,), torch.inf)
    for share in torch.linspace(0.05, 1.3, 1500).tolist():
        span = high - low if middle is None else 2 * torch.maximum(-low, high)
        scale = span * share / (qmax - qmin)
        zero = qmin - (low * share / scale).round() if middle is None else torch.full_like(scale, middle)
        codes = ((weight / scale).round() + zero).clamp(qmin, qmax)
        best = torch.minimum(best, ((codes - zero) * scale - weight).square().sum(dim=1))
    assert (found <= 1.05 * best).all(), found / best


def test_percentile_keeps_its_share_inside() -> None:
    weight = torch.randn(4, 1000, dtype=torch.float64)
    weight[0] = weight[0].abs()
    grid = grid_of(weight, observer="percentile", percentile=97.0)
    limit = weight.abs().sort(dim=1).values[:, 969]
    torch.testing.assert_close(grid.scale[0, :, 0], (limit / 7.5).float())
    affine = grid_of(weight, observer="percentile", percentile=97.0, **FORMATS["affine"])
    spans = torch.tensor([1.0, 2, 2, 2])  # row 0 has no negative weights
    torch.testing.assert_close(affine.scale[0, :, 0], (limit * spans / 15).float(), rtol=0.05, atol=0)
    assert affine.zero_point[0, 0] == 0


def test_percentile_100_is_minmax_and_a_small_one_keeps_one_weight() -> None:
    weight = torch.randn(4, 50)
    assert torch.equal(grid_of(weight, observer="percentile", percentile=100.0).scale, grid_of(weight).scale)
    least = grid_of(weight, observer="percentile", percentile=0.001)
    torch.testing.assert_close(least.scale[0, :, 0], weight.abs().amin(dim=1) / 7.5)


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-41, 1e-38, 1e-37, 1e-30, 1e30])
def test_channels_without_a_range(observer: str, fmt: str, size: float) -> None:
    weight = torch.cat([torch.randn(1, 32), torch.linspace(-1, 1, 32)[None] * size, torch.randn(1, 32)])
    grid = grid_of(weight, observer=observer, **FORMATS[fmt])
    below, above = grid.neighbours(weight[None])
    for values in (grid.scale, grid.zero_point, grid.quantize(weight[None]), below, above):
        assert torch.isfinite(values).all()
    assert (grid.scale > 0).all()
    back = rounded(weight, grid)
    # Either the channel has a grid of its own, or it is too small to matter and is exactly zero.
    assert (back[1] - weight[1]).abs().max() <= max(0.15 * size, 1e-36)
    # Other channels do not notice.
    alone = grid_of(weight[::2], observer=observer, **FORMATS[fmt])
    assert torch.equal(grid.scale[:, ::2], alone.scale)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_zero_is_on_every_grid(fmt: str, shift: float) -> None:
    weight = torch.randn(6, 20) + shift
    for observer in ("minmax", "mse", "percentile"):
        grid = grid_of(weight, observer=observer, **FORMATS[fmt])
        assert not rounded(torch.zeros(6, 20), grid).any()
        assert torch.equal(grid.zero_point, grid.zero_point.round())
        assert ((grid.zero_point >= grid.qmin) & (grid.zero_point <= grid.qmax)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_grid_is_float32_whatever_the_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 10).to(dtype)
    grid = grid_of(weight, observer="mse")
    assert grid.scale.dtype == grid.zero_point.dtype == torch.float32
    assert torch.equal(grid.scale, grid_of(weight.float(), observer="mse").scale)


FLOAT_FORMATS = {name: {"dtype": name} for name in ("fp8", "nvfp4", "mxfp4")}
every_strategy = pytest.mark.parametrize(("strategy", "size"), [("tensor", 0), ("channel", 0), ("group", 8)])


def weighted_error(weight: Tensor, grid: Grid, importance: Tensor, strategy: str, size: int) -> Tensor:
    """Of each block that shares a scale."""
    errors = (rounded(weight, grid) - weight).square() * importance
    return errors.reshape({"tensor": (1, -1), "channel": weight.shape, "group": (-1, size or 1)}[strategy]).sum(dim=1)


@every_strategy
@pytest.mark.parametrize("fmt", [*FORMATS, *FLOAT_FORMATS])
def test_mse_minimizes_the_weighted_error(fmt: str, strategy: str, size: int) -> None:
    weight = torch.randn(8, 24)
    importance = 10.0 ** (torch.randn(8, 24) * 1.5)
    common = {"strategy": strategy, "group_size": size or None, **{**FORMATS, **FLOAT_FORMATS}[fmt]}
    plain = grid_of(weight, observer="mse", **common)
    weighted = grid_of(weight, observer="mse", importance=importance, **common)
    found, other = (weighted_error(weight, grid, importance, strategy, size) for grid in (weighted, plain))
    assert (found <= other * (1 + 1e-5)).all()
    if fmt != "mxfp4" and strategy != "tensor":  # few scales to choose from
        assert found.sum() < 0.97 * other.sum()
    if fmt == "nvfp4":  # the factor of the whole tensor would not be the same below
        return
    # No other share of the range is better, by grids of a weight whose range is that share of it.
    for share in (0.25, 0.5, 0.75, 1.0) if fmt == "mxfp4" else (0.35, 0.5, 0.65, 0.8, 0.9, 1.0):
        scaled = grid_of(weight * share, **common)
        rival = weighted_error(weight, scaled, importance, strategy, size)
        assert (found <= rival * 1.02).all(), share


@every_strategy
@pytest.mark.parametrize("fmt", [*FORMATS, *FLOAT_FORMATS])
def test_only_the_ratios_of_importance_inside_a_block_count(fmt: str, strategy: str, size: int) -> None:
    weight = torch.randn(6, 16)
    common = {"observer": "mse", "strategy": strategy, "group_size": size or None, **{**FORMATS, **FLOAT_FORMATS}[fmt]}
    plain = grid_of(weight, **common)
    for level in (1.0, 1e-38, 1e-30, 1e30, 0.0):
        # 0: inputs that are always 0; their weights still need a grid.
        same = grid_of(weight, importance=torch.full((6, 16), level), **common)
        assert torch.equal(same.scale, plain.scale)
        assert torch.equal(same.zero_point, plain.zero_point)
    importance = torch.rand(6, 16)
    weighted = grid_of(weight, importance=importance, **common)
    assert not torch.equal(weighted.scale, plain.scale) or fmt == "mxfp4" or strategy == "tensor"
    for factor in (2.0**-60, 2.0**40):
        assert torch.equal(grid_of(weight, importance=importance * factor, **common).scale, weighted.scale)


def test_weights_that_do_not_count_are_cut_off() -> None:
    weight = torch.randn(4, 64).clamp(-2.5, 2.5)
    weight[:, 7] = 5.0
    importance = torch.ones(4, 64)
    importance[:, 7] = 0.0
    without = torch.cat([weight[:, :7], weight[:, 8:]], dim=1)
    cut, whole = (grid_of(weight, observer="mse", importance=one) for one in (importance, None))
    alone = grid_of(without, observer="mse")
    assert (cut.scale < 0.9 * whole.scale).all()
    assert (square_error(without, cut) < 1.05 * square_error(without, alone)).all()


@pytest.mark.parametrize("observer", ["minmax", "percentile"])
def test_other_observers_know_no_importance(observer: str) -> None:
    weight = torch.randn(4, 20)
    assert torch.equal(
        grid_of(weight, observer=observer, importance=torch.rand(4, 20)).scale, grid_of(weight, observer=observer).scale
    )


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("scale", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_scales_are_of_their_format(fmt: str, scale: str, strategy: str, observer: str) -> None:
    weight = torch.randn(6, 24) * torch.logspace(-6, 5, 6)[:, None]
    settings = {"observer": observer, "strategy": strategy, "group_size": 8, **FORMATS[fmt]}
    grid, free = grid_of(weight, scale=scale, **settings), grid_of(weight, **settings)
    assert torch.equal(grid.scale, grid.scale.to(getattr(torch, scale)).float())
    assert torch.equal(grid.representable(grid.scale), grid.scale)
    assert not torch.equal(grid.scale, free.scale)
    # With the scale that there will be: every weight inside the range is off by half a step at most.
    below, above = (grid.dequantize(codes) for codes in grid.neighbours(weight[None]))
    inside = ((below <= weight) & (weight <= above))[0]
    step = grid.scale.repeat_interleave(24 // grid.scale.shape[2], dim=2).expand(1, 6, 24)[0]
    assert ((rounded(weight, grid) - weight).abs() <= step * 0.50001)[inside].all()
    assert inside.float().mean() > 0.8
