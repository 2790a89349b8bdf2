"""Calibration rows of one layer: where each row lies, and batches of rows drawn from all ranks' samples.

A row is what one output of the layer sees: a token for Linear, an output pixel for a convolution. Rows are numbered
over the whole calibration set (microbatch by microbatch), so a batch is the same on any number of ranks; each rank
gathers the rows it holds. Shape legend as in numerics/patches.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from distributed_adaround.distributed.comm import Comm
from distributed_adaround.numerics import patches
from distributed_adaround.solve.evaluate import row_mask
from distributed_adaround.solve.problem import LayerProblem

BatchUnit = Literal["rows", "samples"]


class CalibrationRows:
    """This rank's rows of one layer, ready to be gathered.

    features: `(P, C)` padded inputs, channels last. targets: `(R, O)`, transformed float outputs. Both may lie on the
    host or in files; batches are brought to the compute device.
    """

    def __init__(self, problem: LayerProblem) -> None:
        self._geometry = problem.geometry
        self._device = problem.device
        linear = problem.geometry.num_spatial_dims == 0
        collect = self._collect_linear if linear else self._collect_convolution
        self.sample_rows: list[list[int]] = []
        self._starts: Tensor | None = None
        self._offsets = torch.zeros(1, 1, dtype=torch.int64)
        self._shape_of_row: Tensor | None = None
        features, targets = collect(problem)
        self._features = _concatenate(problem, features, problem.geometry.in_channels)
        self._targets = _concatenate(problem, targets, problem.geometry.out_channels)

    @property
    def num_rows(self) -> int:
        return self._targets.shape[0]

    def _collect_linear(self, problem: LayerProblem) -> tuple[list[Tensor], list[Tensor]]:
        features, targets = [], []
        acts = problem.activations
        for x, y, mask, size in zip(acts.inputs, acts.targets, acts.masks, acts.batch_sizes, strict=True):
            counts, select = _counting_rows(mask, tuple(x.shape[:-1]), size)
            self.sample_rows.append(counts)
            features.append(x.reshape(-1, x.shape[-1])[select.to(x.device)])
            rows = y.reshape(-1, y.shape[-1])[select.to(y.device)]
            targets.append(problem.transform(rows.to(problem.device, problem.dtype)))
        return features, targets

    def _collect_convolution(self, problem: LayerProblem) -> tuple[list[Tensor], list[Tensor]]:
        features, targets, starts, shapes = [], [], [], []
        sizes: dict[tuple[int, ...], int] = {}
        position = 0
        acts = problem.activations
        for x, y, mask, size in zip(acts.inputs, acts.targets, acts.masks, acts.batch_sizes, strict=True):
            padded = patches.channels_last_padded(x, problem.geometry)
            spatial = tuple(padded.shape[1:-1])
            first = patches.row_positions(spatial, tuple(y.shape[2:]), problem.geometry)
            sample = torch.arange(x.shape[0])[:, None] * spatial_numel(spatial)
            rows = problem.transform(y.to(problem.device, problem.dtype), channel_dim=1).movedim(1, -1)
            counts, select = _counting_rows(mask, tuple(rows.shape[:-1]), size)
            self.sample_rows.append(counts)
            starts.append((position + sample + first).flatten()[select])
            shapes.append(torch.full_like(starts[-1], sizes.setdefault(spatial, len(sizes))))
            position += x.shape[0] * spatial_numel(spatial)
            features.append(padded.reshape(-1, padded.shape[-1]))
            targets.append(rows.reshape(-1, rows.shape[-1])[select.to(rows.device)])
        if starts:
            self._starts = torch.cat(starts)
            self._offsets = torch.stack([patches.kernel_offsets(size, problem.geometry) for size in sizes])
            self._shape_of_row = torch.cat(shapes) if len(sizes) > 1 else None
        return features, targets

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs `(G, R, J)` and targets `(R, O)` of local rows, int64 `(R,)` on the host."""
        positions = rows[:, None]
        if self._starts is not None:
            shape = 0 if self._shape_of_row is None else self._shape_of_row[rows]
            positions = self._starts[rows][:, None] + self._offsets[shape]
        inputs = patches.gather_rows(self._features, positions.to(self._features.device), self._geometry)
        targets = self._targets.index_select(0, rows.to(self._targets.device))
        return inputs.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)


