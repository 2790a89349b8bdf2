"""Recurrent layers and cells: every weight matrix is learned from what it multiplies, over all steps."""

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
from distributed_adaround.data.microbatches import ModelInputs


class Network(nn.Module):
    """A recurrent layer between two linear ones; all its results are used."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(5, 4), layer, nn.Linear(width, 3)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, ...]:
        if state is not None:  # comes with the samples first
            pair = isinstance(state, tuple)
            state = tuple(s.transpose(0, 1).contiguous() for s in state) if pair else state.transpose(0, 1).contiguous()
        outputs, last = self.layer(self.first(x), state)
        return (self.last(outputs), *(last if isinstance(last, tuple) else [last]))


class Steps(nn.Module):
    """A cell in a loop of two steps."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.last = cell, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.last(torch.stack(outputs, 1))


LAYERS: dict[str, tuple[nn.Module, int]] = {
    "lstm": (nn.LSTM(4, 6), 6),
    "lstm of two layers, both directions": (nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True), 12),
    "lstm with projection": (nn.LSTM(4, 6, batch_first=True, proj_size=2), 2),
    "gru of two layers without bias": (nn.GRU(4, 6, 2, batch_first=True, bias=False), 6),
    "gru, both directions, steps first": (nn.GRU(4, 6, bidirectional=True), 12),
    "rnn": (nn.RNN(4, 6, batch_first=True), 6),
    "rnn with relu": (nn.RNN(4, 6, 2, nonlinearity="relu"), 6),
}
CELLS = [nn.LSTMCell(5, 6), nn.GRUCell(5, 6, bias=False), nn.RNNCell(5, 6), nn.RNNCell(5, 6, nonlinearity="relu")]


@pytest.mark.parametrize(
    ("kind", "given"), [(kind, given) for kind, (layer, _) in LAYERS.items() for given in {False, layer.batch_first}]
)
def test_the_opened_graph_computes_what_the_model_computes_at_any_size(kind: str, given: bool) -> None:
    layer, width = LAYERS[kind]
    model = Network(layer, width).eval()

    def inputs(x: Tensor) -> ModelInputs:
        if not given:
            return ModelInputs((x,), {})
        samples = x.shape[0]
        depth = layer.num_layers * (2 if layer.bidirectional else 1)
        h = torch.randn(samples, depth, layer.proj_size or 6)
        return ModelInputs((x,), {"state": (h, torch.randn(samples, depth, 6)) if isinstance(layer, nn.LSTM) else h})

    graph = straight_line(export_model(model, inputs(torch.randn(3, 7, 5)), varying=True))
    for shape in ((3, 7, 5), (2, 9, 5), (4, 2, 5)):
        each = inputs(torch.randn(shape))
        with torch.no_grad():
            for ours, theirs in zip(graph(*each.args, **each.kwargs), model(*each.args, **each.kwargs), strict=True):
                close(ours, theirs)


def lstm_states(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """State before each step `(N, T, H)`, and the one after the last: written out, as torch documents it."""
    h = c = torch.zeros(x.shape[0], w_hh.shape[1])
    states = [h]
    for step in x.unbind(1):
        i, f, g, o = (step @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    return torch.stack(states, 1)


@pytest.mark.parametrize("reverse", [False, True])
def test_hidden_weights_are_learned_from_the_states_of_both_streams(reverse: bool) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(4, 6, batch_first=True, bidirectional=reverse).eval()
    data = [torch.randn(3, 5, 4), torch.randn(2, 5, 4)]
    suffix = "_l0_reverse" if reverse else "_l0"
    weights = {n: getattr(model, n + suffix).detach().clone() for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    w_ih, w_hh, b_ih, b_hh = weights.values()
    changed = copy.deepcopy(model)
    walker = walker_for(model, inputs_of(*data))
    sites = {site.name: site for site in sites_of(walker)}
    inner = sites[f"weight_hh{suffix}"]
    for site in sites.values():
        if site is inner:
            break
        commit_weight(walker, site, rounded(walker.tensor(site.weight_name)))
    found = reach(walker, inner)
    for place, x in enumerate(data):
        steps = x.flip(1) if reverse else x
        before, now = (lstm_states(steps, w, w_hh, b_ih, b_hh)[:, :-1] for w in (w_ih, rounded(w_ih)))
        before, now = (h.flip(1) if reverse else h for h in (before, now))
        close(found.float_inputs[place], before)
        close(found.inputs[place], now)
        close(found.float_outputs[place], F.linear(before, w_hh, b_hh))
    assert inner.shift_name == f"bias_hh{suffix}"
    commit_weight(walker, inner, rounded(w_hh))
    with torch.no_grad():
        original = copy.deepcopy(changed)
        for parameter in changed.parameters():
            if parameter.dim() == 2:
                parameter.copy_(rounded(parameter))
        ends = [after for index, _, after in walker.finish() if index == 10]
        for after, expected in zip(ends, (changed(data[0])[0], *changed(data[0])[1]), strict=True):
            close(after, expected)
        assert not torch.equal(original(data[0])[0], changed(data[0])[0])


# Its graph is that of all kinds, above.
QUICK = ("lstm of two layers, both directions", "lstm with projection", "gru of two layers without bias")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in LAYERS])
def test_all_matrices_of_a_recurrent_network_are_rounded(kind: str) -> None:
    torch.manual_seed(0)
    model = Network(*LAYERS[kind]).eval()
    batches = [torch.randn(8, 7 + length, 5) for length in (0, 0, 2)]
    quantized, table = quantize(model, batches, dtype="int4", solver="gram", sweeps=5, progress=False)
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    left = {name for name in matrices if torch.equal(model.get_parameter(name), quantized.get_parameter(name))}
    assert left == {name for name in matrices if "weight_hr" in name}
    assert len(table.to_dicts()) == len(matrices - left)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cells_are_learned_from_all_steps(cell: nn.Module) -> None:
    model = Steps(cell).eval()
    data = [torch.randn(3, 2, 5), torch.randn(2, 2, 5)]
    walker = walker_for(model, inputs_of(*data))
    assert {site.name: site.num_calls for site in sites_of(walker)} == {
        "cell.weight_ih": 2, "cell.weight_hh": 2, "last": 1,
    }  # fmt: skip
    site = next(site for site in sites_of(walker) if site.name == "cell.weight_hh")
    for other in sites_of(walker):
        if other is site:
            break
        commit_weight(walker, other, walker.tensor(other.weight_name))
    found = reach(walker, site)
    with torch.no_grad():
        first = cell(data[0][:, 0])
        close(found.float_inputs[0], torch.zeros(3, 6))
        close(found.float_inputs[1], first[0] if isinstance(first, tuple) else first)
        commit_weight(walker, site, walker.tensor(site.weight_name))
        commit_weight(walker, sites_of(walker)[-1], walker.tensor("last.weight"))
        for index, before, after in walker.finish():
            close(before, model(data[index - 10]))
            close(after, before)


def test_a_packed_sequence_is_no_error() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.last(nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0])

    model = Packed()
    batches = [{"x": torch.randn(3, 4, 5), "lengths": torch.tensor([4, 2, 1])} for _ in range(2)]
    quantized, _ = quantize(model, batches, dtype="int4", progress=False)
    assert not torch.equal(model.last.weight, quantized.last.weight)
