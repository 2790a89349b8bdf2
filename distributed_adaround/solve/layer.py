"""From a layer's problem to its result: run a solver, polish, restore mean and spread, keep nearest where better.

problem ─► moments ─► quadratic ─► solver ─► polish ─► restore ─► compare on all data ─► result
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distributed_adaround.errors import StoppedError
from distributed_adaround.numerics.descent import Descent
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.moments import Moments
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.by_channel import ChannelProblem, ChannelSolution, solve_by_channel
from distributed_adaround.solve.evaluate import channel_sums, num_rows, output_errors
from distributed_adaround.solve.problem import LayerProblem, Monitor, OutputErrors, Solution, Solver

# Sweeps of `polish` at most.
_MAX_SWEEPS = 10
# Share of the codes that must have moved in a sweep for another one to pay.
_FEW = 1e-3
# From this many inputs on, inputs are visited in blocks: a loop over single ones would take longer than its products.
_LARGE, _BLOCK, _STEPS = 4096, 32, 4


@dataclass(frozen=True)
class LayerResult:
    """Codes `(G, R, J)` on `grid`; shift: `(O,)`, what is added to the bias, or None; the rest as in LayerFigures."""

    codes: Tensor
    grid: Grid
    shift: Tensor | None
    nearest_error: float
    soft_error: float
    hard_error: float
    flipped: float
    unsettled: float
    kept_nearest: bool


def without_rows(problem: LayerProblem) -> LayerResult:
    """Nearest rounding, for a layer that no calibration data reach: there is nothing to compare it on."""
    codes = problem.grid.quantize(problem.weight)
    return LayerResult(codes, problem.grid, None, math.nan, math.nan, math.nan, 0.0, 0.0, kept_nearest=True)


def round_layer(
    problem: LayerProblem,
    solver: Solver,
    comm: Comm,
    monitor: Monitor,
    *,
    moments: Moments | None = None,
    polishes: bool = False,
) -> LayerResult:
    """Solve one layer, never worse on the calibration data than nearest rounding. A collective; raises as a solver.

    Args:
        problem: of the layer, with its quadratic where there are moments.
        solver, comm, monitor: what solves it; all ranks; and what asks for stops and keeps states.
        moments: of the layer's input, where they were taken.
        polishes: whether to polish the solver's codes, where no activation is in the loss.
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
    nearest, solved = _compare(problem, nearest_codes, solution, grid, shift, moments, comm)
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
    nearest_codes: Tensor,
    solution: Solution,
    grid: Grid,
    shift: Tensor | None,
    moments: Moments | None,
    comm: Comm,
) -> tuple[float, OutputErrors]:
    """Squared error of nearest rounding, and errors of the solution (hard, and soft if any), on all data. A collective.

    The data are passed once more at most, and nearest rounding is not among the candidates where its error is known or
    follows from moments of all rows. grid, shift: as restored.
    """
    measured = None if solution.nearest is None else float(solution.nearest.error[0].sum())
    if measured is not None and solution.errors is not None:
        return measured, solution.errors
    hard = grid.dequantize(solution.codes)
    nearest = problem.grid.dequantize(nearest_codes)
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


def polish(problem: LayerProblem, solution: Solution, comm: Comm, monitor: Monitor) -> Solution:
    """The solution, or a better one on the calibration data: after any solver, move one code after the other to its
    best grid value, and refit scales, while it helps. Arguments as of `Solver.solve`.

    Coordinate descent on the quadratic of all calibration data, over all grid values (not only the two neighbours of
    the float weight). A channel that does not improve stays as it was.
    """

    def work(part: ChannelProblem) -> ChannelSolution:
        large = part.quadratic.weight.shape[2] >= _LARGE
        block, steps = (_BLOCK, _STEPS) if large else (1, 1)
        descent = Descent(part.quadratic, part.grid, part.levels, block=block, steps=steps)
        best, losses = descent.codes(), descent.losses()
        for _ in range(_MAX_SWEEPS):
            if monitor.stop_requested:
                raise StoppedError
            before = descent.levels.clone()
            descent.sweep(1.0)
            if float(torch.count_nonzero(descent.levels != before)) <= _FEW * before.numel():
                break
        descent.settle()
        better = (descent.losses() < losses)[:, :, None]
        codes = torch.where(better, descent.codes(), best)
        return ChannelSolution(codes, torch.where(better, descent.scale, part.grid.scale))

    grid = solution.grid or problem.grid
    codes, grid, _ = solve_by_channel(problem, comm, grid, work, monitor, "polish", solution.codes)
    # What the solver has measured was of its own codes.
    return replace(solution, codes=codes, grid=grid, errors=None)


