"""Axes of the values in a graph: which of them are the same axis, seen from different nodes.

Every axis is a tuple of atoms: one, none where its size is 1, several where axes were flattened into one. Operations
carry atoms on (a linear layer keeps all but the last axis), make new ones (a sum over tokens leaves none of theirs), or
join two: an elementwise operation of x and y says that their axes are one. What does not depend on the data joins
nothing: two sequences may be added to the same positions.
"""

import math
import operator
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from distributed_adaround.capture.recurrent import previous_states, recurrence

Axis = tuple[int, ...]
Axes = tuple[Axis, ...]

_RESHAPES = frozenset(("view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "flatten", "unflatten"))
_REDUCTIONS = frozenset(
    ("sum", "mean", "amax", "amin", "any", "all", "argmax", "argmin", "max", "min", "logsumexp", "var", "std", "prod")
)
# Operations that move what lies along a dimension, and the place of that dimension among their arguments.
_SHUFFLES = {"sort": 1, "argsort": 1, "topk": 2, "flip": 1, "roll": 2, "gather": 1, "index_select": 1}
_IOTA_STEPS = frozenset(
    ("unsqueeze", "squeeze", "view", "slice", "_to_copy", "clone", "to", "alias", "lift_fresh_copy")
)


class AxesOfNodes:
    """Axes of all nodes that hold tensors."""

    def __init__(self, nodes: Sequence[Node], constant: Container[Node]) -> None:
        self._parents: list[int] = []
        self._sizes: list[int] = []
        self._parts: dict[tuple[int, tuple[int, ...]], Axis] = {}
        self._wholes: dict[Axis, int] = {}
        # Axes of each node; a list of them where it has several results.
        self._axes: dict[Node, Axes | list[Axes]] = {}
        self._data: set[Node] = set()
        for node in nodes:
            of_data = node.op == "placeholder" or not self._data.isdisjoint(node.all_input_nodes)
            if of_data and node not in constant and node.op != "output":
                axes = self._follow(node)
                if axes is not None:
                    self._axes[node] = axes
                    self._data.add(node)

    def of(self, node: Node) -> Axes | None:
        """Axes of a node with one tensor, in atoms that stand for all that were joined with them; None: not known."""
        axes = self._axes.get(node)
        return None if axes is None or isinstance(axes, list) else tuple(self._roots(axis) for axis in axes)

    def _follow(self, node: Node) -> Axes | list[Axes] | None:
        value, target = node.meta.get("val"), node.target
        if node.op == "placeholder":
            return self._fresh(_shape(value)) if isinstance(value, Tensor) else None
        if target is operator.getitem:
            return self._item(node)
        if target in (previous_states, recurrence):
            first = self._operand(node.args[1])[:2]
            outputs: Axes = (*first, self._new(0))
            return outputs if target is previous_states else [outputs]
        if not isinstance(target, torch._ops.OpOverload) or value is None:
            # An operation of ours, on rows: the last axis is another, the rows are the same.
            sources = node.all_input_nodes
            axes = self._operand(sources[0]) if sources else ()
            return (*axes[:-1], self._new(0)) if axes else None
        if isinstance(value, (list, tuple)):
            return [self._result(node, each) if isinstance(each, Tensor) else () for each in value]
        return self._result(node, value) if isinstance(value, Tensor) else None

    def _item(self, node: Node) -> Axes | None:
        source, place = node.args[0], node.args[1]
        axes = self._axes.get(source) if isinstance(source, Node) else None
        return axes[place] if isinstance(axes, list) and isinstance(place, int) and place < len(axes) else None

    def _result(self, node: Node, value: Tensor) -> Axes:
        name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
        shape = _shape(value)
        rule = _RULES.get(name)
        if rule is not None:
            axes = rule(self, node)
        elif name in _RESHAPES:
            axes = self._reshaped(self._operand(node.args[0]), shape)
        elif "conv" in name:
            kept = self._elementwise([node.args[0]], shape)
            axes = (*kept[:1], self._new(shape[1]), *kept[2:]) if len(shape) > 2 else kept
        elif name in _REDUCTIONS and len(shape) <= len(self._operand(node.args[0])):
            axes = self._reduced(node)
        else:
            axes = self._elementwise(_tensors(node), shape)
        if name in _SHUFFLES:
            axes = self._shuffled(node, axes, _SHUFFLES[name])
        # Whatever a rule says: never an axis of another size.
        if len(axes) != len(shape):
            return self._fresh(shape)
        return tuple(
            axis if self._size(axis) == size else self._new(size) for axis, size in zip(axes, shape, strict=True)
        )

    def _operand(self, node: Any) -> Axes:
        """Axes of an argument: its own if it is data, else new ones at every use."""
        if node in self._data:
            axes = self._axes[node]
            return () if isinstance(axes, list) else axes
        value = node.meta.get("val") if isinstance(node, Node) else None
        return self._fresh(_shape(value)) if isinstance(value, Tensor) else ()

    def _elementwise(self, operands: Sequence[Any], shape: Sequence[int]) -> Axes:
        """Axes joined from the last one on, as in broadcasting."""
        result: list[Axis] = [()] * len(shape)
        for operand in operands:
            axes = self._operand(operand)[-len(shape) :] if shape else ()
            for place, axis in enumerate(axes, len(shape) - len(axes)):
                if axis and self._size(axis) == shape[place]:
                    result[place] = self._join(result[place], axis)
        return tuple(result)

    def _reshaped(self, axes: Axes, shape: Sequence[int]) -> Axes:
        """Axes flattened and cut again: groups of atoms and of sizes with the same product."""
        atoms = [atom for axis in axes for atom in self._roots(axis)]
        result: list[Axis] = []
        places = [place for place, size in enumerate(shape) if size != 1]
        while places:
            group, sizes = [], [shape[places.pop(0)]]
            product, wanted = 1, sizes[0]
            while product != wanted:
                if product < wanted:
                    if not atoms:
                        return self._fresh(shape)
                    group.append(atoms.pop(0))
                    product *= self._sizes[group[-1]]
                else:
                    if not places:
                        return self._fresh(shape)
                    sizes.append(shape[places.pop(0)])
                    wanted *= sizes[-1]
            result += self._cut(tuple(group), tuple(sizes))
        found = iter(result)
        return tuple(() if size == 1 else next(found) for size in shape)

    def _cut(self, atoms: Axis, sizes: tuple[int, ...]) -> list[Axis]:
        """Axes of these sizes from these atoms; cut and put together again, an atom is itself."""
        if len(sizes) == 1:
            return [(self._wholes[atoms],) if atoms in self._wholes else atoms]
        if len(atoms) > 1:
            return [self._new(size) for size in sizes]
        key = (atoms[0], sizes)
        if key not in self._parts:
            self._parts[key] = tuple(self._new(size)[0] for size in sizes)
            self._wholes[self._parts[key]] = atoms[0]
        return [(part,) for part in self._parts[key]]

    def _reduced(self, node: Node) -> Axes:
        axes = self._operand(node.args[0])
        dims = _argument(node, "dim")
        gone = range(len(axes)) if dims in (None, []) else [dim % len(axes) for dim in _as_list(dims)]
        kept = [() if place in gone else axis for place, axis in enumerate(axes)]
        if not _argument(node, "keepdim"):
            kept = [axis for place, axis in enumerate(kept) if place not in gone]
        return tuple(kept)

    def _shuffled(self, node: Node, axes: Axes, position: int) -> Axes:
        dims = node.args[position] if len(node.args) > position else _argument(node, "dim")
        moved = range(len(axes)) if dims in (None, []) else [dim % max(len(axes), 1) for dim in _as_list(dims)]
        return tuple(self._new(self._size(axis)) if place in moved else axis for place, axis in enumerate(axes))

    def _fresh(self, shape: Sequence[int]) -> Axes:
        return tuple(self._new(size) for size in shape)

    def _new(self, size: int) -> Axis:
        if size == 1:
            return ()
        self._parents.append(len(self._parents))
        self._sizes.append(size)
        return (len(self._parents) - 1,)

    def _size(self, axis: Axis) -> int:
        return math.prod(self._sizes[atom] for atom in axis)

    def _root(self, atom: int) -> int:
        while self._parents[atom] != atom:
            self._parents[atom] = self._parents[self._parents[atom]]
            atom = self._parents[atom]
        return atom

    def _roots(self, axis: Axis) -> Axis:
        return tuple(self._root(atom) for atom in axis)

    def _join(self, one: Axis, other: Axis) -> Axis:
        sizes = [[self._sizes[atom] for atom in axis] for axis in (one, other)]
        if not one or sizes[0] != sizes[1]:
            return one or other
        for a, b in zip(self._roots(one), self._roots(other), strict=True):
            self._parents[max(a, b)] = min(a, b)
        return one

    def _permuted(self, node: Node) -> Axes:
        axes = list(self._operand(node.args[0]))
        name = node.target._schema.name  # type: ignore[union-attr]
        if name == "aten::permute":
            return tuple(axes[dim] for dim in node.args[1])  # type: ignore[union-attr, index]
        a, b = (0, len(axes) - 1) if name == "aten::t" else (node.args[1], node.args[2])
        axes[a], axes[b] = axes[b], axes[a]  # type: ignore[index]
        return tuple(axes)

    def _selected(self, node: Node) -> Axes:
        axes = list(self._operand(node.args[0]))
        del axes[_argument(node, "dim") or 0]
        return tuple(axes)

    def _concatenated(self, node: Node) -> Axes:
        parts: Any = node.args[0]
        shape = _shape(node.meta["val"])
        axes = list(self._elementwise(parts, shape))
        dim = (_argument(node, "dim") or 0) % len(shape)
        axes[dim] = self._new(shape[dim])
        return tuple(axes)

    def _linear(self, node: Node) -> Axes:
        return (*self._operand(node.args[0])[:-1], self._new(_shape(node.meta["val"])[-1]))

    def _embedding(self, node: Node) -> Axes:
        return (*self._operand(node.args[1]), self._new(_shape(node.meta["val"])[-1]))

    def _product(self, node: Node) -> Axes:
        """mm, bmm, matmul, addmm, baddbmm: the inner axes are one."""
        a, b = (self._operand(each) for each in node.args[-2:])
        if min(len(a), len(b)) < 2:
            return ()
        self._join(a[-1], b[-2])
        leading = len(_shape(node.meta["val"])) - 2
        batch: list[Axis] = [()] * leading
        for axes in (a, b):
            outer = axes[:-2]
            for place, axis in enumerate(outer, leading - len(outer)):
                batch[place] = self._join(batch[place], axis)
        return (*batch, a[-2], b[-1])

    def _attention(self, node: Node) -> Axes:
        q, k, v = (self._operand(each) for each in node.args[:3])
        self._join(k[-2], v[-2])
        batch = [self._join(self._join(a, b), c) for a, b, c in zip(q[:-2], k[:-2], v[:-2], strict=False)]
        mask = _argument(node, "attn_mask")
        if isinstance(mask, Node):
            scores = (*batch, q[-2], k[-2])
            axes = self._operand(mask)
            for axis, other in zip(reversed(axes), reversed(scores), strict=False):
                if axis and other:
                    self._join(axis, other)
        return (*batch, q[-2], v[-1])

    def _indexed(self, node: Node) -> Axes:
        """Looked up at 0, 1, 2, ... in one dimension or another, a tensor is itself; else its rows are others."""
        axes = self._operand(node.args[0])
        indices: Any = node.args[1]
        shapes = [
            _shape(index.meta["val"]) if isinstance(index, Node) and _is_iota(index) else None for index in indices
        ]
        if None in shapes:
            return ()
        width = max(len(shape) for shape in shapes if shape is not None)
        result: list[Axis] = [()] * width
        for axis, shape in zip(axes, shapes, strict=False):
            assert shape is not None
            long = [place for place, size in enumerate(shape, width - len(shape)) if size != 1]
            if len(long) == 1:
                result[long[0]] = axis
        return (*result, *axes[len(indices) :])

    def _einsum(self, node: Node) -> Axes:
        equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
        inputs, _, output = equation.partition("->")
        if "." in equation or not output:
            return ()
        known: dict[str, Axis] = {}
        for letters, operand in zip(inputs.split(","), operands, strict=True):  # type: ignore[arg-type]
            for letter, axis in zip(letters, self._operand(operand), strict=True):
                known[letter] = self._join(known.get(letter, ()), axis)
        return tuple(known[letter] for letter in output)


_RULES: dict[str, Callable[[AxesOfNodes, Node], Axes]] = {
    **dict.fromkeys(("permute", "transpose", "t"), AxesOfNodes._permuted),
    **dict.fromkeys(("mm", "bmm", "matmul", "addmm", "baddbmm"), AxesOfNodes._product),
    **dict.fromkeys(("select", "unbind"), AxesOfNodes._selected),
    "cat": AxesOfNodes._concatenated,
    "linear": AxesOfNodes._linear,
    "embedding": AxesOfNodes._embedding,
    "scaled_dot_product_attention": AxesOfNodes._attention,
    "index": AxesOfNodes._indexed,
    "einsum": AxesOfNodes._einsum,
}


def _shape(value: Tensor) -> tuple[int, ...]:
    """Sizes as in the example that the graph was captured with."""
    return tuple(size if isinstance(size, int) else int(size.node.hint or 0) for size in value.shape)


def _tensors(node: Node) -> list[Node]:
    return [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]


def _argument(node: Node, name: str) -> Any:
    """An argument of an operation, by position or by name."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name) if name in names else len(node.args)
    return node.args[place] if place < len(node.args) else None


def _as_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_iota(node: Node) -> bool:
    """Whether a node is 0, 1, 2, ... along one axis."""
    while isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.removeprefix("aten::")
        if name == "arange":
            return len(node.args) == 1 or bool(node.args[0] == 0)
        if name not in _IOTA_STEPS and (name != "add" or node.args[1] != 0):
            return False
        if name == "slice" and _shape(node.meta["val"]) != _shape(node.args[0].meta["val"]):  # type: ignore[union-attr]
            return False
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return False
