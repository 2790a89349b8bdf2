"""Observers against torch's own, against brute force, and on weights without a range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.ranges import choose_grid

SETTINGS: dict[str, Any] = {
    "qmin": -8,
    "qmax": 7,
    "symmetric": True,
    "zero_point": 0,
    "strategy": "channel",
    "group_size": None,
    "observer": "minmax",
}
FORMATS = {
    "symmetric": {},
    "affine": {"symmetric": False, "qmin": 0, "qmax": 15},
    "unsigned": {"qmin": 0, "qmax": 15, "zero_point": 8},
}


def grid_of(weight: Tensor, **settings: Any) -> Grid:
    return choose_grid(weight, **{**SETTINGS, **settings})


def square_error(weight: Tensor, grid: Grid) -> Tensor:
    return (grid.dequantize(grid.quantize(weight)) - weight).square().sum(dim=1)


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
    grid = grid_of(weight, qmin=qmin, qmax=qmin + 255, symmetric=symmetric, zero_point=zero_point, strategy=strategy)
    torch.testing.assert_close(grid.scale.flatten(), scale, rtol=1e-6, atol=0)
    assert torch.equal(grid.zero_point.flatten(), zeros.flatten().float())


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_groups_are_channels_of_the_split_matrix(observer: str, fmt: str) -> None:
    weight = torch.randn(5, 24)
    grid = grid_of(weight, strategy="group", group_size=8, observer=observer, **FORMATS[fmt])
    split = grid_of(weight.reshape(15, 8), observer=observer, **FORMATS[fmt])
    assert grid.scale.shape == grid.zero_point.shape == (5, 3)
    assert torch.equal(grid.scale.reshape(15, 1), split.scale)
    assert torch.equal(grid.zero_point.reshape(15, 1), split.zero_point)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_mse_is_at_least_as_good_as_minmax(fmt: str, strategy: str) -> None:
    # Heavy tails: cutting off the largest weights pays.
    weight = torch.distributions.StudentT(3.0).sample((16, 256))
    common = {"strategy": strategy, "group_size": 64 if strategy == "group" else None, **FORMATS[fmt]}
    by_mse, by_range = (grid_of(weight, observer=observer, **common) for observer in ("mse", "minmax"))
    blocks = {"tensor": (1, -1), "channel": (16, 256), "group": (64, 64)}[strategy]

    def error(grid: Grid) -> Tensor:
        return (grid.dequantize(grid.quantize(weight)) - weight).square().reshape(blocks).sum(dim=1)

    assert (error(by_mse) <= error(by_range)).all()
    assert error(by_mse).sum() < 0.97 * error(by_range).sum()


@pytest.mark.parametrize("fmt", FORMATS)
def test_mse_is_near_the_best_share_of_the_range(fmt: str) -> None:
    weight = torch.randn(8, 100) + 0.3
    weight[3] = torch.distributions.StudentT(2.0).sample((100,))
    found = square_error(weight, grid_of(weight, observer="mse", **FORMATS[fmt]))
    low, high = weight.amin(dim=1, keepdim=True).clamp(max=0), weight.amax(dim=1, keepdim=True).clamp(min=0)
    settings = {**SETTINGS, **FORMATS[fmt]}
    qmin, qmax = settings["qmin"], settings["qmax"]
    best = torch.full((8,), torch.inf)
    for share in torch.linspace(0.05, 1.3, 1500).tolist():
        span = 2 * torch.maximum(-low, high) if settings["symmetric"] else high - low
        scale = span * share / (qmax - qmin)
        if settings["symmetric"]:
            zero = torch.full_like(scale, settings["zero_point"])
        else:
            zero = qmin - (low * share / scale).round()
        codes = ((weight / scale).round() + zero).clamp(qmin, qmax)
        best = torch.minimum(best, ((codes - zero) * scale - weight).square().sum(dim=1))
    assert (found <= 1.05 * best).all(), found / best


def test_percentile_keeps_its_share_inside() -> None:
    weight = torch.randn(4, 1000, dtype=torch.float64)
    weight[0] = weight[0].abs()
    grid = grid_of(weight, observer="percentile", percentile=97.0)
    limit = weight.abs().sort(dim=1).values[:, 969]
    torch.testing.assert_close(grid.scale[:, 0], (limit / 7.5).float())
    affine = grid_of(weight, observer="percentile", percentile=97.0, symmetric=False, qmin=0, qmax=15)
    spans = torch.tensor([1.0, 2, 2, 2])  # row 0 has no negative weights
    torch.testing.assert_close(affine.scale[:, 0], (limit * spans / 15).float(), rtol=0.05, atol=0)
    assert affine.zero_point[0] == 0


def test_percentile_100_is_minmax_and_a_small_one_keeps_one_weight() -> None:
    weight = torch.randn(4, 50)
    assert torch.equal(grid_of(weight, observer="percentile", percentile=100.0).scale, grid_of(weight).scale)
    least = grid_of(weight, observer="percentile", percentile=0.001)
    torch.testing.assert_close(least.scale[:, 0], weight.abs().amin(dim=1) / 7.5)


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-41, 1e-38, 1e-37, 1e-30, 1e30])
def test_rows_without_a_range(observer: str, fmt: str, size: float) -> None:
    weight = torch.cat([torch.randn(1, 32), torch.linspace(-1, 1, 32)[None] * size, torch.randn(1, 32)])
    grid = grid_of(weight, observer=observer, **FORMATS[fmt])
    below, above = grid.neighbours(weight)
    for values in (grid.scale, grid.zero_point, grid.quantize(weight), below, above):
        assert torch.isfinite(values).all()
    assert (grid.scale > 0).all()
    back = grid.dequantize(grid.quantize(weight))
    # Either the row has a grid of its own, or it is too small to matter and is exactly zero.
    assert (back[1] - weight[1]).abs().max() <= max(0.15 * size, 1e-36)
    # Other rows do not notice.
    alone = grid_of(weight[::2], observer=observer, **FORMATS[fmt])
    assert torch.equal(grid.scale[::2], alone.scale)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_zero_is_on_every_grid(fmt: str, shift: float) -> None:
    weight = torch.randn(6, 20) + shift
    for observer in ("minmax", "mse", "percentile"):
        grid = grid_of(weight, observer=observer, **FORMATS[fmt])
        assert not grid.dequantize(grid.quantize(torch.zeros(6, 20))).any()
        assert torch.equal(grid.zero_point, grid.zero_point.round())
        assert ((grid.zero_point >= grid.qmin) & (grid.zero_point <= grid.qmax)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_grid_is_float32_whatever_the_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 10).to(dtype)
    grid = grid_of(weight, observer="mse")
    assert grid.scale.dtype == grid.zero_point.dtype == torch.float32
    assert torch.equal(grid.scale, grid_of(weight.float(), observer="mse").scale)


FLOAT_FORMATS: dict[str, Any] = {
    "fp8": {"qmin": 0, "qmax": 252, "element_format": "e4m3"},
    "nvfp4": {"qmin": 0, "qmax": 14, "element_format": "e2m1", "scale_format": "e4m3"},
    "mxfp4": {"qmin": 0, "qmax": 14, "element_format": "e2m1", "scale_format": "e8m0"},
}
every_strategy = pytest.mark.parametrize(("strategy", "size"), [("tensor", 0), ("channel", 0), ("group", 8)])


def weighted_error(weight: Tensor, grid: Grid, importance: Tensor, strategy: str, size: int) -> Tensor:
    """Of each block that shares a scale."""
    errors = (grid.dequantize(grid.quantize(weight)) - weight).square() * importance
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
