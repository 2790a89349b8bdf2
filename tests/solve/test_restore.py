"""With correct_scale each output channel spreads as it does in the float network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_solving import Fixed, rounded, solver_of

from distributed_adaround.formats import SCALE_FORMATS
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve.layer import LayerResult, restore_outputs
from distributed_adaround.solve.problem import LayerProblem, Solution

GRAM = solver_of("gram", sweeps=10)
NEAREST = solver_of("nearest")


def noisy(make_problem: Any, layer: nn.Module, inputs: list[Tensor], **kwargs: Any) -> LayerProblem:
    """Inputs of the rounded network that are off, in the mean too."""
    floats = [x + 0.3 * torch.randn_like(x) + 0.2 for x in inputs]
    return replace(make_problem(layer, inputs, float_inputs=floats, **kwargs), asymmetry=0.5, correct_scale=True)


def both_outputs(
    problem: LayerProblem, result: LayerResult, masks: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Rows that count, `(rows, O)`, of the float layer and of the rounded one with the shift in its bias."""
    geometry = problem.geometry
    quantized = geometry.from_channels(result.grid.dequantize(result.codes))
    bias = problem.bias
    if result.shift is not None:
        bias = result.shift if bias is None else bias + result.shift
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    weights = (geometry.from_channels(problem.weight), quantized)
    streams = ([batch.x for batch in problem.batches], [batch.x_hat for batch in problem.batches])
    for weight, own_bias, inputs, rows in zip(weights, (problem.bias, bias), streams, found, strict=True):
        for k, x in enumerate(inputs):
            y = geometry.apply(x, weight, own_bias)
            y = (y.movedim(1, -1) if geometry.num_spatial_dims else y).flatten(0, -2)
            rows.append(y if masks is None else y[masks[k].flatten() != 0])
    return torch.cat(found[0]), torch.cat(found[1])


@pytest.mark.parametrize("solver", [GRAM, NEAREST])
def test_mean_and_spread_of_any_kind_of_layer(solver: Any, case: Any, make_problem: Any) -> None:
    layer, inputs = case
    problem = replace(noisy(make_problem, layer, [x + 0.5 for x in inputs]), correct_bias=True)
    result = rounded(problem, solver)
    if result.kept_nearest:
        assert torch.equal(result.grid.scale, problem.grid.scale)
        return
    expected, found = both_outputs(problem, result)
    torch.testing.assert_close(found.mean(dim=0), expected.mean(dim=0), rtol=1e-9, atol=1e-9)
    # Scales are rounded to float32.
    torch.testing.assert_close(found.std(dim=0), expected.std(dim=0), rtol=1e-7, atol=1e-12)
    plain = rounded(replace(problem, correct_scale=False), solver)
    _, found = both_outputs(problem, plain)
    assert (found.std(dim=0) / expected.std(dim=0) - 1).abs().max() > 1e-3


def test_without_a_bias_the_mean_square(make_problem: Any) -> None:
    inputs = [torch.randn(30, 6).double() + 0.5 for _ in range(3)]
    for bias in (True, False):
        problem = noisy(make_problem, nn.Linear(6, 4, bias=bias).double(), inputs)
        result = rounded(problem, GRAM)
        assert not result.kept_nearest
        assert result.shift is None
        expected, found = both_outputs(replace(problem, bias=None), result)
        torch.testing.assert_close(found.square().mean(dim=0), expected.square().mean(dim=0), rtol=2e-7, atol=0)


