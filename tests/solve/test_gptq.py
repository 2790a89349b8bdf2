"""Solver gptq, the baseline: its algorithm, the grid as it is, any number of ranks, and moments that are singular."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_solving import rounded, solve, solver_of

from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve import by_channel
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.gptq import SHARES
from distributed_adaround.solve.measure import measure
from distributed_adaround.solve.problem import LayerProblem, Solution


def solver(damping: float = 0.01) -> Any:
    return solver_of("gptq", damping=damping, starts=1)


def mixed(samples: int, channels: int) -> Tensor:
    return torch.randn(samples, channels).double() @ (torch.randn(channels, channels).double() / channels)


def total_error(problem: LayerProblem, codes: Tensor) -> float:
    return float(output_errors(problem, [problem.grid.dequantize(codes)], SoloComm()).error.sum())


def by_hand(weight: Tensor, scale: Tensor, second: Tensor, damping: float) -> Tensor:
    """Codes of 3 bits. Inputs of large A_jj first; the inputs still free always move to the least squares solution for
    the error so far, which is what the Cholesky factor of the inverse does, here with one solve for each input."""
    # Of inputs that are equally large the first one first.
    order = second.diagonal().argsort(descending=True, stable=True)
    second = second + damping * second.diagonal().mean() * torch.eye(len(second)).double()
    codes = torch.zeros_like(weight)
    moved = weight.clone()
    for place, j in enumerate(order):
        codes[:, j] = (moved[:, j] / scale[:, 0]).round().clamp(-4, 3)
        error = moved[:, j] - codes[:, j] * scale[:, 0]
        free = order[place + 1 :]
        if len(free):
            moved[:, free] += error[:, None] * torch.linalg.solve(second[free][:, free], second[free, j])
    return codes


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_codes_are_those_of_the_algorithm(damping: float, make_problem: Any) -> None:
    x = mixed(60, 10)
    problem = make_problem(nn.Linear(10, 8).double(), list(x.split((35, 25))))
    solution = solve(solver(damping), problem)
    assert torch.equal(solution.codes, by_hand(problem.weight[0], problem.grid.scale[0], x.T @ x / 60, damping)[None])
    assert not torch.equal(solution.codes, problem.grid.quantize(problem.weight))


def test_grids_stay_and_errors_fall_on_all_of_them(grid_name: str, make_problem: Any, with_grid: Any) -> None:
    problem = with_grid(make_problem(nn.Linear(64, 12).double(), [mixed(100, 64), mixed(60, 64)]), grid_name)
    solution = solve(solver(), problem)
    grid, codes = solution.grid or problem.grid, solution.codes
    assert torch.equal(grid.scale, problem.grid.scale)
    assert torch.equal(grid.representable(grid.scale), grid.scale)
    assert torch.equal(codes, codes.round())
    assert problem.grid.qmin <= codes.min() <= codes.max() <= problem.grid.qmax
    assert total_error(problem, codes) < 0.9 * total_error(problem, problem.grid.quantize(problem.weight))


def test_every_kind_of_layer(case: Any, make_problem: Any) -> None:
    layer, inputs = case
    problem = make_problem(layer, [x + x.roll(1, dims=1) for x in inputs])
    codes = solve(solver(), problem).codes
    second = measure(problem, SoloComm()).whole.second
    for moment, found, weight, scale in zip(second, codes, problem.weight, problem.grid.scale, strict=True):
        assert torch.equal(found, by_hand(weight, scale, moment, 0.01))


def test_same_bytes_on_any_number_of_ranks_in_float32(
    make_problem: Any, share: Any, run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_channel, "_BLOCK_CHANNELS", {"cpu": 2})
    problem = make_problem(nn.Conv1d(8, 10, 3, groups=2), [torch.randn(4, 8, 6) for _ in range(4)])
    results: list[Solution] = []
    for world_size in (1, 2, 3, 5):
        results += run_ranks(world_size, lambda comm: solve(solver(), share(problem, comm.rank, comm.world_size), comm))
    assert len(results) == 11
    assert all(torch.equal(result.codes, results[0].codes) for result in results)


@pytest.mark.parametrize("singular", [0, 1])
def test_where_moments_are_singular_the_damping_is_raised(
    singular: int, make_problem: Any, share: Any, run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All inputs of a group alike, in whole numbers: what is left of A after one step of Cholesky is exactly 0."""
    monkeypatch.setattr(by_channel, "_BLOCK_CHANNELS", {"cpu": 2})
    inputs = [torch.randn(4, 6, 5) for _ in range(2)]
    for x in inputs:
        x[:, 3 * singular : 3 * singular + 3] = 1
    problem = make_problem(nn.Conv1d(6, 4, 1, groups=2), inputs)
    alone = solve(solver(1e-30), problem)
    assert "singular at damping 1e-30" in alone.note
    for found in run_ranks(2, lambda comm: solve(solver(1e-30), share(problem, comm.rank, 2), comm)):
        assert found.note == alone.note
        assert torch.equal(found.codes, alone.codes)
    assert solve(solver(), problem).note == ""
    result = rounded(problem, solver(1e-30))
    assert result.note == alone.note
    assert result.hard_error <= result.nearest_error


@pytest.mark.parametrize("starts", [1, 2, 4, 8])
def test_each_channel_keeps_the_best_of_its_scales(starts: int, make_problem: Any) -> None:
    problem = make_problem(nn.Linear(24, 12).double(), [mixed(100, 24), mixed(60, 24)])
    found = solve(solver_of("gptq", starts=starts), problem)
    tried = []
    for share in SHARES[:starts]:
        grid = problem.grid.with_scale(problem.grid.scale * share)
        codes = solve(solver(), replace(problem, grid=grid)).codes
        tried.append(output_errors(problem, [grid.dequantize(codes)], SoloComm()).error[0])
    assert found.grid is not None
    ours = output_errors(problem, [found.grid.dequantize(found.codes)], SoloComm()).error[0]
    torch.testing.assert_close(ours, torch.stack(tried).amin(dim=0), rtol=1e-9, atol=0)


def test_the_linear_part_is_followed(make_problem: Any) -> None:
    inputs = [mixed(60, 8), mixed(40, 8)]
    problem = make_problem(nn.Linear(8, 6).double(), inputs, float_inputs=[1.5 * x for x in inputs])
    with_linear, without = (solve(solver(), replace(problem, asymmetry=share)).codes for share in (1.0, 0.0))
    assert total_error(problem, with_linear) < 0.7 * total_error(problem, without)
