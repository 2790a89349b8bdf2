"""The grid of some rows as descent sees it: inputs first, in units of the scale, with soft rounding between neighbours.

Shape legend: G conv groups, J inputs of one output, R out channels of a group, n runs of J/n inputs that share a scale.

A *level* is a weight over its scale: an integer, or a value of a float format, for weights on the grid. Soft rounding
of a level c between its neighbours lo <= c <= hi, f = (c - lo) / (hi - lo), is

    S_m(c) = lo + (hi - lo) * clamp((f - m/2) / (1 - m), 0, 1)

the point that minimizes (v - c)² + m (hi - lo)² f_v (1 - f_v) over v: the regularizer of AdaRound at beta = 2, with
weight m. S_0 leaves c as it is, S_1 is rounding to the nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed_adaround.numerics.grid import Grid, ScaleFormat, round_scale


@dataclass(frozen=True)
class Lattice:
    """Scales and ranges of some rows.

    scale, zero_point: `(G, n, R)`. qmin, qmax, values, scale_format, tensor_scale: as in Grid. per_row: rows have
    scales of their own, which can be refitted row by row; else there is one, `(1, 1, 1)`, for the whole tensor.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    values: Tensor | None
    scale_format: ScaleFormat
    tensor_scale: Tensor | None
    per_row: bool

    @classmethod
    def of_grid(cls, grid: Grid, num_groups: int) -> Lattice:
        """All rows of a grid, whose scales are `(O, n)` or `(1, 1)`."""
        per_row = grid.scale.numel() > 1

        def inputs_first(values: Tensor) -> Tensor:
            groups = num_groups if per_row else 1
            return values.reshape(groups, -1, values.shape[1]).transpose(1, 2).contiguous()

        return cls(
            inputs_first(grid.scale),
            inputs_first(grid.zero_point),
            grid.qmin,
            grid.qmax,
            grid.values,
            grid.scale_format,
            grid.tensor_scale,
            per_row,
        )

    def rows(self, groups: slice, rows: slice) -> Lattice:
        """The part of some conv groups and of some out channels in them."""
        if not self.per_row:
            return self
        return replace(self, scale=self.scale[groups, :, rows], zero_point=self.zero_point[groups, :, rows])

    def at_shares(self, shares: Sequence[float]) -> Lattice:
        """Copies of the rows as in Quadratic.repeated, each with one share of the scales, as the format can hold it."""
        scales = [self.scale * share for share in shares]
        held = [torch.where(found.isnan(), self.scale, found) for found in map(self.representable, scales)]
        return replace(self, scale=torch.cat(held, dim=2), zero_point=self.zero_point.repeat(1, 1, len(shares)))

    def run(self, index: int) -> LatticeRun:
        """The run of inputs that share scale number `index`."""
        return self._run(self.scale[:, index : index + 1], self.zero_point[:, index : index + 1])

    def of_inputs(self, index: Tensor) -> LatticeRun:
        """The same for one input of each conv group. index: int64 `(G, 1)`, the scale that the input has."""
        if self.scale.shape[1] == 1:
            return self.run(0)
        place = index[:, :, None].expand(-1, -1, self.scale.shape[2])
        return self._run(self.scale.gather(1, place), self.zero_point.gather(1, place))

    def _run(self, scale: Tensor, zero_point: Tensor) -> LatticeRun:
        if self.values is not None:
            return LatticeRun(scale, self.values[0], self.values[-1], self.values)
        return LatticeRun(scale, self.qmin - zero_point, self.qmax - zero_point, None)

    def representable(self, scale: Tensor) -> Tensor:
        """The nearest scales that the format can hold, in the dtype of the lattice; NaN where there is none."""
        narrow = scale.float()
        usable = torch.isfinite(narrow) & (narrow >= torch.finfo(torch.float32).tiny)
        rounded = round_scale(torch.where(usable, narrow, 1.0), self.scale_format, self.tensor_scale)
        return torch.where(usable, rounded.to(scale.dtype), torch.nan)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Weights `(G, R, J)` of codes `(G, R, J)`."""
        if self.values is not None:
            levels = self.values[codes.long()]
        else:
            levels = codes - self._of_inputs(self.zero_point, codes.shape[2]).transpose(1, 2)
        return self.weights(levels.transpose(1, 2)).transpose(1, 2)

    def weights(self, levels: Tensor) -> Tensor:
        """Weights `(G, J, R)` of levels `(G, J, R)`."""
        return levels * self._of_inputs(self.scale, levels.shape[1])

    def _of_inputs(self, values: Tensor, num_inputs: int) -> Tensor:
        """`(G, n, R)` to something that broadcasts against `(G, J, R)`."""
        runs = values.shape[1]
        return values if runs == 1 else values.repeat_interleave(num_inputs // runs, dim=1)

    def codes(self, levels: Tensor) -> Tensor:
        """Codes `(G, J, R)` of levels `(G, J, R)` on the lattice."""
        if self.values is not None:
            return torch.searchsorted(self.values, levels.contiguous()).to(levels.dtype)
        return levels + self._of_inputs(self.zero_point, levels.shape[1])


@dataclass(frozen=True)
class LatticeRun:
    """What a run of inputs has in common. scale: `(G, 1, R)`; low, high: smallest and largest level."""

    scale: Tensor
    low: Tensor
    high: Tensor
    values: Tensor | None

    def round(self, levels: Tensor, softness: float = 1.0) -> Tensor:
        """S_m of levels `(G, p, R)`, m = softness; 1 is the nearest level."""
        if self.values is not None:
            return self._round_to_values(levels, softness)
        nearest = levels.round()
        if softness < 1:
            rest = F.softshrink(levels - nearest, softness / 2)
            nearest.add_(rest, alpha=1 / (1 - softness))
        return torch.minimum(torch.maximum(nearest, self.low, out=nearest), self.high, out=nearest)

    def _round_to_values(self, levels: Tensor, softness: float) -> Tensor:
        assert self.values is not None
        last = self.values.numel() - 1
        below = (torch.searchsorted(self.values, levels.contiguous(), right=True) - 1).clamp_(0, last)
        lo, hi = self.values[below], self.values[(below + 1).clamp_(max=last)]
        width = hi - lo
        fraction = ((levels - lo) / torch.where(width > 0, width, 1.0)).clamp_(0, 1)
        if softness < 1:
            soft = fraction.sub_(softness / 2).div_(1 - softness).clamp_(0, 1)
        else:
            soft = (fraction > 0.5).to(levels.dtype)
        return lo + soft * width
