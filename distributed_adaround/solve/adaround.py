"""Solver `minibatch`: AdaRound by stochastic gradient, data parallel.

Every step draws one global batch of rows, whatever the number of ranks: more ranks mean less time per step, not another
result. How ranks share a step is the learner's business (solve/learner.py, solve/channel_learner.py).
"""

import torch
from torch import Tensor

from distributed_adaround.errors import InputError, StoppedError
from distributed_adaround.runtime.comm import Comm, agreed, phase
from distributed_adaround.solve.channel_learner import ChannelLearner
from distributed_adaround.solve.learner import Learner, SampleLearner
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solution
from distributed_adaround.solve.rows import BatchPlan, CalibrationRows
from distributed_adaround.spec.rounding import RoundingSpec

# Steps between two readings of the loss, each of which waits for the device.
_REPORT_EVERY = 100
_STATE = "minibatch"


def channel_weights(nearest: Tensor, normalization: str, num_weights: int) -> Tensor:
    """Weight `(O,)` of each output channel's mean squared error in the loss. nearest: that of nearest rounding, `(O,)`.

    sum: 1, the paper's loss. mean: 1/O, the ancestor's. nearest: each channel's error is divided by its own error under
    nearest rounding and multiplied by its number of weights, so that data term and regularizer weigh the same per
    weight in every channel of every layer.
    """
    channels = nearest.numel()
    if normalization == "nearest":
        # A channel that nearest rounding gets right (all zeros, say) has nothing to learn: weight 0. The floor keeps
        # the weight of a nearly dead channel finite in float32.
        return torch.where(nearest > 0, num_weights / channels / nearest.clamp(min=1e-30), 0.0)
    return torch.full_like(nearest, 1.0 if normalization == "sum" else 1 / channels)


class MinibatchSolver:
    """AdaRound; settings as RoundingSpec says. reproducible: ranks share channels instead of samples."""

    needs_moments = False

    def __init__(self, settings: RoundingSpec) -> None:
        self._settings = settings
        self.num_steps = settings.max_iter

    def solve(self, problem: LayerProblem, comm: Comm, monitor: Monitor) -> Solution:
        """Learn the rounding of one layer, or go on where a job that was stopped has left it. All ranks raise at the
        same step, StoppedError after the state was saved."""
        settings, weight = self._settings, problem.weight
        rows = CalibrationRows(problem)
        nearest_weight = problem.grid.dequantize(problem.grid.quantize(weight))
        nearest = rows.errors(nearest_weight, comm)
        weights = channel_weights(nearest, settings.normalization, weight.numel()).to(problem.device, problem.dtype)
        plan = BatchPlan(problem, rows.sample_rows, comm, settings.batch_size, settings.batch_unit)
        kind = ChannelLearner if settings.reproducible else SampleLearner
        learner = kind(problem, rows, plan, weights, comm, settings)
        self._learn(learner, problem, comm, monitor)
        return learner.solution()

    def _learn(self, learner: Learner, problem: LayerProblem, comm: Comm, monitor: Monitor) -> None:
        for step in range(_resume(learner, problem, comm, monitor), self.num_steps):
            last = step + 1 == self.num_steps
            if (step + 1) % _REPORT_EVERY and not last:
                learner.step(step)
                continue
            # Rank 0's clock says for all when to save.
            requests = (monitor.stop_requested, comm.rank == 0 and monitor.save_due)
            loss, bad, stop, save = learner.step_and_report(step, requests)
            if bad:
                cause = f"lower rounding.lr (now {self._settings.lr}) or check the calibration data"
                raise agreed(InputError(f"layer {problem.name}: the loss is not finite by step {step + 1}; {cause}"))
            monitor.step(step + 1, loss)
            if (stop or save) and not last:
                state = learner.state()
                with phase(comm, f"save the state of layer {problem.name}"):
                    if comm.rank == 0:
                        monitor.save(_STATE, {**state, "step": torch.tensor(step + 1)})
            if stop and not last:
                raise agreed(StoppedError())


def _resume(learner: Learner, problem: LayerProblem, comm: Comm, monitor: Monitor) -> int:
    """The step to begin with, and on all ranks the state that goes with it."""
    with phase(comm, f"load the state of layer {problem.name}"):
        saved = monitor.load(_STATE) if comm.rank == 0 else None
    step = int(comm.broadcast_object(0 if saved is None else int(saved["step"])))
    if step:
        state = learner.state()
        for name in sorted(state):
            if saved is not None:
                state[name].copy_(saved[name])
            comm.broadcast(state[name])
        learner.restore(state, step)
    return step
