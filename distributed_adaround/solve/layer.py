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
from distributed_adaround.numerics.moments import energy_of
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.by_channel import ChannelProblem, ChannelSolution, solve_by_channel
from distributed_adaround.solve.evaluate import channel_sums, num_rows, output_errors
from distributed_adaround.solve.measure import FoldedMoments
from distributed_adaround.solve.problem import (
    LayerProblem,
    Monitor,
    OutputErrors,
    Solution,
    Solver,
    Trial,
    over_energy,
)

# Sweeps of `polish` at most.
_MAX_SWEEPS = 10
# Share of the codes that must have moved in a sweep for another one to pay.
_FEW = 1e-3
# From this many inputs on, inputs are visited in blocks: a loop over single ones would take longer than its products.
_LARGE, _BLOCK, _STEPS = 4096, 32, 4
# So many times the calibration error is more than a trial with fewer samples and less effort explains.
_PARTED = 2.0
# What a trial on one row may show by chance, as a share of the error; on more rows so much less.
_CHANCE = 0.5
# A relative error that is none.
_NO_ERROR = 1e-9


@dataclass(frozen=True)
class LayerResult:
    """Codes `(G, R, J)` on `grid`; shift: `(O,)`, what is added to the bias, or None; the rest as in LayerFigures."""

    codes: Tensor
    grid: Grid
    shift: Tensor | None
    nearest_error: float
    soft_error: float
    hard_error: float
    held_out_error: float
    flipped: float
    unsettled: float
    kept_nearest: bool
    rows: int
    effective_rows: float
    note: str = ""

    @property
    def warning(self) -> str:
        """What of these figures should make a user look again; nothing: none."""
        inputs, parted = self.codes.shape[2], self.held_out_error / max(self.hard_error, _NO_ERROR)
        if parted > _PARTED:
            return f"on samples left out its error is {parted:.1f} times as large"
        if self.rows < inputs:
            return f"it was learned from {self.rows} rows, fewer than its {inputs} inputs"
        if self.effective_rows < inputs:
            worth = f"its {self.rows} rows are worth {self.effective_rows:.0f} independent ones"
            return f"{worth}, fewer than its {inputs} inputs"
        return ""


def without_rows(problem: LayerProblem, why: str) -> LayerResult:
    """Nearest rounding, for a layer that no calibration data reach: there is nothing to compare it on. why: for the
    report."""
    return LayerResult(
        codes=problem.grid.quantize(problem.weight),
        grid=problem.grid,
        shift=None,
        nearest_error=math.nan,
        soft_error=math.nan,
        hard_error=math.nan,
        held_out_error=math.nan,
        flipped=0.0,
        unsettled=0.0,
        kept_nearest=True,
        rows=0,
        effective_rows=0.0,
        note=f"{why}: rounded to nearest",
    )


def round_layer(
    problem: LayerProblem,
    solver: Solver,
    comm: Comm,
    monitor: Monitor,
    *,
    moments: FoldedMoments | None = None,
    polishes: bool = False,
    trial_solver: Solver | None = None,
) -> LayerResult:
    """Solve one layer, never worse than nearest rounding: on samples that a trial leaves out, where the solver works on
    moments, and on the calibration data. A collective; raises as a solver.

    Args:
        problem: of the layer, with its quadratic where there are moments.
        solver, comm, monitor: what solves it; all ranks; and what asks for stops and keeps states.
        moments: of the layer's input, where they were taken.
        polishes: whether to polish the solver's codes, where no activation is in the loss.
        trial_solver: solves the problem's trial; None: there is none.
    """
    nearest_codes = problem.grid.quantize(problem.weight)
    tried = None
    if problem.trial is not None and trial_solver is not None:
        tried = hold_trial(problem.trial, trial_solver, comm, monitor, polishes=polishes)
    nearest_wins = tried is not None and not tried.learned_wins
    if nearest_wins:
        solution, grid, shift = Solution(nearest_codes), problem.grid, None
    else:
        solution = solver.solve(problem, comm, monitor)
        if polishes and problem.quadratic is not None:
            solution = polish(problem, solution, comm, monitor)
        grid, shift = restore_outputs(problem, solution.codes, solution.grid or problem.grid, comm, moments)
    nearest, solved = _compare(problem, nearest_codes, solution, grid, shift, moments, comm)
    kept_nearest = nearest_wins or float(solved.error[0].sum()) > nearest.error
    codes = nearest_codes if kept_nearest else solution.codes
    return LayerResult(
        codes=codes,
        grid=problem.grid if kept_nearest else grid,
        shift=None if kept_nearest else shift,
        nearest_error=nearest.relative,
        soft_error=solved.relative(0 if solution.soft_weight is None else 1),
        hard_error=nearest.relative if kept_nearest else solved.relative(0),
        held_out_error=math.nan if tried is None else tried.relative(solved, problem, nearest=kept_nearest),
        flipped=float(torch.count_nonzero(codes != nearest_codes)) / codes.numel(),
        unsettled=solution.unsettled,
        kept_nearest=kept_nearest,
        rows=solved.num_rows,
        effective_rows=problem.effective_rows,
        note=solution.note,
    )


