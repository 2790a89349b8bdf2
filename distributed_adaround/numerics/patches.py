"""Any layer as a matrix product over rows: where the inputs of one output lie in memory.

Shape legend: N samples, C input channels, G groups, O out channels, K kernel positions, R rows (tokens or output
pixels), J = K * C / G inputs of one output, P positions of the padded input.

The input is kept channels last, `(P, C)`: one row of a batch is then K contiguous runs of C numbers, whatever the
number of spatial dimensions. A transposed convolution is an ordinary one with stride 1 over its input spread by the
stride, with the kernel read backwards (Dumoulin and Visin 2016, "A guide to convolution arithmetic", section 4).
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from distributed_adaround.numerics.layers import LayerGeometry, pad

# Numbers of one unfolded piece of a microbatch: 32 MiB of float32.
_PIECE = 1 << 23


def channels_last_padded(x: Tensor, geometry: LayerGeometry) -> Tensor:
    """Input of a convolution `(N, C, *L)` to `(N, *padded L, C)`, spread by the stride first if transposed."""
    if geometry.transposed:
        x = _spread(x, geometry.stride)
    return pad(x, _padding(geometry)).movedim(1, -1).contiguous()


def padded_size(size: tuple[int, ...], geometry: LayerGeometry) -> tuple[int, ...]:
    """Spatial size of what `channels_last_padded` makes of an input of spatial size `size`."""
    if geometry.transposed:
        size = _spread_size(size, geometry.stride)
    return tuple(length + before + after for length, (before, after) in zip(size, _padding(geometry), strict=True))


def _padding(geometry: LayerGeometry) -> tuple[tuple[int, int], ...]:
    """(before, after) of each spatial dimension, for the ordinary convolution that the layer is or amounts to."""
    if not geometry.transposed:
        return geometry.padding
    parts = zip(_reach(geometry), geometry.padding, geometry.output_padding, strict=True)
    return tuple((reach - before, reach - after + extra) for reach, (before, after), extra in parts)


def _reach(geometry: LayerGeometry) -> list[int]:
    """Distance from the first to the last kernel position along each dimension."""
    return [d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel_size, strict=True)]


def _stride(geometry: LayerGeometry) -> tuple[int, ...]:
    """Of the ordinary convolution."""
    return (1,) * len(geometry.stride) if geometry.transposed else geometry.stride


def _spread_size(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((length - 1) * s + 1 for length, s in zip(size, stride, strict=True))


def _spread(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Insert stride - 1 zeros between neighbours of every spatial dimension."""
    if all(s == 1 for s in stride):
        return x
    spread = x.new_zeros(*x.shape[:2], *_spread_size(tuple(x.shape[2:]), stride))
    strided: tuple[slice, ...] = tuple(slice(None, None, s) for s in stride)
    spread[(slice(None), slice(None), *strided)] = x
    return spread


def unfolded_pieces(x: Tensor, geometry: LayerGeometry, first: int = 0, every: int = 1) -> Iterator[Tensor]:
    """Inputs of the rows first, first + every, ... of a layer, `(G, rows, J)` as `gather_rows` has them, by pieces.

    x: `(N, C, *L)` of a convolution, `(..., I)` of a Linear layer. Besides one piece only the padded input is copied.
    """
    inputs = geometry.inputs_per_output
    if not geometry.num_spatial_dims:
        yield from torch.split(x.reshape(1, -1, inputs)[:, first::every], max(1, _PIECE // inputs), dim=1)
        return
    features = channels_last_padded(x, geometry)
    size, channels = tuple(features.shape[1:-1]), features.shape[-1]
    starts = row_positions(size, _output_size(size, geometry), geometry).to(x.device)
    offsets = kernel_offsets(size, geometry).to(x.device)
    every_row = torch.arange(x.shape[0] * len(starts), device=x.device)
    chosen = every_row[first::every]
    for rows in torch.split(chosen, max(1, _PIECE // (geometry.groups * inputs))):
        sample, place = rows // len(starts), rows % len(starts)
        positions = (sample * math.prod(size) + starts[place])[:, None] + offsets
        yield gather_rows(features.view(-1, channels), positions, geometry)


def _output_size(padded_size: tuple[int, ...], geometry: LayerGeometry) -> tuple[int, ...]:
    parts = zip(padded_size, _reach(geometry), _stride(geometry), strict=True)
    return tuple((length - reach - 1) // stride + 1 for length, reach, stride in parts)


def row_positions(padded_size: tuple[int, ...], output_size: tuple[int, ...], geometry: LayerGeometry) -> Tensor:
    """First position of every output pixel of one sample inside its padded input; int64 `(prod(output_size),)`."""
    positions = torch.zeros(1, dtype=torch.int64)
    for length, step, pitch in zip(output_size, _stride(geometry), _pitches(padded_size), strict=True):
        positions = (positions[:, None] + torch.arange(length) * (step * pitch)).flatten()
    return positions


def kernel_offsets(padded_size: tuple[int, ...], geometry: LayerGeometry) -> Tensor:
    """Distance of each kernel position from the row's first position; int64 `(K,)`, in the weight's order."""
    pitches = _pitches(padded_size)
    offsets = [
        sum(k * d * p for k, d, p in zip(index, geometry.dilation, pitches, strict=True))
        for index in itertools.product(*(range(k) for k in geometry.kernel_size))
    ]
    return torch.tensor(offsets[::-1] if geometry.transposed else offsets)


def _pitches(size: tuple[int, ...]) -> list[int]:
    """Row-major distance between neighbours along each dimension."""
    return [math.prod(size[i + 1 :]) for i in range(len(size))]


def gather_rows(features: Tensor, positions: Tensor, geometry: LayerGeometry) -> Tensor:
    """Inputs of a batch of rows, `(G, R, J)`. features `(P, C)`; positions int64 `(R, K)`."""
    rows, kernel = positions.shape
    groups, inputs = geometry.groups, geometry.inputs_per_output
    taken = features.index_select(0, positions.flatten())
    if groups == 1:
        return taken.view(1, rows, inputs)
    return taken.view(rows, kernel, groups, inputs // kernel).permute(2, 0, 1, 3).reshape(groups, rows, inputs)


def to_patch_layout(weight: Tensor, geometry: LayerGeometry) -> Tensor:
    """`(G, R, J)` in torch's order (C/G, K) to the order of `gather_rows` (K, C/G)."""
    split = weight.reshape(*weight.shape[:2], -1, math.prod(geometry.kernel_size))
    return split.transpose(2, 3).reshape(weight.shape).contiguous()


def from_patch_layout(patches: Tensor, geometry: LayerGeometry) -> Tensor:
    """Inverse of `to_patch_layout`."""
    split = patches.reshape(*patches.shape[:2], math.prod(geometry.kernel_size), -1)
    return split.transpose(2, 3).reshape(patches.shape)


def weight_order(geometry: LayerGeometry) -> Tensor:
    """Where the inputs of an output, in the order of its weights (C/G, K), lie in a row; int64 `(J,)`."""
    kernel = math.prod(geometry.kernel_size)
    return torch.arange(geometry.inputs_per_output).view(kernel, -1).t().flatten()
