"""From a layer's problem to its codes: run a solver, restore mean and spread, keep nearest rounding where better."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_adaround.numerics.grid import Grid
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solver
from distributed_adaround.solve.restore import restore_outputs


@dataclass(frozen=True)
class LayerResult:
    """Codes `(O, I)` of a layer on `grid`, and how well they do.

    Errors are relative to the energy of the float outputs. shift: `(O,)`, what is added to the layer's bias, or None.
    solver: which one it was, where that is not the one asked for.
    """

    codes: Tensor
    grid: Grid
    shift: Tensor | None
    nearest_error: float
    soft_error: float
    hard_error: float
    flipped: float
    unsettled: float
    kept_nearest: bool
    solver: str | None


def round_layer(problem: LayerProblem, solver: Solver, comm: Comm, monitor: Monitor) -> LayerResult:
    """Solve one layer. The result is never worse on the calibration data than nearest rounding.

    Raises:
        InputError: activations or loss are not finite.
    """
    nearest_codes = problem.grid.quantize(problem.weight)
    nearest = output_errors(problem, [problem.grid.dequantize(nearest_codes)], comm)
    solution = solver(problem, nearest, comm, monitor)
    grid, shift = restore_outputs(problem, solution.codes, solution.grid or problem.grid, comm)
    hard = grid.dequantize(solution.codes)
    candidates = [hard] if solution.soft_weight is None else [hard, solution.soft_weight]
    solved = output_errors(problem, candidates, comm, shift)
    kept_nearest = bool(solved.error[0].sum() > nearest.error[0].sum())
    codes = nearest_codes if kept_nearest else solution.codes
    return LayerResult(
        codes=codes,
        grid=problem.grid if kept_nearest else grid,
        shift=None if kept_nearest else shift,
        nearest_error=nearest.relative(0),
        soft_error=solved.relative(len(candidates) - 1),
        hard_error=nearest.relative(0) if kept_nearest else solved.relative(0),
        flipped=float(torch.count_nonzero(codes != nearest_codes)) / codes.numel(),
        unsettled=solution.unsettled,
        kept_nearest=kept_nearest,
        solver=solution.solver,
    )
