"""Which weights of a graph can be rounded, where their layers run, and why every other parameter stays in float.

A parameter is followed through all operations that only look at it to the nodes that compute with it. Where these are
layers, each part of the parameter that a layer reads is a site; calls that read the same part are calls of one layer.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from distributed_adaround.capture.layer_calls import LayerCall, Operand, Operands, read_layers, read_table, unusable
from distributed_adaround.capture.operations import layer_geometry, module_class, operation_name, what_follows
from distributed_adaround.capture.recurrent import reads_along
from distributed_adaround.capture.sites import BatchNormAfter, FloatParameter, Site, Unit, unusable_values
from distributed_adaround.numerics.layers import LayerGeometry
from distributed_adaround.numerics.weight_view import WeightView


@dataclass(frozen=True)
class UnitCalls:
    """A unit and the nodes at which it runs, in the order of execution (of experts: the calls of the first one)."""

    unit: Unit
    calls: tuple[LayerCall, ...]

    def as_router(self) -> "UnitCalls":
        return replace(self, unit=Unit(tuple(replace(site, is_router=True) for site in self.unit.sites)))

    @property
    def repeats(self) -> bool:
        return len(self.calls) > 1

    @property
    def rows(self) -> float:
        """Of all calls and sites together, in the microbatch of the export."""
        elements = sum(_num_elements(call.node.meta.get("val")) for call in self.calls)
        return elements / self.unit.sites[0].geometry.out_channels


def _num_elements(value: object) -> float:
    """Of the tensor that a node made while it was exported; sizes that depend on data count as 1."""
    if not isinstance(value, Tensor):
        return 1.0
    hints = (size if isinstance(size, int) else size.node.hint for size in value.shape)
    return math.prod(float(hint) if isinstance(hint, int) else 1.0 for hint in hints)


@dataclass(frozen=True)
class Found:
    """units: in the order of their last calls."""

    units: tuple[UnitCalls, ...]
    float_parameters: tuple[FloatParameter, ...]


def find_sites(
    module: GraphModule, nodes: Sequence[Node], constant: frozenset[Node], embeddings: bool = False
) -> Found:
    """embeddings: tables that nothing but look-ups reads are sites too."""
    return _Finder(module, nodes, constant, embeddings).found()


class _Finder:
    def __init__(self, module: GraphModule, nodes: Sequence[Node], constant: frozenset[Node], embeddings: bool) -> None:
        self._constant = constant
        self._order = {node: position for position, node in enumerate(nodes)}
        self._parameters = dict(module.named_parameters())
        self._operands = operands = Operands(module, nodes)
        self._calls = {node: calls for node in nodes if (calls := read_layers(node, operands))}
        if embeddings:
            tables = {node: table for node in nodes if (table := read_table(node, operands)) is not None}
            self._calls |= {node: (table,) for node, table in tables.items()}
        # What computes with each tensor of the model, and through which node it reads it.
        self._readers: dict[str, list[tuple[Node, Node]]] = defaultdict(list)
        for node in nodes:
            for source in () if node in operands else node.all_input_nodes:
                if source in operands and not reads_along(node, source):
                    self._readers[operands.owner(source)].append((node, source))

    def found(self) -> Found:
        groups: list[tuple[str, tuple[LayerCall, ...]]] = []
        left: list[FloatParameter] = []
        for name, parameter in self._parameters.items():
            reason, parts = self._parts(name, parameter)
            if reason is not None:
                left.append(FloatParameter(name, tuple(parameter.shape), reason))
            for (view, calls), label in zip(parts.items(), _labels(parameter, list(parts)), strict=True):
                why = self._unusable_part(calls)
                if why is None:
                    groups.append((label, calls))
                else:
                    left.append(FloatParameter(name + label, view.shape if label else tuple(parameter.shape), why))
        groups.sort(key=lambda group: self._order[group[1][-1].node])
        spans = [(self._order[calls[0].node], self._order[calls[-1].node]) for _, calls in groups]
        units: dict[object, tuple[list[Site], tuple[LayerCall, ...]]] = {}
        for label, calls in groups:
            key = tuple(call.node for call in calls), calls[0].weight.name
            units.setdefault(key, ([], calls))[0].append(self._site(label, calls, spans))
        return Found(tuple(UnitCalls(Unit(tuple(sites)), calls) for sites, calls in units.values()), tuple(left))

    def _parts(self, name: str, parameter: Tensor) -> tuple[str | None, dict[WeightView, tuple[LayerCall, ...]]]:
        """Why the whole parameter stays in float, or the parts of it that are weights of layers with their calls."""
        readers = self._readers[name]
        if not readers:
            return "not used in the forward pass", {}
        parts: dict[WeightView, list[LayerCall]] = defaultdict(list)
        others, biases = set(), 0
        for node, source in readers:
            calls = self._calls.get(node, ())
            if calls and source is calls[0].weight_node:
                for call in calls:
                    parts[call.weight.view].append(call)
            else:
                biases += bool(calls) and source is calls[0].bias_node
                others.add(operation_name(node))
        if not parts:
            if biases == len(readers):
                return "bias", {}
            return f"used by {', '.join(sorted(others))}, not the weight of a layer", {}
        if others:
            return f"shared with {', '.join(sorted(others))}", {}
        if (reason := unusable_values(parameter)) is not None:
            return reason, {}
        if len(parts) > 1 and _overlap(parts):
            return "used by several layers in parts that overlap", {}
        return None, {view: tuple(calls) for view, calls in parts.items()}

    def _unusable_part(self, calls: tuple[LayerCall, ...]) -> str | None:
        if len({call.is_table for call in calls}) > 1:
            return "shared with embedding"
        if len({call.is_linear or call.node.target for call in calls}) > 1:
            return "used by layers of different kinds"
        found = (unusable(call, self._constant, self._parameters) for call in calls)
        reason = next((reason for reason in found if reason is not None), None)
        if reason is None and len(set(map(_geometry, calls))) > 1:
            return "used by layers of different kinds"
        return reason

    def _site(self, label: str, calls: tuple[LayerCall, ...], spans: list[tuple[int, int]]) -> Site:
        first = calls[0]
        path, _, leaf = first.weight.name.rpartition(".")
        follows = {what_follows(call.node) for call in calls}
        batch_norm, activation = follows.pop() if len(follows) == 1 else (None, "identity")
        # Calls with biases of their own have none in common: it is then taken off the outputs.
        bias = first.bias if len({call.bias for call in calls}) == 1 else None
        if bias != first.bias:
            batch_norm, activation = None, "identity"
        return Site(
            name=(path if leaf == "weight" else first.weight.name) + label,
            module_class=module_class(first.node),
            weight_name=first.weight.name,
            bias_name=None if bias is None else bias.name,
            geometry=_geometry(first),
            batch_norm=batch_norm,
            activation=activation,
            num_calls=len(calls),
            shift_name=self._shift_name(calls, bias, batch_norm),
            source=self._source(calls, spans),
            view=None if first.weight.whole else first.weight.view,
            bias_view=None if bias is None or bias.whole else bias.view,
            part=label,
            is_table=first.is_table,
        )

    def _shift_name(
        self, calls: tuple[LayerCall, ...], bias: Operand | None, batch_norm: BatchNormAfter | None
    ) -> str | None:
        """Tensor that shifts the layer's outputs, if nothing else reads it, or that part of it."""
        if bias is None:
            # A batch norm after each of several calls would be shifted by the first.
            name = None if batch_norm is None or calls[0].bias_node is not None else batch_norm.running_mean
            return name if name is not None and len(self._readers[name]) == len(calls) == 1 else None
        own = {call.node for call in calls}
        others = [source for node, source in self._readers[bias.name] if node not in own]
        views = [operand.view for source in others if (operand := self._operands.get(source)) is not None]
        apart = len(views) == len(others) and not _overlap([bias.view, *set(views)])
        return bias.name if apart else None

    def _source(self, calls: tuple[LayerCall, ...], spans: list[tuple[int, int]]) -> str | None:
        """Layers with the same source have the same inputs, unless a commit in between has changed what came before."""
        if len(calls) > 1:
            return None
        source = calls[0].source
        produced, read = self._order[source], self._order[calls[0].node]
        again = sum(first < last < read and first <= produced for first, last in spans)
        return f"{source.name}/{again}" if again else source.name


def _labels(parameter: Tensor, views: Sequence[WeightView]) -> list[str]:
    """What tells the parts of a parameter apart; nothing where one weight is all of it."""
    if len(views) == 1 and math.prod(views[0].shape) == parameter.numel():
        return [""]
    labels: list[str] = []
    for view in views:
        label = view.label(tuple(parameter.shape))
        labels.append(label if label and label not in labels else f"{label}[#{len(labels)}]")
    return labels


def _geometry(call: LayerCall) -> LayerGeometry:
    return layer_geometry(call.node, call.weight.view.shape)


def _overlap(views: Collection[WeightView]) -> bool:
    """Whether two of the parts have a number in common."""
    taken = torch.zeros(1 + max(view.last for view in views), dtype=torch.bool)
    for view in views:
        part = view.of(taken)
        if bool(part.any()):
            return True
        part.fill_(True)
    return False
