"""GPTQ: inputs one after the other to the nearest grid value, their error spread over those still to come.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1,
with the inputs in the order of falling A_jj (activation order). Scales stay as they are, those of groups too.

Shape legend: G conv groups, J inputs of one output, R out channels of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_adaround.numerics.lattice import Lattice
from distributed_adaround.numerics.moments import Quadratic

_FRONT = 128


def gptq_codes(quadratic: Quadratic, lattice: Lattice, damping: float) -> Tensor:
    """Codes `(G, R, J)`. damping: share of the mean of A's diagonal that is added to it.

    With a pull P the float weight is first moved to the least squares solution, `W + P (A + damping)^-1`.
    """
    # Cholesky factors of nearly singular moments need the longer numbers.
    second = quadratic.second.to(torch.float64)
    diagonal = second.diagonal(dim1=1, dim2=2)
    # Inputs that are always 0 would make A singular; what is added there changes nothing.
    added = damping * diagonal.mean(dim=1, keepdim=True) + (diagonal == 0)
    second = second + torch.diag_embed(added.clamp(min=torch.finfo(torch.float64).tiny))
    weight = quadratic.weight
    if quadratic.pull is not None:
        weight = weight + torch.linalg.solve(second, quadratic.pull.double(), left=False).to(weight.dtype)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    spread = _spread(second, order).to(weight.dtype)
    run_of_input = order // (weight.shape[2] // lattice.scale.shape[1])
    levels = _round_in_order(weight.transpose(1, 2), order, spread, lattice, run_of_input)
    return lattice.codes(levels).transpose(1, 2)


def _spread(second: Tensor, order: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of A in the given order, `(G, J, J)`."""
    rows = second.gather(1, order[:, :, None].expand_as(second))
    permuted = rows.gather(2, order[:, None, :].expand_as(second))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(permuted))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _round_in_order(weight: Tensor, order: Tensor, spread: Tensor, lattice: Lattice, run_of_input: Tensor) -> Tensor:
    """Levels `(G, J, R)`, in the weight's order. weight: `(G, J, R)`."""
    place = order[:, :, None].expand_as(weight)
    left = weight.gather(1, place)
    levels = torch.empty_like(left)
    for first in range(0, left.shape[1], _FRONT):
        last = min(first + _FRONT, left.shape[1])
        errors = torch.empty_like(left[:, first:last])
        for j in range(first, last):
            chosen = lattice.of_inputs(run_of_input[:, j : j + 1])
            now = left[:, j : j + 1]
            levels[:, j : j + 1] = chosen.round(now / chosen.scale)
            error = (now - levels[:, j : j + 1] * chosen.scale) / spread[:, j : j + 1, j : j + 1]
            errors[:, j - first : j - first + 1] = error
            left[:, j + 1 : last].baddbmm_(spread[:, j : j + 1, j + 1 : last].transpose(1, 2), error, alpha=-1)
        left[:, last:].baddbmm_(spread[:, first:last, last:].transpose(1, 2), errors, alpha=-1)
    return torch.empty_like(levels).scatter_(1, place, levels)
