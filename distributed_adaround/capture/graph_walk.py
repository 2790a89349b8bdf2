"""Two streams through the captured graph, float and quantized, side by side.

    segment 0      site 0       segment 1      site 1    ...      rest
    x  ──nodes──►  W x = y  ──►  nodes   ──►   W x   ──►           float stream
    x̂  ──nodes──►  Ŵ x̂      ──►  nodes   ──►   Ŵ x̂   ──►           quantized stream

Between two sites a microbatch runs through the whole segment before the next one starts, so that only tensors which a
later segment reads (the frontier) are ever held for all microbatches. Each node runs once per microbatch and stream;
nodes that depend on no site run once for both. Weights visit the device for the segment that reads them.

A layer that runs several times is a unit where it runs last. Until then the quantized stream goes through it with its
float weight, so layers in between are learned as if it were not quantized; then it runs again from the first call on.
Its own later inputs hold the errors of all layers that are quantized by then, and none of its own earlier calls.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.binding import bind
from distributed_adaround.capture.find_sites import UnitCalls
from distributed_adaround.capture.graph import CapturedGraph, attribute
from distributed_adaround.capture.layer_calls import LayerCall
from distributed_adaround.capture.lifetimes import COMMON, FLOAT, QUANTIZED, Lifetimes
from distributed_adaround.capture.masks import MaskedRows, TokenMasks
from distributed_adaround.capture.sites import Batch, Unit, counting_rows
from distributed_adaround.data.microbatches import Microbatches
from distributed_adaround.errors import InputError, first_line

Values = dict[Node, Any]


@dataclass
class _Microbatch:
    """Live values of one microbatch: of each stream, and those that both share."""

    index: int
    masks: TokenMasks
    size: int
    values: dict[str, Values] = field(default_factory=lambda: {FLOAT: {}, QUANTIZED: {}, COMMON: {}})

    def get(self, stream: str, node: Node) -> Any:
        common = self.values[COMMON]
        return common[node] if node in common else self.values[stream][node]


class GraphWalker:
    """Walker over a captured graph; the only owner of activations."""

    def __init__(self, graph: CapturedGraph, store: ActivationStore) -> None:
        self._graph = graph
        self._device, self._store = store.device, store
        self.units = tuple(found.unit for found in graph.units)
        self.float_parameters = graph.float_parameters
        self.notes: list[str] = []
        self.rows: Mapping[str, float] = {found.unit.name: found.rows for found in graph.units}
        self._order = {node: position for position, node in enumerate(graph.nodes)}
        self._lifetimes = Lifetimes(graph.nodes, graph.units, graph.constant | graph.common)
        self._calls = {found.unit.name: found for found in graph.units}
        self._committed = _committed_constants(graph)
        self._rows = MaskedRows(graph.nodes, graph.constant)
        self._held: list[_Microbatch] = []
        self._cursor = 0
        self._reached: Unit | None = None
        self._constants: Values = {}
        # Parameters on the device, and what depends on those that are committed to: by stream, for one segment.
        self._weights: dict[tuple[str, Node], Any] = {}
        # Weights that the quantized stream has passed and the float stream has yet to read.
        self._float_weights: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        tensor = attribute(self._graph.module, name)
        assert isinstance(tensor, Tensor)
        return tensor.detach()

    @torch.no_grad()
    def start(self, microbatches: Microbatches) -> None:
        self._cursor, self._reached = 0, None
        self._held = []
        self._float_weights.clear()
        for index, inputs in microbatches:
            bound = bind(self._graph.module, inputs, index)
            batch = _Microbatch(index, self._rows.of_microbatch(bound, inputs), inputs.size)
            for node, value in bound.items():
                if node.users:
                    batch.values[COMMON][node] = self._keep(self._on_device(value))
            self._held.append(batch)

    @torch.no_grad()
    def reach(self, unit: Unit) -> list[Batch]:
        calls = self._calls[unit.name].calls
        last = calls[-1].node
        self._run(self._nodes_before(last), (FLOAT, QUANTIZED))
        self._cursor = self._order[last]
        # Held here: what nothing reads any more goes when the float stream passes the last call.
        found = [[self._call_of(held, unit, call) for call in calls[:-1]] for held in self._held]
        inputs = [self._inputs(held, calls[-1]) for held in self._held]
        self._run([last], (FLOAT,))
        self._reached = unit
        batches = []
        for held, earlier, values in zip(self._held, found, inputs, strict=True):
            here = [*earlier, self._batch(held, unit, calls[-1], values)]
            batches += [replace(batch, index=held.index * len(calls) + place) for place, batch in enumerate(here)]
        return batches

    def _inputs(self, held: _Microbatch, call: LayerCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """x̂, x and offsets of a call."""
        offsets = None if call.offsets is None else held.get(FLOAT, call.offsets)
        return held.get(QUANTIZED, call.source), held.get(FLOAT, call.source), offsets

    def _call_of(self, held: _Microbatch, unit: Unit, call: LayerCall) -> Batch:
        return self._batch(held, unit, call, self._inputs(held, call))

    def _batch(
        self, held: _Microbatch, unit: Unit, call: LayerCall, values: tuple[Tensor, Tensor, Tensor | None]
    ) -> Batch:
        x_hat, x, offsets = values
        _check_rows(unit, held.index, x_hat, x)
        y = held.values[FLOAT][call.node]
        if unit.sites[0].bias_name is None:
            y = self._without_bias(call, y)
        rows = call.as_rows(x)
        other = rows if x_hat is x else call.as_rows(x_hat)
        # Rows of other shape than the node's are no tokens.
        mask = self._rows.mask_of(call.node, unit.sites[0].geometry.channel_dim, held.masks) if rows is x else None
        y = call.as_rows(y)
        return Batch(held.index, other, rows, y, mask, held.size, call.parts(len(rows), offsets))

    def _without_bias(self, call: LayerCall, y: Tensor) -> Tensor:
        """The output of a call whose bias is not that of the site: calls have different ones."""
        if call.bias_node is None:
            return y
        bias: Tensor = self._constant(call.bias_node, FLOAT)
        return y - (bias if call.is_linear else bias.view(-1, *[1] * (y.dim() - 2)))

    @torch.no_grad()
    def commit(self, unit: Unit, tensors: Mapping[str, Tensor]) -> None:
        if self._reached != unit:
            self.reach(unit)
        found = self._calls[unit.name]
        last = found.calls[-1].node
        for name, value in tensors.items():
            tensor = self.tensor(name)
            if name not in self._float_weights and self._read_after(last, name):
                self._float_weights[name] = tensor.clone()
            tensor.copy_(value)
        # Without new weights all but the last call is as it was.
        self._run(self._second_run(found) if tensors else [last], (QUANTIZED,))
        self._cursor = self._order[last] + 1

    def _second_run(self, found: UnitCalls) -> list[Node]:
        """From the first call of a layer to its last, what has a value of its own in the quantized stream."""
        first, last = self._order[found.calls[0].node], self._order[found.calls[-1].node]
        shared = self._graph.constant | self._graph.common
        return [node for node in self._graph.nodes[first : last + 1] if node not in shared]

    def _read_after(self, last: Node, name: str) -> bool:
        """Whether the float stream has yet to read a tensor of the model, as it is or through what is made of it."""
        reading = {node for node in self._graph.nodes if node.op == "get_attr" and str(node.target) == name}
        for node in self._graph.nodes:
            if not reading.isdisjoint(node.all_input_nodes):
                if node in self._graph.constant:
                    reading.add(node)
                elif self._order[node] > self._order[last]:
                    return True
        return False

    @torch.no_grad()
    def finish(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        output = self._graph.nodes[-1]
        rest, leaves = self._nodes_before(output), pytree.tree_leaves(output.args[0])
        # One microbatch after the other to its end: outputs (logits, say) can be larger than all that came before.
        for batch in self._held:
            self._run_batch(batch, rest, (FLOAT, QUANTIZED))
            float_leaves, quantized_leaves = (
                pytree.tree_leaves(self._resolve(output.args[0], batch.values[stream] | batch.values[COMMON], stream))
                for stream in (FLOAT, QUANTIZED)
            )
            for node, before, after in zip(leaves, float_leaves, quantized_leaves, strict=True):
                if isinstance(before, Tensor) and before.is_floating_point():
                    mask = self._rows.mask_of(node, -1, batch.masks)
                    yield batch.index, counting_rows(before, mask), counting_rows(after, mask)
            for values in batch.values.values():
                values.clear()
        self._held = []
        for held in (self._constants, self._weights, self._float_weights):
            held.clear()

    def _nodes_before(self, node: Node) -> list[Node]:
        """Operations between the cursor and `node`."""
        return [n for n in self._graph.nodes[self._cursor : self._order[node]] if n.op == "call_function"]

    def _run(self, nodes: Sequence[Node], streams: Sequence[str]) -> None:
        """Run nodes for every microbatch; the weights they read are fetched once for all."""
        for batch in self._held:
            self._run_batch(batch, nodes, streams)
        self._weights.clear()
        if QUANTIZED in streams:
            for node in nodes:
                for source in self._lifetimes.ends(QUANTIZED, node):
                    self._constants.pop(source, None)

    def _run_batch(self, batch: _Microbatch, nodes: Sequence[Node], streams: Sequence[str]) -> None:
        """Run nodes for one microbatch, keep what a later segment reads, drop what nothing reads any more."""
        loaded: dict[str, Values] = {FLOAT: {}, QUANTIZED: {}, COMMON: {}}
        for node in nodes:
            if node in self._graph.constant:
                if node not in self._committed:
                    self._constant(node)
            elif node in self._graph.common:
                self._run_node(batch, node, COMMON, loaded)
            else:
                for stream in streams:
                    self._run_node(batch, node, stream, loaded)
            # A common value goes when the quantized stream has read it.
            for stream in (*streams, COMMON) if QUANTIZED in streams else streams:
                for source in self._lifetimes.ends(stream, node):
                    batch.values[stream].pop(source, None)
                    loaded[stream].pop(source, None)
        for values in batch.values.values():
            for node in nodes:
                if node in values:
                    values[node] = self._keep(values[node])

    def _run_node(self, batch: _Microbatch, node: Node, stream: str, loaded: dict[str, Values]) -> None:
        """One node for one microbatch in one stream. loaded: values brought back to the device in this segment."""
        values: Values = {}
        # A decision for both streams is the float stream's.
        reading = FLOAT if stream == COMMON else stream
        for source in node.all_input_nodes:
            if source not in self._graph.constant:
                owner = COMMON if source in self._graph.common else reading
                if source not in loaded[owner]:
                    loaded[owner][source] = self._on_device(batch.values[owner][source])
                values[source] = loaded[owner][source]
        args, kwargs = self._resolve((node.args, node.kwargs), values, reading)
        assert callable(node.target)
        try:
            result = node.target(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            where = f"microbatch {batch.index}: the model fails in {node.target}"
            raise InputError(f"{where}: {first_line(error)}") from error
        batch.values[stream][node] = loaded[stream][node] = result

    def _resolve(self, tree: Any, values: Values, stream: str) -> Any:
        """Arguments of a node with values in the place of nodes, and this rank's device in the place of any."""

        def leaf(value: Any) -> Any:
            if isinstance(value, Node):
                return values[value] if value in values else self._constant(value, stream)
            return self._device if isinstance(value, torch.device) else value

        return map_aggregate(tree, leaf)

    def _constant(self, node: Node, stream: str = QUANTIZED) -> Any:
        """Value of a node that depends on no data. Parameters are fetched once per segment, the rest computed once."""
        if node.op == "get_attr":
            name = str(node.target)
            if stream == FLOAT and name in self._float_weights:
                return self._on_device(self._float_weights[name])
            if (QUANTIZED, node) not in self._weights:
                self._weights[QUANTIZED, node] = self._on_device(attribute(self._graph.module, name))
            return self._weights[QUANTIZED, node]
        held: dict[Any, Any] = self._weights if node in self._committed else self._constants
        key = (stream, node) if node in self._committed else node
        if key not in held:
            args, kwargs = self._resolve((node.args, node.kwargs), {}, stream)
            assert callable(node.target)
            held[key] = node.target(*args, **kwargs)
        return held[key]

    def _on_device(self, value: Any) -> Any:
        """Operations like split return tuples of tensors."""
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self._device, non_blocking=True), value)

    def _keep(self, value: Any) -> Any:
        """A value for later: its tensors where the budget has room."""
        return pytree.tree_map_only(Tensor, self._store.keep, value)


def _committed_constants(graph: CapturedGraph) -> frozenset[Node]:
    """Constants that depend on a tensor that commits change: each stream has its own, until the next commit."""
    names = {name for site in graph.sites for name in (site.weight_name, site.shift_name)}
    found: set[Node] = set()
    for node in graph.nodes:
        if node in graph.constant and (str(node.target) in names or not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return frozenset(found)


def _check_rows(unit: Unit, microbatch: int, x_hat: Tensor, x: Tensor) -> None:
    if x_hat.shape != x.shape:
        what = f"has inputs of shape {tuple(x.shape)} in the float model and {tuple(x_hat.shape)} in the quantized one"
        advice = "rows that depend on the data do not pair up; leave the layers before it in float by quantize.ignore"
        raise InputError(f"layer {unit.name}: in microbatch {microbatch} it {what}; {advice}")
