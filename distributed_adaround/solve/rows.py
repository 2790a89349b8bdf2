"""Calibration rows of one layer: where each row lies, and batches of rows drawn from all ranks' samples.

A row is what one output of the layer sees: a token for Linear, an output pixel for a convolution. Rows are numbered
over the whole calibration set (microbatch by microbatch), so a batch is the same on any number of ranks; each rank
gathers the rows it holds. Shape legend as in numerics/patches.py.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_adaround.capture.sites import Batch
from distributed_adaround.numerics import patches
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.evaluate import error_sums, reduced
from distributed_adaround.solve.problem import LayerProblem

# Rows are drawn for as many steps at once as make this many: one draw of many rows costs little more than one of few.
_ROWS_AT_ONCE = 1 << 14


class CalibrationRows:
    """This rank's rows of one layer, ready to be gathered.

    features: `(P, C)` padded inputs, channels last. base: `(R, O)`, outputs `W x̂ + b` of the float weight, to which a
    solver adds what the difference `Ŵ - W` makes. targets: `(R, O)`, through what follows the layer. Where that is no
    activation the base cancels: base is None, and targets hold the target less the base. All may lie on the host or in
    files; batches are brought to the compute device.
    """

    def __init__(self, problem: LayerProblem) -> None:
        geometry = problem.geometry
        self._problem, self._geometry, self._device = problem, geometry, problem.device
        counting = [_counting_rows(batch, geometry.channel_dim) for batch in problem.batches]
        self.sample_rows = [counts for counts, _ in counting]
        self._selected = [select for _, select in counting]
        # The sizes are known before any row is copied: only one microbatch at a time lies outside the budget.
        self.num_rows = sum(map(len, self._selected))
        shape = (self.num_rows, geometry.out_channels)
        self._targets = problem.store.empty(shape, problem.dtype)
        self.has_base = not problem.transform.is_affine
        self._base = problem.store.empty(shape, problem.dtype) if self.has_base else None
        # What a solver applies to the base and what the difference adds to it.
        self.transform = problem.transform if self.has_base else problem.transform.linear_part()
        self._energy: list[Tensor] = []
        self._fill_outputs()
        self._starts: Tensor | None = None
        self._offsets = torch.zeros(1, math.prod(geometry.kernel_size), dtype=torch.int64)
        self._shape_of_row: Tensor | None = None
        inputs = [batch.x_hat for batch in problem.batches]
        if geometry.num_spatial_dims:
            num_positions = self._locate()
            parts = (patches.channels_last_padded(x, geometry).flatten(0, -2) for x in inputs)
        else:
            num_positions = self.num_rows
            parts = (_take(x, select) for x, select in zip(inputs, self._selected, strict=True))
        self._features = problem.store.empty((num_positions, geometry.in_channels), problem.dtype)
        start = 0
        for part in parts:
            self._features[start : start + part.shape[0]] = part
            start += part.shape[0]
        assert start == num_positions, (start, num_positions)

    def _fill_outputs(self) -> None:
        """Targets, and the base where it is needed, one microbatch after the other; and their energy."""
        problem, dim, start = self._problem, self._geometry.channel_dim, 0
        for batch, select in zip(problem.batches, self._selected, strict=True):
            outputs = problem.base(batch, problem.on_device(batch.x_hat))
            wanted = problem.target(batch, outputs)
            base, target = (_take(values.movedim(dim, -1), select) for values in (outputs, wanted))
            rows, expected = slice(start, start + len(select)), problem.transform(target)
            self._targets[rows] = self.transform(target - base) if self._base is None else expected
            if self._base is not None:
                self._base[rows] = base
            self._energy.append(expected.square().sum(dim=0).double())
            start += len(select)

    def _locate(self) -> int:
        """Find where the rows of a convolution start; returns the number of positions P."""
        geometry = self._geometry
        starts, shapes = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        sizes: dict[tuple[int, ...], int] = {}
        position = 0
        for batch, select in zip(self._problem.batches, self._selected, strict=True):
            num_samples, _, *spatial = batch.x_hat.shape
            size = patches.padded_size(tuple(spatial), geometry)
            first = patches.row_positions(size, tuple(batch.y.shape[2:]), geometry)
            sample = torch.arange(num_samples)[:, None] * math.prod(size)
            starts.append((position + sample + first).flatten()[select])
            shapes.append(torch.full_like(starts[-1], sizes.setdefault(size, len(sizes))))
            position += num_samples * math.prod(size)
        self._starts = torch.cat(starts)
        if sizes:
            self._offsets = torch.stack([patches.kernel_offsets(size, geometry) for size in sizes])
        self._shape_of_row = torch.cat(shapes) if len(sizes) > 1 else None
        return position

    def errors(self, weight: Tensor, comm: Comm) -> Tensor:
        """Mean squared error of a weight `(G, R, J)` against the targets, by output `(O,)` float64: one product. A
        collective. Raises InputError as `evaluate.output_errors` does."""
        problem, dim, start = self._problem, self._geometry.channel_dim, 0
        sums = error_sums(problem, 1)
        for batch, select, energy in zip(problem.batches, self._selected, self._energy, strict=True):
            x_hat, rows = problem.on_device(batch.x_hat), slice(start, start + len(select))
            target = self._targets[rows].to(self._device)
            outputs = _take(problem.outputs(x_hat, weight - problem.weight, None).movedim(dim, -1), select)
            if self._base is not None:
                outputs = outputs.add_(self._base[rows].to(self._device))
            sums[batch.index, 0] = (self.transform(outputs) - target).square_().sum(dim=0).double()
            sums[batch.index, -3] = energy
            sums[batch.index, -1] = len(select)
            start += len(select)
        total = reduced(sums, problem, comm)
        return total[0] / total[-1]

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Inputs `(G, N, J)`, base `(N, O)` or None, and targets `(N, O)` of local rows, int64 `(N,)` on the host."""
        positions = rows[:, None]
        if self._starts is not None:
            offsets = self._offsets
            if self._shape_of_row is not None:
                offsets = offsets.index_select(0, self._shape_of_row.index_select(0, rows))
            positions = self._starts.index_select(0, rows)[:, None] + offsets
        positions = positions.to(self._features.device, non_blocking=True)
        inputs = patches.gather_rows(self._features, positions, self._geometry)
        base = None if self._base is None else self._select(self._base, rows)
        return inputs.to(self._device, non_blocking=True), base, self._select(self._targets, rows)

    def _select(self, values: Tensor, rows: Tensor) -> Tensor:
        rows = rows.to(values.device, non_blocking=True)
        return values.index_select(0, rows).to(self._device, non_blocking=True)


