"""What the graph that torch.export made of a model says about its layers.

The captured graph is functional (no in-place operations), holds the model's own parameters, and names them as the
model does. This file finds the sites in it, says why every other parameter stays in float, and sorts the nodes:

    constant   depends on parameters and constants only: computed once
    common     depends on the data, but on no site: the same in both streams, computed once per microbatch
    streamed   depends on a site: computed once per microbatch and stream
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from distributed_adaround.capture.operations import (
    layer_bias,
    layer_geometry,
    layer_weight,
    module_class,
    operation_name,
    unusable,
    what_follows,
)
from distributed_adaround.capture.sites import BatchNormAfter, FloatParameter, Site, unusable_values


@dataclass(frozen=True)
class CapturedGraph:
    """A model as a list of nodes in execution order.

    first_calls: site of each node where a site's layer runs for the first time. repeat_calls: site of the later ones.
    """

    module: GraphModule
    nodes: tuple[Node, ...]
    sites: tuple[Site, ...]
    first_calls: dict[Node, Site]
    repeat_calls: dict[Node, Site]
    float_parameters: tuple[FloatParameter, ...]
    constant: frozenset[Node]
    common: frozenset[Node]
    placeholders: tuple[Node, ...]


def capture(module: GraphModule) -> CapturedGraph:
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
    reasons = _reasons(module, nodes, constant)
    first_calls, repeat_calls = _find_sites(module, nodes, {name for name, reason in reasons.items() if not reason})
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return CapturedGraph(
        module=module,
        nodes=nodes,
        sites=tuple(first_calls.values()),
        first_calls=first_calls,
        repeat_calls=repeat_calls,
        float_parameters=tuple(FloatParameter(name, shapes[name], why) for name, why in reasons.items() if why),
        constant=constant,
        common=_common_nodes(nodes, constant, {**first_calls, **repeat_calls}),
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


def _common_nodes(nodes: Sequence[Node], constant: frozenset[Node], calls: dict[Node, Site]) -> frozenset[Node]:
    common: set[Node] = set()
    for node in nodes:
        of_data = node not in calls and node not in constant
        if of_data and all(source in constant or source in common for source in node.all_input_nodes):
            common.add(node)
    return frozenset(common)


def _reasons(module: GraphModule, nodes: Sequence[Node], constant: frozenset[Node]) -> dict[str, str | None]:
    """For every parameter, why it stays in float; None: it is the weight of a site."""
    users: dict[str, list[Node]] = {name: [] for name, _ in module.named_parameters()}
    for node in nodes:
        if node.op == "get_attr" and str(node.target) in users:
            users[str(node.target)].extend(node.users)
    return {name: _reason(name, attribute(module, name), mine, constant) for name, mine in users.items()}


def _reason(name: str, parameter: Tensor, users: Sequence[Node], constant: frozenset[Node]) -> str | None:
    if not users:
        return "not used in the forward pass"

    def is_parameter(node: Node | None) -> bool:
        return node is not None and str(node.target) == name

    layers = [user for user in users if is_parameter(layer_weight(user))]
    others = sorted({operation_name(user) for user in users if user not in layers})
    if not layers:
        if all(is_parameter(layer_bias(user)) for user in users):
            return "bias"
        return f"used by {', '.join(others)}, not the weight of a layer"
    if others:
        return f"shared with {', '.join(others)}"
    if len({layer.target for layer in layers}) > 1:
        return "used by layers of different kinds"
    found = (unusable_values(parameter), *(unusable(layer, constant) for layer in layers))
    return next((reason for reason in found if reason is not None), None)


def _find_sites(
    module: GraphModule, nodes: Sequence[Node], weights: set[str]
) -> tuple[dict[Node, Site], dict[Node, Site]]:
    """Sites by the node of their first call, and by those of later calls."""
    calls: dict[str, list[Node]] = {}
    for node in nodes:
        weight = layer_weight(node)
        if weight is not None and str(weight.target) in weights:
            calls.setdefault(str(weight.target), []).append(node)
    first = {mine[0]: _site(module, mine[0], name, len(mine)) for name, mine in calls.items()}
    return first, {node: first[mine[0]] for mine in calls.values() for node in mine[1:]}


def _site(module: GraphModule, node: Node, weight_name: str, num_calls: int) -> Site:
    bias, source = layer_bias(node), node.args[0]
    assert isinstance(source, Node)
    path, _, leaf = weight_name.rpartition(".")
    batch_norm, activation = what_follows(node)
    return Site(
        name=path if leaf == "weight" else weight_name,
        module_class=module_class(node),
        weight_name=weight_name,
        bias_name=None if bias is None else str(bias.target),
        geometry=layer_geometry(node, tuple(attribute(module, weight_name).shape)),
        batch_norm=batch_norm,
        activation=activation,
        num_calls=num_calls,
        shift_name=_shift_name(module, bias, batch_norm, num_calls),
        source=source.name,
    )


def _shift_name(
    module: GraphModule, bias: Node | None, batch_norm: BatchNormAfter | None, num_calls: int
) -> str | None:
    """Tensor that shifts the outputs of a layer that runs once, if nothing else reads it."""
    name = str(bias.target) if bias is not None else batch_norm.running_mean if batch_norm is not None else None
    readers = sum(len(node.users) for node in module.graph.nodes if node.op == "get_attr" and str(node.target) == name)
    return name if readers == 1 and num_calls == 1 else None
