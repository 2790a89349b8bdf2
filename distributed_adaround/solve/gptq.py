"""Solver `gptq`, the baseline: one pass over the inputs, each error made up for by the inputs still to come."""

from __future__ import annotations

from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from distributed_adaround.distributed.comm import Comm, agreed
from distributed_adaround.errors import InputError
from distributed_adaround.numerics.gptq import gptq_codes
from distributed_adaround.solve.by_rows import RowProblem, RowSolution, solve_by_rows
from distributed_adaround.solve.problem import LayerProblem, OnStep, OutputErrors, Solution


def solve_gptq(
    problem: LayerProblem, nearest: OutputErrors, comm: Comm, on_step: OnStep, *, damping: float
) -> Solution:
    """Round one layer under the problem's grid. damping: share of the mean of A's diagonal that is added to it.

    Raises:
        InputError: the inputs are not finite, or their second moment is singular at this damping.
    """

    def work(part: RowProblem) -> RowSolution:
        return RowSolution(gptq_codes(part.quadratic, part.lattice, damping), part.lattice.scale)

    try:
        codes, grid, _ = solve_by_rows(problem, comm, problem.grid, work)
    except LinAlgError as error:
        # All ranks hold the same matrix.
        raise agreed(
            InputError(
                f"layer {problem.name}: the second moment of its inputs is singular at rounding.damping {damping}; "
                "raise it, 0.01 is usual"
            )
        ) from error
    return Solution(codes=codes, grid=grid)
