"""The walk through a captured graph against two whole models run with hooks: values, counts, memory."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from walks import PLENTY, Batches, clone, close, commit, inputs_of, reach, rounded, sites_of, store_of, walker_for

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.exported import export_model, straight_line
from distributed_adaround.capture.graph import capture
from distributed_adaround.capture.graph_walk import GraphWalker
from distributed_adaround.capture.lifetimes import COMMON, FLOAT, QUANTIZED
from distributed_adaround.capture.sites import Site
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError


def calls_of(model: nn.Module, name: str, inputs: ModelInputs) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of all calls of a layer, under all names of its weight, in a whole forward of the model. The
    outputs are without the bias where the weight has several."""
    weight = model.get_submodule(name).weight
    layers = [module for module in model.modules() if getattr(module, "weight", None) is weight]
    found: list[tuple[Tensor, Tensor]] = []

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((args[0].clone(), output - module.bias if len(layers) > 1 else output.clone()))

    handles = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        model(*clone(inputs.args), **clone(inputs.kwargs))
    for handle in handles:
        handle.remove()
    return found


def real_outputs(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def check_walk(
    model: nn.Module,
    batches: Sequence[ModelInputs],
    *,
    ignored: Sequence[str] = (),
    resumed: Sequence[str] = (),
    varying: bool = False,
    store: ActivationStore | None = None,
) -> GraphWalker:
    """Walk to the end and compare x, x̂, y and the outputs with two models that run in full for every site."""
    before, after = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    walker = walker_for(model, batches, varying=varying, store=store)
    for site in sites_of(walker):
        weight = None if site.name in ignored else rounded(before.get_parameter(site.weight_name))
        if site.name not in (*ignored, *resumed):
            found = reach(walker, site)
            expected, quantized = (
                [call for inputs in batches for call in calls_of(whole, site.name, inputs)] for whole in (before, after)
            )
            assert found.indices == [10 * site.num_calls + place for place in range(len(expected))]
            columns = (found.float_inputs, found.inputs, found.float_outputs)
            for x, quantized_x, y, call, other in zip(*columns, expected, quantized, strict=True):
                close(x, call[0])
                close(y, call[1])
                close(quantized_x, other[0])
            masks = [inputs.mask for inputs in batches for _ in range(site.num_calls)]
            # A mask counts where rows are its tokens, not behind a pooling.
            fit = [m is not None and y.shape[:-1] == m.shape for m, y in zip(masks, found.float_outputs, strict=True)]
            for mask, given, fits in zip(masks, found.masks, fit, strict=True):
                assert (given is not None) == fits
                assert mask is None or given is None or torch.equal(given, mask)
        commit(walker, site, weight)
        if weight is not None:
            after.get_parameter(site.weight_name).data.copy_(weight)
            assert torch.equal(model.get_parameter(site.weight_name), weight)
    ends = list(walker.finish())
    expected = []
    for index, inputs in enumerate(batches):
        with torch.no_grad():
            pair = (real_outputs(m(*clone(inputs.args), **clone(inputs.kwargs))) for m in (before, after))
            expected += [(10 + index, *outputs) for outputs in zip(*pair, strict=True)]
    assert [index for index, *_ in ends] == [index for index, *_ in expected]
    for (_, *actual), (index, *outputs) in zip(ends, expected, strict=True):
        mask = batches[index - 10].mask
        for one, other in zip(actual, outputs, strict=True):
            close(one, other if mask is None or other.shape[:2] != mask.shape else other[mask != 0])
    return walker


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding="same")
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x * 2 - 1)
        x = x + self.point(F.relu(self.depthwise(x)))
        return self.head(self.up(x).mean((2, 3)))


class InPlace(nn.Module):
    """Writes into what it read: activations, views, and a buffer of zeros of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        view = y[:, :3]
        view.mul_(2)
        y[:, 3:] = self.b(y)[:, 3:]
        z = torch.zeros_like(y)
        z[:, ::2] += y[:, ::2]
        y.relu_()
        z.add_(y)
        left, right = z.split(3, dim=1)
        left.copy_(right)
        return self.c(z).sigmoid_()


class Repeated(nn.Module):
    """One layer runs three times, another weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.b(x)) + x
            x = self.c(self.a(x).relu())
        return x


