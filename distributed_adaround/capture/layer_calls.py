"""Nodes of a graph that are layers: a product of data with a weight, and how that weight lies in its parameter.

A weight may be read through any operations that only look at it (transpose, slice, split, view) or cast it (autocast).
They are followed on a tensor without memory: the result is a view into the parameter, or it is not a weight.
"""

import operator
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_aggregate

from distributed_adaround.capture.operations import LINEAR, is_convolution
from distributed_adaround.numerics.weight_view import WeightView

_aten = torch.ops.aten
# Copies with the same values. What they copy is read as it is stored.
_COPIES = (_aten.clone.default, _aten.contiguous.default, _aten._to_copy.default, _aten.to.dtype)
_COPY_OPTIONS = {"dtype", "memory_format", "device", "layout", "pin_memory", "non_blocking"}
_PRODUCTS = (_aten.mm.default, _aten.matmul.default, _aten.bmm.default)
# Rows offsets[e - 1]:offsets[e] of x times W[e]; transformers has a form of its own where torch's does not run.
_GROUPED = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


@dataclass(frozen=True)
class Operand:
    """A tensor of the model, by name, as a node reads it. whole: as it is, so that the view says nothing."""

    name: str
    view: WeightView
    whole: bool

    def transposed(self) -> "Operand":
        """`(I, O)` to `(O, I)`."""
        return Operand(self.name, self.view.transposed(), self.view.shape == (1, 1) and self.whole)


