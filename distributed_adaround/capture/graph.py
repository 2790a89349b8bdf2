"""What the graph that torch.export made of a model says about its layers.

The captured graph is functional (no in-place operations), holds the model's own parameters, and names them as the
model does. This file finds the sites in it, says why every other parameter stays in float, and sorts the nodes:

    constant   depends on parameters and constants only: computed once
    common     depends on the data, but on no site, or decides where rows go (see routing.py): the same in both
               streams, computed once per microbatch
    streamed   depends on a site: computed once per microbatch and stream
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from distributed_adaround.capture.find_sites import UnitCalls, find_sites
from distributed_adaround.capture.routing import routers, shared_nodes
from distributed_adaround.capture.sites import FloatParameter, Site


@dataclass(frozen=True)
class CapturedGraph:
    """A model as a list of nodes in execution order. units: in the order of their last calls."""

    module: GraphModule
    nodes: tuple[Node, ...]
    units: tuple[UnitCalls, ...]
    float_parameters: tuple[FloatParameter, ...]
    constant: frozenset[Node]
    common: frozenset[Node]
    placeholders: tuple[Node, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for unit in self.units for site in unit.unit.sites)


def capture(module: GraphModule, embeddings: bool = False) -> CapturedGraph:
    """Read the sites out of the graph that `straight_line` made."""
    # Checks, and writes into buffers: nothing reads them, and they would count as readers of what they look at.
    for node in reversed(module.graph.nodes):
        if node.op == "call_function" and not node.users:
            module.graph.erase_node(node)
    nodes = tuple(module.graph.nodes)
    # A parameter with several names is known by its first one.
    first_names = {id(parameter): name for name, parameter in module.named_parameters()}
    for node in nodes:
        if node.op == "get_attr":
            node.target = first_names.get(id(attribute(module, str(node.target))), node.target)
    constant = _constant_nodes(nodes)
    found = find_sites(module, nodes, constant, embeddings)
    calls = {call.node for unit in found.units for call in unit.calls}
    common = shared_nodes(nodes, constant, calls)
    picking = routers(nodes, common, calls)
    return CapturedGraph(
        module=module,
        nodes=nodes,
        units=tuple(unit.as_router() if unit.calls[0].node in picking else unit for unit in found.units),
        float_parameters=found.float_parameters,
        constant=constant,
        common=common,
        placeholders=tuple(node for node in nodes if node.op == "placeholder"),
    )


def attribute(module: nn.Module, name: str) -> Any:
    """Parameter, buffer or constant by its dotted name."""
    return operator.attrgetter(name)(module)


def _constant_nodes(nodes: Sequence[Node]) -> frozenset[Node]:
    constant: set[Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (node.op == "call_function" and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
    return frozenset(constant)
