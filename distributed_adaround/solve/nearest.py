"""Solver `nearest`: every weight to the nearest value of its grid. The baseline."""

from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solution
from distributed_adaround.spec.rounding import RoundingSpec


class NearestSolver:
    """Looks at no data."""

    needs_moments = False
    num_steps = 0

    def __init__(self, settings: RoundingSpec) -> None:
        pass

    def solve(self, problem: LayerProblem, comm: Comm, monitor: Monitor) -> Solution:
        return Solution(codes=problem.grid.quantize(problem.weight))
