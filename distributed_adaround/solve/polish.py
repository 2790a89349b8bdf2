"""`polish`: after any solver, move one code after the other to its best grid value, and refit scales, while it helps.

Coordinate descent on the quadratic of all calibration data, over all grid values (not only the two neighbours of the
float weight). A row that does not improve stays as it was.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from distributed_adaround.errors import StoppedError
from distributed_adaround.numerics.descent import Descent
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.by_channel import RowProblem, RowSolution, solve_by_rows
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solution

_MAX_SWEEPS = 10
# Share of the codes that must have moved in a sweep for another one to pay.
_FEW = 1e-3
# From this many inputs on, inputs are visited in blocks: a loop over single ones would take longer than its products.
_LARGE, _BLOCK, _STEPS = 4096, 32, 4


def polish(problem: LayerProblem, solution: Solution, comm: Comm, monitor: Monitor) -> Solution:
    """The solution, or a better one on the calibration data."""

    def work(part: RowProblem) -> RowSolution:
        large = part.quadratic.weight.shape[2] >= _LARGE
        block, steps = (_BLOCK, _STEPS) if large else (1, 1)
        descent = Descent(part.quadratic, part.lattice, part.levels, block=block, steps=steps)
        best, losses, scale = descent.codes(), descent.losses(), part.lattice.scale
        for _ in range(_MAX_SWEEPS):
            if monitor.stop_requested:
                raise StoppedError
            before = descent.levels.clone()
            descent.sweep(1.0)
            if float(torch.count_nonzero(descent.levels != before)) <= _FEW * before.numel():
                break
        descent.settle()
        better = descent.losses() < losses
        codes = torch.where(better[:, :, None], descent.codes(), best)
        return RowSolution(codes, torch.where(better[:, None, :], descent.lattice.scale, scale))

    codes, grid, _ = solve_by_rows(
        problem, comm, solution.grid or problem.grid, work, monitor, "polish", solution.codes
    )
    return replace(solution, codes=codes, grid=grid)
