"""From a layer's problem to its codes: run a solver, and keep nearest rounding where that was better."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_adaround.distributed.comm import Comm
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.problem import LayerProblem, OnStep, Solver


@dataclass(frozen=True)
class LayerResult:
    """Codes `(O, I)` of a layer and how well they do; errors are relative to the energy of the float outputs."""

    codes: Tensor
    nearest_error: float
    soft_error: float
    hard_error: float
    flipped: float
    unsettled: float
    kept_nearest: bool


def round_layer(problem: LayerProblem, solver: Solver, comm: Comm, on_step: OnStep) -> LayerResult:
    """Solve one layer. The result is never worse on the calibration data than nearest rounding.

    Raises:
        InputError: activations or loss are not finite.
    """
    grid = problem.grid
    nearest_codes = grid.quantize(problem.weight)
    nearest = output_errors(problem, [grid.dequantize(nearest_codes)], comm)
    solution = solver(problem, nearest, comm, on_step)
    hard = grid.dequantize(solution.codes)
    candidates = [hard] if solution.soft_weight is None else [hard, solution.soft_weight]
    solved = output_errors(problem, candidates, comm)
    kept_nearest = bool(solved.error[0].sum() > nearest.error[0].sum())
    codes = nearest_codes if kept_nearest else solution.codes
    return LayerResult(
        codes=codes,
        nearest_error=nearest.relative(0),
        soft_error=solved.relative(len(candidates) - 1),
        hard_error=nearest.relative(0) if kept_nearest else solved.relative(0),
        flipped=float(torch.count_nonzero(codes != nearest_codes)) / codes.numel(),
        unsettled=solution.unsettled,
        kept_nearest=kept_nearest,
    )
