"""`polish`: after any solver, move one code after the other to its best grid value, and refit scales, while it helps.

Coordinate descent on the quadratic of all calibration data, over all grid values (not only the two neighbours of the
float weight). A channel that does not improve stays as it was.
"""

from dataclasses import replace

import torch

from distributed_adaround.errors import StoppedError
from distributed_adaround.numerics.descent import Descent
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.by_channel import ChannelProblem, ChannelSolution, solve_by_channel
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solution

_MAX_SWEEPS = 10
# Share of the codes that must have moved in a sweep for another one to pay.
_FEW = 1e-3
# From this many inputs on, inputs are visited in blocks: a loop over single ones would take longer than its products.
_LARGE, _BLOCK, _STEPS = 4096, 32, 4


def polish(problem: LayerProblem, solution: Solution, comm: Comm, monitor: Monitor) -> Solution:
    """The solution, or a better one on the calibration data. Arguments as of `Solver.solve`."""

    def work(part: ChannelProblem) -> ChannelSolution:
        large = part.quadratic.weight.shape[2] >= _LARGE
        block, steps = (_BLOCK, _STEPS) if large else (1, 1)
        descent = Descent(part.quadratic, part.grid, part.levels, block=block, steps=steps)
        best, losses = descent.codes(), descent.losses()
        for _ in range(_MAX_SWEEPS):
            if monitor.stop_requested:
                raise StoppedError
            before = descent.levels.clone()
            descent.sweep(1.0)
            if float(torch.count_nonzero(descent.levels != before)) <= _FEW * before.numel():
                break
        descent.settle()
        better = (descent.losses() < losses)[:, :, None]
        codes = torch.where(better, descent.codes(), best)
        return ChannelSolution(codes, torch.where(better, descent.scale, part.grid.scale))

    grid = solution.grid or problem.grid
    codes, grid, _ = solve_by_channel(problem, comm, grid, work, monitor, "polish", solution.codes)
    # What the solver has measured was of its own codes.
    return replace(solution, codes=codes, grid=grid, errors=None)
