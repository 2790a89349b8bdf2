"""Second moments of a layer's inputs, and the quadratic that its squared output error is.

Shape legend: G conv groups (1 for Linear), J inputs of one output, R out channels of a group, N rows (tokens or output
pixels), x float input, x̂ input from the quantized prefix.

With the difference D = Ŵ - W the mean squared output error of a layer without an activation inside the loss is

    mean ||α W (x - x̂) - D x̂||²  =  tr(D A Dᵀ) - 2 tr(D Pᵀ) + const
    A = mean x̂ x̂ᵀ      C = mean (x - x̂) x̂ᵀ      P = α W C

where α is the asymmetry. C is 0 where both streams are the same, so nothing is lost in the difference of two large
products; DESIGN's B is A + C. With a corrected bias both moments lose the product of their means.

Sums are exact: every microbatch's part is rounded once to a fixed point and added as int64, so the total has the same
bits for every order and every number of ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Relative error of a microbatch's sum of products, in units of the dtype's last place; 50 were seen in 100,000 rows.
# In float32 an input counts as constant when it spreads by less than 0.3 % of its mean.
_SUM_ERROR = 64
# Columns of a panel of products: wider ones waste more of the lower triangle, narrower ones are slower products.
_PANEL = 192


class ExactSum:
    """Sum of tensors as int64 in units of a power of two.

    bound: largest absolute value that the total can reach. Parts are rounded to bound * 2^-61 or finer, so an entry of
    the total is off by at most (number of parts) * bound * 2^-62. Totals up to twice the bound do not overflow.
    """

    def __init__(self, shape: tuple[int, ...], bound: float, device: torch.device) -> None:
        assert math.isfinite(bound), bound
        # frexp: 2^(exponent - 1) <= bound < 2^exponent.
        exponent = math.frexp(bound)[1] if bound > 0 else 0
        self._unit = 2.0 ** max(-1000, exponent - 62)
        self.total = torch.zeros(shape, dtype=torch.int64, device=device)

    def add(self, part: Tensor) -> None:
        self.total += (part.to(torch.float64) / self._unit).round_().to(torch.int64)

    def mean(self, count: int) -> Tensor:
        """Total over count, float64."""
        return self.mean_of([self], count)

    @staticmethod
    def mean_of(sums: Sequence["ExactSum"], count: int) -> Tensor:
        """The totals of several sums of one bound, together, over count, float64."""
        total = sums[0].total if len(sums) == 1 else torch.stack([one.total for one in sums]).sum(dim=0)
        return total.to(torch.float64) * sums[0]._unit / count


class SymmetricSum:
    """Sum of products `xᵀ x` of x `(G, rows, J)`: their upper triangle only, in panels of columns. Two thirds of the
    work of the whole square, and little more than half of its memory. bound: as of ExactSum."""

    def __init__(self, groups: int, size: int, bound: float, device: torch.device) -> None:
        self._shape = (groups, size, size)
        self._panels: list[tuple[slice, ExactSum]] = []
        for start in range(0, size, _PANEL):
            columns = slice(start, min(start + _PANEL, size))
            shape = (groups, columns.stop, columns.stop - start)
            self._panels.append((columns, ExactSum(shape, bound, device)))

    def add(self, x: Tensor) -> None:
        for columns, panel in self._panels:
            panel.add(x[:, :, : columns.stop].transpose(1, 2) @ x[:, :, columns])

    @property
    def totals(self) -> list[Tensor]:
        """To add to those of other ranks."""
        return [panel.total for _, panel in self._panels]

    @staticmethod
    def mean_of(sums: Sequence["SymmetricSum"], count: int) -> Tensor:
        """The totals of several sums of one bound, together, over count, `(G, J, J)` float64."""
        whole = torch.empty(sums[0]._shape, dtype=torch.float64, device=sums[0].totals[0].device)
        for panels in zip(*(one._panels for one in sums), strict=True):
            columns = panels[0][0]
            part = ExactSum.mean_of([panel for _, panel in panels], count)
            whole[:, columns, : columns.stop] = part.transpose(1, 2)
            whole[:, : columns.stop, columns] = part
        return whole


@dataclass(frozen=True)
class Moments:
    """Means over all rows of all ranks, float64.

    second: A, `(G, J, J)`. mean: of x̂, `(G, J)`. cross: C, `(G, J, J)`, and cross_mean, of x - x̂, `(G, J)`: None where
    both streams are the same or the asymmetry is 0. every_row: all rows are in them, not an even selection.
    """

    second: Tensor
    mean: Tensor
    cross: Tensor | None
    cross_mean: Tensor | None
    num_rows: int
    every_row: bool = True

    def reordered(self, index: Tensor) -> "Moments":
        """The same with the inputs in another order. index: int64 `(J,)`."""
        pairs = (slice(None), index[:, None], index)
        moved = replace(self, second=self.second[pairs], mean=self.mean[:, index])
        if self.cross is None or self.cross_mean is None:
            return moved
        return replace(moved, cross=self.cross[pairs], cross_mean=self.cross_mean[:, index])

    def error_sums(self, difference: Tensor, weight: Tensor, asymmetry: float) -> Tensor:
        """Squared output error of each channel, `(G, R)` float64, without its constant `sum ||α W (x - x̂)||²` and
        without a correction of the bias, over the rows of the moments. difference: D, weight: W, `(G, R, J)`."""
        difference = difference.double()
        by_weight = torch.bmm(difference, self.second)
        if self.cross is not None and asymmetry:
            by_weight -= 2 * asymmetry * torch.bmm(weight.double(), self.cross)
        return (by_weight * difference).sum(dim=2) * self.num_rows

    def centred(self, mean: Tensor, cross_mean: Tensor | None, dtype: torch.dtype) -> "Moments":
        """Moments around these means of x̂ and x - x̂, which a corrected bias leaves. dtype: of the sums' products."""
        second = self.second - self.mean[:, :, None] * mean[:, None, :] - mean[:, :, None] * self.mean[:, None, :]
        second = second + mean[:, :, None] * mean[:, None, :]
        # Inputs that are always the same keep only the rounding errors of their sums: 0 is what they would be.
        noise = _SUM_ERROR * torch.finfo(dtype).eps * self.second.diagonal(dim1=1, dim2=2)
        varies = (second.diagonal(dim1=1, dim2=2) > noise).to(second.dtype)
        second = second * varies[:, :, None] * varies[:, None, :]
        cross = self.cross
        if cross is not None:
            assert cross_mean is not None
            assert self.cross_mean is not None
            cross = cross - self.cross_mean[:, :, None] * mean[:, None, :]
            cross = cross - cross_mean[:, :, None] * (self.mean - mean)[:, None, :]
            cross = cross * varies[:, None, :]
        return replace(self, second=second, mean=self.mean - mean, cross=cross)


