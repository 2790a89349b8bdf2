"""Solver `nearest`: every weight to the nearest value of its grid. The baseline."""

from __future__ import annotations

from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.problem import LayerProblem, Monitor, OutputErrors, Solution


def solve_nearest(problem: LayerProblem, nearest: OutputErrors, comm: Comm, monitor: Monitor) -> Solution:
    """Nearest codes; looks at no data."""
    return Solution(codes=problem.grid.quantize(problem.weight))
