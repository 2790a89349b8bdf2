"""The baselines: `nearest`, and `gptq`, one pass in which the inputs still to come make up for each error."""

from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from distributed_adaround.errors import InputError
from distributed_adaround.numerics.gptq import GptqFactors, best_start, gptq_codes
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.runtime.comm import Comm, agreed
from distributed_adaround.solve.by_channel import ChannelProblem, ChannelSolution, solve_by_channel
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solution
from distributed_adaround.spec.rounding import RoundingSpec

# Channels are tried at the first of these shares of the observer's scales. An observer minimizes the rounding of
# single weights: here other weights make up for one that is clipped, so that less is better; but an observer also clips
# what large inputs depend on (of SmolLM2's weights mse leaves 0.65 of the range), so that more is better.
SHARES = (1.0, 0.85, 1.2, 1.4, 0.925, 1.1, 1.3, 1.6)


class NearestSolver:
    """Every weight to the nearest value of its grid. Looks at no data."""

    needs_moments = False
    num_steps = 0

    def __init__(self, settings: RoundingSpec) -> None:
        pass

    def solve(self, problem: LayerProblem, comm: Comm, monitor: Monitor) -> Solution:
        return Solution(codes=problem.grid.quantize(problem.weight))


class GptqSolver:
    """settings.damping: share of the mean of A's diagonal that is added to it. Each channel is rounded at several
    scales, as the solver gram starts from; the one with the least output error stays."""

    needs_moments = True
    num_steps = 0

    def __init__(self, settings: RoundingSpec) -> None:
        self._damping, self._starts = settings.damping, settings.starts

    def solve(self, problem: LayerProblem, comm: Comm, monitor: Monitor) -> Solution:
        """Raises InputError when the second moment of the inputs is not finite."""
        factors = layer_factors(problem, self._damping)

        def work(part: ChannelProblem) -> ChannelSolution:
            shares = start_shares(part.grid, self._starts)
            quadratic, grid = part.quadratic.repeated(len(shares)), part.grid.at_shares(shares)
            codes = gptq_codes(quadratic, grid, factors.groups(part.place[0]))
            loss = quadratic.loss(grid.dequantize(codes))
            return ChannelSolution(*best_start(codes, grid.scale, loss, len(shares)))

        codes, grid, _ = solve_by_channel(problem, comm, problem.grid, work, monitor, "gptq")
        return Solution(codes=codes, grid=grid, note=damping_note(factors, self._damping))


def start_shares(grid: Grid, starts: int) -> list[float]:
    """Of the observer's scales, one for each start. Powers of two have nothing in between, and scales that channels
    share stay."""
    return list(SHARES[: 1 if not grid.per_channel or grid.scale_format.powers_of_two else starts])


def layer_factors(problem: LayerProblem, damping: float) -> GptqFactors:
    """The factors of a layer's second moment. Raises InputError when it is not finite."""
    assert problem.quadratic is not None, "the layer's quadratic is taken before"
    try:
        return GptqFactors.of(problem.quadratic.second, damping)
    except LinAlgError as error:
        # All ranks hold the same matrix.
        advice = "check the weights and the calibration data"
        raise agreed(
            InputError(f"layer {problem.name}: the second moment of its inputs is not finite; {advice}")
        ) from error


def damping_note(factors: GptqFactors, damping: float) -> str:
    """What became of the damping, if it was not enough."""
    if factors.damping <= damping:
        return ""
    return f"its second moment is singular at damping {damping}: {factors.damping:.3g} was used"
