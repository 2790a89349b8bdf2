"""Solver gram: better than nearest rounding, always on the grid, the same bytes on any number of ranks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_solving import rounded, solve, solver_of

from distributed_adaround.numerics.gptq import GptqFactors
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve import by_channel, gram
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.gram import regularizer_weight
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solution


def solver(num_sweeps: int = 30, damping: float = 0.01, starts: int = 3) -> Any:
    return solver_of("gram", sweeps=num_sweeps, damping=damping, starts=starts)


def mixed(samples: int, channels: int, *size: int) -> Tensor:
    """Inputs that depend on each other, as those of real layers do."""
    mixing = torch.randn(channels, channels).double() * torch.linspace(1.5, 0.05, channels)
    return torch.einsum("nc...,cd->nd...", torch.randn(samples, channels, *size).double(), mixing.T.contiguous())


def linear_problem(make_problem: Any, dtype: torch.dtype = torch.float64, outputs: int = 12) -> Any:
    whole = mixed(120, 64).to(dtype)
    return make_problem(nn.Linear(64, outputs).to(dtype), list(whole.split((50, 20, 50))))


def solved(problem: LayerProblem, solution: Solution) -> Tensor:
    assert solution.grid is not None
    return solution.grid.dequantize(solution.codes)


def errors(problem: LayerProblem, *weights: Tensor) -> Tensor:
    """Squared output error by output channel, `(weights, O)`: outputs against targets, no moments."""
    return output_errors(problem, weights, SoloComm()).error


def nearest_weight(problem: LayerProblem) -> Tensor:
    return problem.grid.dequantize(problem.grid.quantize(problem.weight))


def check_on_grid(problem: LayerProblem, solution: Solution) -> None:
    grid, codes = solution.grid, solution.codes
    assert grid is not None
    assert torch.equal(codes, codes.round())
    assert codes.min() >= grid.qmin
    assert codes.max() <= grid.qmax
    assert grid.scale.shape == problem.grid.scale.shape
    assert (grid.scale > 0).all()
    # What goes to disk is float32, in the format of the scales.
    assert torch.equal(grid.representable(grid.scale), grid.scale)
    for name in ("qmin", "qmax", "scale_format"):
        assert getattr(grid, name) == getattr(problem.grid, name)
    assert torch.equal(grid.zero_point, problem.grid.zero_point)


def test_every_grid(grid_name: str, make_problem: Any, with_grid: Any) -> None:
    problem = with_grid(linear_problem(make_problem), grid_name)
    solution = solve(solver(), problem)
    check_on_grid(problem, solution)
    nearest, found = errors(problem, nearest_weight(problem), solved(problem, solution)).sum(dim=1).tolist()
    # fp8 has steps so fine that some inputs of little weight have nothing to make up for.
    assert found < 0.35 * nearest
    refitted = not torch.equal(solution.grid.scale, problem.grid.scale)
    assert refitted == ("tensor" not in grid_name and grid_name != "mxfp4")


def test_every_kind_of_layer(case: Any, make_problem: Any) -> None:
    layer, inputs = case
    problem = make_problem(layer, inputs, float_inputs=[x + 0.1 * torch.randn_like(x) for x in inputs])
    solution = solve(solver(), problem)
    check_on_grid(problem, solution)
    nearest, found = errors(problem, nearest_weight(problem), solved(problem, solution)).sum(dim=1).tolist()
    # Small layers on noise: there is little to make up for.
    assert found < 0.98 * nearest


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_nearest_whatever_the_settings(seed: int, make_problem: Any) -> None:
    """One sweep is too few to settle well; and inputs are fewer than weights."""
    torch.manual_seed(seed)
    problem = make_problem(nn.Linear(24, 5).double(), [mixed(6, 24), mixed(5, 24)], num_bits=2)
    problem = replace(problem, correct_bias=bool(seed % 2))
    result = rounded(problem, solver(num_sweeps=1))
    hard = result.grid.dequantize(result.codes)[0]
    bias = problem.bias if result.shift is None else problem.bias + result.shift
    found = sum(float((batch.x_hat @ hard.T + bias - batch.y).square().sum()) for batch in problem.batches)
    assert found <= float(errors(problem, nearest_weight(problem)).sum())


def test_what_draws_towards_the_float_output_is_used(make_problem: Any) -> None:
    """Where the quantized prefix made all inputs too small, asymmetric rounding makes the weights larger."""
    inputs = [mixed(60, 8), mixed(40, 8)]
    problem = make_problem(nn.Linear(8, 6).double(), inputs, float_inputs=[1.5 * x for x in inputs])
    with_linear, without = (solve(solver(), replace(problem, asymmetry=share)) for share in (1.0, 0.0))
    drawn, plain = errors(problem, solved(problem, with_linear), solved(problem, without)).sum(dim=1).tolist()
    assert drawn < 0.5 * plain


CASES: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "linear": (nn.Linear(32, 7), (32,), "per channel"),
    "tokens, per group": (nn.Linear(32, 7), (5, 32), "per group"),
    "per tensor": (nn.Linear(32, 7), (32,), "per tensor"),
    "nvfp4": (nn.Linear(32, 7), (32,), "nvfp4"),
    "conv in groups": (nn.Conv2d(8, 6, 3, groups=2), (8, 5, 5), "affine"),
    "depthwise": (nn.Conv1d(8, 8, 4, groups=8), (8, 6), "per channel"),
    "transposed": (nn.ConvTranspose1d(8, 6, 3, stride=2), (8, 6), "per channel"),
}


@pytest.mark.parametrize("name", CASES)
def test_same_bytes_on_any_number_of_ranks_in_float32(
    name: str, make_problem: Any, with_grid: Any, share: Any, run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_channel, "_BLOCK_CHANNELS", {"cpu": 2})
    layer, shape, grid = CASES[name]
    inputs = [torch.randn(4, *shape) for _ in range(4)]
    problem = make_problem(layer, inputs, float_inputs=[x + 0.1 * torch.randn_like(x) for x in inputs])
    problem = with_grid(replace(problem, correct_bias=True, asymmetry=0.5), grid)
    assert problem.dtype == torch.float32
    results = {
        world_size: run_ranks(
            world_size,
            lambda comm: rounded(share(problem, comm.rank, comm.world_size), solver(12), comm),
        )
        for world_size in (1, 2, 3, 5)
    }
    (alone,) = results[1]
    assert not alone.kept_nearest
    assert alone.shift is not None
    for result in (result for found in results.values() for result in found):
        for ours, theirs in (
            (result.codes, alone.codes), (result.grid.scale, alone.grid.scale), (result.shift, alone.shift)
        ):  # fmt: skip
            assert torch.equal(ours, theirs)
        assert (result.hard_error, result.unsettled) == (alone.hard_error, alone.unsettled)


@pytest.mark.parametrize(("num_sweeps", "looks"), [(1, [1]), (10, [10]), (25, [10, 20, 25])])
def test_progress_is_told_up_to_the_last_sweep(num_sweeps: int, looks: list[int], make_problem: Any) -> None:
    problem = linear_problem(make_problem)
    told: list[tuple[int, float]] = []
    watching = Monitor(lambda step, loss: told.append((step, loss)))
    solution = solve(solver(num_sweeps), problem, monitor=watching)
    assert [step for step, _ in told] == looks
    # Without a linear part the loss is the squared output error of one row of the data; what has not settled yet has
    # less of it.
    error = float(errors(problem, solved(problem, solution)).sum()) / 120
    assert 0.5 * error < told[-1][1] < 1.5 * error
    assert solution.unsettled < {1: 0.4, 10: 0.2, 25: 0.08}[num_sweeps]


def test_soft_values_that_are_open_at_the_end_are_counted(make_problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = linear_problem(make_problem)
    monkeypatch.setattr(gram, "regularizer_weight", lambda sweep, num_sweeps: 0.0)
    monkeypatch.setattr(by_channel, "_BLOCK_CHANNELS", {"cpu": 5})
    solution = solve(solver(20, starts=1), problem)
    # All that are not clipped.
    assert 0.85 < solution.unsettled <= 1
    check_on_grid(problem, solution)


@pytest.mark.parametrize("num_sweeps", [1, 2, 5, 100, 999])
def test_the_regularizer_rises_to_1_in_any_number_of_sweeps(num_sweeps: int) -> None:
    weights = [regularizer_weight(sweep, num_sweeps) for sweep in range(num_sweeps)]
    assert weights[-1] == 1.0
    assert weights[0] > 0
    assert all(a < b for a, b in itertools.pairwise(weights))
    if num_sweeps % 5 == 0:
        assert weights[num_sweeps * 4 // 5 - 1] == pytest.approx(0.5)


def test_channels_that_gptq_rounds_better_take_its_codes(make_problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = linear_problem(make_problem, outputs=6)
    quick = solve(solver(1, starts=1), problem)
    best = solve(solver(60), problem)
    # The scales of GPTQ are those of the grid: give the problem those that its codes were found with.
    problem = replace(problem, grid=best.grid)
    even = torch.arange(6) % 2 == 0

    def gptq(quadratic: Any, grid: Any, factors: GptqFactors) -> Tensor:
        damped = GptqFactors.of(quadratic.second, 0.25)
        assert torch.equal(factors.spread, damped.spread)
        return torch.where(even[:, None], best.codes, -4.0)

    monkeypatch.setattr(gram, "gptq_codes", gptq)
    found = solve(solver(1, damping=0.25, starts=1), problem)
    assert found.grid is not None
    assert best.grid is not None
    assert quick.grid is not None
    assert torch.equal(found.codes[:, even], best.codes[:, even])
    assert torch.equal(found.grid.scale[:, even], best.grid.scale[:, even])
    # The other channels are the descent's own, with the scales that it refitted.
    assert not (found.codes[:, ~even] == -4).all(dim=2).any()
    assert not torch.equal(found.grid.scale[:, ~even], problem.grid.scale[:, ~even])


@pytest.mark.parametrize("grid_name", ["per channel", "per group", "affine", "nvfp4", "float16", "bfloat16"])
def test_each_channel_keeps_the_best_of_its_starts(grid_name: str, make_problem: Any, with_grid: Any) -> None:
    """The first start is the observer's scale: more of them are never worse, channel by channel."""
    problem = with_grid(linear_problem(make_problem), grid_name)
    results = [solve(solver(starts=starts), problem) for starts in (1, 2, 4)]
    one, two, four = (errors(problem, solved(problem, result))[0] for result in results)
    assert (two <= one * (1 + 1e-9)).all()
    assert (four <= one * (1 + 1e-9)).all()
    assert two.sum() < one.sum()
    assert four.sum() < 0.99 * one.sum()
    for result in results:
        check_on_grid(problem, result)


