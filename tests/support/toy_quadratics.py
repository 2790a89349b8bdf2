"""Quadratics of layers that never were, and grids for their weights."""

from __future__ import annotations

import torch
from torch import Tensor
from toy_formats import layer_format

from distributed_adaround.formats import Strategy
from distributed_adaround.numerics.descent import Descent
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.moments import Quadratic, outputs_first
from distributed_adaround.numerics.ranges import choose_grid


def make_quadratic(groups: int, channels: int, inputs: int, *, linear: bool = False, dead: int = 0) -> Quadratic:
    """Inputs of unequal size that hang together, float64; the first `dead` are always 0."""
    x = torch.randn(groups, 3 * inputs, inputs).double() @ torch.randn(groups, inputs, inputs).double() / inputs**0.5
    x = (x + torch.randn_like(x)) * 10.0 ** torch.linspace(-0.3, 0.3, inputs).double()[torch.randperm(inputs)]
    x[:, :, :dead] = 0
    second = x.transpose(1, 2) @ x / x.shape[1]
    weight = torch.randn(groups, channels, inputs).double()
    change = torch.randn(groups, channels, inputs).double() / 5
    return Quadratic(second, weight, change @ second if linear else None)


def make_grid(quadratic: Quadratic, strategy: Strategy = "channel", *, runs: int = 1, dtype: str = "uint2") -> Grid:
    """Of the quadratic's weight, with scales for `runs` of its inputs; integers are affine."""
    size = quadratic.weight.shape[2] // runs
    fmt = layer_format(
        dtype, strategy=strategy, group_size=size, observer="mse", symmetric=not dtype.startswith("uint")
    )
    return choose_grid(quadratic.weight, fmt).to(quadratic.weight.dtype)


def weights_of(descent: Descent) -> Tensor:
    """Weights `(G, R, J)` of the present levels, also of soft ones, in the weight's order."""
    return outputs_first(descent._weights(), descent._order)
