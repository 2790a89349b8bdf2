"""Outputs of a rounded layer get back the mean and the spread that they have in the float network.

Rounding by least squares shrinks a layer's outputs: what is left as error is missing from their energy. In a single
layer that is little, but the layers of a residual network shrink together (ResNet-20 at 2 bits: its outputs to 88 %,
which made up a fourth of their squared error). Larger scales of an output channel undo it, at no cost when the network
runs, and the bias takes the mean. Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for
rapid-deployment", do so to the weights; here the outputs count.
"""

import torch
from torch import Tensor

from distributed_adaround.numerics.grid import Grid
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.evaluate import channel_sums, num_rows
from distributed_adaround.solve.problem import LayerProblem


def restore_outputs(problem: LayerProblem, codes: Tensor, grid: Grid, comm: Comm) -> tuple[Grid, Tensor | None]:
    """The grid with scales that restore the spread, and the shift `(O,)` that restores the mean; None: no shift.

    What the problem does not ask for, and scales that are shared by channels or of few bits, stay as they are. A
    collective where anything is to be done.

    Args:
        problem: of the layer.
        codes: `(G, R, J)` of the grid.
        grid: with the solver's scales.
        comm: of all ranks.
    """
    scales = problem.correct_scale and grid.scale_format.refits and grid.scale.shape[:2] == codes.shape[:2]
    if not (scales or problem.correct_bias):
        return grid, None
    mean, spread = _mean_and_spread(problem, grid.dequantize(codes), comm)
    if scales:
        factor = (spread[0] / spread[1]).sqrt().view(*codes.shape[:2], 1)
        # A channel without any spread has a factor of 0, NaN or infinity: none makes a scale, so it keeps its own.
        restored = grid.with_scale(factor * grid.scale)
        if grid.scale_format.storage == "float32":
            mean[1] *= (restored.scale.double() / grid.scale)[:, :, 0].flatten()
        elif problem.correct_bias:
            # Rounding to fewer bits changes the scales of a channel's groups by different shares.
            mean, _ = _mean_and_spread(problem, restored.dequantize(codes), comm)
        grid = restored
    return grid, (mean[0] - mean[1]).to(problem.dtype) if problem.correct_bias else None


def _mean_and_spread(problem: LayerProblem, rounded: Tensor, comm: Comm) -> tuple[Tensor, Tensor]:
    """Mean and variance, `(2, O)` float64, of the float and of the rounded layer's outputs, without the bias.

    Over all rows of all ranks, with the same bits on any number of them: each microbatch has a place of its own in what
    is summed. Where no bias is corrected, the mean square takes the place of the variance.
    """
    geometry, dim = problem.geometry, problem.geometry.channel_dim
    # Number of rows; mean of both layers; sum of squares around it, of both.
    shape = (problem.total_microbatches, 5, geometry.out_channels)
    parts = torch.zeros(shape, dtype=torch.float64, device=problem.device)
    for batch in problem.batches:
        outputs = problem.outputs(problem.on_device(batch.x_hat), rounded, None)
        keep = batch.keep(dim)
        count = num_rows(batch, keep, dim).to(problem.device)
        parts[batch.index, 0] = count
        for place, values in enumerate((problem.on_device(batch.y), outputs), start=1):
            mean = channel_sums(values, keep, dim) / count.clamp(min=1)
            parts[batch.index, place] = mean
            away = values - mean.to(values.dtype).view(-1, *[1] * geometry.num_spatial_dims)
            parts[batch.index, place + 2] = channel_sums(away.square_(), keep, dim)
    rows, means, squares = torch.split(comm.all_reduce(parts), [1, 2, 2], dim=1)
    share = rows / rows.sum(dim=0)
    mean = (share * means).sum(dim=0)
    variance = squares.sum(dim=0) / rows.sum(dim=0) + (share * (means - mean).square()).sum(dim=0)
    if problem.bias is not None:
        mean[0] -= problem.bias
    return mean, variance if problem.correct_bias else variance + mean.square()
