"""With correct_bias each output channel has the mean that it has in the float network, whatever the solver."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_solving import Fixed, rounded, solver_of

from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.solve.layer import LayerResult
from distributed_adaround.solve.problem import LayerProblem, Solution

SOLVERS: dict[str, Any] = {
    "nearest": solver_of("nearest"),
    "gptq": solver_of("gptq"),
    "gram": solver_of("gram", sweeps=10),
}


def targets(problem: LayerProblem) -> list[Tensor]:
    """asymmetry * W x + (1 - asymmetry) * W x̂, with the bias."""
    geometry = problem.geometry
    weight = geometry.from_channels(problem.weight)
    return [
        problem.asymmetry * geometry.apply(batch.x, weight, problem.bias)
        + (1 - problem.asymmetry) * geometry.apply(batch.x_hat, weight, problem.bias)
        for batch in problem.batches
    ]


def output_difference(
    problem: LayerProblem, result: LayerResult, wanted: list[Tensor], masks: list[Tensor] | None = None
) -> Tensor:
    """Output less what is wanted in all rows that count, `(rows, O)`, with the shifted bias in the layer."""
    geometry = problem.geometry
    weight = geometry.from_channels(result.grid.dequantize(result.codes))
    bias = torch.zeros(geometry.out_channels).double() if problem.bias is None else problem.bias
    bias = bias if result.shift is None else bias + result.shift
    parts = []
    for k, (batch, target) in enumerate(zip(problem.batches, wanted, strict=True)):
        difference = geometry.apply(batch.x_hat, weight, bias) - target
        rows = difference.movedim(1, -1) if geometry.num_spatial_dims else difference
        rows = rows.reshape(-1, rows.shape[-1])
        parts.append(rows if masks is None else rows[masks[k].flatten() != 0])
    return torch.cat(parts)


def check_mean(problem: LayerProblem, result: LayerResult, masks: list[Tensor] | None = None) -> None:
    assert result.shift is not None
    assert result.shift.shape == (problem.geometry.out_channels,)
    difference = output_difference(problem, result, [batch.y for batch in problem.batches], masks)
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
    result = rounded(problem, SOLVERS[solver])
    check_mean(problem, result)
    # The report's figure is that of the layer as it will be.
    floats = [batch.y for batch in problem.batches]
    energy = sum(float(y.square().sum()) for y in floats)
    error = float(output_difference(problem, result, floats).square().sum())
    assert result.hard_error == pytest.approx(error / energy, rel=1e-9)
    plain = rounded(replace(problem, correct_bias=False), SOLVERS[solver])
    assert plain.shift is None
    assert asymmetry < 1 or result.hard_error < plain.hard_error


@pytest.mark.parametrize("asymmetry", [1.0, 0.3])
def test_no_mean_error_is_left_in_any_kind_of_layer(asymmetry: float, case: Any, make_problem: Any) -> None:
    layer, inputs = case
    inputs = [x + 0.5 for x in inputs]
    problem = make_problem(layer, inputs, float_inputs=[x + 0.2 * torch.randn_like(x) + 0.1 for x in inputs])
    problem = replace(problem, asymmetry=asymmetry, correct_bias=True)
    check_mean(problem, rounded(problem, SOLVERS["gram"]))


def test_rows_that_are_padding_do_not_count(make_problem: Any) -> None:
    masks = [torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])]
    problem = replace(tokens(make_problem, masks=masks), asymmetry=0.5, correct_bias=True)
    check_mean(problem, rounded(problem, SOLVERS["gram"]), masks)


def test_a_layer_without_a_bias_gets_one(make_problem: Any) -> None:
    """By the batch norm behind it, which is inside the loss."""
    problem = tokens(make_problem, bias=False)
    norm = OutputTransform(torch.rand(5).double() + 0.5, torch.randn(5).double())
    for transform in (OutputTransform(), norm):
        problem = replace(problem, correct_bias=True, transform=transform)
        result = rounded(problem, SOLVERS["gram"])
        check_mean(problem, result)
    outputs = [batch.y for batch in problem.batches]
    energy = sum(float(norm(y).square().sum()) for y in outputs)
    error = float((output_difference(problem, result, outputs) * norm.scale).square().sum())
    assert result.hard_error == pytest.approx(error / energy, rel=1e-9)


def test_nearest_rounding_that_is_kept_has_no_shift(make_problem: Any) -> None:
    problem = replace(tokens(make_problem), correct_bias=True)
    worst = Solution(codes=torch.where(problem.weight > 0, -4.0, 3.0).double())
    result = rounded(problem, Fixed(worst))
    assert result.kept_nearest
    assert result.shift is None
    assert torch.equal(result.grid.scale, problem.grid.scale)


def test_scales_of_a_solution_that_is_refused_are_refused_too(make_problem: Any) -> None:
    problem = tokens(make_problem)
    nearest = problem.grid.quantize(problem.weight)
    other = replace(problem.grid, scale=problem.grid.scale * 9)
    result = rounded(problem, Fixed(Solution(codes=nearest, grid=other)))
    assert result.kept_nearest
    assert torch.equal(result.grid.scale, problem.grid.scale)
    assert result.hard_error == result.nearest_error < result.soft_error
