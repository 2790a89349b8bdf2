"""Observers: from a weight matrix to the scale and zero point of its grid.

All observers reduce a weight `(G, R, J)` to blocks `(B, K)` that share one scale: one block for the whole tensor, one
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

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from distributed_adaround.formats import LayerFormat, ScaleFormat
from distributed_adaround.numerics.grid import Grid, nearest_values, round_scale

# Shares of the min-max range that the mse observer tries. Integers: below 0.2 every case measured was far off; a
# little above 1 pays because a symmetric range of 2^b codes has one code less on the positive side.
_CANDIDATES = torch.linspace(0.2, 1.1, 91).tolist()
# Floats: their steps grow with the number, so the largest weight may as well lie on a value in the middle. Up to 2.1
# instead of 1.1 gives 7 to 10 % less error in nvfp4, 8 to 20 % in fp8; beyond it there is little.
_FLOAT_CANDIDATES = torch.linspace(0.3, 2.1, 91).tolist()
# For scales that are powers of two others would be rounded to one of these.
_POWERS = [0.25, 0.5, 1.0, 2.0]


def choose_grid(weight: Tensor, layer_format: LayerFormat, importance: Tensor | None = None) -> Grid:
    """Grid of a weight `(G, R, J)`, in float32 whatever the weight's dtype. Scales are rounded to their format.

    importance: `(G, R, J)`, how much the squared error of each weight counts where the observer minimizes it; None: all
    the same, also for output_mse, whose grid before the moments are known is that of mse.
    """
    groups, channels, inputs = weight.shape
    per_tensor = layer_format.strategy == "tensor"
    block = weight.numel() if per_tensor else layer_format.group_size or inputs
    blocks = weight.to(torch.float32).reshape(-1, block)
    cut = layer_format.observer == "percentile"
    low, high = _percentile_range(blocks, layer_format.percentile) if cut else blocks.aminmax(dim=1)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    grid_of_range, rounded = _ways_to_round(layer_format, low, high)
    if layer_format.observer in ("mse", "output_mse"):
        counts = None if importance is None else importance.to(torch.float32).reshape(-1, block)
        share = _best_share(blocks, counts, low, high, grid_of_range, rounded, _shares(layer_format))
        low, high = low * share, high * share
    best = grid_of_range(low, high)
    shape = (1, 1, 1) if per_tensor else (groups, channels, -1)
    scale, zero_point = best.scale.reshape(shape), best.zero_point.reshape(shape)
    return replace(best, scale=scale, zero_point=zero_point, per_channel=not per_tensor)


def _shares(layer_format: LayerFormat) -> Sequence[float]:
    if layer_format.number.element is None:
        return _CANDIDATES
    return _POWERS if layer_format.scale.powers_of_two else _FLOAT_CANDIDATES


def _ways_to_round(
    layer_format: LayerFormat, low: Tensor, high: Tensor
) -> tuple[Callable[[Tensor, Tensor], Grid], Callable[[Tensor, Grid], Tensor]]:
    """How blocks get a grid from their ranges `(B,)`, and how they are rounded to it, in the layout `(1, B, K)`."""
    element, scale_format = layer_format.number.element, layer_format.scale
    if element is None:
        return partial(_integer_grid, layer_format), lambda blocks, grid: grid.dequantize(grid.quantize(blocks))
    values = torch.tensor(element.values, device=low.device)
    factor = None
    if scale_format.per_tensor:
        # With it the largest scale of a block is at most the format's largest. A power of two: then weights are exact
        # in bfloat16, in which libraries unpack them, and in whichever order the three factors are multiplied.
        own = torch.maximum(-low, high).max()
        amax = own if layer_format.tensor_amax is None else torch.full_like(own, layer_format.tensor_amax)
        fraction, exponent = torch.frexp(amax / (values[-1] * scale_format.largest))
        factor = torch.ldexp(torch.ones_like(amax), exponent - (fraction == 0.5).int())
        # Also its product with the smallest value of the scale format must be a normal number.
        factor = factor.clamp(min=2.0**-117).reshape(1, 1, 1)

    def rounded(blocks: Tensor, grid: Grid) -> Tensor:
        return nearest_values(blocks / grid.scale, element).mul_(grid.scale)

    return partial(_float_grid, scale_format, values, factor), rounded


def _float_grid(
    scale_format: ScaleFormat, values: Tensor, tensor_scale: Tensor | None, low: Tensor, high: Tensor
) -> Grid:
    """Grid of blocks of a float format, scale and zero point `(1, B, 1)`, from their ranges `(B,)`."""
    scale = torch.maximum(-low, high)[None, :, None]
    if scale_format.powers_of_two:
        half_a_step = (values[-1] - values[-2]) / 2
        # round_scale goes up from 1.5 times a power of two.
        scale = scale / (values[-1] + half_a_step) * 1.5
    else:
        scale = scale / values[-1]
    scale = round_scale(_usable(scale), scale_format, tensor_scale)
    return Grid(scale, torch.zeros_like(scale), 0, len(values) - 1, scale_format, values, tensor_scale)


def _usable(scale: Tensor) -> Tensor:
    """A block of zeros, or one so small that its scale underflows, has no range: any scale represents it."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)


def _integer_grid(layer_format: LayerFormat, low: Tensor, high: Tensor) -> Grid:
    """Grid of blocks, scale and zero point `(1, B, 1)`, from their ranges `(B,)`."""
    qmin, qmax = layer_format.quant_min, layer_format.quant_max
    span = torch.maximum(-low, high) * 2 if layer_format.symmetric else high - low
    scale = round_scale(_usable(span / (qmax - qmin)), layer_format.scale)
    if layer_format.symmetric:
        zeros = torch.full_like(scale, layer_format.zero_point)
    else:
        zeros = (qmin - torch.round(low / scale)).clamp(qmin, qmax)
    return Grid(scale[None, :, None], zeros[None, :, None], qmin, qmax, layer_format.scale)


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
    """Share of the range `(B,)`, of those given, with the smallest (weighted) squared rounding error.

    blocks, importance: `(B, K)`. low, high: `(B,)`, the range with 0 in it.
    """
    # In units of about the largest weight, where squares do not underflow. Powers of two change no other bit.
    exponent = torch.frexp(torch.maximum(-low, high)).exponent.clamp(min=-126)[None, :, None]
    blocks = torch.ldexp(blocks[None], -exponent)
    best_error, best = torch.full_like(low, torch.inf), torch.ones_like(low)
    if importance is not None:
        # Only the ratios inside a block count. Where nothing counts (inputs that are always 0), all count the same.
        largest = importance.amax(dim=1, keepdim=True)
        importance = torch.where(largest > 0, importance / largest, 1.0)
    for share in shares:
        grid = grid_of_range(low * share, high * share)
        grid = replace(grid, scale=torch.ldexp(grid.scale, -exponent))
        squares = (rounded(blocks, grid) - blocks).square_()[0]
        error = squares.sum(dim=1) if importance is None else (squares * importance).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, share, best)
    return best
