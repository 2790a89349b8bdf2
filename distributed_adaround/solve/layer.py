"""From a layer's problem to its result: run a solver, polish, restore mean and spread, keep nearest where better.

problem ─► moments ─► quadratic ─► solver ─► polish ─► restore ─► compare on all data ─► result
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.moments import Moments
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.polish import polish
from distributed_adaround.solve.problem import LayerProblem, Monitor, OutputErrors, Solution, Solver
from distributed_adaround.solve.restore import restore_outputs


@dataclass(frozen=True)
class LayerResult:
    """Codes `(G, R, J)` of a layer on `grid`; shift: `(O,)`, what is added to its bias, or None; the rest as in
    LayerFigures."""

    codes: Tensor
    grid: Grid
    shift: Tensor | None
    nearest_error: float
    soft_error: float
    hard_error: float
    flipped: float
    unsettled: float
    kept_nearest: bool


def round_layer(
    problem: LayerProblem,
    solver: Solver,
    comm: Comm,
    monitor: Monitor,
    *,
    moments: Moments | None = None,
    polishes: bool = False,
) -> LayerResult:
    """Solve one layer. The result is never worse on the calibration data than nearest rounding. A collective.

    Args:
        problem: of the layer, with its quadratic where there are moments.
        solver, comm: the solver, and all ranks.
        monitor: for progress, stops and saved states.
        moments: of the layer's input, where they were taken.
        polishes: whether to polish the solver's codes, where no activation is in the loss.

    Raises:
        InputError: activations or loss are not finite.
        StoppedError: a rank was asked to stop.
    """
    nearest_codes = problem.grid.quantize(problem.weight)
    solution = solver.solve(problem, comm, monitor)
    if polishes and problem.quadratic is not None:
        solution = polish(problem, solution, comm, monitor)
    found = solution.grid or problem.grid
    grid, shift = restore_outputs(problem, solution.codes, found, comm)
    if grid is not found or shift is not None:
        # What the solver has measured was before.
        solution = replace(solution, errors=None)
    nearest, solved = _compare(problem, solution, grid, shift, moments, comm)
    kept_nearest = bool(solved.error[0].sum() > nearest)
    codes = nearest_codes if kept_nearest else solution.codes
    energy = float(solved.energy.sum())
    nearest_error = nearest / energy if energy > 0 else nearest
    return LayerResult(
        codes=codes,
        grid=problem.grid if kept_nearest else grid,
        shift=None if kept_nearest else shift,
        nearest_error=nearest_error,
        soft_error=solved.relative(0 if solution.soft_weight is None else 1),
        hard_error=nearest_error if kept_nearest else solved.relative(0),
        flipped=float(torch.count_nonzero(codes != nearest_codes)) / codes.numel(),
        unsettled=solution.unsettled,
        kept_nearest=kept_nearest,
    )


def _compare(
    problem: LayerProblem,
    solution: Solution,
    grid: Grid,
    shift: Tensor | None,
    moments: Moments | None,
    comm: Comm,
) -> tuple[float, OutputErrors]:
    """Squared error of nearest rounding, and the errors of the solution (hard, and soft where it has that), on all
    data. A collective.

    The data are passed once more at most, and nearest rounding is not among the candidates where its error is known or
    follows from moments of all rows. grid, shift: as restored.
    """
    measured = None if solution.nearest is None else float(solution.nearest.error[0].sum())
    if measured is not None and solution.errors is not None:
        return measured, solution.errors
    hard = grid.dequantize(solution.codes)
    nearest = problem.grid.dequantize(problem.grid.quantize(problem.weight))
    candidates = [hard] if solution.soft_weight is None else [hard, solution.soft_weight]
    known = measured is not None or (shift is None and torch.equal(hard, nearest))
    if moments is not None and not (moments.every_row and problem.quadratic is not None and problem.asymmetry < 1):
        moments = None  # nothing in closed form
    if not known and moments is None:
        candidates.append(nearest)
    solved = output_errors(problem, candidates, comm, shift)
    if measured is not None:
        return measured, solved
    if known or moments is None:
        return float(solved.error[0 if known else -1].sum()), solved
    by_channel = moments.error_sums(nearest - problem.weight, problem.weight, problem.asymmetry).flatten()
    if problem.transform.scale is not None:
        by_channel *= problem.transform.scale.double().square()
    return float(by_channel.sum() + solved.asymmetric.sum()), solved
