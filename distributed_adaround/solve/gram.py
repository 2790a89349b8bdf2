"""Solver `gram`: descent on the exact quadratic of all calibration data, from the float weights onto the grid.

It is not AdaRound: it solves the same problem without sampling. Without an activation inside the loss the squared
output error is a quadratic of the weights, whose matrix is the second moment of the inputs. It is taken once, by all
ranks together; after that no sample is touched again, and each rank solves some of the channels (numerics/descent.py).
Each channel is solved from several scales at once, and the best is kept. Channels that GPTQ rounds better take its
codes: where inputs are nearly dependent (the first convolutions of a network) descent needs more sweeps than it gets.
"""

import torch
from torch import Tensor

from distributed_adaround.errors import StoppedError
from distributed_adaround.numerics.descent import Descent
from distributed_adaround.numerics.gptq import GptqFactors, best_start, gptq_codes
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.moments import Quadratic
from distributed_adaround.numerics.soft_rounding import SETTLED
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.by_channel import ChannelProblem, ChannelSolution, solve_by_channel
from distributed_adaround.solve.gptq import damping_note, layer_factors, start_shares
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solution
from distributed_adaround.spec.rounding import RoundingSpec

# Inputs of a block and proximal steps in each. Blocks of 1 get a little further per sweep, but a sweep then is a loop
# over all inputs: measured on MiniLM and ResNet-20 at 3 bits, for the same error blocks of 32 take half the time.
_BLOCK, _STEPS = 32, 4
# The regularizer rises to this weight in the first 4/5 of the sweeps, to 1 in the rest. Most decisions fall below it:
# over the same sweeps 0.3 and 0.7 ended 1 to 2 % worse than 0.5.
_SLOW_PART, _SLOW_END = 0.8, 0.5
# Scales are refitted from this weight of the regularizer on. Refits to soft values drift: with refits in all sweeps,
# 400 sweeps of MiniLM at 3 bits ended with larger scales and 3 % more error than 100.
_REFIT_FROM = 0.2
# Sweeps between two readings of the loss, each of which waits for the device.
_READ_EVERY = 10


def regularizer_weight(sweep: int, num_sweeps: int) -> float:
    """mu at sweep 0 .. num_sweeps - 1: near 0 at the first, 1 at the last, and a function of nothing else."""
    done = (sweep + 1) / num_sweeps
    if done <= _SLOW_PART:
        return _SLOW_END * done / _SLOW_PART
    return _SLOW_END + (1 - _SLOW_END) * (done - _SLOW_PART) / (1 - _SLOW_PART)


class GramSolver:
    """settings.sweeps: passes over all inputs, each about the cost of one and a half products `(O, I) x (I, I)` for
    each start. damping: of GPTQ. starts: how many scales each channel starts from, where channels have their own."""

    needs_moments = True

    def __init__(self, settings: RoundingSpec) -> None:
        self.num_steps = settings.sweeps
        self._damping, self._starts = settings.damping, settings.starts

    def solve(self, problem: LayerProblem, comm: Comm, monitor: Monitor) -> Solution:
        """Round one layer; scales that belong to channels are refitted on the way. Raises InputError when the second
        moment of the inputs is not finite."""
        factors = layer_factors(problem, self._damping)

        def work(part: ChannelProblem) -> ChannelSolution:
            shares = start_shares(part.grid, self._starts)
            # Copies of the block's channels, one for each start.
            quadratic, grid = part.quadratic.repeated(len(shares)), part.grid.at_shares(shares)
            descent = Descent(quadratic, grid, block=_BLOCK, steps=_STEPS)
            for sweep in range(self.num_steps):
                # Ranks meet after the last channel; all of them then learn that this one stopped.
                if monitor.stop_requested:
                    raise StoppedError
                weight = regularizer_weight(sweep, self.num_steps)
                descent.sweep(weight, refit=weight >= _REFIT_FROM)
                if (sweep + 1) % _READ_EVERY == 0 or sweep + 1 == self.num_steps:
                    done = part.done * self.num_steps + part.size * (sweep + 1)
                    monitor.step(round(done), float(descent.losses().sum()) / len(shares))
            unsettled = descent.unsettled(SETTLED) / len(shares)
            descent.settle()
            found = _better_channels(quadratic, grid, descent, factors.groups(part.place[0]))
            return ChannelSolution(*best_start(*found, len(shares)), unsettled)

        codes, grid, unsettled = solve_by_channel(problem, comm, problem.grid, work, monitor, "gram")
        note = damping_note(factors, self._damping)
        return Solution(codes=codes, grid=grid, unsettled=unsettled / codes.numel(), note=note)


def _better_channels(
    quadratic: Quadratic, grid: Grid, descent: Descent, factors: GptqFactors
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each channel the codes with the smaller loss, of the descent or of GPTQ; scales; and that loss `(G, R)`."""
    other, ours = gptq_codes(quadratic, grid, factors), descent.losses()
    loss = quadratic.loss(grid.dequantize(other))
    theirs = loss < ours
    return (
        torch.where(theirs[:, :, None], other, descent.codes()),
        torch.where(theirs[:, :, None], grid.scale, descent.scale),
        torch.where(theirs, loss, ours),
    )
