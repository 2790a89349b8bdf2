"""Moments of a layer's inputs over all ranks, taken while the walk holds them; one reduction per layer.

The unfolded input of a convolution is never held whole: it passes by in pieces. Layers that read the same tensor in the
same way (query, key and value; gate and up) share one set of moments.

Samples fall into folds, by microbatch, or by their place in it where microbatches are few; each fold has sums of its
own. How much folds differ tells what the moments are worth on other data (regularize.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distributed_adaround.capture.sites import Batch
from distributed_adaround.numerics.moments import ExactSum, Moments, SymmetricSum
from distributed_adaround.numerics.patches import unfolded_pieces, weight_order
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.evaluate import channel_sums, non_finite_error
from distributed_adaround.solve.problem import LayerProblem

# Folds of a layer: as many sums are held and sent. Of large layers the least number that shows a spread.
_FOLDS, _LARGE_FOLDS, _LARGE = 4, 2, 4096


class SharedMoments:
    """Measures moments, and keeps the last ones for the next layers with the same input."""

    def __init__(self) -> None:
        self._key: object = None
        self._moments: FoldedMoments | None = None

    def measure(self, problem: LayerProblem, comm: Comm) -> FoldedMoments:
        """As the function `measure`; a collective unless the last problem had the same input, on all ranks alike."""
        # What makes rows of an input, apart from the tensor itself.
        of = problem.geometry
        reading = (of.kernel_size, of.stride, of.padding, of.dilation, of.output_padding, of.transposed)
        key = (problem.source or problem.name, of.in_channels, of.groups, reading, problem.dtype)
        if self._moments is None or key != self._key:
            self._moments = None  # frees the old ones first
            self._key, self._moments = key, measure(problem, comm)
        return self._moments


def measure(problem: LayerProblem, comm: Comm) -> FoldedMoments:
    """The same bits on any number of ranks. A collective. Raises InputError when the inputs are not finite."""
    sizes = comm.all_gather_object(_own_sizes(problem))
    squares, change, longest = (max(values) for values in zip(*(size[:3] for size in sizes), strict=True))
    if not (math.isfinite(squares) and math.isfinite(change)):
        raise non_finite_error(problem, comm)
    groups, inputs = problem.geometry.groups, problem.geometry.inputs_per_output
    bounds = _Bounds(problem.total_microbatches, squares, change, longest)
    number = _FOLDS if inputs <= _LARGE else _LARGE_FOLDS
    folds = [_FoldSums.empty(groups, inputs, bounds, problem.device) for _ in range(number)]
    step = 1
    if problem.rows_per_input is not None:
        # Of so many rows moments take one.
        step = max(1, sum(size[3] for size in sizes) // (problem.rows_per_input * inputs))
    for fold, x_hat, difference in _pieces(problem, change > 0, step, number):
        folds[fold].add(x_hat, difference)
    totals = [total for fold in folds for total in fold.totals]
    flat = comm.all_reduce(torch.cat([total.reshape(-1) for total in totals]))
    for whole, part in zip(totals, torch.split(flat, [total.numel() for total in totals]), strict=True):
        whole.copy_(part.view_as(whole))
    order = weight_order(problem.geometry).to(problem.device) if problem.geometry.num_spatial_dims else None
    return FoldedMoments([fold for fold in folds if int(fold.count)] or folds[:1], order, every_row=step == 1)


class FoldedMoments:
    """Moments of a layer's inputs, of all rows and of each fold of them."""

    def __init__(self, folds: Sequence[_FoldSums], order: Tensor | None, every_row: bool) -> None:
        """folds: their sums. order: int64 `(J,)`, the inputs in the weight's order. every_row: as of Moments."""
        self._folds, self._order, self._every_row = folds, order, every_row
        self.rows = [int(fold.count) for fold in folds]
        self.whole = self._moments(folds)
        # What is made of them, by who asks; see regularize.py.
        self.derived: dict[object, object] = {}

    def fold(self, number: int) -> Moments:
        """Those of one fold alone."""
        return self._moments([self._folds[number]])

    def without(self, number: int) -> Moments:
        """Those of all other folds."""
        return self._moments([fold for place, fold in enumerate(self._folds) if place != number])

    def _moments(self, folds: Sequence[_FoldSums]) -> Moments:
        moments = replace(_FoldSums.moments(folds), every_row=self._every_row)
        return moments if self._order is None else moments.reordered(self._order)


@dataclass(frozen=True)
class _Bounds:
    """How many microbatches there are, and what their sums can reach: see `_own_sizes`."""

    total: int
    squares: float
    change: float
    longest: int


