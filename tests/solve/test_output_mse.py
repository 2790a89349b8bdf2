"""Observer output_mse: scales with the least error of the outputs, each weight counting as its input is large."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_adaround.formats import LayerFormat
from distributed_adaround.numerics.ranges import choose_grid
from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve.measure import measure
from distributed_adaround.solve.problem import LayerProblem
from distributed_adaround.solve.setup import with_moments
from distributed_adaround.spec.quantize import QuantizeSpec

FORMATS: dict[str, dict[str, Any]] = {
    "per tensor": {"dtype": "int3", "qscheme": "per_tensor_symmetric"},
    "per channel": {"dtype": "int3"},
    "affine": {"dtype": "uint3", "qscheme": "per_channel_affine"},
    "per group": {"dtype": "int4", "qscheme": "per_group_symmetric", "group_size": 6},
    "fp4": {"dtype": "fp4"},
}
SHARES = torch.linspace(0.2, 1.1, 91).tolist()


def format_of(observer: str, **fields: Any) -> LayerFormat:
    found = QuantizeSpec(observer=observer, **fields).for_layer("layer", "Linear")
    assert found is not None
    return found


def of_other_sizes(problem: LayerProblem, layer_format: LayerFormat) -> LayerProblem:
    return replace(problem, grid=choose_grid(problem.weight.float(), layer_format).to(problem.dtype))


def weighted_grid(problem: LayerProblem, layer_format: LayerFormat, comm: Any) -> LayerProblem:
    return with_moments(problem, measure(problem, comm), layer_format, comm)


def weighted(problem: LayerProblem, power: Tensor) -> Tensor:
    """Squared rounding error of each weight times the mean square of its input, `(G, R, J)`."""
    rounded = problem.grid.dequantize(problem.grid.quantize(problem.weight))
    return (rounded - problem.weight).square() * power


@pytest.mark.parametrize("name", FORMATS)
def test_the_weighted_error_falls(name: str, make_problem: Any) -> None:
    size = torch.logspace(-1.5, 0.5, 18)[torch.randperm(18)].double()
    x = torch.randn(200, 18).double() * size
    layer_format = format_of("output_mse", **FORMATS[name])
    plain = of_other_sizes(make_problem(nn.Linear(18, 7).double(), [x[:80], x[80:]]), format_of("mse", **FORMATS[name]))
    found = weighted_grid(of_other_sizes(plain, layer_format), layer_format, SoloComm())
    assert not torch.equal(found.grid.scale, plain.grid.scale)
    assert torch.equal(found.grid.scale.float().double(), found.grid.scale)
    power = x.square().mean(dim=0)
    assert weighted(found, power).sum() < 0.97 * weighted(plain, power).sum()
    # No scale group got worse.
    shape = (1, -1) if name == "per tensor" else (7, found.grid.scale.shape[2], -1)
    by_scale = [weighted(problem, power).reshape(shape).sum(dim=-1) for problem in (found, plain)]
    assert (by_scale[0] <= by_scale[1] * (1 + 1e-6)).all()


def test_scales_are_the_best_of_those_tried(make_problem: Any) -> None:
    """Of each channel, over all shares of its largest weight, with sums written out."""
    x = torch.randn(60, 8).double() * torch.linspace(0.05, 2, 8)
    layer_format = format_of("output_mse", dtype="int3")
    problem = weighted_grid(make_problem(nn.Linear(8, 6).double(), [x]), layer_format, SoloComm())
    for row, scale in zip(problem.weight[0], problem.grid.scale[0, :, 0], strict=True):
        errors = []
        for share in SHARES:
            step = share * row.abs().max() / 3.5
            rounded = (row / step).round().clamp(-4, 3) * step
            errors.append(float(((rounded - row) ** 2 * x.square().mean(dim=0)).sum()))
        best = SHARES[errors.index(min(errors))]
        assert float(scale) == pytest.approx(float(best * row.abs().max() / 3.5), rel=1e-6)


def test_inputs_of_a_convolution_in_groups(make_problem: Any) -> None:
    """Each group has inputs of its own: with channels of the second group quiet but one, that one decides."""
    x = torch.randn(20, 4, 9).double() * torch.tensor([1.0, 1.0, 0.01, 3.0])[:, None]
    layer_format = format_of("output_mse", dtype="int3")
    problem = make_problem(nn.Conv1d(4, 6, 1, groups=2).double(), [x])
    found = weighted_grid(problem, layer_format, SoloComm())
    plain = of_other_sizes(problem, format_of("mse", dtype="int3"))
    own = (found.grid.dequantize(found.grid.quantize(found.weight)) - found.weight).abs()
    other = (plain.grid.dequantize(plain.grid.quantize(plain.weight)) - plain.weight).abs()
    assert own[1, :, 1].sum() < 0.5 * other[1, :, 1].sum()
    assert (own[1, :, 1] <= other[1, :, 1]).all()
    # Both channels of the first group are equally loud, nearly.
    assert (own[0].square().sum(dim=1) <= other[0].square().sum(dim=1) * 1.2).all()


def test_same_scales_on_any_number_of_ranks(make_problem: Any, share: Any, run_ranks: Any) -> None:
    layer_format = format_of("output_mse", dtype="int3", qscheme="per_group_symmetric", group_size=4)
    problem = make_problem(nn.Linear(8, 6), [torch.randn(5, 8) * 10.0**k for k in (-1, 1, 0, 0)])
    alone = weighted_grid(problem, layer_format, SoloComm())
    for world_size in (2, 3, 5):
        for found in run_ranks(
            world_size, lambda comm: weighted_grid(share(problem, comm.rank, comm.world_size), layer_format, comm)
        ):
            assert torch.equal(found.grid.scale, alone.grid.scale)


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
def test_other_observers_leave_the_grid_alone(observer: str, make_problem: Any) -> None:
    problem = make_problem(nn.Linear(8, 6), [torch.randn(5, 8)])
    found = weighted_grid(problem, format_of(observer, dtype="int3"), SoloComm())
    assert found.grid is problem.grid
    assert found.quadratic is not None
    with_relu = replace(problem, transform=OutputTransform(activation="relu"))
    found = weighted_grid(with_relu, format_of(observer, dtype="int3"), SoloComm())
    assert found.grid is problem.grid
    assert found.quadratic is None


def test_moments_of_a_layer_with_an_activation_in_the_loss_make_its_grid_alone(make_problem: Any) -> None:
    """They know nothing of the activation."""
    problem = make_problem(nn.Linear(8, 6), [torch.randn(5, 8) * torch.linspace(0.05, 2, 8)])
    problem = replace(problem, transform=OutputTransform(activation="relu"))
    found = weighted_grid(problem, format_of("output_mse", dtype="int3"), SoloComm())
    assert found.quadratic is None
    assert not torch.equal(found.grid.scale, problem.grid.scale)


def test_inputs_that_are_always_zero_do_not_ruin_the_scale(make_problem: Any) -> None:
    """Silent on the calibration data is not silent for ever: a scale nothing decides on is that of the weights."""
    x = torch.randn(50, 8).double()
    x[:, 4:] = 0
    layer_format = format_of("output_mse", dtype="int3", qscheme="per_group_symmetric", group_size=4)
    problem = make_problem(nn.Linear(8, 6).double(), [x])
    found = weighted_grid(problem, layer_format, SoloComm())
    rounded = found.grid.dequantize(found.grid.quantize(found.weight))
    relative = (rounded - found.weight).square()[:, :, 4:].sum(dim=2) / found.weight.square()[:, :, 4:].sum(dim=2)
    assert relative.max() < 0.15
