"""Ways of storing a weight: the layers that the graph finds, against models with a plain layer for each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from walks import clone, close, commit_weight, inputs_of, reach, rounded, sites_of, walker_for

from distributed_adaround import quantize
from distributed_adaround.capture.exported import export_model, straight_line
from distributed_adaround.capture.graph import capture
from distributed_adaround.data.microbatches import ModelInputs


class Calling(nn.Module):
    """forward is a function of the module and its inputs; tensors are parameters."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, Tensor) else member)
        self._function = forward

    def forward(self, *x: Tensor) -> Any:
        return self._function(self, *x)


@dataclass
class Layer:
    """A layer of a model: site name, parameter, its matrix `(out, in)` as a view into the parameter, its input and its
    bias as functions of the model (whose earlier layers may be rounded) and the model's input."""

    name: str
    parameter: str
    matrix: Callable[[Tensor], Tensor]
    x: Callable[..., Tensor]
    bias: Callable[[nn.Module], Tensor] | None = None
    dtype: torch.dtype = torch.float32


def rows(*sizes: int) -> list[ModelInputs]:
    return inputs_of(*(torch.randn(size, 6) for size in sizes))


def conv1d_of_gpt2() -> tuple[nn.Module, list[Layer]]:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.addmm(m.b, F.relu(x @ m.a), m.w)

    model = Calling(forward, a=torch.randn(6, 5), w=torch.randn(5, 4), b=torch.randn(4))
    return model, [
        Layer("a", "a", lambda p: p.T, lambda m, x: x),
        Layer("w", "w", lambda p: p.T, lambda m, x: F.relu(x @ m.a), lambda m: m.b),
    ]


def packed() -> tuple[nn.Module, list[Layer]]:
    """Query, key and value in one weight; taken out by split, chunk and slices of weight and bias."""

    def forward(m: Any, x: Tensor) -> Tensor:
        first, rest = m.w.split([3, 6])
        other, bias = m.b.split([3, 6])
        h = m.l(x)
        y = F.linear(h, first, other)
        for weight, b in zip(rest.chunk(2), bias.chunk(2), strict=True):
            y = y + F.linear(h, weight, b).tanh()
        return y

    model = Calling(forward, l=nn.Linear(6, 4), w=torch.randn(9, 4), b=torch.randn(9))
    return (
        model,
        [
            Layer("l", "l.weight", lambda p: p, lambda m, x: x, lambda m: m.l.bias),
            *(
                Layer(
                    f"w[{start}:{start + 3}]",
                    "w",
                    lambda p, s=start: p[s : s + 3],  # type: ignore[misc]
                    lambda m, x: m.l(x),
                    lambda m, s=start: m.b[s : s + 3],  # type: ignore[misc]
                )
                for start in (0, 3, 6)
            ),
        ],
    )


def columns() -> tuple[nn.Module, list[Layer]]:
    """Columns of one weight read apart, and the second behind the first."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, m.w[:, :6])), m.w[:, 6:])

    return Calling(forward, w=torch.randn(5, 11)), [
        Layer("w[:,0:6]", "w", lambda p: p[:, :6], lambda m, x: x),
        Layer("w[:,6:11]", "w", lambda p: p[:, 6:], lambda m, x: F.relu(F.linear(x, m.w[:, :6]))),
    ]


def selected() -> tuple[nn.Module, list[Layer]]:
    """One matrix after the other in a 3-D parameter, one of them transposed."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.relu(x @ m.w[0]), m.w[1].squeeze())

    return Calling(forward, w=torch.randn(2, 6, 6)), [
        Layer("w[0]", "w", lambda p: p[0].T, lambda m, x: x),
        Layer("w[1]", "w", lambda p: p[1], lambda m, x: F.relu(x @ m.w[0])),
    ]


def under_autocast() -> tuple[nn.Module, list[Layer]]:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.b(F.relu(m.a(x))).float()

    def second(m: Any, x: Tensor) -> Tensor:
        a = m.a
        return F.relu(F.linear(x.bfloat16(), a.weight.bfloat16(), a.bias.bfloat16()))

    model = Calling(forward, a=nn.Linear(6, 5), b=nn.Linear(5, 4))
    return model, [
        Layer("a", "a.weight", lambda p: p, lambda m, x: x.bfloat16(), lambda m: m.a.bias.bfloat16(), torch.bfloat16),
        Layer("b", "b.weight", lambda p: p, second, lambda m: m.b.bias.bfloat16(), torch.bfloat16),
    ]


CASES = [conv1d_of_gpt2, packed, columns, selected, under_autocast]