@dataclass(frozen=True)
class _FoldSums:
    """Sums over the rows of a fold: of x̂x̂ᵀ, x̂, and where streams differ of (x - x̂)x̂ᵀ and x - x̂; how many rows."""

    second: SymmetricSum
    mean: ExactSum
    cross: ExactSum | None
    cross_mean: ExactSum | None
    count: Tensor

    @classmethod
    def empty(cls, groups: int, inputs: int, bounds: _Bounds, device: torch.device) -> _FoldSums:
        # By Cauchy and Schwarz, per microbatch; a little room for the rounding of float32.
        room, shape = 1.01 * bounds.total, (groups, inputs)
        cross, cross_mean = None, None
        if bounds.change > 0:
            cross = ExactSum((*shape, inputs), room * math.sqrt(bounds.squares * bounds.change), device)
            cross_mean = ExactSum(shape, room * math.sqrt(bounds.change * bounds.longest), device)
        return cls(
            second=SymmetricSum(groups, inputs, room * bounds.squares, device),
            mean=ExactSum(shape, room * math.sqrt(bounds.squares * bounds.longest), device),
            cross=cross,
            cross_mean=cross_mean,
            count=torch.zeros(1, dtype=torch.int64, device=device),
        )

    def add(self, x_hat: Tensor, difference: Tensor | None) -> None:
        """Rows `(G, rows, J)` of x̂, and of x - x̂ where the streams differ."""
        self.second.add(x_hat)
        self.mean.add(x_hat.sum(dim=1))
        self.count.add_(x_hat.shape[1])
        if self.cross is not None and self.cross_mean is not None and difference is not None:
            self.cross.add(difference.transpose(1, 2) @ x_hat)
            self.cross_mean.add(difference.sum(dim=1))

    @property
    def totals(self) -> list[Tensor]:
        """To add to those of other ranks."""
        others = (one.total for one in (self.mean, self.cross, self.cross_mean) if one is not None)
        return [*self.second.totals, *others, self.count]

    @staticmethod
    def moments(folds: Sequence[_FoldSums]) -> Moments:
        """Means over the rows of some folds; their integers are added, so the order does not matter."""
        rows = max(1, sum(int(fold.count) for fold in folds))
        cross = [fold.cross for fold in folds if fold.cross is not None]
        cross_mean = [fold.cross_mean for fold in folds if fold.cross_mean is not None]
        return Moments(
            second=SymmetricSum.mean_of([fold.second for fold in folds], rows),
            mean=ExactSum.mean_of([fold.mean for fold in folds], rows),
            cross=ExactSum.mean_of(cross, rows) if cross else None,
            cross_mean=ExactSum.mean_of(cross_mean, rows) if cross_mean else None,
            num_rows=rows,
        )


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
        if batch.x is not batch.x_hat:
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


def _pieces(problem: LayerProblem, differs: bool, step: int, folds: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """x̂ and x - x̂ `(G, rows, J)`, a piece of a microbatch at a time with the fold it falls in: one row of `step`, and
    none that is padding."""
    geometry = problem.geometry
    for batch in problem.batches:
        keep = _keep(batch, problem)
        near = problem.on_device(batch.x_hat)
        streams = [near, problem.on_device(batch.x) - near] if differs else [near]
        if not geometry.num_spatial_dims and near.shape[0] < folds:
            # One long text, say: its tokens in runs.
            streams = [stream.reshape(-1, stream.shape[-1]) for stream in streams]
        units = max(1, streams[0].shape[0])
        per_unit = max(1, batch.y.numel() // geometry.out_channels // units)
        # A step that shares a factor with the positions of a sample would meet the same ones in every sample.
        every = next(n for n in range(step, 0, -1) if math.gcd(n, per_unit) == 1)
        # Multiples of the golden ratio fall evenly on the first rows.
        first = int(batch.index * 0.6180339887498949 % 1 * every)
        for fold, part in _fold_parts(batch.index // problem.num_calls, units, problem, folds):
            own = None if keep is None else keep[part.start * per_unit : part.stop * per_unit]
            # The rows that would be taken of the whole microbatch.
            start, begin = 0, (first - part.start * per_unit) % every
            pieces = (unfolded_pieces(stream[part], geometry, begin, every) for stream in streams)
            for parts in zip(*pieces, strict=True):
                stop = start + parts[0].shape[1]
                if own is not None:
                    parts = tuple(rows[:, own[begin::every][start:stop]] for rows in parts)
                yield fold, parts[0], (parts[1] if differs else None)
                start = stop


def _fold_parts(microbatch: int, units: int, problem: LayerProblem, folds: int) -> Iterator[tuple[int, slice]]:
    """Which samples of a microbatch, or tokens of the only ones, fall in which fold: all of them in one where
    microbatches are many, so that nothing is cut; every fold its part where they are few."""
    if problem.total_microbatches // problem.num_calls >= 2 * folds:
        yield microbatch % folds, slice(0, units)
        return
    for number in range(folds):
        part = slice(units * number // folds, units * (number + 1) // folds)
        if part.stop > part.start:
            yield (microbatch + number) % folds, part
