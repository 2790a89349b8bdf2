"""Solver `minibatch`: AdaRound by stochastic gradient, data parallel.

Every step draws one global batch of rows. Each rank computes the data term's gradient from the rows it holds and the
regularizer's for its share of the weights; both, the two losses and a non-finite flag lie in one flat bucket that is
summed over ranks in one collective. All ranks then take the same Adam step. The global batch does not depend on the
number of ranks: more ranks mean less time per step, not another result.

Layout of the bucket (W weights of the layer):  [ gradient by s: W | data loss | regularizer | non-finite ]
s is the clamped sigmoid of alpha, in which the soft weights are linear. Its derivative by alpha is the same on all
ranks and comes after the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distributed_adaround.distributed.comm import Comm, agreed
from distributed_adaround.errors import InputError
from distributed_adaround.numerics import patches
from distributed_adaround.numerics.rounding import (
    OutputTransform,
    RoundingSchedule,
    SoftRounding,
    add_regularizer_gradient,
    pieces,
    regularizer,
)
from distributed_adaround.solve.problem import LayerProblem, OnStep, OutputErrors, Solution
from distributed_adaround.solve.rows import BatchPlan, BatchUnit, CalibrationRows

# Steps between two looks at the loss. Reading it waits for the device, so not at every step.
_LOOK_EVERY = 100

# Adam divides by the gradient's size, so where a layer starts without error it would take full steps along rounding
# noise, another one for each number of ranks. With the normalization `nearest` gradients that matter are about 1 per
# weight and can be told from noise; the other two have no known scale and keep torch's eps.
_ADAM_EPS = {"nearest": 1e-2, "sum": 1e-8, "mean": 1e-8}

Normalization = Literal["sum", "mean", "nearest"]


@dataclass(frozen=True)
class MinibatchSettings:
    """What the job file says about this solver. normalization: see `channel_weights`."""

    schedule: RoundingSchedule
    batch_size: int
    batch_unit: BatchUnit
    lr: float
    normalization: Normalization


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
    problem: LayerProblem, nearest: OutputErrors, comm: Comm, on_step: OnStep, *, settings: MinibatchSettings
) -> Solution:
    """Learn the rounding of one layer.

    nearest: errors of nearest rounding, for the normalization.

    Raises:
        InputError: the loss became infinite or NaN; all ranks raise at the same step.
    """
    rows = CalibrationRows(problem)
    plan = BatchPlan(problem, rows.sample_rows, comm, settings.batch_size, settings.batch_unit)
    low, high = problem.grid.neighbours(problem.weight)
    neighbours = (problem.grid.dequantize(codes) for codes in (low, high))
    soft = SoftRounding(*(patches.to_patch_layout(w, problem.geometry) for w in (problem.weight, *neighbours)))
    weights = channel_weights(nearest, settings.normalization, problem.weight.numel()).to(problem.device, problem.dtype)
    bucket = torch.zeros(soft.alpha.numel() + 3, dtype=problem.dtype, device=problem.device)
    gradient = bucket[:-3].view_as(soft.alpha)
    eps = _ADAM_EPS[settings.normalization]
    bad = torch.zeros((), dtype=problem.dtype, device=problem.device)
    schedule = settings.schedule
    for step in range(schedule.num_steps):
        local, batch_rows = plan.batch(step)
        fill_bucket(bucket, soft, *rows.gather(local), rows.transform, weights / max(1, batch_rows))
        look = (step + 1) % _LOOK_EVERY == 0 or step + 1 == schedule.num_steps
        share = (comm.rank, comm.world_size)
        add_regularizer(bucket, soft, schedule.weight(step), schedule.beta(step), *share, with_value=look)
        comm.all_reduce(bucket)
        soft.descend(gradient, settings.lr, eps)
        bad += bucket[-1]
        if look:
            if float(bad):
                raise agreed(
                    InputError(
                        f"layer {problem.name}: the loss is not finite by step {step + 1}; lower rounding.lr "
                        f"(now {settings.lr}) or check the calibration data"
                    )
                )
            on_step(step + 1, float(bucket[-3] + bucket[-2]))
    return _solution(problem, soft, low, high)


def fill_bucket(
    bucket: Tensor,
    soft: SoftRounding,
    inputs: Tensor,
    base: Tensor | None,
    targets: Tensor,
    transform: OutputTransform,
    channel_weight: Tensor,
) -> None:
    """Write this rank's data term into the bucket: gradient by s, loss, non-finite flag.

    inputs `(G, R, J)`, base `(R, O)` or None, targets `(R, O)` as CalibrationRows gathers them; no rows give zeros.
    transform: of base and difference. channel_weight `(O,)`: divided by the rows of the global batch already.
    """
    difference = soft.difference
    rows = inputs.shape[1]
    outputs = torch.bmm(inputs, difference.transpose(1, 2)).permute(1, 0, 2).reshape(targets.shape)
    if base is not None:
        outputs.add_(base)
    loss, gradient = transform.forward_backward(outputs, targets, channel_weight)
    by_group = gradient.view(rows, *difference.shape[:2]).permute(1, 2, 0)
    torch.bmm(by_group, inputs, out=bucket[:-3].view_as(difference)).mul_(soft.slope)
    bucket[-3] = loss
    bucket[-2] = 0
    # 0 times an infinite or NaN loss is NaN.
    torch.ne(loss * 0, 0, out=bucket[-1])


def add_regularizer(
    bucket: Tensor,
    soft: SoftRounding,
    reg_param: float,
    beta: float,
    rank: int,
    world_size: int,
    *,
    with_value: bool = True,
) -> None:
    """Add the regularizer of this rank's share of the weights to the bucket: its gradient; its value if wanted."""
    if reg_param == 0:
        return
    size = soft.sigmoid.numel()
    share = slice(size * rank // world_size, size * (rank + 1) // world_size)
    sigmoid, gradient = soft.sigmoid.view(-1)[share], bucket[:-3][share]
    for piece, derivative in zip(pieces(sigmoid), pieces(gradient), strict=True):
        add_regularizer_gradient(derivative, piece, beta, reg_param)
    if with_value:
        bucket[-2] = reg_param * regularizer(sigmoid, beta)


def _solution(problem: LayerProblem, soft: SoftRounding, low: Tensor, high: Tensor) -> Solution:
    choice = int((soft.delta > 0).sum())
    return Solution(
        codes=torch.where(patches.from_patch_layout(soft.rounds_up, problem.geometry), high, low),
        soft_weight=problem.weight + patches.from_patch_layout(soft.refresh(), problem.geometry),
        unsettled=int(soft.unsettled.sum()) / max(1, choice),
    )