def spatial_numel(size: tuple[int, ...]) -> int:
    """Positions of one padded sample."""
    return torch.Size(size).numel()


def _counting_rows(mask: Tensor | None, leading: tuple[int, ...], batch_size: int) -> tuple[list[int], Tensor]:
    """Rows that count: how many in each sample, and their indices (int64, on the host).

    leading: shape of the layer's output without its channels. Where the batch size does not divide the rows (a
    model that mixes samples), every row is a sample of its own.
    """
    keep = row_mask(mask, leading)
    keep = torch.ones(leading, dtype=torch.bool) if keep is None else keep.cpu()
    samples = batch_size if batch_size and keep.numel() % batch_size == 0 else keep.numel()
    return keep.reshape(samples, -1).sum(dim=1).tolist(), keep.reshape(-1).nonzero().squeeze(1)


def _concatenate(problem: LayerProblem, parts: list[Tensor], width: int) -> Tensor:
    """Parts `(rows, width)` as one tensor in budgeted memory; frees each part as soon as it is copied."""
    whole = problem.store.empty((sum(part.shape[0] for part in parts), width), problem.dtype)
    start = 0
    while parts:
        part = parts.pop(0)
        whole[start : start + part.shape[0]] = part
        start += part.shape[0]
    return whole


class BatchPlan:
    """Which rows each step uses: a pure function of (seed, layer name, step), never of the world size."""

    def __init__(
        self, problem: LayerProblem, local_counts: Sequence[Sequence[int]], comm: Comm, batch_size: int, unit: BatchUnit
    ) -> None:
        owned = problem.activations.indices
        counts = _all_sample_counts(owned, local_counts, problem.total_microbatches, comm)
        flat = torch.tensor([count for microbatch in counts for count in microbatch], dtype=torch.int64)
        self._ends = flat.cumsum(0)
        self.num_rows = int(flat.sum())
        mine = torch.tensor([index in set(owned) for index, microbatch in enumerate(counts) for _ in microbatch])
        local = torch.where(mine, flat, 0)
        # Global row id + shift = local row id, for samples this rank holds.
        self._shift = (local.cumsum(0) - local) - (self._ends - flat)
        self._mine = mine
        self._counts = flat
        self._unit = unit
        self._batch_size = batch_size
        self._key = f"{problem.seed}/{problem.name}".encode()

    def _generator(self, step: int) -> torch.Generator:
        digest = hashlib.sha256(self._key + b"/" + str(step).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def batch(self, step: int) -> tuple[Tensor, int]:
        """Local rows of this step, int64 `(R,)`, and the number of rows of the whole batch over all ranks."""
        if self._unit == "samples":
            return self._sample_batch(step)
        if self.num_rows <= self._batch_size:
            rows = torch.arange(self.num_rows)
        else:
            rows = torch.randint(self.num_rows, (self._batch_size,), generator=self._generator(step))
        sample = torch.bucketize(rows, self._ends, right=True)
        held = self._mine[sample]
        return (rows + self._shift[sample])[held], rows.numel()

    def _sample_batch(self, step: int) -> tuple[Tensor, int]:
        order = torch.randperm(self._counts.numel(), generator=self._generator(step))
        drawn = order[: self._batch_size]
        held = drawn[self._mine[drawn]]
        first = self._ends[held] - self._counts[held] + self._shift[held]
        rows = [torch.arange(start, start + count) for start, count in zip(first, self._counts[held], strict=True)]
        local = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        return local, int(self._counts[drawn].sum())


def _all_sample_counts(
    owned: Sequence[int], local_counts: Sequence[Sequence[int]], total: int, comm: Comm
) -> list[list[int]]:
    """Rows of every sample, by microbatch, over all ranks."""
    counts: list[list[int]] = [[] for _ in range(total)]
    for part in comm.all_gather_object(dict(zip(owned, local_counts, strict=True))):
        for index, microbatch in part.items():
            counts[index] = list(microbatch)
    return counts
