"""Which microbatch and sample a message names when activations stop being finite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve.evaluate import non_finite_error


def told(problem: Any) -> str:
    text = str(non_finite_error(problem, SoloComm()))
    assert text.startswith("layer block.layer: its activations are ")
    return text.removeprefix("layer block.layer: its activations are ").partition(";")[0]


@pytest.mark.parametrize("stream", ["x_hat", "x", "y"])
@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 2)], ids=["linear", "conv"])
def test_the_first_of_several(layer: nn.Module, stream: str, make_problem: Any) -> None:
    shape = (3, 4) if isinstance(layer, nn.Linear) else (3, 4, 3, 3)
    inputs = [torch.randn(shape) for _ in range(3)]
    problem = make_problem(layer, inputs, float_inputs=[x.clone() for x in inputs])
    tensors = [getattr(batch, stream) for batch in problem.batches]
    for microbatch, sample, value in ((2, 0, torch.nan), (1, 2, -torch.inf), (1, 1, torch.inf)):
        tensors[microbatch][sample].view(-1)[-1] = value
    what = {"x_hat": "quantized input", "x": "float input", "y": "float output"}[stream]
    assert told(problem) == f"not finite: inf in its {what}, sample 1 of microbatch 1"
    # Not in the order in which this rank holds them.
    batches = [replace(batch, index=index) for batch, index in zip(problem.batches, (7, 9, 8), strict=True)]
    assert told(replace(problem, batches=batches)) == f"not finite: nan in its {what}, sample 0 of microbatch 8"


def test_the_float_stream_is_blamed_first(make_problem: Any) -> None:
    inputs = [torch.randn(3, 4)]
    problem = make_problem(nn.Linear(4, 3), inputs, float_inputs=[inputs[0].clone()])
    (batch,) = problem.batches
    batch.x_hat[0, 0] = torch.nan
    batch.y[1, 0] = torch.nan
    batch.x[2, 0] = torch.nan
    assert told(problem) == "not finite: nan in its float input, sample 2 of microbatch 0"


@pytest.mark.parametrize("flat", [False, True])
def test_padding_is_not_blamed(flat: bool, make_problem: Any) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    x = torch.randn(9, 4) if flat else torch.randn(3, 3, 4)
    problem = make_problem(nn.Linear(4, 2), [x], masks=[mask])
    problem.batches[0].x_hat.view(3, 3, 4)[0, 2] = torch.nan
    problem.batches[0].x_hat.view(3, 3, 4)[2, 1, 3] = torch.nan
    assert told(problem).endswith("sample 2 of microbatch 0")


def test_finite_values_with_squares_beyond_the_precision(make_problem: Any) -> None:
    problem = make_problem(nn.Linear(4, 2), [torch.ones(3, 4)])
    problem.batches[0].y[1, 1] = -1e30
    assert told(problem) == "too large for float32: -1e+30 in its float output, sample 1 of microbatch 0"
    assert told(make_problem(nn.Linear(4, 2).double(), [torch.full((3, 4), 1e30).double()])) == "too large for float64"