class Distant(nn.Module):
    """A shared layer with others between its calls, one of which is shared too and goes on after it; what the second
    call reads beside them was made before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(6, 6) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        early = self.d(x.cos())
        scale = x.abs().mean(-1, keepdim=True)
        y = self.a(early.relu())
        y = self.b(y.tanh()) + early * scale
        y = self.c(y.tanh()) + x
        y = self.a(y.relu()) + early
        y = y + self.e(y) * scale
        return self.b(y.tanh()) + early


class TwoInputs(nn.Module):
    """Several inputs of which one is not used, a dict of outputs with integers and an input among them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(5, 6)

    def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0, unused: Tensor | None = None) -> dict[str, Any]:
        hidden = (self.a(x) + self.b(y)) * scale
        return {"nested": (hidden, hidden.argmax(-1)), "x": x, "none": None}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        bias = torch.where(attention_mask[:, None, :] != 0, 0.0, -1e4)
        x = x + self.out((q @ k.transpose(1, 2) / 8**0.5 + bias).softmax(-1) @ v)
        return self.head(x)


def images(*sizes: int) -> list[ModelInputs]:
    return inputs_of(*(torch.randn(size, 3, 6, 6) for size in sizes))


def texts(*shapes: tuple[int, int]) -> list[ModelInputs]:
    batches = []
    for samples, length in shapes:
        mask = torch.ones(samples, length, dtype=torch.long)
        mask[0, length // 2 :] = 0
        batches.append({"input_ids": torch.randint(20, (samples, length)), "attention_mask": mask})
    return inputs_of(*batches)


def rows(*sizes: int) -> list[ModelInputs]:
    return inputs_of(*(torch.randn(size, 6) for size in sizes))


CASES: list[tuple[str, type[nn.Module], Any, bool, int]] = [
    ("convolutions", Convolutions, lambda: images(4, 4, 3), False, PLENTY),
    ("remainder of one sample", Convolutions, lambda: images(4, 1), False, 500),
    ("in place", InPlace, lambda: rows(4, 4, 1), False, PLENTY),
    ("in place on disk", InPlace, lambda: rows(4, 4, 1), False, 500),
    ("repeated", Repeated, lambda: rows(4, 2), False, 1000),
    ("shared over a distance", Distant, lambda: rows(4, 2), False, 1000),
    ("attention, as many samples as tokens", Attention, lambda: texts((5, 5), (5, 5), (2, 5)), False, PLENTY),
    ("attention, other lengths", Attention, lambda: texts((3, 7), (3, 4), (1, 9)), True, 500),
]


@pytest.mark.parametrize(("kind", "batches", "varying", "budget"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_activations_are_those_of_two_whole_models(
    kind: type[nn.Module], batches: Any, varying: bool, budget: int, tmp_path: Any
) -> None:
    store = store_of(budget, tmp_path)
    check_walk(kind(), batches(), varying=varying, store=store)
    assert (store.peak["disk"] > 0) == (budget != PLENTY)
    assert store.peak["host"] <= budget
    gc.collect()
    assert store._used == {"device": 0, "host": 0, "disk": 0}
    assert list(tmp_path.iterdir()) == []


def test_several_inputs_and_outputs() -> None:
    unused = torch.randn(3, 2)
    batches = [
        ModelInputs((torch.randn(n, 4),), {"scale": 2.0, "unused": unused[:n], "y": torch.randn(n, 5)}) for n in (3, 2)
    ]
    check_walk(TwoInputs(), batches)
    walker = walker_for(TwoInputs(), batches)
    assert {node.target for batch in walker._held for node in batch.values[COMMON]} == {"x", "y"}


@pytest.mark.slow
def test_tiny_transformers() -> None:
    """Both go through whole jobs in test_huggingface.py."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    check_walk(
        transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=20)), texts((3, 6), (1, 8)), varying=True
    )
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=20, use_cache=False)
    check_walk(transformers.LlamaForCausalLM(config), texts((3, 6), (2, 6)))


def test_ignored_layers_stay_float_and_resumed_ones_are_not_reached() -> None:
    model = Convolutions()
    weight = model.point.weight.clone()
    check_walk(model, images(3, 2), ignored=["stem.0", "point"], resumed=["depthwise"])
    assert torch.equal(model.point.weight, weight)


def test_a_layer_may_be_reached_again_after_a_new_start() -> None:
    model, batches = Repeated(), rows(3)
    walker = walker_for(model, batches)
    first = reach(walker, sites_of(walker)[0])
    walker.start(Batches(batches))
    again = reach(walker, sites_of(walker)[0])
    assert torch.equal(first.float_outputs[0], again.float_outputs[0])
    commit(walker, sites_of(walker)[0], None)
    commit(walker, sites_of(walker)[1], None)
    ((_, before, after),) = walker.finish()
    assert torch.equal(before, after)


def test_a_new_start_forgets_what_was_reached() -> None:
    batches = rows(3)
    walker = walker_for(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), batches)
    (site,) = sites_of(walker)
    reach(walker, site)
    walker.start(Batches(batches))
    commit(walker, site, None)
    assert len(list(walker.finish())) == 1


@pytest.mark.parametrize("kind", [Convolutions, Repeated, InPlace])
def test_every_node_runs_once_per_microbatch_and_stream(kind: type[nn.Module], monkeypatch: Any) -> None:
    batches = images(2, 3, 1) if kind is Convolutions else rows(2, 3, 1)
    walker = walker_for(kind(), batches)
    ran: Counter[tuple[int, str, str]] = Counter()
    computed: Counter[str] = Counter()
    original = GraphWalker._run_node

    def run_node(self: Any, batch: Any, node: Any, stream: str, loaded: Any) -> None:
        ran[batch.index, node.name, stream] += 1
        original(self, batch, node, stream, loaded)

    monkeypatch.setattr(GraphWalker, "_run_node", run_node)
    graph = walker._graph
    for node in graph.nodes:
        if node.op == "call_function":
            monkeypatch.setattr(node, "target", counting(node.target, computed, node.name))
    for site in sites_of(walker):
        reach(walker, site)
        commit(walker, site, rounded(walker.tensor(site.weight_name)))
    list(walker.finish())
    expected: Counter[tuple[int, str, str]] = Counter()
    for node in graph.nodes:
        if node.op == "call_function" and node not in graph.constant:
            for stream in (COMMON,) if node in graph.common else (FLOAT, QUANTIZED):
                expected.update((index, node.name, stream) for index in (10, 11, 12))
    for found in graph.units:
        # Once more for every layer that is called before and after it; the last call waits for the new weight.
        inside = between(graph.nodes, found)[:-1] if found.repeats else []
        expected.update((index, node.name, QUANTIZED) for node in inside for index in (10, 11, 12))
    assert ran == expected
    assert {stream for _, _, stream in ran} >= {FLOAT, QUANTIZED}
    # And the operations behind the nodes: constants once in all.
    runs = Counter({node.name: 1 for node in graph.constant if node.op == "call_function"})
    for (_, name, _), number in expected.items():
        runs[name] += number
    assert computed == runs


def between(nodes: Sequence[Any], found: Any) -> list[Any]:
    """Operations from a layer's first call to its last. All of them depend on it in the models here."""
    first, last = (nodes.index(found.calls[place].node) for place in (0, -1))
    return [node for node in nodes[first : last + 1] if node.op == "call_function"]


def counting(function: Any, calls: Counter[str], name: str) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    return counted


def test_constants_are_computed_once_and_let_go() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shift = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + self.shift.exp()).relu()

    walker = walker_for(Constant(), rows(2, 2))
    computed: Counter[str] = Counter()
    (constant,) = (node for node in walker._graph.constant if node.op == "call_function")
    constant.target = counting(constant.target, computed, "exp")
    for site in sites_of(walker):
        commit(walker, site, None)
        assert not walker._weights
    assert computed == {"exp": 1}
    assert not walker._constants
    list(walker.finish())


def test_only_the_frontier_is_held() -> None:
    """A chain of layers needs the same memory however long it is."""
    peaks = []
    for length in (3, 9):
        store = store_of()
        blocks = (nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6)) for _ in range(length))
        check_walk(nn.Sequential(*blocks), rows(4, 4, 4), store=store)
        peaks.append(store.peak["host"])
    assert peaks[0] == peaks[1]


