"""AdaRound as the paper has it, in plain autograd, beside the fused step: the same soft weights and the same codes.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", equations 22 to 25. Nothing here is
the program's own but the draw of the rows of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve.adaround import MinibatchSolver
from distributed_adaround.solve.channel_learner import ChannelLearner
from distributed_adaround.solve.learner import SampleLearner
from distributed_adaround.solve.problem import Monitor, Solution
from distributed_adaround.solve.rows import BatchPlan
from distributed_adaround.spec.rounding import RoundingSpec

STEPS, ROWS, LR = 60, 24, 0.03
REG_PARAMS = {"sum": 0.02, "nearest": 10.0}


def rectified_sigmoid(V: Tensor) -> Tensor:
    """Eq. 23, with zeta = 1.1 and gamma = -0.1."""
    return (torch.sigmoid(V) * 1.2 - 0.1).clamp(0, 1)


def outputs(layer: nn.Module, weight: Tensor, inputs: list[Tensor], relu: bool) -> Tensor:
    """f(W x) of all rows, `(rows, O)`."""
    y = torch.cat([functional_call(layer, {"weight": weight}, x).movedim(1, -1).flatten(0, -2) for x in inputs])
    return y.relu() if relu else y


@dataclass(frozen=True)
class Learned:
    """Of a layer, all in the weight's shape; loss: of the last step."""

    V: Tensor
    soft: Tensor
    codes: Tensor
    loss: float


def adaround(
    layer: nn.Module, scale: Tensor, streams: tuple[list[Tensor], list[Tensor]], relu: bool, weighing: str, draw: Any
) -> Learned:
    """Codes -4 to 3 of a weight in torch's shape. scale: broadcasts with it. streams: x and x̂. draw: rows of a step."""
    weight = layer.weight.detach()
    below = torch.floor(weight / scale).clamp(-4, 3)
    lo, hi = below * scale, (below + 1).clamp(-4, 3) * scale
    h = ((weight - lo) / torch.where(hi > lo, hi - lo, 1.0)).clamp(0, 1)
    V = (-torch.log(1.2 / (h + 0.1) - 1)).requires_grad_()
    target = outputs(layer, weight, streams[0], relu)
    nearest = outputs(layer, (weight / scale).round().clamp(-4, 3) * scale, streams[1], relu)
    # The paper's loss; or each channel relative to its error under nearest rounding, times its number of weights.
    relative = weight[0].numel() / (nearest - target).square().mean(dim=0)
    per_channel = torch.ones_like(relative) if weighing == "sum" else relative
    adam = torch.optim.Adam([V], lr=LR, eps=1e-8 if weighing == "sum" else 1e-2)
    for step in range(STEPS):
        rows, warm = draw(step), 0.2 * STEPS
        beta = 2 + 18 * 0.5 * (1 + math.cos(math.pi * max(0.0, step - warm) / (STEPS - 1 - warm)))
        soft = lo + rectified_sigmoid(V) * (hi - lo)  # eq. 22
        error = outputs(layer, soft, streams[1], relu)[rows] - target[rows]
        loss = (error.square() * per_channel).sum() / len(rows)
        if step >= warm:
            regularizer = (1 - (2 * rectified_sigmoid(V) - 1).abs() ** beta).sum()  # eq. 24
            loss = loss + REG_PARAMS[weighing] * regularizer  # eq. 25
        adam.zero_grad()
        loss.backward()
        adam.step()
    h = rectified_sigmoid(V.detach())
    codes = torch.where(h >= 0.5, hi, lo) / scale
    return Learned(V.detach(), lo + h * (hi - lo), codes.round(), loss.item())


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("normalization", ["sum", "nearest"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv in groups"])
def test_the_fused_step_is_plain_adaround(
    kind: str, relu: bool, normalization: str, reproducible: bool, make_problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer: nn.Module = nn.Linear(10, 7) if kind == "linear" else nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
    layer = layer.double().requires_grad_(False)
    shape = (10,) if kind == "linear" else (6, 6, 5)
    near = [torch.randn(n, *shape).double() for n in (20, 7, 30)]
    floats = [x + 0.2 * torch.randn_like(x) for x in near]
    transform = OutputTransform(activation="relu" if relu else "identity")
    problem = make_problem(layer, near, float_inputs=floats, transform=transform)
    settings = RoundingSpec(
        max_iter=STEPS,
        batch_size=ROWS,
        lr=LR,
        normalization=normalization,
        reg_param=REG_PARAMS[normalization],
        reproducible=reproducible,
    )
    learner_kind, alphas = (ChannelLearner if reproducible else SampleLearner), []
    solution = learner_kind.solution

    def seen(learner: Any) -> Solution:
        alphas.append(learner.state()["alpha"])
        return solution(learner)

    monkeypatch.setattr(learner_kind, "solution", seen)
    told: list[float] = []
    found = MinibatchSolver(settings).solve(problem, SoloComm(), Monitor(lambda step, loss: told.append(loss)))

    counts = [[1 if kind == "linear" else 9] * len(x) for x in near]
    plan = BatchPlan(problem, counts, SoloComm(), ROWS, "rows")
    scale = problem.grid.scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
    expected = adaround(layer, scale, (floats, near), relu, normalization, lambda step: plan.batch(step)[0])

    def by_channel(weight: Tensor) -> Tensor:
        return problem.geometry.to_channels(weight)

    assert found.soft_weight is not None
    torch.testing.assert_close(found.soft_weight, by_channel(expected.soft), rtol=1e-8, atol=1e-10)
    assert torch.equal(found.codes, by_channel(expected.codes))
    (alpha,) = alphas
    groups, channels, inputs = problem.weight.shape
    if kind != "linear":
        # The rows of a convolution have the input channels last.
        alpha = alpha.view(groups, channels, 9, inputs // 9).transpose(2, 3).reshape(groups, channels, inputs)
    torch.testing.assert_close(alpha, by_channel(expected.V), rtol=1e-8, atol=1e-8)
    assert told[-1] == pytest.approx(expected.loss, rel=1e-8)
    # Something was learned, and something is still open.
    assert (found.codes != problem.grid.quantize(problem.weight)).any()
    assert 0 < found.unsettled < 1
