"""A layer's result: never worse than nearest, always on the grid, and its figures are what they say."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_adaround.errors import InputError
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.soft_rounding import RoundingSchedule
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve.adaround import solve_minibatch
from distributed_adaround.solve.layer import round_layer
from distributed_adaround.solve.learner import MinibatchSettings
from distributed_adaround.solve.nearest import solve_nearest
from distributed_adaround.solve.problem import Monitor, Solution

NO_PROGRESS = Monitor()


def minibatch(num_steps: int, lr: float, reg_param: float = 0.01) -> Any:
    schedule = RoundingSchedule(num_steps, 0.2, 20.0, 2.0, reg_param)
    return partial(solve_minibatch, settings=MinibatchSettings(schedule, 16, "rows", lr, "nearest"))


def small_problem(make_problem: Any, outputs: int = 3) -> Any:
    mixing = torch.randn(3, 6).double()
    inputs = [torch.randn(20, 3).double() @ mixing for _ in range(3)]
    return make_problem(nn.Linear(6, outputs).double(), inputs)


def relative_error(problem: Any, codes: Tensor) -> float:
    """Written out: squared error over squared float outputs, over all rows and channels."""
    weight = codes * problem.grid.scale
    error = energy = 0.0
    for x, target in zip(problem.activations.inputs, problem.activations.float_outputs, strict=True):
        error += float((x @ weight.T + problem.bias - target).square().sum())
        energy += float(target.square().sum())
    return error / energy


def test_nearest_solver(make_problem: Any) -> None:
    problem = small_problem(make_problem)
    result = round_layer(problem, solve_nearest, SoloComm(), NO_PROGRESS)
    codes = (problem.weight / problem.grid.scale).round().clamp(-4, 3)
    assert torch.equal(result.codes, codes)
    expected = relative_error(problem, codes)
    for figure in (result.nearest_error, result.soft_error, result.hard_error):
        assert figure == pytest.approx(expected, rel=1e-10)
    assert (result.flipped, result.unsettled, result.kept_nearest) == (0.0, 0.0, False)


def test_better_codes_are_taken(make_problem: Any) -> None:
    problem = small_problem(make_problem, outputs=1)
    low, high = problem.grid.neighbours(problem.weight)
    choices = [torch.where(torch.tensor([up]), high, low) for up in itertools.product([False, True], repeat=6)]
    best = min(choices, key=lambda codes: relative_error(problem, codes))
    soft = problem.weight * 1.01
    solution = Solution(codes=best, soft_weight=soft, unsettled=0.25)
    result = round_layer(problem, lambda *args: solution, SoloComm(), NO_PROGRESS)
    nearest = problem.grid.quantize(problem.weight)
    assert not torch.equal(best, nearest)
    assert torch.equal(result.codes, best)
    assert not result.kept_nearest
    assert result.hard_error == pytest.approx(relative_error(problem, best), rel=1e-10)
    assert result.soft_error == pytest.approx(relative_error(problem, soft / problem.grid.scale), rel=1e-10)
    assert result.nearest_error == pytest.approx(relative_error(problem, nearest), rel=1e-10)
    assert result.hard_error < result.nearest_error
    assert result.flipped == int((best != nearest).sum()) / 6
    assert result.unsettled == 0.25


@pytest.mark.parametrize("garbage", [-4.0, 3.0, 1e6])
def test_worse_codes_are_refused(garbage: float, make_problem: Any) -> None:
    problem = small_problem(make_problem)
    codes = torch.full_like(problem.weight, garbage)
    result = round_layer(problem, lambda *args: Solution(codes=codes), SoloComm(), NO_PROGRESS)
    assert result.kept_nearest
    assert torch.equal(result.codes, problem.grid.quantize(problem.weight))
    assert result.hard_error == result.nearest_error < result.soft_error
    assert result.flipped == 0


@pytest.mark.parametrize("seed", range(8))
def test_never_worse_than_nearest_and_on_the_grid(seed: int, make_problem: Any) -> None:
    torch.manual_seed(seed)
    problem = small_problem(make_problem)
    # Too few steps, too large ones: bad codes are likely.
    result = round_layer(problem, minibatch(3, lr=3.0), SoloComm(), NO_PROGRESS)
    assert relative_error(problem, result.codes) <= relative_error(problem, problem.grid.quantize(problem.weight))
    assert torch.equal(result.codes, result.codes.round())
    assert result.codes.min() >= -4
    assert result.codes.max() <= 3


def test_ranks_agree(make_problem: Any, share: Any, run_ranks: Any) -> None:
    problem = small_problem(make_problem)
    solver = minibatch(60, lr=0.05)
    alone = round_layer(problem, solver, SoloComm(), NO_PROGRESS)
    for world_size in (2, 5):
        results = run_ranks(
            world_size,
            lambda comm: round_layer(share(problem, comm.rank, comm.world_size), solver, comm, NO_PROGRESS),
        )
        for result in results:
            assert torch.equal(result.codes, alone.codes)
            assert result.hard_error == alone.hard_error
            assert result.nearest_error == alone.nearest_error
            assert result.kept_nearest == alone.kept_nearest


@pytest.mark.parametrize("solver", [solve_nearest, minibatch(5, 0.01)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_activations_that_are_not_finite(
    world_size: int, solver: Any, make_problem: Any, share: Any, run_ranks: Any
) -> None:
    problem = small_problem(make_problem)
    problem.activations.inputs[1][2, 3] = torch.inf

    def work(comm: Any) -> str:
        with pytest.raises(InputError) as caught:
            round_layer(share(problem, comm.rank, world_size), solver, comm, NO_PROGRESS)
        return str(caught.value)

    message = (
        "layer block.layer: its activations are not finite: inf in its float input, sample 2 of microbatch 1; check "
        "the weights and the calibration data"
    )
    assert run_ranks(world_size, work) == [message] * world_size


def test_everything_masked(make_problem: Any) -> None:
    layer = nn.Linear(3, 2).double()
    problem = make_problem(layer, [torch.randn(2, 4, 3).double()], masks=[torch.zeros(2, 4)])
    with pytest.raises(InputError, match=r"layer block\.layer: the attention mask leaves no row"):
        round_layer(problem, minibatch(5, 0.01), SoloComm(), NO_PROGRESS)


def test_a_layer_that_is_on_the_grid_already(make_problem: Any) -> None:
    problem = make_problem(nn.Linear(6, 3).double(), [torch.randn(30, 6).double()])
    codes = torch.randint(-4, 4, (3, 6)).double()
    grid = Grid(torch.full((3, 1), 0.25).double(), torch.zeros(3, 1).double(), -4, 3)
    problem = replace(problem, weight=codes * 0.25, grid=grid)
    problem.activations.float_outputs = [x @ problem.weight.T + problem.bias for x in problem.activations.inputs]
    result = round_layer(problem, minibatch(120, 0.02), SoloComm(), NO_PROGRESS)
    assert torch.equal(result.codes, codes)
    assert result.hard_error < 1e-25
    assert result.flipped == 0


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_a_layer_of_zeros(value: float, make_problem: Any) -> None:
    layer = nn.Conv2d(2, 3, 2)
    layer.weight.data.fill_(value)
    problem = make_problem(layer, [torch.randn(2, 2, 4, 4)])
    result = round_layer(problem, minibatch(50, 0.02), SoloComm(), NO_PROGRESS)
    assert torch.isfinite(result.codes).all()
    assert result.hard_error <= result.nearest_error <= 1e-20
