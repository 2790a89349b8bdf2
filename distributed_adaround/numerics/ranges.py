"""Observers: from a weight matrix to the scale and zero point of its grid.

All observers reduce the matrix `(O, I)` to blocks `(B, K)` that share one scale: one block for the whole tensor, one
per out channel, or one per group of consecutive inputs. Scale and zero point follow torch's observers:
symmetric `scale = max|w| / ((qmax - qmin) / 2)`, affine `scale = (max - min) / (qmax - qmin)`, zero always on the grid.
Float formats: `scale = max|w| / largest value`, brought to what the scale format can hold:

    e8m0 (MX)     the smallest power of two that cuts max|w| by less than half of the format's last step. Squared error
                  relative to the weights, of normal, Laplace and Student-t (5) weights: mxfp4 0.0125, 0.0154, 0.0153;
                  with the rule of the OCP MX v1.0 specification, floor(log2 max|w|) less the exponent of the largest
                  value, 0.0132, 0.0161, 0.0159; never cutting, 0.0133, 0.0175, 0.0176. mxfp8 0.00071, 0.00070,
                  0.00070, the same as never cutting; with the rule of the specification 0.00086, 0.00101, 0.00099.
    e4m3 (NVFP4)  the nearest one, as is usual: nvfp4 0.0091, 0.0086, 0.0085; rounded up 0.0101, 0.0100, 0.0099. The
                  factor of the whole tensor is max|w| / (6 * 448), so that the largest scale of a block is 448.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from distributed_adaround.numerics.floats import ElementFormat, float_values, nearest_values
from distributed_adaround.numerics.grid import Grid, ScaleFormat, round_scale

Observer = Literal["minmax", "mse", "percentile"]
Strategy = Literal["tensor", "channel", "group"]

# Shares of the min-max range that the mse observer tries. Integers: below 0.2 every case measured was far off; a
# little above 1 pays because a symmetric range of 2^b codes has one code less on the positive side.
_CANDIDATES = torch.linspace(0.2, 1.1, 91).tolist()
# Floats: their steps grow with the number, so the largest weight may as well lie on a value in the middle. Up to 2.1
# instead of 1.1 gives 7 to 10 % less error in nvfp4, 8 to 20 % in fp8; beyond it there is little.
_FLOAT_CANDIDATES = torch.linspace(0.3, 2.1, 91).tolist()
# For scales that are powers of two others would be rounded to one of these.
_POWERS = [0.25, 0.5, 1.0, 2.0]


def choose_grid(
    weight: Tensor,
    *,
    qmin: int,
    qmax: int,
    symmetric: bool,
    zero_point: int,
    strategy: Strategy,
    group_size: int | None,
    observer: Observer,
    percentile: float = 99.9,
    element_format: ElementFormat | None = None,
    scale_format: ScaleFormat = "float32",
    importance: Tensor | None = None,
) -> Grid:
    """Grid of a weight matrix `(O, I)`, in float32 whatever the weight's dtype.

    zero_point: of symmetric grids; affine grids find their own. group_size: divides I, with strategy "group".
    percentile: share of |w| (in percent) that the percentile observer keeps inside the range. element_format: of the
    values, symmetric only, with qmin 0 and qmax the number of values less 1; None: integers. importance: `(O, I)`, how
    much the squared error of each weight counts for the mse observer; None: all the same.
    """
    rows, inputs = weight.shape
    block = {"tensor": rows * inputs, "channel": inputs, "group": group_size or inputs}[strategy]
    blocks = weight.to(torch.float32).reshape(-1, block)
    low, high = _percentile_range(blocks, percentile) if observer == "percentile" else blocks.aminmax(dim=1)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    shape = (1, 1) if strategy == "tensor" else (rows, -1)

    values = None if element_format is None else float_values(element_format).to(weight.device)
    tensor_scale = None if values is None or scale_format != "e4m3" else _tensor_scale(low, high, values)

    def grid_of_range(low: Tensor, high: Tensor) -> Grid:
        if values is None:
            return _integer_grid(low, high, qmin, qmax, symmetric, zero_point)
        return _float_grid(low, high, values, scale_format, tensor_scale)

    def rounded(blocks: Tensor, grid: Grid) -> Tensor:
        if element_format is None:
            return grid.dequantize(grid.quantize(blocks))
        return nearest_values(blocks / grid.scale, element_format).mul_(grid.scale)

    if observer == "mse":
        floats = _POWERS if scale_format == "e8m0" else _FLOAT_CANDIDATES
        shares = _CANDIDATES if values is None else floats
        counts = None if importance is None else importance.to(torch.float32).reshape(-1, block)
        if counts is not None:
            # Where nothing counts (inputs that are always 0) every range would do; that of the weights does no harm.
            counts = torch.where(counts.any(dim=1, keepdim=True), counts, 1.0)
        share = _best_share(blocks, counts, low, high, grid_of_range, rounded, shares)
        low, high = low * share, high * share
    best = grid_of_range(low, high)
    return replace(best, scale=best.scale.reshape(shape), zero_point=best.zero_point.reshape(shape))


def _tensor_scale(low: Tensor, high: Tensor, values: Tensor) -> Tensor:
    """Factor `(1, 1)` of the whole tensor: with it the largest scale of a block is 448, the largest e4m3 value."""
    largest = torch.maximum(-low, high).max() / (values[-1] * 448)
    # Also its product with the smallest e4m3 value must be a normal number.
    return largest.clamp(min=2.0**-117).reshape(1, 1)


def _float_grid(
    low: Tensor, high: Tensor, values: Tensor, scale_format: ScaleFormat, tensor_scale: Tensor | None
) -> Grid:
    """Grid of blocks of a float format, scale and zero point `(B, 1)`, from their ranges `(B,)`."""
    largest = torch.maximum(-low, high)[:, None]
    if scale_format == "e8m0":
        half_a_step = (values[-1] - values[-2]) / 2
        # round_scale goes up from 1.5 times a power of two.
        scale = largest / (values[-1] + half_a_step) * 1.5
    else:
        scale = largest / values[-1]
    scale = round_scale(_usable(scale), scale_format, tensor_scale)
    return Grid(scale, torch.zeros_like(scale), 0, len(values) - 1, values, scale_format, tensor_scale)


def _usable(scale: Tensor) -> Tensor:
    """A block of zeros, or one so small that its scale underflows, has no range: any scale represents it."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)