@dataclass(frozen=True)
class _NearestErrors:
    """Of nearest rounding: squared error against the targets; relative distance from the float outputs."""

    error: float
    relative: float


def _compare(
    problem: LayerProblem,
    nearest_codes: Tensor,
    solution: Solution,
    grid: Grid,
    shift: Tensor | None,
    moments: FoldedMoments | None,
    comm: Comm,
) -> tuple[_NearestErrors, OutputErrors]:
    """Errors of nearest rounding, and of the solution (hard, and soft if any), on all data. A collective.

    The data are passed once, and nearest rounding is not among the candidates where its error is known or follows from
    moments of all rows. grid, shift: as restored.
    """
    hard, nearest = grid.dequantize(solution.codes), problem.grid.dequantize(nearest_codes)
    candidates = [hard] if solution.soft_weight is None else [hard, solution.soft_weight]
    same = shift is None and torch.equal(hard, nearest)
    follows = moments is not None and moments.whole.every_row and problem.transform.is_affine
    if not (same or follows):
        candidates.append(nearest)
    solved = output_errors(problem, candidates, comm, shift)
    if same or not follows:
        place = 0 if same else -1
        return _NearestErrors(float(solved.error[place].sum()), solved.relative(place)), solved
    assert moments is not None, "errors follow from moments"

    def error(asymmetry: float) -> float:
        by_channel = moments.whole.error_sums(nearest - problem.weight, problem.weight, asymmetry).flatten()
        by_channel *= _squared_scale(problem)
        return float(by_channel.sum() + asymmetry**2 * solved.from_inputs.sum())

    return _NearestErrors(error(problem.asymmetry), over_energy(error(1.0), float(solved.energy.sum()))), solved


def _squared_scale(problem: LayerProblem) -> Tensor:
    """What the squared outputs are multiplied by after the layer, `(O,)` float64."""
    scale = problem.transform.scale
    if scale is None:
        return torch.ones(problem.geometry.out_channels, dtype=torch.float64, device=problem.device)
    return scale.double().square()


@dataclass(frozen=True)
class Tried:
    """What a trial showed on the fold left out: loss less its constant of each channel, learned and nearest `(R,)`, and
    the same against the float outputs, `apart` of `(2, R)`; all float64."""

    trial: Trial
    learned: Tensor
    nearest: Tensor
    apart: Tensor

    @property
    def learned_wins(self) -> bool:
        """By more than the few rows left out may show by chance."""
        return bool(self.learned.sum() < self.nearest.sum() * (1 - _CHANCE / self.trial.effective_rows))

    def relative(self, solved: OutputErrors, problem: LayerProblem, *, nearest: bool) -> float:
        """Distance from the float outputs over their energy. solved: what the layer's data show of both."""
        channels = self.trial.channels
        scale = _squared_scale(problem)[channels]
        constant, energy = (part[channels] / solved.num_rows for part in (solved.from_inputs, solved.energy))
        return over_energy(float((self.apart[int(nearest)] * scale + constant).sum()), float(energy.sum()))


