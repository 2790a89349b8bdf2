"""GPTQ: inputs one after the other to the nearest grid value, their error spread over those still to come.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1,
with the inputs in the order of falling A_jj (activation order). Scales stay as they are, those of groups too.

Shape legend: G conv groups, J inputs of one output, R out channels of a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.moments import Quadratic, inputs_first, outputs_first, permuted

_FRONT = 128
# Beyond it A counts for nothing, and only numbers that are not finite make it singular.
_LEAST_DAMPING, _MOST_DAMPING = 1e-6, 1e6


@dataclass(frozen=True)
class GptqFactors:
    """What all channels of a layer share.

    order: of the inputs, int64 `(G, J)`. lower: Cholesky factor of the damped A in that order, `(G, J, J)` float64.
    spread: upper Cholesky factor of its inverse, `(G, J, J)`: how the error of one input goes to those after it.
    damping: what it took.
    """

    order: Tensor
    lower: Tensor
    spread: Tensor
    damping: float

    @classmethod
    def of(cls, second: Tensor, damping: float) -> "GptqFactors":
        """Factors of A `(G, J, J)`. damping: share of the mean of A's diagonal that is added to it; where A is singular
        all the same, ten times as much, until it is not.

        Raises torch.linalg.LinAlgError when A is not even finite.
        """
        dtype = second.dtype
        # Nearly singular moments need the longer numbers.
        second = second.to(torch.float64)
        diagonal = second.diagonal(dim1=1, dim2=2)
        order = diagonal.argsort(dim=1, descending=True, stable=True)
        ordered = permuted(second, order)
        # Inputs that are always 0 would make A singular; what is added there changes nothing.
        mean, silent = diagonal.mean(dim=1, keepdim=True), (diagonal.gather(1, order) == 0).to(second.dtype)
        while True:
            lower, failed = torch.linalg.cholesky_ex(ordered + torch.diag_embed(damping * mean + silent))
            if not bool(failed.any()):
                break
            if damping > _MOST_DAMPING:
                raise LinAlgError("the second moment is not finite")
            damping = max(10 * damping, _LEAST_DAMPING)  # 0 would stay 0
        spread = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        return cls(order, lower, spread.to(dtype), damping)

    def groups(self, index: slice) -> "GptqFactors":
        """The factors of some conv groups."""
        return GptqFactors(self.order[index], self.lower[index], self.spread[index], self.damping)


def gptq_codes(quadratic: Quadratic, grid: Grid, factors: GptqFactors) -> Tensor:
    """Codes `(G, R, J)`. With a linear part P the float weight first moves to the least squares solution W + P A^-1."""
    order = factors.order
    left = inputs_first(quadratic.weight, order)
    frozen = grid.frozen(left)
    if quadratic.linear is not None:
        linear = inputs_first(quadratic.linear, order).double()
        left += torch.cholesky_solve(linear, factors.lower).to(left.dtype)
    return grid.codes(outputs_first(_round_in_order(left, factors.spread, grid, order, frozen), order))


def best_start(codes: Tensor, scale: Tensor, loss: Tensor, starts: int) -> tuple[Tensor, Tensor]:
    """Of the copies of each channel codes `(G, R, J)` and scale `(G, R, n)` of the one with the least loss. codes: `(G,
    starts * R, J)`, one copy of all channels after the other; scale, loss likewise."""
    groups, copies, _ = codes.shape
    if starts == 1:
        return codes, scale
    shape = (groups, starts, copies // starts)
    best = loss.reshape(shape).argmin(dim=1)[:, None, :, None]
    codes, scale = (part.reshape(*shape, -1).take_along_dim(best, dim=1).squeeze(1) for part in (codes, scale))
    return codes, scale


def _round_in_order(left: Tensor, spread: Tensor, grid: Grid, order: Tensor, frozen: Tensor | None) -> Tensor:
    """Levels `(G, J, R)` of weights `(G, J, R)`, which are changed, both in the order of the inputs. frozen: those that
    must stay 0; the inputs after them make up for what they would have become."""
    levels, runs = torch.empty_like(left), grid.scale.shape[2]
    run_of_input = order // (order.shape[1] // runs)
    shared = grid.runs()[0] if runs == 1 else None
    for first in range(0, left.shape[1], _FRONT):
        last = min(first + _FRONT, left.shape[1])
        errors = torch.empty_like(left[:, first:last])
        for j in range(first, last):
            chosen = shared or grid.of_inputs(run_of_input[:, j : j + 1])
            now = left[:, j : j + 1]
            levels[:, j : j + 1] = chosen.round(now / chosen.scale)
            if frozen is not None:
                levels[:, j : j + 1].masked_fill_(frozen[:, j : j + 1], 0)
            error = (now - levels[:, j : j + 1] * chosen.scale) / spread[:, j : j + 1, j : j + 1]
            errors[:, j - first : j - first + 1] = error
            left[:, j + 1 : last].baddbmm_(spread[:, j : j + 1, j + 1 : last].transpose(1, 2), error, alpha=-1)
        left[:, last:].baddbmm_(spread[:, first:last, last:].transpose(1, 2), errors, alpha=-1)
    return levels
