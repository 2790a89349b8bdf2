"""The baselines: `nearest`, and `gptq`, one pass in which the inputs still to come make up for each error."""

from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from distributed_adaround.errors import InputError
from distributed_adaround.numerics.gptq import GptqFactors, gptq_codes
from distributed_adaround.runtime.comm import Comm, agreed
from distributed_adaround.solve.by_channel import ChannelProblem, ChannelSolution, solve_by_channel
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solution
from distributed_adaround.spec.rounding import RoundingSpec


class NearestSolver:
    """Every weight to the nearest value of its grid. Looks at no data."""

    needs_moments = False
    num_steps = 0

    def __init__(self, settings: RoundingSpec) -> None:
        pass

    def solve(self, problem: LayerProblem, comm: Comm, monitor: Monitor) -> Solution:
        return Solution(codes=problem.grid.quantize(problem.weight))


class GptqSolver:
    """settings.damping: share of the mean of A's diagonal that is added to it."""

    needs_moments = True
    num_steps = 0

    def __init__(self, settings: RoundingSpec) -> None:
        self._damping = settings.damping

    def solve(self, problem: LayerProblem, comm: Comm, monitor: Monitor) -> Solution:
        """Raises InputError when the second moment of the inputs is singular at this damping."""
        factors = layer_factors(problem, self._damping)

        def work(part: ChannelProblem) -> ChannelSolution:
            codes = gptq_codes(part.quadratic, part.grid, factors.groups(part.place[0]))
            return ChannelSolution(codes, part.grid.scale)

        codes, grid, _ = solve_by_channel(problem, comm, problem.grid, work, monitor, "gptq")
        return Solution(codes=codes, grid=grid)


def layer_factors(problem: LayerProblem, damping: float) -> GptqFactors:
    """The factors of a layer's second moment. Raises InputError when it is singular at this damping."""
    assert problem.quadratic is not None, "the layer's quadratic is taken before"
    try:
        return GptqFactors.of(problem.quadratic.second, damping)
    except LinAlgError as error:
        # All ranks hold the same matrix.
        singular = f"the second moment of its inputs is singular at rounding.damping {damping}"
        raise agreed(InputError(f"layer {problem.name}: {singular}; raise it, 0.01 is usual")) from error
