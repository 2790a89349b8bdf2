"""Recurrent layers in a graph, opened so that the products with their weights are nodes like any other.

torch runs a whole LSTM as one operation. Per layer and direction it becomes

    p = linear(x, W_ih, b_ih)                    a site: what the inputs give to the gates
    h = previous_states(x, W_ih, W_hh, .., p)    what the recurrence gives back to itself, of all steps
    q = linear(h, W_hh, b_hh)                    a site: what the states give to the gates
    outputs, states = recurrence(x, W_ih, W_hh, .., q)

where the last argument of each is not used, but sets the order: the walk runs h when W_ih is rounded, in the quantized
stream with W_hh still in float, and the outputs when both are. Nothing is unrolled over time. A cell, which runs one
step, becomes its two products and what it makes of them.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

_aten = torch.ops.aten
# Operations of whole layers, and whether their state is a pair (h, c).
_LAYERS: dict[Any, bool] = {
    _aten.lstm.input: True,
    _aten.gru.input: False,
    _aten.rnn_tanh.input: False,
    _aten.rnn_relu.input: False,
}
States = Sequence[Tensor]


def _recurrent_layers(
    kind: str, x: Tensor, states: list[Tensor], weights: list[Tensor], biases: bool, num_layers: int,
    bidirectional: bool, batch_first: bool,
) -> list[Tensor]:  # fmt: skip
    """All layers at once, as torch.export sees them: outputs and last states."""
    layer = next(layer for layer in _LAYERS if str(layer) == kind)
    given = states if _LAYERS[layer] else states[0]
    return list(layer(x, given, weights, biases, num_layers, 0.0, False, bidirectional, batch_first))


def _shapes(
    kind: str, x: Tensor, states: list[Tensor], weights: list[Tensor], biases: bool, num_layers: int,
    bidirectional: bool, batch_first: bool,
) -> list[Tensor]:  # fmt: skip
    outputs = x.new_empty((*x.shape[:2], states[0].shape[-1] * (2 if bidirectional else 1)))
    return [outputs, *(state.new_empty(state.shape) for state in states)]


torch.library.custom_op("distributed_adaround::recurrent_layers", _recurrent_layers, mutates_args=()).register_fake(
    _shapes
)
_OWN = torch.ops.distributed_adaround.recurrent_layers.default


@contextmanager
def any_length() -> Iterator[None]:
    """torch.export takes the shapes of a recurrent layer's outputs from a loop over time, which fixes the length. In
    here the modules call an operation of our own instead, whose shapes are known."""
    for layer in _LAYERS:
        name = layer._schema.name.removeprefix("aten::")
        setattr(torch._VF, name, partial(_as_one, layer, getattr(torch._VF, name)))
    try:
        yield
    finally:
        for layer in _LAYERS:
            delattr(torch._VF, layer._schema.name.removeprefix("aten::"))


def _as_one(layer: Any, original: Callable[..., Any], *arguments: Any) -> Any:
    x, given, weights, *rest = arguments
    if isinstance(weights, Tensor | tuple):
        return original(*arguments)  # of a packed sequence
    states = list(given) if _LAYERS[layer] else [given]
    biases, num_layers, _, _, bidirectional, batch_first = rest
    return tuple(_OWN(str(layer), x, states, list(weights), biases, num_layers, bidirectional, batch_first))


def open_recurrent(module: GraphModule) -> None:
    """Rewrite the recurrent layers and cells of a graph."""
    for node in list(module.graph.nodes):
        with module.graph.inserting_before(node):
            if node.target in _LAYERS or node.target == _OWN:
                _open_layer(module, node)
            elif node.target in _CELLS:
                _open_cell(module, node)
    module.recompile()


def close_recurrent(graph: Graph) -> None:
    """Put torch's operations in the place of those of `any_length`, in a graph that others shall run."""
    for node in graph.nodes:
        if node.target == _OWN:
            arguments: Any = node.args
            kind, x, states, weights, biases, num_layers, bidirectional, batch_first = arguments
            node.target = next(layer for layer in _LAYERS if str(layer) == kind)
            given = states if _LAYERS[node.target] else states[0]
            node.args = (x, given, weights, biases, num_layers, 0.0, False, bidirectional, batch_first)
            node.meta["val"] = tuple(node.meta["val"])


def reads_along(node: Node, source: Node) -> bool:
    """Whether `node` is a recurrence that reads a tensor of which layers show what it computes with it."""
    return node.target in (previous_states, recurrence) and any(u.target == _aten.linear.default for u in source.users)


def recurrence(
    kind: Any, x: Tensor, states: States, weights: Sequence[Tensor], options: Any, _: Tensor
) -> tuple[Tensor, ...]:
    """One direction of one layer: outputs in the order of x, and the last states `(1, N, H)`. options: biases,
    batch_first, reverse."""
    biases, batch_first, reverse = options
    time = 1 if batch_first else 0
    given = states if _LAYERS[kind] else states[0]
    x = x.flip(time) if reverse else x
    outputs, *last = kind(x, given, weights, biases, 1, 0.0, False, False, batch_first)
    return (outputs.flip(time) if reverse else outputs, *last)


def previous_states(
    kind: Any, x: Tensor, states: States, weights: Sequence[Tensor], options: Any, after: Tensor
) -> Tensor:
    """The state that each step of a recurrence starts from, in the order of x: its outputs, one step later."""
    _, batch_first, reverse = options
    outputs, *_ = recurrence(kind, x, states, weights, options, after)
    time, first = (1, states[0].transpose(0, 1)) if batch_first else (0, states[0])
    steps = outputs.shape[time] - 1
    parts = [outputs.narrow(time, 1, steps), first] if reverse else [first, outputs.narrow(time, 0, steps)]
    return torch.cat(parts, time)