@dataclass(frozen=True)
class Quadratic:
    """`tr(D A Dᵀ) - 2 tr(D Pᵀ)` of a layer or some of its out channels.

    second: A, `(G, J, J)`. weight: W, `(G, R, J)`. linear: P, `(G, R, J)`, or None for 0.
    """

    second: Tensor
    weight: Tensor
    linear: Tensor | None

    def part(self, place: tuple[slice, slice]) -> "Quadratic":
        """The part of some conv groups and of some out channels in each of them."""
        linear = None if self.linear is None else self.linear[place]
        return Quadratic(self.second[place[0]], self.weight[place], linear)

    def repeated(self, times: int) -> "Quadratic":
        """The channels of each group so often, one copy of all of them after the other."""
        linear = None if self.linear is None else self.linear.repeat(1, times, 1)
        return Quadratic(self.second, self.weight.repeat(1, times, 1), linear)

    def loss(self, rounded: Tensor) -> Tensor:
        """Loss without its constant of each channel, `(G, R)`, of weights `(G, R, J)`."""
        difference = rounded - self.weight
        gradient = torch.bmm(difference, self.second)
        if self.linear is not None:
            gradient -= 2 * self.linear
        return (gradient * difference).sum(dim=2)


def quadratic_of(weight: Tensor, second: Tensor, cross: Tensor | None, asymmetry: float) -> Quadratic:
    """The quadratic of a layer, in the dtype of its weight `(G, R, J)`. second, cross: A and C, `(G, J, J)`."""
    linear = None
    if cross is not None and asymmetry:
        linear = torch.bmm(weight, cross.to(weight.dtype)).mul_(asymmetry)
    return Quadratic(second.to(weight.dtype), weight, linear)


def energy_of(second: Tensor) -> Callable[[Tensor], Tensor]:
    """The mean square `(G, R)` of each channel's outputs, as a function of its weight `(G, R, J)`. second: A."""
    return lambda weight: (torch.bmm(weight, second) * weight).sum(dim=2)


def permuted(second: Tensor, order: Tensor) -> Tensor:
    """A `(G, J, J)` with rows and columns in the order of inputs, int64 `(G, J)`."""
    rows = second.gather(1, order[:, :, None].expand_as(second))
    return rows.gather(2, order[:, None, :].expand_as(second))


def inputs_first(values: Tensor, order: Tensor) -> Tensor:
    """`(G, R, J)` to `(G, J, R)` with the inputs in that order."""
    return values.transpose(1, 2).gather(1, order[:, :, None].expand(-1, -1, values.shape[1]))


def outputs_first(values: Tensor, order: Tensor) -> Tensor:
    """Inverse of `inputs_first`."""
    return torch.empty_like(values).scatter_(1, order[:, :, None].expand_as(values), values).transpose(1, 2)