def _counting_rows(batch: Batch, channel_dim: int) -> tuple[list[int], Tensor]:
    """Rows that count: how many in each sample, and their indices (int64, on the host).

    Where the batch size does not divide the rows (a model that mixes samples), every row is a sample of its own.
    """
    keep = batch.keep(channel_dim)
    if keep is None:
        keep = torch.ones(batch.y.movedim(channel_dim, -1).shape[:-1], dtype=torch.bool)
    samples = batch.size if batch.size and keep.numel() % batch.size == 0 else keep.numel()
    # An expert may have no row in a microbatch.
    keep = keep.cpu().reshape(samples, -1 if keep.numel() else 0)
    return keep.sum(dim=1).tolist(), keep.flatten().nonzero().squeeze(1)


def _take(values: Tensor, select: Tensor) -> Tensor:
    """Selected rows `(R, C)` of a tensor with the channels last."""
    return values.reshape(-1, values.shape[-1])[select.to(values.device)]


class BatchPlan:
    """Which rows each step uses: a pure function of (seed, layer name, step), never of the world size."""

    def __init__(
        self, problem: LayerProblem, local_counts: Sequence[Sequence[int]], comm: Comm, batch_size: int, unit: str
    ) -> None:
        """A collective. local_counts: rows of each sample of each microbatch of this rank. batch_size: of a step, over
        all ranks together; unit: what it counts."""
        here = dict(zip((batch.index for batch in problem.batches), local_counts, strict=True))
        everywhere: dict[int, Sequence[int]] = {}
        for part in comm.all_gather_object(here):
            everywhere.update(part)
        samples = [(index in here, count) for index in sorted(everywhere) for count in everywhere[index]]
        self._mine = torch.tensor([mine for mine, _ in samples], dtype=torch.bool)
        self._counts = torch.tensor([count for _, count in samples], dtype=torch.int64)
        self._ends = self._counts.cumsum(0)
        self.num_rows = int(self._counts.sum())
        local = torch.where(self._mine, self._counts, 0)
        # Global row id + shift = local row id, for samples this rank holds.
        self._shift = (local.cumsum(0) - local) - (self._ends - self._counts)
        self._unit, self._batch_size = unit, batch_size
        self._key = f"{problem.seed}/{problem.name}".encode()
        self._steps_at_once = max(1, _ROWS_AT_ONCE // batch_size)
        self._block = -1
        self._batches: list[tuple[Tensor, Tensor]] = []

    def _generator(self, number: int) -> torch.Generator:
        digest = hashlib.sha256(self._key + b"/" + str(number).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def batch(self, step: int) -> tuple[Tensor, int]:
        """Local rows of this step, int64 `(R,)`, and the number of rows of the whole batch over all ranks."""
        local, _, num_rows = self.placed_batch(step)
        return local, num_rows

    def placed_batch(self, step: int) -> tuple[Tensor, Tensor, int]:
        """Local rows of this step, their places in the whole batch, int64 `(R,)`, and the number of its rows."""
        if self._unit == "samples":
            return self._sample_batch(step)
        block, place = divmod(step, self._steps_at_once)
        if block != self._block:
            self._block, self._batches = block, self._row_batches(block)
        return *self._batches[place], min(self.num_rows, self._batch_size)

    def _row_batches(self, block: int) -> list[tuple[Tensor, Tensor]]:
        """Local rows of all steps of one block and their places; the generator is seeded by the block's number."""
        if self.num_rows <= self._batch_size:
            rows = torch.arange(self.num_rows).repeat(self._steps_at_once, 1)
        else:
            shape = (self._steps_at_once, self._batch_size)
            rows = torch.randint(self.num_rows, shape, generator=self._generator(block))
        sample = torch.bucketize(rows, self._ends, right=True)
        held = self._mine[sample]
        counts = held.sum(dim=1).tolist()
        local = torch.split((rows + self._shift[sample])[held], counts)
        return list(zip(local, torch.split(held.nonzero()[:, 1], counts), strict=True))

    def _sample_batch(self, step: int) -> tuple[Tensor, Tensor, int]:
        drawn = torch.randperm(self._counts.numel(), generator=self._generator(step))[: self._batch_size]
        counts = self._counts[drawn]
        sample = torch.repeat_interleave(drawn, counts)
        # Rows of one sample follow each other, in the batch and in the calibration set.
        within = torch.arange(len(sample)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        places = self._mine[sample].nonzero().squeeze(1)
        sample, within = sample[places], within[places]
        local = self._ends[sample] - self._counts[sample] + within + self._shift[sample]
        return local, places, int(counts.sum())
