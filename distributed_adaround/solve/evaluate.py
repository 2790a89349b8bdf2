"""Output error of rounded weights over the whole calibration set, with the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_adaround.capture.sites import row_mask
from distributed_adaround.errors import InputError
from distributed_adaround.runtime.comm import Comm, agreed
from distributed_adaround.solve.finite import non_finite_error
from distributed_adaround.solve.problem import LayerProblem, OutputErrors


def output_errors(
    problem: LayerProblem, candidates: Sequence[Tensor], comm: Comm, shift: Tensor | None = None
) -> OutputErrors:
    """Errors of weights `(O, I)` against the float layer, through what follows the layer.

    shift: `(O,)`, added to the outputs of the candidates (a corrected bias), or None.

    Each microbatch's sums fill a place of their own, so the reduction only ever adds zeros to them and the total does
    not depend on the number of ranks.

    Raises:
        InputError: the layer's inputs or outputs are not finite.
    """
    channels = problem.geometry.out_channels
    sums = torch.zeros(
        problem.total_microbatches, len(candidates) + 2, channels, dtype=torch.float64, device=problem.device
    )
    bias = problem.bias if shift is None else shift if problem.bias is None else problem.bias + shift
    weights = [problem.geometry.from_matrix(weight) for weight in candidates]
    activations = problem.activations
    for index, x, output, mask in zip(
        activations.indices, activations.inputs, activations.float_outputs, activations.masks, strict=True
    ):
        sums[index] = _microbatch_errors(problem, weights, bias, x, output, mask)
    total = comm.all_reduce(sums).sum(dim=0)
    if not bool(torch.isfinite(total).all()):
        raise non_finite_error(problem, comm)
    if not total[-1, 0]:
        raise agreed(
            InputError(f"layer {problem.name}: the attention mask leaves no row to learn from; check the mask")
        )
    return OutputErrors(error=total[:-2], energy=total[-2], num_rows=int(total[-1, 0]))


def _microbatch_errors(
    problem: LayerProblem,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    x: Tensor,
    output: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`(candidates + 2, O)`: squared error of each candidate, energy of the float output, number of rows."""
    x = x.to(problem.device, problem.dtype)
    channel_dim = problem.geometry.channel_dim
    expected = problem.transform(problem.target(x, output), channel_dim)
    keep = rows_that_count(expected, mask, channel_dim)
    errors = [
        channel_sums(
            (problem.transform(problem.geometry.apply(x, weight, bias), channel_dim) - expected).square_(),
            keep,
            channel_dim,
        )
        for weight in weights
    ]
    energy = channel_sums(expected.square(), keep, channel_dim)
    return torch.stack([*errors, energy, num_rows(expected, keep, channel_dim).expand_as(energy)])


def rows_that_count(outputs: Tensor, mask: Tensor | None, channel_dim: int) -> Tensor | None:
    """Which rows of a layer's outputs count, bool of their shape without the channels; None: all."""
    keep = row_mask(mask, tuple(outputs.movedim(channel_dim, -1).shape[:-1]))
    return None if keep is None else keep.to(outputs.device)


def num_rows(outputs: Tensor, keep: Tensor | None, channel_dim: int) -> Tensor:
    """How many rows of a layer's outputs count: a number, float64, on their device."""
    if keep is not None:
        return keep.sum(dtype=torch.float64)
    return torch.full((), outputs.numel() / outputs.shape[channel_dim], dtype=torch.float64, device=outputs.device)


def channel_sums(values: Tensor, keep: Tensor | None, channel_dim: int) -> Tensor:
    """Sum over all rows that count, `(O,)` float64.

    Rows of a sample (of a Linear layer: all) are summed in the dtype of the values, which torch does pairwise: on a CPU
    ten times as fast as in float64, and as exact as the values are.
    """
    if keep is None and channel_dim == 1:
        return values.flatten(2).sum(dim=2).sum(dim=0, dtype=torch.float64)
    rows = values.movedim(channel_dim, -1)
    rows = rows.flatten(0, -2) if keep is None else rows[keep]
    return rows.sum(dim=0).double()