def test_rows_that_are_padding_do_not_count(make_problem: Any) -> None:
    masks = [torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])]
    inputs = [torch.randn(3, 4, 6).double(), torch.randn(2, 4, 6).double()]
    problem = replace(noisy(make_problem, nn.Linear(6, 5).double(), inputs, masks=masks), correct_bias=True)
    grid, shift = restore_outputs(problem, problem.grid.quantize(problem.weight), problem.grid, SoloComm())
    result = replace(
        rounded(problem, NEAREST),
        codes=problem.grid.quantize(problem.weight), grid=grid, shift=shift,
    )  # fmt: skip
    expected, found = both_outputs(problem, result, masks)
    torch.testing.assert_close(found.mean(dim=0), expected.mean(dim=0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.std(dim=0), expected.std(dim=0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("correct_bias", [True, False])
def test_the_same_bits_on_any_number_of_ranks(
    correct_bias: bool, make_problem: Any, share: Any, run_ranks: Any
) -> None:
    inputs = [torch.randn(size, 6) for size in (5, 1, 8, 3, 4)]
    problem = replace(noisy(make_problem, nn.Linear(6, 5), inputs), correct_bias=correct_bias)
    codes = problem.grid.quantize(problem.weight)
    grid, shift = restore_outputs(problem, codes, problem.grid, SoloComm())
    assert not torch.equal(grid.scale, problem.grid.scale)
    for world_size in (2, 3, 5):
        results = run_ranks(
            world_size,
            lambda comm: restore_outputs(share(problem, comm.rank, comm.world_size), codes, problem.grid, comm),
        )
        for other, other_shift in results:
            assert torch.equal(other.scale, grid.scale)
            assert (other_shift is None and shift is None) or torch.equal(other_shift, shift)


def test_scales_that_channels_share_or_that_have_few_bits_stay(make_problem: Any) -> None:
    problem = noisy(make_problem, nn.Linear(6, 5).double(), [torch.randn(30, 6).double()])
    one = (slice(0, 1), slice(0, 1))
    shared = replace(problem.grid.part(one), per_channel=False)
    few_bits = replace(problem.grid, scale_format=SCALE_FORMATS["e8m0"])
    for grid in (shared, few_bits):
        found, shift = restore_outputs(problem, grid.quantize(problem.weight), grid, SoloComm())
        assert found is grid
        assert shift is None


def test_all_groups_of_a_channel_take_the_same_factor(make_problem: Any) -> None:
    problem = noisy(make_problem, nn.Linear(6, 5).double(), [torch.randn(30, 6).double()])
    scale = problem.grid.scale * torch.tensor([1.0, 0.7, 1.2]).double()
    grid = replace(problem.grid, scale=scale, zero_point=torch.zeros_like(scale))
    found, _ = restore_outputs(problem, grid.quantize(problem.weight), grid, SoloComm())
    factor = found.scale / scale
    torch.testing.assert_close(factor, factor[:, :, :1].expand(-1, -1, 3), rtol=2e-7, atol=0)
    assert (factor[:, :, 0].unique().numel()) == 5


@pytest.mark.parametrize("correct_bias", [True, False])
def test_channels_without_any_spread_keep_their_scale(correct_bias: bool, make_problem: Any) -> None:
    problem = noisy(make_problem, nn.Linear(6, 4).double(), [torch.randn(30, 6).double()])
    problem = replace(problem, correct_bias=correct_bias)
    codes = problem.grid.quantize(problem.weight)
    codes[0, 1] = 0  # the rounded channel is dead
    problem.weight[0, 2] = 0  # the float one is
    problem.batches[0].y[:, 2] = problem.bias[2]
    grid, _ = restore_outputs(problem, codes, problem.grid, SoloComm())
    same = (grid.scale == problem.grid.scale.float()).flatten()
    assert same.tolist() == [False, True, True, False]


def test_scales_of_a_solution_that_is_worse_than_nearest_are_not_kept(make_problem: Any) -> None:
    problem = noisy(make_problem, nn.Linear(6, 4).double(), [torch.randn(30, 6).double()])
    worst = Solution(codes=torch.where(problem.weight > 0, -4.0, 3.0).double())
    result = rounded(problem, Fixed(worst))
    assert result.kept_nearest
    assert torch.equal(result.grid.scale, problem.grid.scale)


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_scales_of_16_bits_stay_of_their_format(name: str, groups: int, correct_bias: bool, make_problem: Any) -> None:
    """As near to the spread as the format lets them come, and the mean still exactly."""
    problem = noisy(make_problem, nn.Linear(6, 5).double(), [torch.randn(40, 6).double() for _ in range(2)])
    problem = replace(problem, correct_bias=correct_bias)
    scale = problem.grid.scale * torch.linspace(1.0, 1.2, groups).double()
    grid = replace(problem.grid, scale_format=SCALE_FORMATS[name])
    grid = replace(grid, scale=grid.representable(scale), zero_point=torch.zeros_like(scale))
    codes = grid.quantize(problem.weight)
    found, shift = restore_outputs(problem, codes, grid, SoloComm())
    assert torch.equal(found.scale, found.scale.to(getattr(torch, name)).double())
    assert torch.equal(found.representable(found.scale), found.scale)
    assert not torch.equal(found.scale, grid.scale)
    result = replace(rounded(problem, NEAREST), codes=codes, grid=found, shift=shift)
    expected, outputs = both_outputs(problem if correct_bias else replace(problem, bias=None), result)
    step = 2.0**-11 if name == "float16" else 2.0**-8
    if correct_bias:
        torch.testing.assert_close(outputs.mean(dim=0), expected.mean(dim=0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(outputs.std(dim=0), expected.std(dim=0), rtol=2 * step, atol=0)
    else:
        sizes = [y.square().mean(dim=0).sqrt() for y in (outputs, expected)]
        torch.testing.assert_close(*sizes, rtol=2 * step, atol=0)
