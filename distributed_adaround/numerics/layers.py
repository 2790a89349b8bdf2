"""Geometry of the layers whose weights are rounded: one view of the weight for all of them.

Shape legend: O out channels, I or J inputs of one output (`C_in / groups * prod(kernel)`), G groups of the layer,
R = O / G out channels of a group, N samples, C channels, L one or more spatial dimensions.

Whatever a layer is (Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, grouped, depthwise), the rest of the program
sees its weight as `(G, R, J)`: all weights that make one output channel lie side by side. It enters that view once, by
`to_channels`, and leaves it once, by `from_channels`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

# By the number of spatial dimensions.
_Functions = dict[int, Callable[..., Tensor]]
_CONV: _Functions = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: _Functions = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class LayerGeometry:
    """Shape and strides of one layer; `stride` and the rest have one entry per spatial dimension, none for Linear.

    weight_shape: the parameter's in torch, `(O, I)` for Linear, `(O, C_in/G, *kernel)` for a convolution, `(C_in, O/G,
    *kernel)` for a transposed one. padding: (before, after); of a transposed convolution both are torch's `padding`.
    """

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    @property
    def num_spatial_dims(self) -> int:
        return len(self.weight_shape) - 2

    @property
    def channel_dim(self) -> int:
        """Dimension of the channels in the layer's inputs and outputs."""
        return 1 if self.num_spatial_dims else -1

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    @property
    def out_channels(self) -> int:
        return self.weight_shape[1] * self.groups if self.transposed else self.weight_shape[0]

    @property
    def in_channels(self) -> int:
        """C_in of the layer's input (features for Linear)."""
        return self.weight_shape[0] if self.transposed else self.weight_shape[1] * self.groups

    @property
    def inputs_per_output(self) -> int:
        """I, the number of weights that make one output."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    def to_channels(self, weight: Tensor) -> Tensor:
        """Weight in torch's shape to `(G, R, J)`, J flattened as (C_in/G, *kernel)."""
        if not self.transposed:
            return weight.reshape(self.groups, -1, self.inputs_per_output)
        split = weight.reshape(self.groups, -1, self.weight_shape[1], *self.kernel_size)
        return split.transpose(1, 2).reshape(self.groups, -1, self.inputs_per_output)

    def from_channels(self, channels: Tensor) -> Tensor:
        """Inverse of `to_channels`."""
        if not self.transposed:
            return channels.reshape(self.weight_shape)
        split = channels.reshape(self.groups, self.weight_shape[1], -1, *self.kernel_size)
        return split.transpose(1, 2).reshape(self.weight_shape)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer itself: input `(N, C_in, *L)`, or `(..., I)` for Linear, weight in torch's shape."""
        dims = self.num_spatial_dims
        if dims == 0:
            return F.linear(x, weight, bias)
        kwargs: dict[str, Any] = {"stride": self.stride, "groups": self.groups, "dilation": self.dilation}
        if self.transposed:
            kwargs["padding"] = tuple(before for before, _ in self.padding)
            return _CONV_TRANSPOSE[dims](x, weight, bias, output_padding=self.output_padding, **kwargs)
        if all(before == after for before, after in self.padding):
            # The same call as the module's own, so that the same input gives the same bits.
            return _CONV[dims](x, weight, bias, padding=tuple(before for before, _ in self.padding), **kwargs)
        return _CONV[dims](pad(x, self.padding), weight, bias, **kwargs)


def padding_pairs(
    padding: str | Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """torch's `padding` of a convolution, numbers or "same" or "valid", as (before, after) per spatial dimension."""
    if padding == "valid":
        return ((0, 0),) * len(kernel_size)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        return tuple((amount // 2, amount - amount // 2) for amount in total)
    return tuple((int(amount), int(amount)) for amount in padding)


def pad(x: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
    """Zero-pad the trailing spatial dimensions of x by (before, after) each; negative values crop."""
    if not any(before or after for before, after in padding):
        return x
    flat = [amount for pair in reversed(padding) for amount in pair]
    return F.pad(x, flat)
