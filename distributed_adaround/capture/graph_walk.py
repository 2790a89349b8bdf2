"""Two streams through the captured graph, float and quantized, side by side.

    segment 0      site 0       segment 1      site 1    ...      rest
    x  ──nodes──►  W x = y  ──►  nodes   ──►   W x   ──►           float stream
    x̂  ──nodes──►  Ŵ x̂      ──►  nodes   ──►   Ŵ x̂   ──►           quantized stream

Between two sites a microbatch runs through the whole segment before the next one starts, so that only tensors which a
later segment reads (the frontier) are ever held for all microbatches. Each node runs once per microbatch and stream;
nodes that depend on no site run once for both. Weights visit the device for the segment that reads them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.binding import bind
from distributed_adaround.capture.graph import CapturedGraph, attribute
from distributed_adaround.capture.sites import Batch, Unit, counting_rows
from distributed_adaround.data.microbatches import Microbatches
from distributed_adaround.errors import InputError, first_line

FLOAT, QUANTIZED, COMMON = "float", "quantized", "common"
Values = dict[Node, Any]


@dataclass
class _Microbatch:
    """Live values of one microbatch: of each stream, and those that both share."""

    index: int
    mask: Tensor | None
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
        self.units = tuple(Unit((site,)) for site in graph.sites)
        self.float_parameters = graph.float_parameters
        self.notes: list[str] = []
        self._order = {node: position for position, node in enumerate(graph.nodes)}
        self._last_reads = _last_reads(graph.nodes)
        self._site_nodes = {site.name: node for node, site in graph.first_calls.items()}
        self._microbatches: list[_Microbatch] = []
        self._cursor = 0
        self._reached: Unit | None = None
        self._constants: Values = {}
        self._weights: Values = {}
        # Weights that the quantized stream has passed and the float stream has yet to read.
        self._float_weights: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        tensor = attribute(self._graph.module, name)
        assert isinstance(tensor, Tensor)
        return tensor.detach()

    @torch.no_grad()
    def start(self, microbatches: Microbatches) -> None:
        self._cursor, self._reached = 0, None
        self._microbatches = []
        self._float_weights.clear()
        for index, inputs in microbatches:
            batch = _Microbatch(index, inputs.mask, inputs.size)
            for node, value in bind(self._graph.module, inputs, index).items():
                if node.users:
                    batch.values[COMMON][node] = self._keep(self._on_device(value))
            self._microbatches.append(batch)

    @torch.no_grad()
    def reach(self, unit: Unit) -> list[Batch]:
        node = self._site_nodes[unit.site.name]
        self._run(self._nodes_before(node), (FLOAT, QUANTIZED))
        self._cursor = self._order[node]
        source = node.args[0]
        assert isinstance(source, Node)
        inputs = [(held.get(QUANTIZED, source), held.get(FLOAT, source)) for held in self._microbatches]
        self._run([node], (FLOAT,))
        self._reached = unit
        return [
            Batch(held.index, x_hat, x, held.values[FLOAT][node], held.mask, held.size)
            for held, (x_hat, x) in zip(self._microbatches, inputs, strict=True)
        ]

    @torch.no_grad()
    def commit(self, unit: Unit, tensors: Mapping[str, Tensor]) -> None:
        if self._reached != unit:
            self.reach(unit)
        node = self._site_nodes[unit.site.name]
        for name, value in tensors.items():
            tensor = self.tensor(name)
            if self._read_after(node, name):
                self._float_weights[name] = tensor.clone()
            tensor.copy_(value)
        self._run([node], (QUANTIZED,))
        self._cursor = self._order[node] + 1

    def _read_after(self, node: Node, name: str) -> bool:
        sources = (other for other in self._graph.nodes if other.op == "get_attr" and str(other.target) == name)
        return any(self._order[user] > self._order[node] for source in sources for user in source.users)

    @torch.no_grad()
    def finish(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        output = self._graph.nodes[-1]
        rest = self._nodes_before(output)
        # One microbatch after the other to its end: outputs (logits, say) can be larger than all that came before.
        for batch in self._microbatches:
            self._run_batch(batch, rest, (FLOAT, QUANTIZED))
            float_leaves, quantized_leaves = (
                pytree.tree_leaves(self._resolve(output.args[0], batch.values[stream] | batch.values[COMMON], stream))
                for stream in (FLOAT, QUANTIZED)
            )
            for before, after in zip(float_leaves, quantized_leaves, strict=True):
                if isinstance(before, Tensor) and before.is_floating_point():
                    yield batch.index, counting_rows(before, batch.mask), counting_rows(after, batch.mask)
            for values in batch.values.values():
                values.clear()
        self._microbatches = []
        for held in (self._constants, self._weights, self._float_weights):
            held.clear()

    def _nodes_before(self, node: Node) -> list[Node]:
        """Operations between the cursor and `node`."""
        return [n for n in self._graph.nodes[self._cursor : self._order[node]] if n.op == "call_function"]

    def _run(self, nodes: Sequence[Node], streams: Sequence[str]) -> None:
        """Run nodes for every microbatch; the weights they read are fetched once for all."""
        for batch in self._microbatches:
            self._run_batch(batch, nodes, streams)
        self._weights.clear()
        if QUANTIZED in streams:
            for node in nodes:
                for source in self._last_reads.get(node, ()):
                    self._constants.pop(source, None)

    def _run_batch(self, batch: _Microbatch, nodes: Sequence[Node], streams: Sequence[str]) -> None:
        """Run nodes for one microbatch, keep what a later segment reads, drop what nothing reads any more."""
        loaded: dict[str, Values] = {FLOAT: {}, QUANTIZED: {}, COMMON: {}}
        for node in nodes:
            if node in self._graph.constant:
                self._constant(node)
            elif node in self._graph.common:
                self._run_node(batch, node, COMMON, loaded)
            else:
                for stream in streams:
                    self._run_node(batch, node, stream, loaded)
            # A common value goes when the quantized stream has read it.
            for source in self._last_reads.get(node, ()):
                for stream in (*streams, COMMON) if QUANTIZED in streams else streams:
                    batch.values[stream].pop(source, None)
                    loaded[stream].pop(source, None)
        for values in batch.values.values():
            for node in nodes:
                if node in values:
                    values[node] = self._keep(values[node])

    def _run_node(self, batch: _Microbatch, node: Node, stream: str, loaded: dict[str, Values]) -> None:
        """One node for one microbatch in one stream. loaded: values brought back to the device in this segment."""
        values: Values = {}
        for source in node.all_input_nodes:
            if source not in self._graph.constant:
                owner = COMMON if source in self._graph.common else stream
                if source not in loaded[owner]:
                    loaded[owner][source] = self._on_device(batch.values[owner][source])
                values[source] = loaded[owner][source]
        args, kwargs = self._resolve((node.args, node.kwargs), values, stream)
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
            if node not in self._weights:
                self._weights[node] = self._on_device(attribute(self._graph.module, name))
            return self._weights[node]
        if node not in self._constants:
            args, kwargs = self._resolve((node.args, node.kwargs), {}, stream)
            assert callable(node.target)
            self._constants[node] = node.target(*args, **kwargs)
        return self._constants[node]

    def _on_device(self, value: Any) -> Any:
        """Operations like split return tuples of tensors."""
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self._device, non_blocking=True), value)

    def _keep(self, value: Any) -> Any:
        """A value for later: its tensors where the budget has room."""
        return pytree.tree_map_only(Tensor, self._store.keep, value)


def _last_reads(nodes: Sequence[Node]) -> dict[Node, list[Node]]:
    """For each node, the sources that no later node reads."""
    last = {source: node for node in nodes for source in node.all_input_nodes}
    reads: dict[Node, list[Node]] = {}
    for source, node in last.items():
        reads.setdefault(node, []).append(source)
    return reads
