"""Quadratics of layers that never were, and lattices for their weights."""

from __future__ import annotations

import torch

from distributed_adaround.numerics.floats import ElementFormat
from distributed_adaround.numerics.grid import ScaleFormat
from distributed_adaround.numerics.lattice import Lattice
from distributed_adaround.numerics.moments import Quadratic
from distributed_adaround.numerics.ranges import Strategy, choose_grid


def make_quadratic(groups: int, rows: int, inputs: int, *, pull: bool = False, dead: int = 0) -> Quadratic:
    """Inputs of unequal size that hang together, float64; the first `dead` are always 0."""
    x = torch.randn(groups, 3 * inputs, inputs).double() @ torch.randn(groups, inputs, inputs).double() / inputs**0.5
    x = (x + torch.randn_like(x)) * 10.0 ** torch.linspace(-0.3, 0.3, inputs).double()[torch.randperm(inputs)]
    x[:, :, :dead] = 0
    second = x.transpose(1, 2) @ x / x.shape[1]
    weight = torch.randn(groups, rows, inputs).double()
    change = torch.randn(groups, rows, inputs).double() / 5
    return Quadratic(second, weight, change @ second if pull else None)


def make_lattice(
    quadratic: Quadratic,
    strategy: Strategy = "channel",
    *,
    runs: int = 1,
    bits: int = 2,
    element_format: ElementFormat | None = None,
    scale_format: ScaleFormat = "float32",
) -> Lattice:
    codes = 2**bits if element_format is None else {"e2m1": 15, "e4m3": 253}[element_format]
    grid = choose_grid(
        quadratic.weight.flatten(0, 1),
        qmin=0,
        qmax=codes - 1,
        symmetric=element_format is not None,
        zero_point=0,
        strategy=strategy,
        group_size=quadratic.weight.shape[2] // runs,
        observer="mse",
        element_format=element_format,
        scale_format=scale_format,
    )
    return Lattice.of_grid(grid.to(quadratic.weight.dtype), quadratic.weight.shape[0])
