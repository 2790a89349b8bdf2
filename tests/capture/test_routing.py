"""Rows that data send to different places: the two streams agree on where, and every walk gets to its end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from walks import close, commit_weight, inputs_of, reach, rounded, sites_of, walker_for

from distributed_adaround import quantize
from distributed_adaround.capture.exported import export_model, straight_line
from distributed_adaround.capture.graph import capture
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError


class Routed(nn.Module):
    """Experts of top-1, by nonzero, behind a layer; `picked` replays a routing instead of taking its own."""

    def __init__(self, num_experts: int = 3) -> None:
        super().__init__()
        self.inp, self.gate = nn.Linear(6, 8), nn.Linear(8, num_experts)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_experts))
        self.out = nn.Linear(8, 4)
        self.picked: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.inp(x))
        top = self.gate(h).argmax(-1)
        if self.picked is not None:
            top = self.picked
        y = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            rows = torch.where(top == e)[0]
            y = y.index_add(0, rows, expert(h[rows]))
        return self.out(y)


def routing(model: Routed, x: Tensor) -> Tensor:
    return model.gate(torch.relu(model.inp(x))).argmax(-1)


def seen_by(layer: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(x)
    handle.remove()
    return found[0]


def test_both_streams_go_where_the_float_stream_goes() -> None:
    torch.manual_seed(0)
    model = Routed()
    batches = inputs_of(*(torch.randn(size, 6) for size in (40, 7, 1)))
    before, after = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model).requires_grad_(False)
    walker = walker_for(model, batches)
    names = [site.name for site in sites_of(walker)]
    assert names == ["inp", "gate", "experts.0", "experts.1", "experts.2", "out"]
    differing = 0
    for site in sites_of(walker):
        found = reach(walker, site)
        for (x,), x_hat, x_float in zip((b.args for b in batches), found.inputs, found.float_inputs, strict=True):
            after.picked = routing(before, x)
            differing += int((routing(after, x) != after.picked).sum())
            close(x_float, seen_by(before.get_submodule(site.name), before, x))
            close(x_hat, seen_by(after.get_submodule(site.name), after, x))
        weight = rounded(before.get_parameter(site.weight_name))
        commit_weight(walker, site, weight)
        after.get_parameter(site.weight_name).copy_(weight)
    assert differing > 0, "the case shows nothing"
    for (_, one, other), inputs in zip(walker.finish(), batches, strict=True):
        after.picked = routing(before, inputs.args[0])
        close(one, before(inputs.args[0]))
        close(other, after(inputs.args[0]))


class Calling(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(6, 8), nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.a(x), self.b)


def streamed(function: Any) -> set[str]:
    """Operations after the first layer that each stream runs by itself."""
    graph = capture(straight_line(export_model(Calling(function).eval(), ModelInputs((torch.randn(5, 6),), {}))))
    own = set(graph.nodes) - graph.constant - graph.common
    return {str(n.target).removeprefix("aten.").split(".")[0] for n in own if n.op == "call_function"} - {"linear"}


def top_k(y: Tensor, b: nn.Module) -> Tensor:
    weights, index = torch.topk(torch.softmax(y, -1), 2)
    weights = weights / weights.sum(-1, keepdim=True)
    mask = F.one_hot(index, 8).permute(2, 1, 0).sum((1, 2)) > 0
    return b(y) * torch.zeros_like(y).scatter(1, index, weights) * mask


def biased(y: Tensor, b: nn.Module) -> Tensor:
    """As DeepSeek: the best scores with a correction, their weights from the scores without."""
    scores = y.sigmoid()
    index = torch.topk(scores + 0.1, 2).indices
    return b(y) * scores.gather(1, index).sum(-1, keepdim=True)


def sorted_rows(y: Tensor, b: nn.Module) -> Tensor:
    order = y[:, 0].argsort()
    return b(y[order])[order.argsort()]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (top_k, {"softmax", "mul"}),
        (biased, {"sigmoid", "add", "mul"}),
        (sorted_rows, {"select", "slice", "index"}),
        # Values that are no routing, and masks that only choose, are each stream's own.
        (lambda y, b: b(y.topk(2, dim=0).values), {"topk", "<built-in function getitem>"}),
        (lambda y, b: b(y.max(dim=0).values), {"max", "<built-in function getitem>"}),
        (lambda y, b: b(torch.where(y > 0, y, 0.1 * y)), {"gt", "where", "mul"}),
        (lambda y, b: b(y.masked_fill(~(y > 0), 0.0)), {"gt", "bitwise_not", "masked_fill", "logical_not"}),
        (lambda y, b: b(y * (y > 0)), {"gt", "mul"}),
        # But not the same mask where it lists rows.
        (lambda y, b: b(y[(y > 0).any(-1)]), {"index"}),
    ],
    ids=["top-k", "biased", "sorted", "top values", "maximum", "leaky", "filled", "multiplied", "listed"],
)
def test_what_each_stream_runs_by_itself(function: Any, expected: set[str]) -> None:
    assert streamed(function) <= expected
    assert streamed(function) & expected


def test_inputs_that_do_not_pair_up_are_an_error(monkeypatch: Any) -> None:
    monkeypatch.setattr("distributed_adaround.capture.routing._decides", lambda node: False)
    torch.manual_seed(0)
    walker = walker_for(Routed(), inputs_of(torch.randn(40, 6)))
    layers = iter(sites_of(walker))
    for site in (next(layers), next(layers)):
        reach(walker, site)
        commit_weight(walker, site, torch.randn_like(walker.tensor(site.weight_name)))
    what = r"^layer experts\.0: in microbatch 10 it has inputs of shape \(\d+, 8\) in the float model and \(\d+, 8\)"
    with pytest.raises(InputError, match=what):
        reach(walker, next(layers))


@pytest.mark.parametrize(
    "solver", ["nearest", "gram", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gptq", "minibatch"))]
)
def test_an_expert_without_rows_is_rounded_to_nearest_and_says_so(solver: str) -> None:
    torch.manual_seed(0)
    model = Routed(4).eval()
    with torch.no_grad():
        model.gate.bias[3] = -100  # never picked
    batches = [torch.randn(size, 6) for size in (3, 1, 15, 9)]
    found, table = quantize(model, batches, dtype="int4", solver=solver, max_iter=30, progress=False)
    rows = {row.name: row for row in table}
    assert rows["experts.3"].note == "no calibration data reach it: rounded to nearest"
    assert rows["experts.3"].kept_nearest
    weight = model.experts[3].weight
    assert (found.experts[3].weight - weight).abs().max() <= weight.abs().max() / 7
    assert not torch.equal(found.experts[3].weight, weight)
    for name in ("experts.0", "experts.1", "out"):
        assert rows[name].hard_error < 0.1
