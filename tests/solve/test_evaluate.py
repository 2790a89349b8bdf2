"""Output errors against brute force, masks, and the same bits on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_adaround.errors import InputError
from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.problem import OutputErrors


def brute_force(outputs: list[Tensor], targets: list[Tensor], keep: list[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Squared error and energy of every channel, `(O,)`, row by row; outputs and targets with channels last."""
    error, energy, rows = 0.0, 0.0, 0
    for out, target, kept in zip(outputs, targets, keep, strict=True):
        pairs = zip(out.reshape(-1, out.shape[-1]), target.reshape(-1, target.shape[-1]), strict=True)
        for (a, b), counts in zip(pairs, kept.reshape(-1).tolist(), strict=True):
            if counts:
                error, energy, rows = error + (a - b) ** 2, energy + b**2, rows + 1
    return error, energy, rows


def test_convolution_with_batch_norm_and_relu(make_problem: Any) -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    scale, shift = torch.randn(2, 6, dtype=torch.float64)
    inputs = [torch.randn(n, 4, s, s, dtype=torch.float64) for n, s in ((2, 5), (3, 7), (1, 6))]
    floats = [x + 0.1 * torch.randn_like(x) for x in inputs]
    problem = make_problem(layer, inputs, float_inputs=floats, transform=OutputTransform(scale, shift, "relu"))
    candidates = [problem.weight, problem.weight + 0.1 * torch.randn_like(problem.weight)]

    def through(x: Tensor, weight: Tensor) -> Tensor:
        y = F.conv2d(x, weight.reshape(layer.weight.shape), layer.bias.detach(), 2, 1, 1, 2).movedim(1, -1)
        return F.relu(y * scale + shift)

    errors = output_errors(problem, candidates, SoloComm())
    targets = [through(x, problem.weight) for x in floats]
    keep = [torch.ones(t.shape[:-1]) for t in targets]
    for number, weight in enumerate(candidates):
        error, energy, rows = brute_force([through(x, weight) for x in inputs], targets, keep)
        torch.testing.assert_close(errors.error[number], error, rtol=1e-11, atol=0)
        torch.testing.assert_close(errors.energy, energy, rtol=1e-11, atol=0)
        assert errors.num_rows == rows == 2 * 9 + 3 * 16 + 9
        assert errors.relative(number) == pytest.approx(float(error.sum() / energy.sum()), rel=1e-11)
    assert errors.error.dtype == torch.float64


def token_problem(make_problem: Any, masks: list[Tensor | None], *, flat: bool = False) -> Any:
    layer = nn.Linear(5, 3).double()
    inputs = [torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)]
    if flat:
        inputs = [x.reshape(-1, 5) for x in inputs]
    return make_problem(layer, inputs, masks=masks, batch_sizes=[2, 3])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("flat", [False, True])
def test_masked_tokens_do_not_count(flat: bool, dtype: torch.dtype, make_problem: Any) -> None:
    masks = [torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).to(dtype), torch.tensor([[0] * 4, [1, 0, 0, 0], [1, 1, 1, 0]])]
    problem = token_problem(make_problem, masks, flat=flat)
    # Whatever padding holds, even NaN, leaves no trace.
    for batch, mask in zip(problem.batches, masks, strict=True):
        for values in (batch.x_hat, batch.y):
            values.reshape(-1, values.shape[-1])[mask.reshape(-1) == 0] = torch.nan
    weight = problem.weight + 0.3
    errors = output_errors(problem, [weight], SoloComm())
    outputs = [batch.x_hat @ weight[0].T + problem.bias for batch in problem.batches]
    error, energy, rows = brute_force(outputs, [batch.y for batch in problem.batches], masks)
    torch.testing.assert_close(errors.error[0], error, rtol=1e-12, atol=0)
    torch.testing.assert_close(errors.energy, energy, rtol=1e-12, atol=0)
    assert errors.num_rows == rows == 10


def test_pooled_rows_all_count(make_problem: Any) -> None:
    layer = nn.Linear(5, 3).double()
    inputs = [torch.randn(2, 5, dtype=torch.float64)]
    problem = make_problem(layer, inputs, masks=[torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])])
    assert output_errors(problem, [problem.weight], SoloComm()).num_rows == 2


def test_all_masked_is_an_input_error(make_problem: Any) -> None:
    problem = token_problem(make_problem, [torch.zeros(2, 4), torch.zeros(3, 4)])
    with pytest.raises(InputError, match=r"layer block\.layer: the attention mask leaves no row"):
        output_errors(problem, [problem.weight], SoloComm())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["x_hat", "y"])
def test_activations_that_are_not_finite(where: str, value: float, make_problem: Any) -> None:
    problem = token_problem(make_problem, [None, None])
    getattr(problem.batches[1], where)[0, 0, 0] = value
    with pytest.raises(InputError, match=r"layer block\.layer: its activations are not finite"):
        output_errors(problem, [problem.weight], SoloComm())


def test_relative_error_without_energy() -> None:
    zeros = torch.zeros(2)
    errors = OutputErrors(zeros, torch.tensor([[2.0, 1.0], [0.0, 0.0]]), energy=zeros, from_inputs=zeros, num_rows=4)
    assert errors.relative(0) == 3.0
    assert errors.relative(1) == 0.0


@pytest.mark.parametrize("world_size", [2, 3, 5, 9])
def test_same_bits_on_any_number_of_ranks(world_size: int, make_problem: Any, share: Any, run_ranks: Any) -> None:
    # float32, sizes over many orders: any other order of sums would show.
    inputs = [torch.randn(3, 4, 6, 6) * 10.0**k for k in (-3, 0, 2, -1, 1, 0, 3)]
    problem = make_problem(nn.Conv2d(4, 5, 3), inputs)
    rounded = problem.grid.dequantize(problem.grid.quantize(problem.weight))
    alone = output_errors(problem, [rounded], SoloComm())
    assert (alone.error > 0).all()

    def work(comm: Any) -> Any:
        return output_errors(share(problem, comm.rank, world_size), [rounded], comm)

    for errors in run_ranks(world_size, work):
        assert torch.equal(errors.error, alone.error)
        assert torch.equal(errors.energy, alone.energy)
        assert errors.num_rows == alone.num_rows


def test_in_place_nothing(make_problem: Any) -> None:
    problem = token_problem(make_problem, [None, None])
    problem = replace(problem, transform=OutputTransform(activation="relu"))
    tensors = [tensor for batch in problem.batches for tensor in (batch.x_hat, batch.y)]
    before = [tensor.clone() for tensor in tensors]
    output_errors(problem, [problem.weight + 1], SoloComm())
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