@pytest.mark.parametrize("grid_name", ["per tensor", "mxfp4"])
def test_scales_that_cannot_be_a_little_smaller_have_one_start(
    grid_name: str, make_problem: Any, with_grid: Any
) -> None:
    problem = with_grid(linear_problem(make_problem), grid_name)
    one, many = (solve(solver(starts=starts), problem) for starts in (1, 5))
    assert torch.equal(one.codes, many.codes)
    assert one.unsettled == many.unsettled


def test_inputs_that_are_always_zero_or_all_alike(make_problem: Any) -> None:
    x = mixed(40, 12)
    x[:, 3:5] = 0
    x[:, 7:] = x[:, 7:8]
    problem = make_problem(nn.Linear(12, 4).double(), [x[:25], x[25:]])
    solution = solve(solver(), problem)
    check_on_grid(problem, solution)
    nearest, found = errors(problem, nearest_weight(problem), solved(problem, solution)).sum(dim=1).tolist()
    assert found < 0.5 * nearest
    dead = make_problem(nn.Linear(12, 4).double(), [torch.zeros(10, 12).double()])
    check_on_grid(dead, solve(solver(), dead))


def test_a_layer_of_zeros(make_problem: Any) -> None:
    layer = nn.Linear(6, 3)
    layer.weight.data.zero_()
    solution = solve(solver(3), make_problem(layer, [torch.randn(9, 6)]))
    assert not solution.grid.dequantize(solution.codes).any()


def test_damping_that_leaves_the_moments_singular_is_raised(make_problem: Any) -> None:
    problem = make_problem(nn.Linear(3, 2), [torch.ones(4, 3)])
    assert "is singular at damping 1e-30" in solve(solver(2, damping=1e-30), problem).note
    assert solve(solver(2), problem).note == ""


def test_progress_grows_over_all_blocks_of_channels(make_problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_channel, "_BLOCK_CHANNELS", {"cpu": 2})
    told: list[int] = []
    watching = Monitor(lambda step, loss: told.append(step))
    solve(solver(30), linear_problem(make_problem, outputs=6), monitor=watching)
    assert told == [3, 7, 10, 13, 17, 20, 23, 27, 30]
