"""Moments of a layer's inputs over all ranks, taken while the walk holds them; one reduction per layer.

The unfolded input of a convolution is never held whole: it passes by in pieces. Layers that read the same tensor in the
same way (query, key and value; gate and up) share one set of moments.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from distributed_adaround.capture.sites import Batch
from distributed_adaround.numerics.moments import ExactSum, Moments, SymmetricSum
from distributed_adaround.numerics.patches import unfolded_pieces, weight_order
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.evaluate import channel_sums, non_finite_error
from distributed_adaround.solve.problem import LayerProblem


class SharedMoments:
    """Measures moments, and keeps the last ones for the next layers with the same input."""

    def __init__(self) -> None:
        self._key: object = None
        self._moments: Moments | None = None

    def measure(self, problem: LayerProblem, comm: Comm) -> Moments:
        """As the function `measure`; a collective unless the last problem had the same input, on all ranks alike."""
        # What makes rows of an input, apart from the tensor itself.
        of = problem.geometry
        reading = (of.kernel_size, of.stride, of.padding, of.dilation, of.output_padding, of.transposed)
        key = (problem.source or problem.name, of.in_channels, of.groups, reading, problem.dtype)
        if self._moments is None or key != self._key:
            self._moments = None  # frees the old ones first
            self._key, self._moments = key, measure(problem, comm)
        return self._moments


def measure(problem: LayerProblem, comm: Comm) -> Moments:
    """The same bits on any number of ranks. A collective. Raises InputError when the inputs are not finite."""
    sizes = comm.all_gather_object(_own_sizes(problem))
    squares, change, longest = (max(values) for values in zip(*(size[:3] for size in sizes), strict=True))
    if not (math.isfinite(squares) and math.isfinite(change)):
        raise non_finite_error(problem, comm)
    groups, inputs = problem.geometry.groups, problem.geometry.inputs_per_output
    total, device = problem.total_microbatches, problem.device
    # By Cauchy and Schwarz, per microbatch; a little room for the rounding of float32.
    second = SymmetricSum(groups, inputs, 1.01 * total * squares, device)
    mean = ExactSum((groups, inputs), 1.01 * total * math.sqrt(squares * longest), device)
    differs, cross, cross_mean = change > 0, None, None
    if differs:
        cross = ExactSum((groups, inputs, inputs), 1.01 * total * math.sqrt(squares * change), device)
        cross_mean = ExactSum((groups, inputs), 1.01 * total * math.sqrt(change * longest), device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    step = 1
    if problem.rows_per_input is not None:
        # Of so many rows moments take one.
        step = max(1, sum(size[3] for size in sizes) // (problem.rows_per_input * inputs))
    for x_hat, difference in _pieces(problem, differs, step):
        second.add(x_hat)
        mean.add(x_hat.sum(dim=1))
        count += x_hat.shape[1]
        if cross is not None and cross_mean is not None and difference is not None:
            cross.add(difference.transpose(1, 2) @ x_hat)
            cross_mean.add(difference.sum(dim=1))
    totals = [*second.totals, *(one.total for one in (mean, cross, cross_mean) if one is not None), count]
    flat = comm.all_reduce(torch.cat([total.reshape(-1) for total in totals]))
    for whole, part in zip(totals, torch.split(flat, [total.numel() for total in totals]), strict=True):
        whole.copy_(part.view_as(whole))
    rows = max(1, int(count))
    moments = Moments(
        second=second.mean(rows),
        mean=mean.mean(rows),
        cross=None if cross is None else cross.mean(rows),
        cross_mean=None if cross_mean is None else cross_mean.mean(rows),
        num_rows=rows,
        every_row=step == 1,
    )
    spatial = problem.geometry.num_spatial_dims > 0
    return moments.reordered(weight_order(problem.geometry).to(device)) if spatial else moments


def _own_sizes(problem: LayerProblem) -> tuple[float, float, int, int]:
    """How large sums over the rows of one of this rank's microbatches can get, since no unfolded input channel has
    larger squares than the channel itself: of squares of x̂, and of x - x̂; the most rows of one; rows that count."""
    inputs, change, rows, all_rows = 0.0, 0.0, 0, 0
    for batch in problem.batches:
        keep = _keep(batch, problem)
        near = _as_summed(batch.x_hat, keep, problem)
        inputs = max(inputs, _largest_square_sum(near, problem))
        own = batch.y.numel() // problem.geometry.out_channels
        rows, all_rows = max(rows, own), all_rows + (own if keep is None else int(keep.sum()))
        if problem.asymmetry and batch.x is not batch.x_hat:
            change = max(change, _largest_square_sum(_as_summed(batch.x, keep, problem) - near, problem))
    return inputs, change, rows, all_rows


def _keep(batch: Batch, problem: LayerProblem) -> Tensor | None:
    """Which rows of a microbatch count, `(rows,)`, or None for all."""
    keep = batch.keep(problem.geometry.channel_dim)
    return None if keep is None else keep.reshape(-1).to(problem.device)


def _as_summed(x: Tensor, keep: Tensor | None, problem: LayerProblem) -> Tensor:
    """An input in the precision of the sums; that of a Linear layer without rows that are padding."""
    x = problem.on_device(x)
    return x if keep is None or problem.geometry.num_spatial_dims else x.reshape(-1, x.shape[-1])[keep]


def _largest_square_sum(x: Tensor, problem: LayerProblem) -> float:
    """Largest sum over one channel of squares; infinite where a value is not finite."""
    sums = channel_sums(x.square(), None, problem.geometry.channel_dim)
    # Not NaN, which max() would pass over.
    return float(sums.max()) if bool(torch.isfinite(sums).all()) else math.inf


def _pieces(problem: LayerProblem, differs: bool, step: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """x̂ and x - x̂ `(G, rows, J)`, a piece of a microbatch at a time: one row of `step`, and none that is padding."""
    geometry = problem.geometry
    for batch in problem.batches:
        per_sample = max(1, batch.y.numel() // geometry.out_channels // max(1, batch.y.shape[0]))
        # A step that shares a factor with the positions of a sample would meet the same ones in every sample.
        every = next(n for n in range(step, 0, -1) if math.gcd(n, per_sample) == 1)
        # Multiples of the golden ratio fall evenly on the first rows.
        first = int(batch.index * 0.6180339887498949 % 1 * every)
        keep = _keep(batch, problem)
        near = problem.on_device(batch.x_hat)
        streams = [near, problem.on_device(batch.x) - near] if differs else [near]
        start = 0
        for parts in zip(*(unfolded_pieces(stream, geometry, first, every) for stream in streams), strict=True):
            stop = start + parts[0].shape[1]
            if keep is not None:
                parts = tuple(part[:, keep[first::every][start:stop]] for part in parts)
            yield parts[0], (parts[1] if differs else None)
            start = stop
