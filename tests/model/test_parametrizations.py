"""Computed weights become plain ones with the same values, on the working copy alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from distributed_adaround import quantize
from distributed_adaround.model.parametrizations import fold_parametrizations


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def with_bias_too() -> nn.Module:
    layer = nn.Linear(6, 6)
    for name in ("weight", "bias"):
        parametrize.register_parametrization(layer, name, Doubled())
    return layer


def pruned_twice() -> nn.Module:
    layer = nn.Linear(6, 6)
    for _ in range(2):
        prune.random_unstructured(layer, "weight", amount=5)
    return layer


def tied() -> nn.Module:
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    for layer in (a, b):
        parametrize.register_parametrization(layer, "weight", Doubled())
    return nn.Sequential(a, b)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "old weight_norm": lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
    "weight_norm of a dimension": lambda: parametrizations.weight_norm(nn.Conv1d(6, 6, 1), dim=2),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
    "weight and bias": with_bias_too,
    "pruned twice": pruned_twice,
    "tied": tied,
}


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return nn.Sequential(KINDS[kind](), nn.ReLU(), nn.Conv1d(6, 4, 1) if "dimension" in kind else nn.Linear(6, 4))


def data(kind: str) -> list[Tensor]:
    return [torch.randn(8, 6, 5) if "dimension" in kind else torch.randn(8, 6) for _ in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_folded_model_computes_the_same_from_plain_weights(kind: str) -> None:
    model = network(kind).eval()
    (x, _) = data(kind)
    expected = model(x)
    names = fold_parametrizations(model)
    assert torch.equal(model(x), expected)
    plain = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv1d)}
    assert set(model.state_dict()) == {f"{name}.{leaf}" for name in plain for leaf in ("weight", "bias")}
    assert {name.rpartition(".")[2] for name in names} <= {"weight", "bias"}
    assert {type(model.get_submodule(name)) for name in plain} <= {nn.Linear, nn.Conv1d}
    assert fold_parametrizations(model) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_model_stays_parametrized(kind: str) -> None:
    model = network(kind).eval()
    batches = data(kind)
    before, keys = model(batches[0]), list(model.state_dict())
    quantized, table = quantize(model, batches, dtype="int4", solver="nearest", progress=False)
    assert torch.equal(model(batches[0]), before)
    assert list(model.state_dict()) == keys
    assert len(table.to_dicts()) >= 2
    for module in quantized.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            assert all(len(row.unique()) <= 16 for row in module.weight)