@pytest.mark.parametrize("case", CASES)
def test_a_walk_through_layers_however_they_are_stored(case: Callable[[], tuple[nn.Module, list[Layer]]]) -> None:
    torch.manual_seed(0)
    model, layers = case()
    batches = rows(4, 2)
    before, after = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model).requires_grad_(False)
    walker = walker_for(model, batches)
    assert [site.name for site in sites_of(walker)] == [layer.name for layer in layers]
    for site, layer in zip(sites_of(walker), layers, strict=True):
        float_matrix = layer.matrix(before.get_parameter(layer.parameter)).to(layer.dtype)
        found = reach(walker, site)
        assert torch.equal(site.weight_of(walker.tensor(site.weight_name)), float_matrix)
        for (x,), x_hat, x_float, y in zip(
            (each.args for each in batches), found.inputs, found.float_inputs, found.float_outputs, strict=True
        ):
            close(x_float, layer.x(before, x))
            close(x_hat, layer.x(after, x))
            bias = None if layer.bias is None else layer.bias(before)
            close(y, F.linear(layer.x(before, x), float_matrix, bias))
        if layer.bias is not None:
            assert site.bias_name is not None
            assert torch.equal(site.bias_of(walker.tensor(site.bias_name)), layer.bias(before))
        weight = rounded(float_matrix).to(layer.dtype)
        commit_weight(walker, site, weight)
        layer.matrix(after.get_parameter(layer.parameter)).copy_(weight)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, after.get_parameter(name))
    ends = list(walker.finish())
    with torch.no_grad():
        for (_, one, other), inputs in zip(ends, batches, strict=True):
            close(one, before(*clone(inputs.args)))
            close(other, after(*clone(inputs.args)))


def test_the_bias_of_a_part_is_shifted_in_its_place() -> None:
    model, _ = packed()
    walker = walker_for(model, rows(3))
    site = next(site for site in sites_of(walker) if site.name == "w[3:6]")
    assert site.shift_name == "b"
    bias = walker.tensor("b")
    expected = bias.clone()
    expected[3:6] += torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(site.shifted(bias, torch.tensor([1.0, 2.0, 3.0])), expected)


def reasons(model: nn.Module, *args: Tensor) -> dict[str, str]:
    graph = capture(straight_line(export_model(model.eval(), ModelInputs(args, {}))))
    return {parameter.name: parameter.reason for parameter in graph.float_parameters}


def test_parts_that_cannot_be_rounded_say_why() -> None:
    overlapping = Calling(lambda m, x: F.linear(x, m.w[:3]) + F.linear(x, m.w[2:5]), w=torch.randn(5, 6))
    assert reasons(overlapping, torch.randn(3, 6)) == {"w": "used by several layers in parts that overlap"}
    shared = Calling(lambda m, x: F.linear(x, m.w[:3]) + m.w[3:].sum(), w=torch.randn(5, 6))
    assert reasons(shared, torch.randn(3, 6)) == {"w": "shared with sum"}
    query = Calling(
        lambda m, x: F.linear(m.q, m.w[:3]).sum() + F.linear(x, m.w[3:]), w=torch.randn(5, 6), q=torch.randn(6)
    )
    assert reasons(query, torch.randn(3, 6)) == {
        "w[0:3]": "the input of its layer does not depend on the data",
        "q": "used by linear, not the weight of a layer",
    }
    expanded = Calling(lambda m, x: F.linear(x, m.w.expand(4, 6)), w=torch.randn(1, 6))
    assert reasons(expanded, torch.randn(3, 6)) == {"w": "used by linear, not the weight of a layer"}
    copied = Calling(lambda m, x: F.linear(x, m.w.T.reshape(4, 6)), w=torch.randn(4, 6))
    assert reasons(copied, torch.randn(3, 6)) == {"w": "used by unsafe_view, not the weight of a layer"}


def test_a_layer_on_a_vector_is_one_on_a_batch_of_one() -> None:
    model = Calling(lambda m, x: m.a(x) * m.gate(m.a(x).mean(0)), a=nn.Linear(6, 4), gate=nn.Linear(4, 4))
    walker = walker_for(model, rows(3, 5))
    reach(walker, sites_of(walker)[0])
    found = reach(walker, sites_of(walker)[1])
    assert [tensor.shape for tensor in (*found.inputs, *found.float_outputs)] == [(1, 4)] * 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory = self.other(y)
        return self.attention(self.first(x), memory, memory)[0]


@pytest.mark.parametrize("solver", ["gram", "minibatch"])
def test_cross_attention_is_quantized_on_the_grid(solver: str) -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    batches = [(torch.randn(4, 5, 8), torch.randn(4, 7, 8)) for _ in range(4)]
    quantized, table = quantize(model, batches, dtype="int3", solver=solver, max_iter=20, progress=False)
    assert [layer.name for layer in table] == [
        "other", "first", "attention.in_proj_weight[0:8]", "attention.in_proj_weight[8:24]", "attention.out_proj"
    ]  # fmt: skip
    weight = quantized.attention.in_proj_weight
    assert all(row.unique().numel() <= 8 for row in weight)
    assert not torch.equal(weight, model.attention.in_proj_weight)