@dataclass(frozen=True)
class LayerCall:
    """One node `y = x Wᵀ + b`, a convolution, or one of several products in one node. source: x. bias: None without
    one, or where it is computed.

    experts: how many products there are, expert: which one this is. They have rows of their own: those between two
    `offsets` of x `(R, I)`, or an entry of x `(E, T, I)`. columns: rows of x and y lie along the last dimension.
    """

    node: Node
    source: Node
    weight_node: Node
    weight: Operand
    bias_node: Node | None = None
    bias: Operand | None = None
    experts: int | None = None
    expert: int = 0
    offsets: Node | None = None
    columns: bool = False

    @property
    def is_linear(self) -> bool:
        return not is_convolution(self.node)

    @property
    def is_table(self) -> bool:
        return self.node.target == _aten.embedding.default

    @property
    def reads(self) -> tuple[Node, ...]:
        """What is needed of a call to learn from it, apart from its output."""
        return (self.source,) if self.offsets is None else (self.source, self.offsets)

    def as_rows(self, values: Tensor) -> Tensor:
        """An input or output as the solver takes it: a vector as one row, the rows of experts one after the other."""
        if self.is_linear and values.dim() == 1:
            return values.unsqueeze(0)
        if self.columns:
            values = values.transpose(-1, -2)
        if self.experts is not None and self.offsets is None:
            values = values.expand(self.experts, -1, -1)
        return values if self.experts is None and not self.columns else values.reshape(-1, values.shape[-1])

    def parts(self, num_rows: int, offsets: Tensor | None) -> tuple[int, ...] | None:
        """Where the rows of each expert end."""
        if self.experts is None:
            return None
        if offsets is not None:
            return tuple(offsets.tolist())
        return tuple((expert + 1) * num_rows // self.experts for expert in range(self.experts))


class Operands:
    """Which nodes are tensors of the model, or parts of them that share their memory."""

    def __init__(self, module: nn.Module, nodes: Sequence[Node]) -> None:
        self._values: dict[Node, Any] = {}
        self._owners: dict[Node, tuple[str, torch.dtype | None]] = {}
        for node in nodes:
            sources = node.all_input_nodes
            if node.op == "get_attr":
                tensor = operator.attrgetter(str(node.target))(module)
                if isinstance(tensor, Tensor):
                    # Contiguous, as the view of a parameter must be; any other layout only ever is read as a whole.
                    self._values[node] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                    self._owners[node] = (str(node.target), None)
            elif node.op == "call_function" and len(sources) == 1 and sources[0] in self._values:
                self._follow(node, sources[0])

    def _follow(self, node: Node, source: Node) -> None:
        before, (name, dtype) = self._values[source], self._owners[source]
        if node.target in _COPIES:
            if node.kwargs.keys() <= _COPY_OPTIONS and not node.args[1:]:
                self._values[node] = before
                self._owners[node] = (name, node.kwargs.get("dtype", dtype))  # type: ignore[assignment]
            return
        if any(not isinstance(argument, int | float | None) for argument in _plain(node)):
            return
        assert callable(node.target)
        args, kwargs = map_aggregate((node.args, node.kwargs), lambda leaf: before if leaf is source else leaf)
        try:
            after = node.target(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
            return  # no operation on such a tensor, so none that only looks at it
        leaves = after if isinstance(after, list | tuple) else [after]
        if all(isinstance(leaf, Tensor) and _same_memory(leaf, before) for leaf in leaves):
            self._values[node], self._owners[node] = after, (name, dtype)

    def __contains__(self, node: object) -> bool:
        return node in self._values

    def get(self, node: object) -> Operand | None:
        """The tensor that a node reads; None: it is computed, or several."""
        if not isinstance(node, Node) or not isinstance(value := self._values.get(node), Tensor):
            return None
        if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
            return None  # expanded: one number in several places
        name, dtype = self._owners[node]
        dtype = None if dtype == value.dtype else dtype
        base = value if value._base is None else value._base
        whole = dtype is None and (value.shape, value.stride()) == (base.shape, base.stride())
        return Operand(name, WeightView.like(value, dtype), whole)

    def owner(self, node: Node) -> str:
        """Name of the tensor that a node is, or is a part of."""
        return self._owners[node][0]


def _plain(node: Node) -> list[Any]:
    """Arguments that are no nodes, flat."""
    found: list[Any] = []
    map_aggregate((node.args, node.kwargs), lambda leaf: None if isinstance(leaf, Node) else found.append(leaf))
    return found


def _same_memory(part: Tensor, whole: Any) -> bool:
    first: Tensor = whole[0] if isinstance(whole, list | tuple) else whole
    base = first if first._base is None else first._base
    return part is base or part._base is base


def read_layers(node: Node, operands: Operands) -> tuple[LayerCall, ...]:
    """The layers that a node is: none, one, or one for each expert."""
    if str(node.target) in _GROUPED:
        return _grouped(node, operands)
    columns = False
    if node.target in LINEAR or is_convolution(node):
        source, weight, bias, transposed = node.args[0], node.args[1], _argument(node, 2), False
    elif node.target == _aten.addmm.default and not node.kwargs:
        bias, source, weight, transposed = *node.args[:3], True
    elif node.target in _PRODUCTS:
        source, weight, bias, transposed = node.args[0], node.args[1], None, True
        if operands.get(weight) is None:
            source, weight, transposed, columns = weight, source, False, True
    else:
        return ()
    operand = operands.get(weight)
    if operand is None or not isinstance(source, Node) or not isinstance(weight, Node):
        return ()
    bias_node = bias if isinstance(bias, Node) else None
    call = LayerCall(node, source, weight, operand, bias_node, operands.get(bias_node), columns=columns)
    if node.target in _PRODUCTS and len(operand.view.shape) == 3:
        return _experts(call, transposed)
    if len(operand.view.shape) != 2 and not is_convolution(node):
        return ()
    if columns and _dims(source) != 2:
        return ()
    return (replace(call, weight=operand.transposed()) if transposed else call,)


def read_table(node: Node, operands: Operands) -> LayerCall | None:
    """A look-up of rows of a weight `(V, D)`; source: the row numbers."""
    if node.target != _aten.embedding.default:
        return None
    operand, index = operands.get(node.args[0]), node.args[1]
    if operand is None or not operand.whole or not isinstance(index, Node) or not isinstance(node.args[0], Node):
        return None
    return LayerCall(node, index, node.args[0], operand)


def _grouped(node: Node, operands: Operands) -> tuple[LayerCall, ...]:
    """x `(R, I)` times W `(E, I, O)`, and nothing else."""
    values = [*node.args, *node.kwargs.values()]
    nodes = [value for value in values if isinstance(value, Node)]
    operand = operands.get(nodes[1]) if len(nodes) == 3 and _dims(nodes[0]) == 2 else None
    if operand is None or len(operand.view.shape) != 3:
        return ()
    return _experts(LayerCall(node, nodes[0], nodes[1], operand, offsets=nodes[2]), transposed=True)


def _experts(call: LayerCall, transposed: bool) -> tuple[LayerCall, ...]:
    """A call for each matrix of a weight `(E, O, I)`; transposed: `(E, I, O)`."""
    if call.offsets is None and _dims(call.source) not in (2, 3):
        return ()
    experts = call.weight.view.shape[0]
    calls = []
    for expert in range(experts):
        weight = Operand(call.weight.name, call.weight.view.entry(expert), whole=False)
        calls.append(
            replace(call, weight=weight.transposed() if transposed else weight, experts=experts, expert=expert)
        )
    return tuple(calls)


def _dims(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def _argument(node: Node, position: int) -> Any:
    return node.args[position] if len(node.args) > position else None


def unusable(call: LayerCall, constant: Container[Node], parameters: Mapping[str, Tensor]) -> str | None:
    """Why the weight of a layer cannot be learned from its inputs and outputs; None: it can."""
    if call.source in constant:
        return "the input of its layer does not depend on the data"
    channels = (call.weight.view.shape[0],)
    if call.bias_node is not None and (call.bias is None or (call.is_linear and call.bias.view.shape != channels)):
        return "the bias of its layer is computed from other tensors"
    if any(other not in (*call.reads, call.weight_node, call.bias_node) for other in call.node.all_input_nodes):
        return "the padding of its layer depends on the size of the input"
    output = call.node.meta.get("val")
    # A convolution's output with its batch has as many dimensions as the weight.
    if not call.is_linear and isinstance(output, Tensor) and output.dim() != len(call.weight.view.shape):
        return "its layer runs on samples without a batch dimension"
    if not (call.weight.whole or parameters[call.weight.name].is_contiguous()):
        return "it is read in parts and its memory is not contiguous"
    return None
