"""Solver `minibatch`: AdaRound by stochastic gradient, data parallel.

Every step draws one global batch of rows, whatever the number of ranks: more ranks mean less time per step, not another
result. How ranks share a step is the learner's business (solve/learner.py, solve/row_learner.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_adaround.errors import InputError, StoppedError
from distributed_adaround.runtime.comm import Comm, agreed, phase
from distributed_adaround.solve.channel_learner import RowLearner
from distributed_adaround.solve.learner import Learner, MinibatchSettings, Normalization, SampleLearner
from distributed_adaround.solve.problem import LayerProblem, Monitor, OutputErrors, Solution
from distributed_adaround.solve.rows import BatchPlan, CalibrationRows

# Steps between two looks at the loss. Reading it waits for the device, so not at every step.
_LOOK_EVERY = 100
_STATE = "minibatch"


def channel_weights(errors: OutputErrors, normalization: Normalization, num_weights: int) -> Tensor:
    """Weight `(O,)` of each output channel's mean squared error in the loss.

    sum: 1, the paper's loss. mean: 1/O, the ancestor's. nearest: each channel's error is divided by its own error under
    nearest rounding (candidate 0) and multiplied by its number of weights, so that data term and regularizer weigh the
    same per weight in every channel of every layer.
    """
    channels = errors.energy.numel()
    if normalization == "nearest":
        nearest = errors.error[0] / errors.num_rows
        # A channel that nearest rounding gets right (all zeros, say) has nothing to learn: weight 0. The floor keeps
        # the weight of a nearly dead channel finite in float32.
        return torch.where(nearest > 0, num_weights / channels / nearest.clamp(min=1e-30), 0.0)
    return torch.full_like(errors.energy, 1.0 if normalization == "sum" else 1 / channels)


def solve_minibatch(
    problem: LayerProblem, nearest: OutputErrors, comm: Comm, monitor: Monitor, *, settings: MinibatchSettings
) -> Solution:
    """Learn the rounding of one layer, or go on where a job that was stopped has left it.

    nearest: errors of nearest rounding, for the normalization.

    Raises:
        InputError: the loss became infinite or NaN; all ranks raise at the same step.
        StoppedError: a rank was asked to stop; all raise at the same step, after the state was saved.
    """
    weights = channel_weights(nearest, settings.normalization, problem.weight.numel()).to(problem.device, problem.dtype)
    rows = CalibrationRows(problem)
    plan = BatchPlan(problem, rows.sample_rows, comm, settings.batch_size, settings.batch_unit)
    learner = (RowLearner if settings.reproducible else SampleLearner)(problem, rows, plan, weights, comm, settings)
    num_steps = settings.schedule.num_steps
    for step in range(_resume(learner, problem, comm, monitor), num_steps):
        if (step + 1) % _LOOK_EVERY and step + 1 < num_steps:
            learner.step(step)
            continue
        # Rank 0's clock says for all when to save.
        wishes = (monitor.stop_requested, comm.rank == 0 and monitor.save_due)
        loss, bad, stop, save = learner.look(step, wishes)
        if bad:
            raise agreed(
                InputError(
                    f"layer {problem.name}: the loss is not finite by step {step + 1}; lower rounding.lr "
                    f"(now {settings.lr}) or check the calibration data"
                )
            )
        monitor.step(step + 1, loss)
        if (stop or save) and step + 1 < num_steps:
            _save(learner, step + 1, problem, comm, monitor)
        if stop and step + 1 < num_steps:
            raise agreed(StoppedError())
    return learner.solution()


def _save(learner: Learner, step: int, problem: LayerProblem, comm: Comm, monitor: Monitor) -> None:
    state = learner.state()
    with phase(comm, f"save the state of layer {problem.name}"):
        if comm.rank == 0:
            monitor.save(_STATE, {**state, "step": torch.tensor(step)})


def _resume(learner: Learner, problem: LayerProblem, comm: Comm, monitor: Monitor) -> int:
    """The step to begin with, and on all ranks the state that goes with it."""
    saved = None
    with phase(comm, f"load the state of layer {problem.name}"):
        if comm.rank == 0:
            saved = monitor.load(_STATE)
    step = int(comm.broadcast_object(0 if saved is None else int(saved["step"])))
    if step:
        state = learner.state()
        for name in sorted(state):
            if saved is not None:
                state[name].copy_(saved[name])
            comm.broadcast(state[name])
        learner.restore(state, step)
    return step