def hold_trial(trial: Trial, solver: Solver, comm: Comm, monitor: Monitor, *, polishes: bool) -> Tried:
    """Solve some channels without one fold of the samples, and look at them on that fold. A collective."""
    part, quietly = trial.problem, _OnlyStops(monitor)
    solution = solver.solve(part, comm, quietly)
    if polishes:
        solution = polish(part, solution, comm, quietly)
    learned = (solution.grid or part.grid).dequantize(solution.codes)
    nearest = part.grid.dequantize(part.grid.quantize(part.weight))
    held_out = trial.held_out

    def loss(weight: Tensor, asymmetry: float) -> Tensor:
        return held_out.error_sums(weight - part.weight, part.weight, asymmetry).flatten() / held_out.num_rows

    apart = torch.stack([loss(learned, 1.0), loss(nearest, 1.0)])
    return Tried(trial, loss(learned, part.asymmetry), loss(nearest, part.asymmetry), apart)


class _OnlyStops(Monitor):
    """A trial stops with its layer, and tells and keeps nothing."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__()
        self._monitor = monitor

    @property
    def stop_requested(self) -> bool:
        return self._monitor.stop_requested


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
    return replace(solution, codes=codes, grid=grid)


def restore_outputs(
    problem: LayerProblem, codes: Tensor, grid: Grid, comm: Comm, moments: FoldedMoments | None = None
) -> tuple[Grid, Tensor | None]:
    """The grid with scales that restore the spread, and the shift `(O,)` that restores the mean; None: no shift.

    Rounding by least squares shrinks a layer's outputs: what is left as error is missing from their energy. In a single
    layer that is little, but the layers of a residual network shrink together (ResNet-20 at 2 bits: its outputs to
    88 %, which made up a fourth of their squared error). Larger scales of an output channel undo it, at no cost when
    the network runs, and the bias takes the mean. Banner et al. 2019, "Post training 4-bit quantization of
    convolutional networks for rapid-deployment", do so to the weights; here the outputs count.

    What the problem does not ask for, and scales that are shared by channels or of few bits, stay as they are. A
    collective where anything is to be done. codes: `(G, R, J)` of the grid. moments: of the layer's input, where they
    were taken: what rounding does to the spread is then what other data are expected to show.
    """
    scales = problem.correct_scale and grid.scale_format.refits and grid.scale.shape[:2] == codes.shape[:2]
    if not (scales or problem.correct_bias):
        return grid, None
    rounded = grid.dequantize(codes)
    mean, spread = _mean_and_spread(problem, rounded, comm)
    if scales:
        ratio = spread[0] / spread[1] * _expected_change(problem, rounded, moments)
        # A channel without any spread has a ratio of 0, NaN or infinity: none makes a scale, so it keeps its own.
        restored = grid.with_scale(ratio.sqrt().view(*codes.shape[:2], 1) * grid.scale)
        if grid.scale_format.storage == "float32":
            mean[1] *= (restored.scale.double() / grid.scale)[:, :, 0].flatten()
        elif problem.correct_bias:
            # Rounding to fewer bits changes the scales of a channel's groups by different shares.
            mean, _ = _mean_and_spread(problem, restored.dequantize(codes), comm)
        grid = restored
    return grid, (mean[0] - mean[1]).to(problem.dtype) if problem.correct_bias else None


def _expected_change(problem: LayerProblem, rounded: Tensor, moments: FoldedMoments | None) -> Tensor | float:
    """How rounding changes the energy of each channel's outputs on other data, `(O,)`, over how it does on the
    calibration rows, to which the weights are fitted; 1 where that is not known. rounded: `(G, R, J)`."""
    if moments is None or problem.quadratic is None:
        return 1.0
    whole = moments.whole
    if problem.correct_bias:
        whole = whole.centred(whole.mean, whole.cross_mean, problem.dtype)
    seen, expects = (energy_of(second.double()) for second in (whole.second, problem.quadratic.second))
    before, after = problem.weight.double(), rounded.double()
    return (expects(before) / expects(after) * seen(after) / seen(before)).flatten()


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