class Watched(nn.Module):
    """A hundred elementwise operations between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for _ in range(100):
            x = x.cos()
        return self.b(x)


def test_values_inside_a_segment_are_let_go(monkeypatch: Any) -> None:
    held: list[int] = []
    original = GraphWalker._run_node

    def run_node(self: Any, batch: Any, node: Any, stream: str, loaded: Any) -> None:
        original(self, batch, node, stream, loaded)
        held.append(sum(len(values) for tree in (batch.values, loaded) for values in tree.values()))

    monkeypatch.setattr(GraphWalker, "_run_node", run_node)
    check_walk(Watched(), rows(3))
    assert len(held) > 200
    assert max(held) <= 8


def test_one_copy_of_the_weights(monkeypatch: Any) -> None:
    model = Convolutions()
    walker = walker_for(model, images(2))
    for site in sites_of(walker):
        weight = model.get_parameter(site.weight_name)
        assert walker.tensor(site.weight_name).data_ptr() == weight.data_ptr()
        reach(walker, site)
        commit(walker, site, rounded(weight))
        assert walker.tensor(site.weight_name).data_ptr() == model.get_parameter(site.weight_name).data_ptr()
    assert walker._float_weights == {}
    # The float stream has passed the last call of a shared layer when it is committed.
    repeated = walker_for(Repeated(), rows(2))
    for site in sites_of(repeated):
        commit(repeated, site, rounded(repeated.tensor(site.weight_name)))
    assert repeated._float_weights == {}


def test_a_rank_without_microbatches_walks_along() -> None:
    model = Convolutions().eval()
    graph = capture(straight_line(export_model(model, images(3)[0])))
    walker = GraphWalker(graph, store_of())
    walker.start(Batches([]))
    for site in sites_of(walker):
        found = reach(walker, site)
        assert (found.indices, found.inputs, found.float_outputs) == ([], [], [])
        commit(walker, site, rounded(model.get_parameter(site.weight_name)))
    assert list(walker.finish()) == []
    assert torch.equal(model.point.weight, rounded(model.point.weight))


def test_masks_and_sizes_go_with_the_activations() -> None:
    batches = texts((3, 7), (2, 7))
    walker = walker_for(Attention(), batches)
    found = reach(walker, sites_of(walker)[0])
    assert found.batch_sizes == [3, 2]
    assert all(mask is each.mask for mask, each in zip(found.masks, batches, strict=True))


def start_error(model: nn.Module, first: ModelInputs, second: ModelInputs, *, varying: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        walker_for(model, [first, second], varying=varying)
    return str(caught.value)


def test_inputs_that_the_graph_was_not_captured_for_are_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(6, 6)

        def forward(self, x: Tensor, steps: int = 1) -> Tensor:
            state = torch.zeros_like(x[:, 0])
            for t in range(x.shape[1]):
                state = torch.tanh(self.cell(x[:, t] + steps * state))
            return state

    short, long = (ModelInputs((torch.randn(3, length, 6),), {}) for length in (4, 5))
    assert "size 4 in dimension 1, the data has shape (3, 5, 6)" in start_error(Recurrent(), short, long, varying=True)
    one, two = (ModelInputs((torch.randn(3, 4, 6),), {"steps": steps}) for steps in (1, 2))
    assert "'steps' = 1, the data has 2" in start_error(Recurrent(), one, two)
    wrong = ModelInputs((), {"pixels": torch.randn(3, 4, 6)})
    assert "the model takes the inputs ['x'], the data has ['pixels']" in start_error(Recurrent(), short, wrong)


def test_data_that_an_operation_refuses_is_an_input_error() -> None:
    good, bad = texts((3, 7), (3, 7))
    bad.kwargs["input_ids"][1, 2] = 99  # type: ignore[index]
    walker = walker_for(Attention(), [good, bad])
    with pytest.raises(
        InputError, match=r"^microbatch 11: the model fails in aten\.embedding\.default: IndexError: index out of range"
    ):
        reach(walker, sites_of(walker)[0])


def test_sites_and_reasons_are_those_of_the_graph() -> None:
    walker = walker_for(Attention(), texts((3, 7)))
    assert [site.name for site in sites_of(walker)] == ["qkv", "out", "head"]
    assert isinstance(sites_of(walker)[0], Site)
    assert walker.notes == []
    assert {parameter.name for parameter in walker.float_parameters} == {
        "table.weight", "qkv.bias", "out.bias", "head.bias"
    }  # fmt: skip
