"""With correct_bias each output channel has the mean that it has in the float network, whatever the solver."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve.gptq import solve_gptq
from distributed_adaround.solve.gram import GramSettings, solve_gram
from distributed_adaround.solve.layer import LayerResult, round_layer
from distributed_adaround.solve.nearest import solve_nearest
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solution

SOLVERS: dict[str, Any] = {
    "nearest": solve_nearest,
    "gptq": partial(solve_gptq, damping=0.01),
    "gram": partial(solve_gram, settings=GramSettings(10, 0.01)),
}


NO_PROGRESS = Monitor()


def targets(problem: LayerProblem) -> list[Tensor]:
    """asymmetry * W x + (1 - asymmetry) * W x̂, with the bias."""
    acts, geometry = problem.activations, problem.geometry
    weight = geometry.from_matrix(problem.weight)
    return [
        problem.asymmetry * geometry.apply(x, weight, problem.bias)
        + (1 - problem.asymmetry) * geometry.apply(x_hat, weight, problem.bias)
        for x, x_hat in zip(acts.float_inputs, acts.inputs, strict=True)
    ]


def output_difference(
    problem: LayerProblem, result: LayerResult, wanted: list[Tensor], masks: list[Tensor] | None = None
) -> Tensor:
    """Output less what is wanted in all rows that count, `(rows, O)`, with the shifted bias in the layer."""
    geometry = problem.geometry
    weight = geometry.from_matrix(result.grid.dequantize(result.codes))
    bias = torch.zeros(geometry.out_channels).double() if problem.bias is None else problem.bias
    bias = bias if result.shift is None else bias + result.shift
    parts = []
    for k, (x, target) in enumerate(zip(problem.activations.inputs, wanted, strict=True)):
        difference = geometry.apply(x, weight, bias) - target
        rows = difference.movedim(1, -1) if geometry.num_spatial_dims else difference
        rows = rows.reshape(-1, rows.shape[-1])
        parts.append(rows if masks is None else rows[masks[k].flatten() != 0])
    return torch.cat(parts)


def check_mean(problem: LayerProblem, result: LayerResult, masks: list[Tensor] | None = None) -> None:
    assert result.shift is not None
    assert result.shift.shape == (problem.geometry.out_channels,)
    difference = output_difference(problem, result, problem.activations.float_outputs, masks)
    size = difference.square().mean().sqrt()
    assert (difference.mean(dim=0).abs() < 1e-10 * size).all()
    assert result.shift.abs().max() > 1e-3 * size


def tokens(make_problem: Any, bias: bool = True, **kwargs: Any) -> Any:
    inputs = [torch.randn(3, 4, 6).double() + 0.5, torch.randn(2, 4, 6).double()]
    floats = [x * 1.1 + 0.2 * torch.randn_like(x) for x in inputs]
    return make_problem(nn.Linear(6, 5, bias=bias).double(), inputs, float_inputs=floats, **kwargs)


@pytest.mark.parametrize("asymmetry", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_mean_error_is_left(solver: str, asymmetry: float, make_problem: Any) -> None:
    problem = replace(tokens(make_problem), asymmetry=asymmetry, correct_bias=True)
    result = round_layer(problem, SOLVERS[solver], SoloComm(), NO_PROGRESS)
    check_mean(problem, result)
    # The report's figure is that of the layer as it will be.
    energy = sum(float(target.square().sum()) for target in targets(problem))
    error = float(output_difference(problem, result, targets(problem)).square().sum())
    assert result.hard_error == pytest.approx(error / energy, rel=1e-9)
    plain = round_layer(replace(problem, correct_bias=False), SOLVERS[solver], SoloComm(), NO_PROGRESS)
    assert plain.shift is None
    assert asymmetry < 1 or result.hard_error < plain.hard_error


@pytest.mark.parametrize("asymmetry", [1.0, 0.3])
def test_no_mean_error_is_left_in_any_kind_of_layer(asymmetry: float, case: Any, make_problem: Any) -> None:
    layer, inputs = case
    inputs = [x + 0.5 for x in inputs]
    problem = make_problem(layer, inputs, float_inputs=[x + 0.2 * torch.randn_like(x) + 0.1 for x in inputs])
    problem = replace(problem, asymmetry=asymmetry, correct_bias=True)
    check_mean(problem, round_layer(problem, SOLVERS["gram"], SoloComm(), NO_PROGRESS))


def test_rows_that_are_padding_do_not_count(make_problem: Any) -> None:
    masks = [torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])]
    problem = replace(tokens(make_problem, masks=masks), asymmetry=0.5, correct_bias=True)
    check_mean(problem, round_layer(problem, SOLVERS["gram"], SoloComm(), NO_PROGRESS), masks)


def test_a_layer_without_a_bias_gets_one(make_problem: Any) -> None:
    """By the batch norm behind it, which is inside the loss."""
    problem = tokens(make_problem, bias=False)
    norm = OutputTransform(torch.rand(5).double() + 0.5, torch.randn(5).double())
    for transform in (OutputTransform(), norm):
        problem = replace(problem, correct_bias=True, transform=transform)
        result = round_layer(problem, SOLVERS["gram"], SoloComm(), NO_PROGRESS)
        check_mean(problem, result)
    outputs = problem.activations.float_outputs
    energy = sum(float(norm(y).square().sum()) for y in outputs)
    error = float((output_difference(problem, result, outputs) * norm.scale).square().sum())
    assert result.hard_error == pytest.approx(error / energy, rel=1e-9)


def test_nearest_rounding_that_is_kept_has_no_shift(make_problem: Any) -> None:
    problem = replace(tokens(make_problem), correct_bias=True)
    worst = Solution(codes=torch.where(problem.weight > 0, -4.0, 3.0).double())
    result = round_layer(problem, lambda *_: worst, SoloComm(), NO_PROGRESS)
    assert result.kept_nearest
    assert result.shift is None
    assert torch.equal(result.grid.scale, problem.grid.scale)


def test_scales_of_a_solution_that_is_refused_are_refused_too(make_problem: Any) -> None:
    problem = tokens(make_problem)
    nearest = problem.grid.quantize(problem.weight)
    other = replace(problem.grid, scale=problem.grid.scale * 9)
    result = round_layer(problem, lambda *_: Solution(codes=nearest, grid=other), SoloComm(), NO_PROGRESS)
    assert result.kept_nearest
    assert torch.equal(result.grid.scale, problem.grid.scale)
    assert result.hard_error == result.nearest_error < result.soft_error


def test_the_solver_that_stood_in_is_named(make_problem: Any) -> None:
    problem = tokens(make_problem)
    codes = problem.grid.quantize(problem.weight)
    for name in (None, "minibatch"):
        solution = Solution(codes=codes, solver=name)
        assert round_layer(problem, lambda *_, s=solution: s, SoloComm(), NO_PROGRESS).solver == name
