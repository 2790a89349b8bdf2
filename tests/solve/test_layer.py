"""A layer's result: never worse than nearest, always on the grid, and its figures are what they say."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_formats import FLOAT32
from toy_solving import SOLO, Fixed, rounded, solver_of, with_outputs

from distributed_adaround.errors import InputError
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.solve import layer as layer_file
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.measure import measure
from distributed_adaround.solve.problem import Solution

NEAREST = solver_of("nearest")


def minibatch(num_steps: int, lr: float, reg_param: float = 0.01) -> Any:
    return solver_of("minibatch", max_iter=num_steps, batch_size=16, lr=lr, reg_param=reg_param)


def small_problem(make_problem: Any, outputs: int = 3) -> Any:
    mixing = torch.randn(3, 6).double()
    inputs = [torch.randn(20, 3).double() @ mixing for _ in range(3)]
    return make_problem(nn.Linear(6, outputs).double(), inputs)


def relative_error(problem: Any, codes: Tensor) -> float:
    """Written out: squared error over squared float outputs, over all rows and channels."""
    weight = (codes * problem.grid.scale)[0]
    error = energy = 0.0
    for batch in problem.batches:
        error += float((batch.x_hat @ weight.T + problem.bias - batch.y).square().sum())
        energy += float(batch.y.square().sum())
    return error / energy


def test_nearest_solver(make_problem: Any) -> None:
    problem = small_problem(make_problem)
    result = rounded(problem, NEAREST)
    codes = (problem.weight / problem.grid.scale).round().clamp(-4, 3)
    assert torch.equal(result.codes, codes)
    expected = relative_error(problem, codes)
    for figure in (result.nearest_error, result.soft_error, result.hard_error):
        assert figure == pytest.approx(expected, rel=1e-10)
    assert (result.flipped, result.unsettled, result.kept_nearest) == (0.0, 0.0, False)


def test_better_codes_are_taken(make_problem: Any) -> None:
    problem = small_problem(make_problem, outputs=1)
    low, high = problem.grid.neighbours(problem.weight)
    choices = [torch.where(torch.tensor([[up]]), high, low) for up in itertools.product([False, True], repeat=6)]
    best = min(choices, key=lambda codes: relative_error(problem, codes))
    soft = problem.weight * 1.01
    solution = Solution(codes=best, soft_weight=soft, unsettled=0.25)
    result = rounded(problem, Fixed(solution))
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
    result = rounded(problem, Fixed(Solution(codes=codes)))
    assert result.kept_nearest
    assert torch.equal(result.codes, problem.grid.quantize(problem.weight))
    assert result.hard_error == result.nearest_error < result.soft_error
    assert result.flipped == 0


@pytest.mark.parametrize("seed", range(8))
def test_never_worse_than_nearest_and_on_the_grid(seed: int, make_problem: Any) -> None:
    torch.manual_seed(seed)
    problem = small_problem(make_problem)
    # Too few steps, too large ones: bad codes are likely.
    result = rounded(problem, minibatch(3, lr=3.0))
    assert relative_error(problem, result.codes) <= relative_error(problem, problem.grid.quantize(problem.weight))
    assert torch.equal(result.codes, result.codes.round())
    assert result.codes.min() >= -4
    assert result.codes.max() <= 3


def test_ranks_agree(make_problem: Any, share: Any, run_ranks: Any) -> None:
    problem = small_problem(make_problem)
    solver = minibatch(60, lr=0.05)
    alone = rounded(problem, solver)
    for world_size in (2, 5):
        results = run_ranks(
            world_size,
            lambda comm: rounded(share(problem, comm.rank, comm.world_size), solver, comm),
        )
        for result in results:
            assert torch.equal(result.codes, alone.codes)
            assert result.hard_error == alone.hard_error
            assert result.nearest_error == alone.nearest_error
            assert result.kept_nearest == alone.kept_nearest


@pytest.mark.parametrize("solver", [NEAREST, minibatch(5, 0.01)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_activations_that_are_not_finite(
    world_size: int, solver: Any, make_problem: Any, share: Any, run_ranks: Any
) -> None:
    problem = small_problem(make_problem)
    problem.batches[1].x_hat[2, 3] = torch.inf

    def work(comm: Any) -> str:
        with pytest.raises(InputError) as caught:
            rounded(share(problem, comm.rank, world_size), solver, comm)
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
        rounded(problem, minibatch(5, 0.01))


def test_a_layer_that_is_on_the_grid_already(make_problem: Any) -> None:
    problem = make_problem(nn.Linear(6, 3).double(), [torch.randn(30, 6).double()])
    codes = torch.randint(-4, 4, (1, 3, 6)).double()
    grid = Grid(torch.full((1, 3, 1), 0.25).double(), torch.zeros(1, 3, 1).double(), -4, 3, FLOAT32)
    problem = replace(problem, weight=codes * 0.25, grid=grid)
    problem = with_outputs(problem, [batch.x_hat @ problem.weight[0].T + problem.bias for batch in problem.batches])
    result = rounded(problem, minibatch(120, 0.02))
    assert torch.equal(result.codes, codes)
    assert result.hard_error < 1e-25
    assert result.flipped == 0


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_a_layer_of_zeros(value: float, make_problem: Any) -> None:
    layer = nn.Conv2d(2, 3, 2)
    layer.weight.data.fill_(value)
    problem = make_problem(layer, [torch.randn(2, 2, 4, 4)])
    result = rounded(problem, minibatch(50, 0.02))
    assert torch.isfinite(result.codes).all()
    assert result.hard_error <= result.nearest_error <= 1e-20


# --- what nearest rounding loses, from moments instead of a pass over the data

STREAMS = ("one stream", "two streams")
NORMS = (None, "batch norm")


def measured_and_nearest(make_problem: Any, layer: nn.Module, streams: str, norm: str | None) -> Any:
    """A layer of float64, and its weight rounded to the nearest."""
    shape = (6,) if isinstance(layer, nn.Linear) else (6, 4, 3)
    inputs = [torch.randn(n, *shape).double() + 0.3 for n in (9, 4, 7)]
    floats = inputs if streams == "one stream" else [1.1 * x + 0.2 * torch.randn_like(x) for x in inputs]
    scale, shift = torch.randn(2, 5).double()
    transform = OutputTransform() if norm is None else OutputTransform(scale, shift)
    problem = make_problem(layer.double(), inputs, float_inputs=floats, transform=transform)
    return problem, problem.grid.dequantize(problem.grid.quantize(problem.weight))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("asymmetry", [0.0, 0.5])
@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 1)], ids=["linear", "conv 1x1"])
def test_the_error_of_nearest_rounding_follows_from_moments(
    layer: nn.Module, asymmetry: float, streams: str, norm: str | None, make_problem: Any
) -> None:
    problem, nearest = measured_and_nearest(make_problem, layer, streams, norm)
    problem = replace(problem, asymmetry=asymmetry)
    moments = measure(problem, SOLO).whole
    errors = output_errors(problem, [nearest], SOLO)
    assert bool(errors.from_inputs.any()) == (streams == "two streams")
    for share, expected in ((asymmetry, errors.error[0]), (1.0, errors.apart[0])):
        found = moments.error_sums(nearest - problem.weight, problem.weight, share).flatten()
        if norm is not None:
            found *= problem.transform.scale.square()
        torch.testing.assert_close(found + share**2 * errors.from_inputs, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("asymmetry", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("correct_bias", [False, True])
@pytest.mark.parametrize("rows_per_input", [None, 1])
def test_nearest_rounding_is_passed_over_the_data_only_where_moments_do_not_tell(
    rows_per_input: int | None,
    correct_bias: bool,
    asymmetry: float,
    streams: str,
    norm: str | None,
    make_problem: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem, nearest = measured_and_nearest(make_problem, nn.Linear(6, 5), streams, norm)
    problem = replace(problem, asymmetry=asymmetry, correct_bias=correct_bias, rows_per_input=rows_per_input)
    passed: list[int] = []

    def watched(problem: Any, candidates: Any, *others: Any) -> Any:
        passed.append(len(candidates))
        return output_errors(problem, candidates, *others)

    monkeypatch.setattr(layer_file, "output_errors", watched)
    result = rounded(problem, solver_of("gram", sweeps=5))
    every_row = rows_per_input is None
    assert passed == [1 if every_row else 2]
    assert result.nearest_error == pytest.approx(output_errors(problem, [nearest], SOLO).relative(0), rel=1e-9)


@pytest.mark.parametrize("name", ["gram", "gptq"])
def test_float_outputs_of_few_bits_are_no_error_of_the_weight(name: str, make_problem: Any) -> None:
    """At 8 bits the weight loses less than bfloat16 cuts off the outputs; the solver's gain must still be seen."""
    mixing = torch.randn(6, 24)
    problem = make_problem(nn.Linear(24, 8), [torch.randn(40, 6) @ mixing for _ in range(3)], num_bits=8)
    problem = with_outputs(problem, [batch.y.bfloat16() for batch in problem.batches])
    problem = replace(problem, asymmetry=0.5)
    result = rounded(problem, solver_of(name))
    assert not result.kept_nearest
    assert result.hard_error < 0.5 * result.nearest_error
    error = sum(
        float((batch.x_hat @ (result.grid.dequantize(result.codes) - problem.weight)[0].T).square().sum())
        for batch in problem.batches
    )
    energy = sum(float(batch.y.float().square().sum()) for batch in problem.batches)
    assert result.hard_error == pytest.approx(error / energy, rel=1e-3)
