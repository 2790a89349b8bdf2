"""polish: after any solver no channel gets worse, and no single code or scale is left that would make one better."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_formats import FLOAT32
from toy_solving import SOLO, solve, solver_of, with_quadratic

from distributed_adaround.numerics.descent import Descent
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve import by_channel
from distributed_adaround.solve import layer as polish_file
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solution

SOLVERS: dict[str, Any] = {
    "nearest": solver_of("nearest"),
    "gptq": solver_of("gptq"),
    "gram": solver_of("gram", sweeps=10),
    "minibatch": solver_of("minibatch", max_iter=40, batch_size=32, lr=0.05, reg_param=10.0),
}
NEAREST = SOLVERS["nearest"]


def mixed(samples: int, channels: int) -> Tensor:
    return torch.randn(samples, channels).double() @ (torch.randn(channels, channels).double() / channels)


def polish(problem: LayerProblem, solution: Solution, comm: Comm = SOLO) -> Solution:
    """After moments, as in a job."""
    return polish_file.polish(with_quadratic(problem, comm), solution, comm, Monitor())


def errors(problem: LayerProblem, solution: Solution) -> Tensor:
    """Squared output error of each output channel, `(O,)`: outputs against targets, no moments."""
    grid = solution.grid or problem.grid
    return output_errors(problem, [grid.dequantize(solution.codes)], SOLO).error[0]


def check_on_grid(grid: Grid, codes: Tensor) -> None:
    assert torch.equal(codes, codes.round())
    assert grid.qmin <= codes.min() <= codes.max() <= grid.qmax
    assert (grid.scale > 0).all()
    assert torch.equal(grid.representable(grid.scale), grid.scale)


@pytest.mark.parametrize("name", SOLVERS)
def test_no_channel_gets_worse_after_any_solver(name: str, make_problem: Any) -> None:
    inputs = [mixed(70, 24), mixed(50, 24)]
    problem = make_problem(
        nn.Linear(24, 16).double(), inputs, float_inputs=[x + 0.02 * mixed(*x.shape) for x in inputs]
    )
    before = solve(SOLVERS[name], problem)
    after = polish(problem, before)
    assert after.grid is not None
    check_on_grid(after.grid, after.codes)
    assert (errors(problem, after) <= errors(problem, before) * (1 + 1e-12)).all()
    assert errors(problem, after).sum() < 0.99 * errors(problem, before).sum()
    assert (after.soft_weight, after.unsettled) == (before.soft_weight, before.unsettled)
    # A channel that was not improved is as it was, codes and scale.
    same = errors(problem, after) >= errors(problem, before)
    assert torch.equal(after.codes[:, same], before.codes[:, same])
    assert torch.equal(after.grid.scale[:, same], (before.grid or problem.grid).scale[:, same])


def test_no_channel_gets_worse_on_any_grid(grid_name: str, make_problem: Any, with_grid: Any) -> None:
    problem = with_grid(make_problem(nn.Linear(64, 12).double(), [mixed(100, 64), mixed(60, 64)]), grid_name)
    before = solve(NEAREST, problem)
    after = polish(problem, before)
    assert after.grid is not None
    check_on_grid(after.grid, after.codes)
    assert (errors(problem, after) <= errors(problem, before) * (1 + 1e-12)).all()
    assert errors(problem, after).sum() < 0.7 * errors(problem, before).sum()
    if "tensor" in grid_name:
        assert torch.equal(after.grid.scale, problem.grid.scale)


def test_no_channel_gets_worse_in_any_kind_of_layer(case: Any, make_problem: Any) -> None:
    layer, inputs = case
    problem = make_problem(layer, inputs, float_inputs=[x + 0.1 * torch.randn_like(x) for x in inputs])
    before = solve(NEAREST, problem)
    after = polish(problem, before)
    assert (errors(problem, after) <= errors(problem, before) * (1 + 1e-12)).all()
    assert errors(problem, after).sum() < errors(problem, before).sum()


@pytest.mark.parametrize("seed", range(4))
def test_no_single_code_or_scale_is_left_to_improve(
    seed: int, make_problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every code of every weight is tried, and scales a little larger and smaller."""
    monkeypatch.setattr(polish_file, "_MAX_SWEEPS", 100)
    torch.manual_seed(seed)
    problem = make_problem(nn.Linear(10, 4).double(), [mixed(40, 10)])
    after = polish(problem, solve(NEAREST, problem))
    assert after.grid is not None
    found = errors(problem, after)
    for j in range(10):
        for code in range(-4, 4):
            codes = after.codes.clone()
            codes[:, :, j] = code
            assert (errors(problem, replace(after, codes=codes)) >= found * (1 - 1e-6)).all()
    for factor in (0.999, 1.001):
        other = replace(after, grid=replace(after.grid, scale=after.grid.scale * factor))
        assert (errors(problem, other) > found).all()


def test_weights_leave_their_two_neighbours(make_problem: Any) -> None:
    """Two inputs alike: the error of one that is clipped goes to the other."""
    x = mixed(50, 1).repeat(1, 2)
    layer = nn.Linear(2, 1, bias=False).double()
    layer.weight.data = torch.tensor([[6.0, 0.2]]).double()
    problem = make_problem(layer, [x])
    ones = torch.ones(1, 1, 1).double()
    problem = replace(problem, grid=Grid(ones, ones * 0, -4, 3, FLOAT32, per_channel=False))
    after = polish(problem, solve(NEAREST, problem))
    assert after.codes.tolist() == [[[3.0, 3.0]]]
    assert errors(problem, after) < 0.05 * float((x[:, 0] ** 2).sum())


