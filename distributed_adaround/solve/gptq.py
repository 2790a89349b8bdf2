"""Solver `gptq`, the baseline: one pass over the inputs, each error made up for by the inputs still to come."""

from __future__ import annotations

from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from distributed_adaround.errors import InputError
from distributed_adaround.numerics.gptq import GptqFactors, gptq_codes
from distributed_adaround.runtime.comm import Comm, agreed
from distributed_adaround.solve.by_channel import RowProblem, RowSolution, solve_by_rows
from distributed_adaround.solve.measure import layer_quadratic
from distributed_adaround.solve.problem import LayerProblem, Monitor, OutputErrors, Solution


def solve_gptq(
    problem: LayerProblem, nearest: OutputErrors, comm: Comm, monitor: Monitor, *, damping: float
) -> Solution:
    """Round one layer under the problem's grid. damping: share of the mean of A's diagonal that is added to it.

    Raises:
        InputError: the inputs are not finite, or their second moment is singular at this damping.
    """
    factors = layer_factors(problem, comm, damping)

    def work(part: RowProblem) -> RowSolution:
        return RowSolution(gptq_codes(part.quadratic, part.lattice, factors.groups(part.place[0])), part.lattice.scale)

    codes, grid, _ = solve_by_rows(problem, comm, problem.grid, work, monitor, "gptq")
    return Solution(codes=codes, grid=grid)


def layer_factors(problem: LayerProblem, comm: Comm, damping: float) -> GptqFactors:
    """The factors of a layer's second moment, on every rank.

    Raises:
        InputError: it is singular at this damping.
    """
    try:
        return GptqFactors.of(layer_quadratic(problem, comm).second, damping)
    except LinAlgError as error:
        # All ranks hold the same matrix.
        raise agreed(
            InputError(
                f"layer {problem.name}: the second moment of its inputs is singular at rounding.damping {damping}; "
                "raise it, 0.01 is usual"
            )
        ) from error