def restore_outputs(problem: LayerProblem, codes: Tensor, grid: Grid, comm: Comm) -> tuple[Grid, Tensor | None]:
    """The grid with scales that restore the spread, and the shift `(O,)` that restores the mean; None: no shift.

    Rounding by least squares shrinks a layer's outputs: what is left as error is missing from their energy. In a single
    layer that is little, but the layers of a residual network shrink together (ResNet-20 at 2 bits: its outputs to
    88 %, which made up a fourth of their squared error). Larger scales of an output channel undo it, at no cost when
    the network runs, and the bias takes the mean. Banner et al. 2019, "Post training 4-bit quantization of
    convolutional networks for rapid-deployment", do so to the weights; here the outputs count.

    What the problem does not ask for, and scales that are shared by channels or of few bits, stay as they are. A
    collective where anything is to be done. codes: `(G, R, J)` of the grid.
    """
    scales = problem.correct_scale and grid.scale_format.refits and grid.scale.shape[:2] == codes.shape[:2]
    if not (scales or problem.correct_bias):
        return grid, None
    mean, spread = _mean_and_spread(problem, grid.dequantize(codes), comm)
    if scales:
        factor = (spread[0] / spread[1]).sqrt().view(*codes.shape[:2], 1)
        # A channel without any spread has a factor of 0, NaN or infinity: none makes a scale, so it keeps its own.
        restored = grid.with_scale(factor * grid.scale)
        if grid.scale_format.storage == "float32":
            mean[1] *= (restored.scale.double() / grid.scale)[:, :, 0].flatten()
        elif problem.correct_bias:
            # Rounding to fewer bits changes the scales of a channel's groups by different shares.
            mean, _ = _mean_and_spread(problem, restored.dequantize(codes), comm)
        grid = restored
    return grid, (mean[0] - mean[1]).to(problem.dtype) if problem.correct_bias else None


def _mean_and_spread(problem: LayerProblem, rounded: Tensor, comm: Comm) -> tuple[Tensor, Tensor]:
    """Mean and variance, `(2, O)` float64, of the float and of the rounded layer's outputs, without the bias.

    Over all rows of all ranks, with the same bits on any number of them: each microbatch has a place of its own in what
    is summed. Where no bias is corrected, the mean square takes the place of the variance.
    """
    geometry, dim = problem.geometry, problem.geometry.channel_dim
    # Number of rows; mean of both layers; sum of squares around it, of both.
    shape = (problem.total_microbatches, 5, geometry.out_channels)
    parts = torch.zeros(shape, dtype=torch.float64, device=problem.device)
    for batch in problem.batches:
        outputs = problem.outputs(problem.on_device(batch.x_hat), rounded, None)
        keep = batch.keep(dim)
        count = num_rows(batch, keep, dim).to(problem.device)
        parts[batch.index, 0] = count
        for place, values in enumerate((problem.on_device(batch.y), outputs), start=1):
            mean = channel_sums(values, keep, dim) / count.clamp(min=1)
            parts[batch.index, place] = mean
            away = values - mean.to(values.dtype).view(-1, *[1] * geometry.num_spatial_dims)
            parts[batch.index, place + 2] = channel_sums(away.square_(), keep, dim)
    rows, means, squares = torch.split(comm.all_reduce(parts), [1, 2, 2], dim=1)
    share = rows / rows.sum(dim=0)
    mean = (share * means).sum(dim=0)
    variance = squares.sum(dim=0) / rows.sum(dim=0) + (share * (means - mean).square()).sum(dim=0)
    if problem.bias is not None:
        mean[0] -= problem.bias
    return mean, variance if problem.correct_bias else variance + mean.square()
