"""Solver `gptq`, the baseline: one pass over the inputs, each error made up for by the inputs still to come."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from distributed_adaround.distributed.comm import Comm
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
        PeerError: it is on another rank, whose inputs are those of another conv group.
    """

    def work(part: RowProblem) -> RowSolution:
        return RowSolution(damped_codes(part, damping, problem.name), part.lattice.scale)

    codes, grid, _ = solve_by_rows(problem, comm, problem.grid, work)
    return Solution(codes=codes, grid=grid)


def damped_codes(part: RowProblem, damping: float, name: str) -> Tensor:
    """Codes `(G, R, J)` of some rows. name: of the layer.

    Raises:
        InputError: the second moment of the inputs is singular at this damping.
    """
    try:
        return gptq_codes(part.quadratic, part.lattice, damping)
    except LinAlgError as error:
        raise InputError(
            f"layer {name}: the second moment of its inputs is singular at rounding.damping {damping}; raise it, 0.01 "
            "is usual"
        ) from error
