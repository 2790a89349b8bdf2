"""Solver `gram`: descent on the exact quadratic of all calibration data, from the float weights onto the grid.

Without an activation inside the loss the squared output error is a quadratic of the weights, whose matrix is the second
moment of the inputs. It is taken once, by all ranks together; after that no sample is touched again, and each rank
solves some of the rows (numerics/descent.py). Each row is solved from several scales at once, and the best is kept.
Rows that GPTQ rounds better take its codes: where inputs are nearly dependent (the first convolutions of a network)
descent needs more sweeps than it gets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_adaround.errors import StoppedError
from distributed_adaround.numerics.descent import Descent
from distributed_adaround.numerics.gptq import GptqFactors, gptq_codes
from distributed_adaround.numerics.lattice import Lattice
from distributed_adaround.numerics.moments import Quadratic
from distributed_adaround.numerics.soft_rounding import SETTLED
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.by_channel import RowProblem, RowSolution, solve_by_rows
from distributed_adaround.solve.gptq import layer_factors
from distributed_adaround.solve.problem import LayerProblem, Monitor, OutputErrors, Solution

# Inputs of a block and proximal steps in each. Blocks of 1 get a little further per sweep, but a sweep then is a loop
# over all inputs: measured on MiniLM and ResNet-20 at 3 bits, for the same error blocks of 32 take half the time.
_BLOCK, _STEPS = 32, 4
# The regularizer rises to this weight in the first 4/5 of the sweeps, to 1 in the rest. Most decisions fall below it:
# over the same sweeps 0.3 and 0.7 ended 1 to 2 % worse than 0.5.
_SLOW_PART, _SLOW_END = 0.8, 0.5
# Rows start from scales of this share of the observer's up to all of it. An observer minimizes the rounding of single
# weights; here other weights make up for one that is clipped. At 8 bits the observer's is best, and found to be.
_LEAST_SHARE = 0.85
# Scales are refitted from this weight of the regularizer on. Refits to soft values drift: with refits in all sweeps,
# 400 sweeps of MiniLM at 3 bits ended with larger scales and 3 % more error than 100.
_REFIT_FROM = 0.2
# Sweeps between two looks at the loss. Reading it waits for the device.
_LOOK_EVERY = 10


@dataclass(frozen=True)
class GramSettings:
    """num_sweeps: passes over all inputs, each about the cost of one and a half products `(O, I) x (I, I)` for each
    start. damping: of GPTQ. starts: how many scales each row starts from, where rows have scales of their own."""

    num_sweeps: int
    damping: float
    starts: int = 3


def regularizer_weight(sweep: int, num_sweeps: int) -> float:
    """mu at sweep 0 .. num_sweeps - 1: near 0 at the first, 1 at the last, and a function of nothing else."""
    done = (sweep + 1) / num_sweeps
    if done <= _SLOW_PART:
        return _SLOW_END * done / _SLOW_PART
    return _SLOW_END + (1 - _SLOW_END) * (done - _SLOW_PART) / (1 - _SLOW_PART)


def solve_gram(
    problem: LayerProblem, nearest: OutputErrors, comm: Comm, monitor: Monitor, *, settings: GramSettings
) -> Solution:
    """Round one layer; scales that belong to rows are refitted on the way.

    Raises:
        InputError: the inputs are not finite, or their second moment is singular at this damping.
    """

    factors = layer_factors(problem, comm, settings.damping)

    def work(part: RowProblem) -> RowSolution:
        shares = _shares(part.lattice, settings.starts)
        quadratic, lattice = part.quadratic.repeated(len(shares)), part.lattice.at_shares(shares)
        descent = Descent(quadratic, lattice, block=_BLOCK, steps=_STEPS)
        for sweep in range(settings.num_sweeps):
            # Ranks meet behind the last row; all of them then learn that this one stopped.
            if monitor.stop_requested:
                raise StoppedError
            weight = regularizer_weight(sweep, settings.num_sweeps)
            descent.sweep(weight, refit=weight >= _REFIT_FROM)
            if (sweep + 1) % _LOOK_EVERY == 0 or sweep + 1 == settings.num_sweeps:
                done = part.done * settings.num_sweeps + part.size * (sweep + 1)
                monitor.step(round(done), float(descent.losses().sum()) / len(shares))
        unsettled = descent.unsettled(SETTLED) / len(shares)
        descent.settle()
        found = _better_rows(quadratic, lattice, descent, factors.groups(part.place[0]))
        return _best_start(*found, unsettled, len(shares))

    codes, grid, unsettled = solve_by_rows(problem, comm, problem.grid, work, monitor, "gram")
    return Solution(codes=codes, grid=grid, unsettled=unsettled / codes.numel())


def _shares(lattice: Lattice, starts: int) -> list[float]:
    """Of the observer's scales, one for each start. Powers of two have nothing in between."""
    if not lattice.per_row or lattice.scale_format == "e8m0":
        starts = 1
    return [1 - (1 - _LEAST_SHARE) * start / max(1, starts - 1) for start in range(starts)]


def _better_rows(
    quadratic: Quadratic, lattice: Lattice, descent: Descent, factors: GptqFactors
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the codes with the smaller loss, of the descent or of GPTQ; with scales, and that loss `(G, R)`."""
    other, ours = gptq_codes(quadratic, lattice, factors), descent.losses()
    loss = quadratic.loss(lattice.dequantize(other))
    theirs = loss < ours
    return (
        torch.where(theirs[:, :, None], other, descent.codes()),
        torch.where(theirs[:, None, :], lattice.scale, descent.lattice.scale),
        torch.where(theirs, loss, ours),
    )


def _best_start(codes: Tensor, scale: Tensor, loss: Tensor, unsettled: Tensor, starts: int) -> RowSolution:
    """Of the copies of each row the one with the least loss."""
    groups, _, inputs = codes.shape
    best = loss.reshape(groups, starts, -1).argmin(dim=1)
    return RowSolution(
        codes.reshape(groups, starts, -1, inputs).take_along_dim(best[:, None, :, None], dim=1).squeeze(1),
        scale.reshape(groups, -1, starts, best.shape[1]).take_along_dim(best[:, None, None, :], dim=2).squeeze(2),
        unsettled,
    )