def _open_layer(module: GraphModule, node: Node) -> None:
    call = _caller(module, node)
    arguments: Any = node.args
    kind: Any = node.target
    if kind == _OWN:
        kind = next(layer for layer in _LAYERS if str(layer) == arguments[0])
        x, states, weights, biases, num_layers, bidirectional, batch_first = arguments[1:]
    else:
        x, given, weights, biases, num_layers, _, _, bidirectional, batch_first = arguments
        states = given if _LAYERS[kind] else [given]
    directions = 2 if bidirectional else 1
    size = len(weights) // (num_layers * directions)
    ends: list[list[Node]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            first = [call(_aten.slice.Tensor, state, 0, place, place + 1) for state in states]
            options = (biases, batch_first, direction == 1)
            output, *last = _open_direction(call, kind, x, first, weights[place * size : (place + 1) * size], options)
            outputs.append(output)
            ends.append(last)
        x = outputs[0] if directions == 1 else _joined(call, outputs)
    _replace_outputs(node, [x, *(call(_aten.cat.default, list(last), 0) for last in zip(*ends, strict=True))])
    module.graph.erase_node(node)


def _open_direction(
    call: Callable[..., Node], kind: Any, x: Node, states: list[Node], weights: Sequence[Node], options: Any
) -> list[Node]:
    """One direction of one layer; the nodes of its outputs and last states."""
    biases = weights[2:4] if options[0] else [None, None]
    gates, state = (weights[1].meta["val"].shape[place : place + 1] for place in (0, 1))
    given = _with_shape(call(_aten.linear.default, x, weights[0], biases[0]), x, gates)
    before = _with_shape(call(previous_states, kind, x, states, list(weights), options, given), x, state)
    returned = _with_shape(call(_aten.linear.default, before, weights[1], biases[1]), x, gates)
    result = call(recurrence, kind, x, states, list(weights), options, returned)
    output, *last = [call(operator.getitem, result, place) for place in range(1 + len(states))]
    return [_with_shape(output, x, state), *last]


def _joined(call: Callable[..., Node], outputs: list[Node]) -> Node:
    """Outputs of both directions side by side."""
    width = sum(output.meta["val"].shape[-1] for output in outputs)
    return _with_shape(call(_aten.cat.default, outputs, -1), outputs[0], (width,))


def _with_shape(node: Node, rows: Node, width: Sequence[int]) -> Node:
    """The node, known to have the leading sizes of `rows`: torch.export knows them of its own nodes."""
    value: Tensor = rows.meta["val"]
    node.meta["val"] = value.new_empty((*value.shape[:-1], *width))
    return node


def _open_cell(module: GraphModule, node: Node) -> None:
    function, is_pair = _CELLS[node.target]
    call = _caller(module, node)
    arguments: Any = (*node.args, None, None)
    x, state, w_ih, w_hh, b_ih, b_hh, *_ = arguments
    states = list(state) if is_pair else [state]
    # A first state of zeros is a constant, of which no layer can be learned.
    gates, width = (w_hh.meta["val"].shape[place : place + 1] for place in (0, 1))
    hidden = _with_shape(call(_beside, states[0], x), x, width)
    products = [
        _with_shape(call(_aten.linear.default, source, weight, bias), x, gates)
        for source, weight, bias in ((x, w_ih, b_ih), (hidden, w_hh, b_hh))
    ]
    result = call(function, *products, states[1] if is_pair else hidden)
    if is_pair:
        _replace_outputs(node, [call(operator.getitem, result, place) for place in (0, 1)])
    else:
        node.replace_all_uses_with(result)
    module.graph.erase_node(node)


def _beside(state: Tensor, _: Tensor) -> Tensor:
    return state


def _lstm_cell(given: Tensor, returned: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (given + returned).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(given: Tensor, returned: Tensor, h: Tensor) -> Tensor:
    (r, z, n), (r_h, z_h, n_h) = given.chunk(3, -1), returned.chunk(3, -1)
    n, z = (n + (r + r_h).sigmoid() * n_h).tanh(), (z + z_h).sigmoid()
    return n + z * (h - n)


def _tanh_cell(given: Tensor, returned: Tensor, _: Tensor) -> Tensor:
    return (given + returned).tanh()


def _relu_cell(given: Tensor, returned: Tensor, _: Tensor) -> Tensor:
    return (given + returned).relu()


# What each cell makes of its two products, and whether its state is a pair (h, c).
_CELLS: dict[Any, tuple[Callable[..., Any], bool]] = {
    _aten.lstm_cell.default: (_lstm_cell, True),
    _aten.gru_cell.default: (_gru_cell, False),
    _aten.rnn_tanh_cell.default: (_tanh_cell, False),
    _aten.rnn_relu_cell.default: (_relu_cell, False),
}


def _caller(module: GraphModule, like: Node) -> Callable[..., Node]:
    """Makes nodes that belong to the same module as `like`."""

    def call(target: Any, *args: Any) -> Node:
        node = module.graph.call_function(target, args)
        if "nn_module_stack" in like.meta:
            node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
        return node

    return call


def _replace_outputs(node: Node, outputs: Sequence[Node]) -> None:
    for user in list(node.users):
        assert user.target is operator.getitem, user
        user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
        user.graph.erase_node(user)
