"""Pruned weights keep their zeros with every solver, format and correction, and only then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_adaround import quantize

INPUTS, OUTPUTS = 32, 12
FORMATS: dict[str, dict[str, Any]] = {
    "symmetric": {"dtype": "int2"},
    "affine": {"dtype": "uint4", "qscheme": "per_channel_affine"},
    "affine groups": {"dtype": "uint3", "qscheme": "per_group_affine", "group_size": 8},
    "per tensor": {"dtype": "int4", "qscheme": "per_tensor_symmetric"},
    "floats": {"dtype": "nvfp4"},
    "by outputs": {"dtype": "int3", "observer": "output_mse"},
}
SOLVERS: dict[str, dict[str, Any]] = {
    "nearest": {"solver": "nearest"},
    "gptq": {"solver": "gptq"},
    "gram": {"solver": "gram", "sweeps": 12},
    "minibatch": {"solver": "minibatch", "max_iter": 60, "lr": 0.05, "batch_size": 64},
    "minibatch, polished": {"solver": "minibatch", "max_iter": 20, "batch_size": 64, "polish": True},
    "by channel": {"solver": "minibatch", "max_iter": 30, "batch_size": 64, "reproducible": True},
}


def pruned(kind: str = "linear") -> nn.Module:
    """Two of four neighbouring inputs are 0."""
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, OUTPUTS) if kind == "linear" else nn.Conv2d(8, OUTPUTS, 2, groups=2)
    weight = layer.weight.data.view(-1, 4)
    weight.scatter_(1, weight.abs().argsort(dim=1)[:, :2], 0.0)
    return layer


def inputs(*shape: int) -> list[Tensor]:
    """So alike that it pays to move zeros."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(64, *[1] * len(shape), generator=generator)
    return [common + 0.03 * torch.randn(64, *shape, generator=generator) for _ in range(4)]


def rounded(model: nn.Module, batches: list[Tensor], **fields: Any) -> Tensor:
    weight = quantize(model, batches, progress=False, **fields).model.weight
    assert isinstance(weight, Tensor)
    return weight


@pytest.mark.parametrize(
    ("solver", "number"),
    [
        *((solver, "symmetric") for solver in SOLVERS),
        *((solver, number) for solver in ("gram", "minibatch, polished") for number in list(FORMATS)[1:]),
        ("gptq", "affine groups"),
        ("gptq", "floats"),
    ],
)
def test_zeros_stay(solver: str, number: str) -> None:
    model = pruned()
    weight = rounded(model, inputs(INPUTS), keep_zeros=True, **SOLVERS[solver], **FORMATS[number])
    zeros = model.weight == 0
    assert int(zeros.sum()) == INPUTS * OUTPUTS // 2
    assert (weight[zeros] == 0).all()
    assert (weight[~zeros] != 0).any()


@pytest.mark.parametrize("solver", ["gptq", "gram", "minibatch"])
def test_zeros_of_a_convolution_in_groups_stay(solver: str) -> None:
    model = pruned("conv")
    weight = rounded(model, inputs(8, 3, 3), keep_zeros=True, dtype="int3", **SOLVERS[solver])
    assert (weight[model.weight == 0] == 0).all()


@pytest.mark.parametrize("solver", ["gptq", "gram", "minibatch, polished"])
def test_without_the_field_they_move(solver: str) -> None:
    model = pruned()
    weight = rounded(model, inputs(INPUTS), **SOLVERS[solver], **FORMATS["symmetric"])
    assert (weight[model.weight == 0] != 0).any()


@pytest.mark.parametrize("solver", ["gptq", "gram"])
def test_the_other_weights_make_up_for_it(solver: str) -> None:
    model, batches = pruned(), inputs(INPUTS)
    found = quantize(model, batches, progress=False, keep_zeros=True, dtype="int2", **SOLVERS[solver]).table[0]
    assert found.hard_error < 0.1 * found.nearest_error