def test_garbage_is_a_start_like_any_other(make_problem: Any) -> None:
    problem = make_problem(nn.Linear(24, 6).double(), [mixed(90, 24)])
    nearest = errors(problem, solve(NEAREST, problem)).sum()
    after = polish(problem, Solution(codes=torch.full_like(problem.weight, 3.0)))
    assert errors(problem, after).sum() < nearest


def test_a_layer_without_error_stays_as_it_is(make_problem: Any) -> None:
    problem = make_problem(nn.Linear(6, 3).double(), [mixed(30, 6)])
    codes = torch.randint(-4, 4, (1, 3, 6)).double()
    grid = Grid(torch.full((1, 3, 1), 0.25).double(), torch.zeros(1, 3, 1).double(), -4, 3, FLOAT32)
    problem = replace(problem, weight=codes * 0.25, grid=grid)
    after = polish(problem, Solution(codes=codes))
    assert after.grid is not None
    assert torch.equal(after.codes, codes)
    assert torch.equal(after.grid.scale, grid.scale)


def test_with_a_corrected_bias_the_spread_of_the_error_falls(make_problem: Any) -> None:
    """The mean may grow: it goes into the bias."""
    inputs = [mixed(80, 12) + 0.3]
    problem = make_problem(nn.Linear(12, 8).double(), inputs)
    problem = replace(problem, correct_bias=True)
    before = solve(NEAREST, problem)
    after = polish(problem, before)
    centred = inputs[0] - inputs[0].mean(dim=0)

    def spread(solution: Solution) -> Tensor:
        rounded = (solution.grid or problem.grid).dequantize(solution.codes)
        return (centred @ (rounded - problem.weight)[0].T).square().sum(dim=0)

    assert (spread(after) <= spread(before) * (1 + 1e-12)).all()
    assert spread(after).sum() < 0.7 * spread(before).sum()
    plain = polish(replace(problem, correct_bias=False), before)
    assert spread(after).sum() < spread(plain).sum()


def test_inputs_of_large_layers_are_visited_in_blocks(make_problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []

    class Watched(Descent):
        def __init__(self, *args: Any, block: int, steps: int) -> None:
            made.append((block, steps))
            super().__init__(*args, block=block, steps=steps)

    monkeypatch.setattr(polish_file, "Descent", Watched)
    problem = make_problem(nn.Linear(40, 9).double(), [mixed(90, 40), mixed(50, 40)])
    before = solve(SOLVERS["gptq"], problem)
    single = polish(problem, before)
    monkeypatch.setattr(polish_file, "_LARGE", 40)
    blocks = polish(problem, before)
    assert made == [(1, 1), (32, 4)]
    assert blocks.grid is not None
    check_on_grid(blocks.grid, blocks.codes)
    assert (errors(problem, blocks) <= errors(problem, before) * (1 + 1e-12)).all()
    assert errors(problem, blocks).sum() < 0.95 * errors(problem, before).sum()
    assert errors(problem, blocks).sum() < 1.2 * errors(problem, single).sum()


def test_a_channel_that_descent_made_worse_is_as_it_was(make_problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bad(Descent):
        def settle(self) -> None:
            super().settle()
            self.levels[:, :, 1] = -4
            self._runs[0].scale[:, :, 1] *= 2

    monkeypatch.setattr(polish_file, "Descent", Bad)
    problem = make_problem(nn.Linear(24, 3).double(), [mixed(90, 24)])
    before = solve(NEAREST, problem)
    after = polish(problem, before)
    assert after.grid is not None
    assert torch.equal(after.codes[:, 1], before.codes[:, 1])
    assert after.grid.scale[0, 1] == problem.grid.scale[0, 1]
    assert (after.grid.scale[:, [0, 2]] != problem.grid.scale[:, [0, 2]]).all()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("grid", ["per group", "affine", "mxfp4", "float16"])
def test_same_bytes_on_any_number_of_ranks_in_float32(
    grid: str, large: bool, make_problem: Any, with_grid: Any, share: Any, run_ranks: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(by_channel, "_BLOCK_CHANNELS", {"cpu": 2})
    monkeypatch.setattr(polish_file, "_LARGE", 1 if large else 1000)
    problem = with_grid(make_problem(nn.Conv1d(16, 10, 4, groups=2), [torch.randn(4, 16, 9) for _ in range(4)]), grid)
    start = Solution(codes=problem.grid.quantize(problem.weight))
    results: list[Solution] = []
    for world_size in (1, 2, 3, 5):
        results += run_ranks(world_size, lambda comm: polish(share(problem, comm.rank, comm.world_size), start, comm))
    assert not torch.equal(results[0].codes, start.codes)
    for result in results:
        assert result.grid is not None
        assert results[0].grid is not None
        assert torch.equal(result.codes, results[0].codes)
        assert torch.equal(result.grid.scale, results[0].grid.scale)


def test_the_loss_that_falls_is_that_of_the_layer(make_problem: Any) -> None:
    """The quadratic's channels are those of the outputs, in every group."""
    layer = nn.Conv1d(6, 8, 2, groups=2).double()
    problem = make_problem(layer, [torch.randn(5, 6, 7).double()])
    after = polish(problem, solve(NEAREST, problem))
    assert after.grid is not None
    rounded = after.grid.dequantize(after.codes)
    quadratic = with_quadratic(problem).quadratic
    assert quadratic is not None
    loss = quadratic.loss(rounded).flatten()
    torch.testing.assert_close(loss, errors(problem, after) / 30, rtol=1e-9, atol=1e-12)
