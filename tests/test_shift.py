"""A corrected bias in the model: which tensor takes it, and that only the quantized stream sees it, by both walkers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_batches import Batches
from walks import commit, plenty, reach, sites_of

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.calls import count_calls
from distributed_adaround.capture.exported import export_model, straight_line
from distributed_adaround.capture.graph import capture
from distributed_adaround.capture.graph_walk import GraphWalker
from distributed_adaround.capture.layer_modules import find_layers
from distributed_adaround.capture.replay_walk import ReplayWalker
from distributed_adaround.capture.sites import Walker
from distributed_adaround.data.microbatches import ModelInputs

CPU = torch.device("cpu")


class Calling(nn.Module):
    """forward is a function of the module and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **members: nn.Module) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self._function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


def by_graph(model: nn.Module, x: Tensor, *_: Tensor) -> Walker:
    store = ActivationStore(CPU, device_budget=0, host_budget=1 << 40)
    return GraphWalker(capture(straight_line(export_model(model.eval(), ModelInputs((x,), {})))), store)


def by_replay(model: nn.Module, *batches: Tensor) -> Walker:
    model.eval()
    calls = count_calls(model, find_layers(model)[0], Batches(batches), CPU)
    return ReplayWalker(model, calls, "a test", plenty())


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(6, 6, bias=bias)


def norm(seed: int = 0) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(6)
    for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return layer


def shared_bias() -> nn.Module:
    model = nn.Sequential(linear(), nn.ReLU(), linear(), nn.ReLU(), linear())
    model[2].bias = model[0].bias
    return model


def shared_weight() -> nn.Module:
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    model[2].weight = model[0].weight
    return model


