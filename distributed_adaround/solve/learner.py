"""Learners of `minibatch`: the soft rounding of a layer, and how ranks share a step. This one: by samples.

Each rank computes the data term's gradient from the rows it holds and the regularizer's for its share of the weights;
both, the two losses and some flags lie in one flat bucket that one collective sums. Then all take the same Adam step.

Layout of the bucket (W weights of the layer):  [ gradient by s: W | data loss | regularizer | non-finite ]
s is the clamped sigmoid of alpha, in which the soft weights are linear. Its derivative by alpha is the same on all
ranks and comes after the sum. Two requests travel after the bucket: to stop, and to save.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_adaround.numerics import patches
from distributed_adaround.numerics.soft_rounding import (
    OutputTransform,
    RoundingSchedule,
    SoftRounding,
    add_regularizer_gradient,
    pieces,
    regularizer,
)
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.problem import LayerProblem, Solution
from distributed_adaround.solve.rows import BatchPlan, CalibrationRows
from distributed_adaround.spec.rounding import RoundingSpec

# Adam divides by the gradient's size, so where a layer starts without error it would take full steps along rounding
# noise, another one for each number of ranks. With the normalization `nearest` gradients that matter are about 1 per
# weight and can be told from noise; the other two have no known scale and keep torch's eps.
_ADAM_EPS = {"nearest": 1e-2, "sum": 1e-8, "mean": 1e-8}


@dataclass
class Learner(ABC):
    """The soft rounding of one layer while it is learned, from its float weights on, and how ranks share the work of a
    step. rows: of this rank. plan: which rows each step takes. channel_weight: `(O,)`, of each channel's squared error.
    """

    problem: LayerProblem
    rows: CalibrationRows
    plan: BatchPlan
    channel_weight: Tensor
    comm: Comm
    settings: RoundingSpec

    def __post_init__(self) -> None:
        spec = self.settings
        self._schedule = RoundingSchedule(spec.max_iter, spec.warm_start, *spec.beta, spec.regularization)
        self._bad = torch.zeros((), dtype=self.problem.dtype, device=self.problem.device)

    def _descend(self, soft: SoftRounding, bucket: Tensor) -> None:
        soft.descend(bucket[:-3].view_as(soft.alpha), self.settings.lr, _ADAM_EPS[self.settings.normalization])
        self._bad += bucket[-1]

    @abstractmethod
    def step(self, step: int, with_value: bool = False) -> None:
        """One step of Adam. with_value: take the regularizer's value too."""

    @abstractmethod
    def step_and_report(self, step: int, requests: tuple[bool, bool]) -> tuple[float, bool, bool, bool]:
        """One step, and over all ranks: the loss, whether it was ever not finite, and whether any rank requests it."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything the next steps depend on, the same on all ranks. A collective."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor], step: int) -> None:
        """Go on after `step` steps."""

    @abstractmethod
    def solution(self) -> Solution:
        """A collective."""


class SampleLearner(Learner):
    """Each rank takes the samples that it holds; gradients are summed over ranks in every step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._soft = SoftRounding(*soft_start(self.problem))
        self._flat = self._bad.new_zeros(self._soft.alpha.numel() + 5)
        self._bucket, self._requests = self._flat[:-2], self._flat[-2:]

    def step(self, step: int, with_value: bool = False) -> None:
        comm, bucket, weight, beta = self.comm, self._bucket, self._schedule.weight(step), self._schedule.beta(step)
        local, batch_rows = self.plan.batch(step)
        weights = self.channel_weight / max(1, batch_rows)
        fill_bucket(bucket, self._soft, *self.rows.gather(local), self.rows.transform, weights)
        add_regularizer(bucket, self._soft, weight, beta, comm.rank, comm.world_size, with_value)
        comm.all_reduce(self._flat)
        self._descend(self._soft, bucket)

    def step_and_report(self, step: int, requests: tuple[bool, bool]) -> tuple[float, bool, bool, bool]:
        self._requests.copy_(torch.tensor(requests))
        self.step(step, with_value=True)
        data, regularizer, stop, save, bad = torch.stack([*self._bucket[-3:-1], *self._requests, self._bad]).tolist()
        self._requests.zero_()
        return data + regularizer, bool(bad), bool(stop), bool(save)

    def state(self) -> dict[str, Tensor]:
        return self._soft.state()

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        self._soft.restore(state, step)

    def solution(self) -> Solution:
        soft = self._soft
        return rounded(self.problem, soft.rounds_up, soft.refresh(), int(soft.unsettled.sum()))


def soft_start(problem: LayerProblem) -> tuple[Tensor, Tensor, Tensor]:
    """The weight and its two neighbours on the grid, `(G, R, J)` in the layout of patches."""
    neighbours = (problem.grid.dequantize(codes) for codes in problem.grid.neighbours(problem.weight))
    weight, low, high = (patches.to_patch_layout(w, problem.geometry) for w in (problem.weight, *neighbours))
    return weight, low, high


def rounded(problem: LayerProblem, rounds_up: Tensor, difference: Tensor, num_unsettled: int) -> Solution:
    """The solution from soft weights. rounds_up, difference: `(G, R, J)` in the layout of patches."""
    low, high = problem.grid.neighbours(problem.weight)
    return Solution(
        codes=torch.where(patches.from_patch_layout(rounds_up, problem.geometry), high, low),
        soft_weight=problem.weight + patches.from_patch_layout(difference, problem.geometry),
        unsettled=num_unsettled / max(1, int((high > low).sum())),
    )


def fill_bucket(
    bucket: Tensor,
    soft: SoftRounding,
    inputs: Tensor,
    base: Tensor | None,
    targets: Tensor,
    transform: OutputTransform,
    channel_weight: Tensor,
) -> None:
    """Write this rank's data term into the bucket: gradient by s, loss, non-finite flag. No rows give zeros.
    inputs `(G, N, J)`, base `(N, O)` or None, targets `(N, O)`: N rows as CalibrationRows gathers them. channel_weight:
    `(O,)`, divided by the rows of the global batch already.
    """
    difference = soft.difference
    outputs = torch.bmm(inputs, difference.transpose(1, 2)).permute(1, 0, 2).reshape(targets.shape)
    if base is not None:
        outputs.add_(base)
    loss, gradient = transform.forward_backward(outputs, targets, channel_weight)
    by_group = gradient.view(-1, *difference.shape[:2]).permute(1, 2, 0)
    torch.bmm(by_group, inputs, out=bucket[:-3].view_as(difference)).mul_(soft.slope)
    bucket[-3] = loss
    bucket[-2] = 0
    # 0 times an infinite or NaN loss is NaN.
    torch.ne(loss * 0, 0, out=bucket[-1])


def add_regularizer(
    bucket: Tensor, soft: SoftRounding, weight: float, beta: float, rank: int, world_size: int, with_value: bool = True
) -> None:
    """Add the regularizer of this rank's share of the weights to the bucket; with_value: not only its gradient."""
    if weight == 0:
        return
    size = soft.sigmoid.numel()
    share = slice(size * rank // world_size, size * (rank + 1) // world_size)
    sigmoid, gradient = soft.sigmoid.view(-1)[share], bucket[:-3][share]
    for piece, derivative in zip(pieces(sigmoid), pieces(gradient), strict=True):
        add_regularizer_gradient(derivative, piece, beta, weight)
    if with_value:
        bucket[-2] = weight * regularizer(sigmoid, beta)