def _integer_grid(low: Tensor, high: Tensor, qmin: int, qmax: int, symmetric: bool, zero_point: int) -> Grid:
    """Grid of blocks, scale and zero point `(B, 1)`, from their ranges `(B,)`."""
    span = torch.maximum(-low, high) * 2 if symmetric else high - low
    scale = _usable(span / (qmax - qmin))
    zeros = torch.full_like(scale, zero_point) if symmetric else (qmin - torch.round(low / scale)).clamp(qmin, qmax)
    return Grid(scale[:, None], zeros[:, None], qmin, qmax)


def _percentile_range(blocks: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Range of each block `(B,)` cut where `percentile` percent of |w| lie inside."""
    rank = max(1, min(blocks.shape[1], round(blocks.shape[1] * percentile / 100)))
    limit = blocks.abs().kthvalue(rank, dim=1, keepdim=True).values
    return blocks.clamp(-limit, limit).aminmax(dim=1)


def _best_share(
    blocks: Tensor,
    importance: Tensor | None,
    low: Tensor,
    high: Tensor,
    grid_of_range: Callable[[Tensor, Tensor], Grid],
    rounded: Callable[[Tensor, Grid], Tensor],
    shares: Sequence[float],
) -> Tensor:
    """Share of the range `(B,)`, of those given, with the smallest (weighted) squared rounding error of the weights."""
    # In units of about the largest weight, where squares do not underflow. Powers of two change no other bit.
    exponent = torch.frexp(torch.maximum(-low, high)).exponent.clamp(min=-126)[:, None]
    blocks = torch.ldexp(blocks, -exponent)
    best_error = torch.full((blocks.shape[0],), torch.inf, device=blocks.device)
    best = torch.ones_like(best_error)
    if importance is not None:
        # Only the ratios inside a block count. Where nothing counts, all count the same.
        largest = importance.amax(dim=1, keepdim=True)
        importance = torch.where(largest > 0, importance / largest, 1.0)
    for share in shares:
        grid = grid_of_range(low * share, high * share)
        grid = replace(grid, scale=torch.ldexp(grid.scale, -exponent))
        squares = (rounded(blocks, grid) - blocks).square_()
        error = squares.sum(dim=1) if importance is None else (squares * importance).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, share, best)
    return best
