"""Rows of a layer do not depend on each other: each rank solves some of them, and the codes are gathered once.

Rows are cut into blocks whose size does not depend on the number of ranks, so a row's result does not either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.lattice import Lattice
from distributed_adaround.numerics.moments import Quadratic
from distributed_adaround.runtime.comm import Comm, phase
from distributed_adaround.solve.measure import layer_quadratic
from distributed_adaround.solve.problem import LayerProblem, Monitor

# Out channels of a block: enough for the matrix products, few enough to keep several ranks busy.
_BLOCK_ROWS = {"cpu": 256, "cuda": 1024}


@dataclass(frozen=True)
class RowProblem:
    """What one block of rows is solved from. levels: `(G, R, J)` to start from, or None.
    place: its conv groups, and its out channels in each of them. done: share of this rank's blocks that came before;
    size: its own share."""

    quadratic: Quadratic
    lattice: Lattice
    levels: Tensor | None
    place: tuple[slice, slice]
    done: float
    size: float


@dataclass(frozen=True)
class RowSolution:
    """codes `(G, R, J)`; scale `(G, n, R)`, as in Lattice; unsettled: how many soft values had not settled."""

    codes: Tensor
    scale: Tensor
    unsettled: Tensor | float = 0.0


def block_rows(device_type: str) -> int:
    """Out channels of a block on one kind of device."""
    return _BLOCK_ROWS.get(device_type, 1024)


def row_blocks(groups: int, rows: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of (conv groups, out channels of each group), of about `size` out channels."""
    parts = -(-rows // size)
    cuts = [slice(rows * part // parts, rows * (part + 1) // parts) for part in range(parts)]
    together = max(1, size // rows)
    for first in range(0, groups, together):
        for cut in cuts:
            yield slice(first, min(first + together, groups)), cut


def _kept(monitor: Monitor, key: str, work: Callable[[], RowSolution], device: torch.device) -> RowSolution:
    """The solution of a block, from before a restart if it was kept; kept when it took long."""
    saved = monitor.load(key)
    if saved is not None:
        return RowSolution(**{name: tensor.to(device) for name, tensor in saved.items()})
    found = work()
    if monitor.save_due:
        monitor.save(key, {name: torch.as_tensor(value) for name, value in vars(found).items()})
    return found


def solve_by_rows(
    problem: LayerProblem,
    comm: Comm,
    grid: Grid,
    work: Callable[[RowProblem], RowSolution],
    monitor: Monitor,
    stage: str,
    start: Tensor | None = None,
) -> tuple[Tensor, Grid, float]:
    """Codes `(O, I)`, the grid with the scales that were found, and the number of soft values that had not settled.

    stage: name of the work; finished blocks of a long one are kept under it. start: codes `(O, I)` of `grid` to begin
    from, or None.

    Raises:
        PeerError: `work` raised on another rank.
    """
    geometry, device = problem.geometry, problem.device
    groups, rows = geometry.groups, geometry.out_channels // geometry.groups
    shape = (groups, rows, geometry.inputs_per_output)
    whole = layer_quadratic(problem, comm)
    lattice = Lattice.of_grid(grid, groups)
    levels = None if start is None else grid.levels(start).reshape(shape)
    codes = torch.zeros(shape, dtype=torch.uint8, device=device)
    # Filled by one rank each, zeros elsewhere: the sum is exact.
    scale = torch.zeros_like(lattice.scale) if lattice.per_row else None
    unsettled = torch.zeros(1, dtype=torch.float64, device=device)
    with phase(comm, f"round layer {problem.name}"):
        own = list(enumerate(row_blocks(groups, rows, block_rows(device.type))))[comm.rank :: comm.world_size]
        for number, (index, (some, cut)) in enumerate(own):
            part = RowProblem(
                whole.rows(some, cut),
                lattice.rows(some, cut),
                None if levels is None else levels[some, cut],
                (some, cut),
                done=number / len(own),
                size=1 / len(own),
            )
            found = _kept(monitor, f"{stage}-{index}", partial(work, part), device)
            codes[some, cut] = (found.codes - grid.qmin).to(torch.uint8)
            unsettled += found.unsettled
            if scale is not None:
                scale[some, :, cut] = found.scale
    comm.all_reduce(codes)
    comm.all_reduce(unsettled)
    if scale is not None:
        comm.all_reduce(scale)
        grid = replace(grid, scale=scale.transpose(1, 2).reshape(grid.scale.shape).contiguous())
    return codes.to(problem.dtype).add_(grid.qmin).reshape(problem.weight.shape), grid, float(unsettled)