# (model, shift_name of each site by the graph, and by replay, which does not see what follows a layer)
NAMES: dict[str, tuple[Callable[[], nn.Module], list[str | None], list[str | None]]] = {
    "bias": (lambda: nn.Sequential(linear(), linear()), ["0.bias", "1.bias"], ["0.bias", "1.bias"]),
    "no bias": (lambda: nn.Sequential(linear(False), nn.ReLU(), linear()), [None, "2.bias"], [None, "2.bias"]),
    "batch norm": (lambda: nn.Sequential(linear(False), norm()), ["1.running_mean"], [None]),
    "bias and batch norm": (lambda: nn.Sequential(linear(), norm()), ["0.bias"], ["0.bias"]),
    "batch norm and another reader": (lambda: Calling(lambda m, x: m.b(y := m.a(x)) + y, a=linear(False), b=norm()),
                                      [None], [None]),
    "one batch norm behind two layers": (
        lambda: Calling(lambda m, x: m.n(m.b(m.n(m.a(x)))), a=linear(False), b=linear(False), n=norm()),
        [None, None], [None, None]),
    "mean read elsewhere": (
        lambda: Calling(lambda m, x: m.n(m.a(x)) + m.n.running_mean, a=linear(False), n=norm()), [None], [None]),
    "runs twice": (lambda: Calling(lambda m, x: m.b(m.a(m.a(x).relu())), a=linear(), b=linear()),
                   ["a.bias", "b.bias"], [None, "b.bias"]),
    "runs twice, with batch norms": (
        lambda: Calling(lambda m, x: m.o(m.a(m.n(m.a(x)))), a=linear(False), n=norm(), o=norm()), [None], [None]),
    "bias of two layers": (shared_bias, [None, None, "4.bias"], [None, None, "4.bias"]),
    # Neither of the two biases belongs to all calls.
    "weight of two layers": (shared_weight, [None], [None]),
    "bias read elsewhere": (lambda: Calling(lambda m, x: m.a(x) * m.a.bias, a=linear()), [None], ["a.bias"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_tensor_that_takes_the_shift_is_read_by_the_layer_alone(name: str) -> None:
    build, graph, replay = NAMES[name]
    for walker, expected in (
        (by_graph(build(), torch.randn(4, 6)), graph),
        (by_replay(build(), torch.randn(4, 6)), replay),
    ):
        assert [site.shift_name for site in sites_of(walker)] == expected


def test_convolutions_have_their_biases_or_means_shifted() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, groups=2)
    )
    sites = sites_of(by_graph(model, torch.randn(3, 2, 5, 6)))
    assert [site.shift_name for site in sites] == ["1.running_mean", "3.bias"]
    shift = torch.tensor([1.0, 2.0])
    assert torch.equal(sites[0].shifted(torch.tensor([5.0, 5.0]), shift), torch.tensor([4.0, 3.0]))
    assert torch.equal(sites[1].shifted(torch.tensor([5.0, 5.0]), shift), torch.tensor([6.0, 7.0]))
    assert sites[1].shifted(torch.zeros(2).half(), shift.double()).dtype == torch.float16


def chain() -> nn.Module:
    """A layer with a bias, two with batch norms behind them, of which one has a bias too, and the last."""
    torch.manual_seed(0)
    return nn.Sequential(
        linear(), nn.ReLU(), linear(False), norm(), nn.ReLU(), linear(), norm(), nn.Tanh(), linear(), nn.Tanh()
    ).eval()


def changed(model: nn.Module, layer: int, weight: Tensor, shift: Tensor, walker: Walker) -> None:
    """The same commit in a plain model: by hand, outputs of the layer grow by the shift."""
    model[layer].weight.data.copy_(weight)
    if model[layer].bias is None:
        model[layer].bias = nn.Parameter(shift.clone())
    else:
        model[layer].bias.data += shift


@pytest.mark.parametrize("capture_by", [by_graph, by_replay])
@pytest.mark.parametrize("resumed", [False, True])
def test_only_the_quantized_stream_sees_a_shift(resumed: bool, capture_by: Callable[..., Walker]) -> None:
    """Inputs, targets and outputs of both streams are those of two whole models, one with and one without."""
    model, before, after = chain(), chain(), chain()
    data = [torch.randn(5, 6), torch.randn(3, 6)]
    walker = capture_by(model, *data)
    walker.start(Batches(data))
    shifted = []
    for site in sites_of(walker):
        layer = int(site.name)
        if not resumed:
            found = reach(walker, site)
            for x, x_float, x_hat, y in zip(data, found.float_inputs, found.inputs, found.float_outputs, strict=True):
                torch.testing.assert_close(x_float, before[:layer](x))
                torch.testing.assert_close(x_hat, after[:layer](x))
                torch.testing.assert_close(y, before[: layer + 1](x))
        weight = torch.round(before[layer].weight.detach() * 4) / 4
        shift = None if site.shift_name is None else torch.randn(6)
        commit(walker, site, weight, shift)
        if shift is not None:
            shifted.append(site.shift_name)
            changed(after, layer, weight, shift, walker)
        else:
            after[layer].weight.data.copy_(weight)
    graph = capture_by is by_graph
    assert shifted == (["0.bias", "3.running_mean", "5.bias", "8.bias"] if graph else ["0.bias", "5.bias", "8.bias"])
    ends = list(walker.finish())
    assert [index for index, *_ in ends] == [0, 1]
    for x, (_, first, last) in zip(data, ends, strict=True):
        torch.testing.assert_close(first, before(x))
        torch.testing.assert_close(last, after(x))
        assert not torch.allclose(first, last, atol=1e-2)
        # What is left in the model is the quantized one, and it has no tensor more than before.
        torch.testing.assert_close(model(x), after(x))
    assert model.state_dict().keys() == before.state_dict().keys()
    same = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before.state_dict()[name])]
    assert set(before.state_dict()) - set(same) == {f"{k}.weight" for k in (0, 2, 5, 8)} | set(shifted)


def test_float_tensors_are_held_only_while_the_walk_needs_them() -> None:
    model = chain()
    walker = by_graph(model, torch.randn(4, 6))
    assert isinstance(walker, GraphWalker)
    walker.start(Batches([torch.randn(4, 6)]))
    mean = model[3].running_mean.clone()
    for site in sites_of(walker):
        commit(walker, site, None, None if site.shift_name is None else torch.ones(6))
    # The float stream has passed the biases; a batch norm comes after its layer.
    assert set(walker._float_weights) == {"3.running_mean"}
    assert torch.equal(walker._float_weights["3.running_mean"], mean)
    assert torch.equal(model[3].running_mean, mean - 1)
    list(walker.finish())
    assert walker._float_weights == {}
