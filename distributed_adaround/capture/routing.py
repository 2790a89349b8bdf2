"""What both streams share: values that depend on no layer, and decisions that the float stream takes for both.

Rows of the two streams must pair up. So which expert a token goes to, and any other index, count or size that depends
on data, is *pinned*: computed once, from float values. Pinned are

    - whole numbers and sizes, however they come about (argmax, sort, nonzero, cumsum, histc);
    - truth values, except where they only choose between numbers (`where`, a mask that is filled in or multiplied);
    - values that come with such indices from topk, sort, max or min: the weights of a routing; scores that are gathered
      by indices that were taken from themselves; and the best of scores whose place is taken too.

What follows from pinned values alone is pinned with them.
"""

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

_aten = torch.ops.aten
# Values with the indices that they were found at.
_RANKED = (
    *(_aten.topk.default, _aten.sort.default, _aten.sort.stable, _aten.max.dim, _aten.min.dim),
    *(_aten.kthvalue.default, _aten.mode.default, _aten.median.dim, _aten.cummax.default, _aten.cummin.default),
)
_ARGUMENT = (_aten.argmax.default, _aten.argmin.default, _aten.argsort.default, _aten.argsort.stable)
_BEST = (_aten.max.dim, _aten.min.dim, _aten.amax.default, _aten.amin.default, _aten.topk.default)
# A row of a table for an index: tokens, codes of a codebook.
_LOOK_UP = (_aten.embedding.default,)
# Only the shape of their argument counts.
_SHAPE_ONLY = (
    *(_aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default, _aten.empty_like.default),
    *(_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default, _aten.new_empty.default),
)
_GATHER = (_aten.gather.default, _aten.take_along_dim.default, _aten.index.Tensor, _aten.index_select.default)
# What a truth value may do without deciding where anything goes.
_CHOICES = {"where", "masked_fill", "mul", "bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "logical_and"}
_CHOICES |= {"logical_or", "logical_not", "logical_xor", "_to_copy", "expand", "unsqueeze", "view", "alias", "clone"}


def shared_nodes(nodes: Sequence[Node], constant: Container[Node], calls: Container[Node]) -> frozenset[Node]:
    """Nodes that run once for both streams, from common and float values. calls: of the layers."""
    shared: set[Node] = set()
    scores = _Scores(nodes, calls)
    for node in nodes:
        if node in calls or node in constant or node.op == "output":
            continue
        follows = all(source in constant or source in shared for source in node.all_input_nodes)
        if follows or _decides(node) or scores.are_picked(node, shared):
            shared.add(node)
    return frozenset(shared)


def routers(nodes: Sequence[Node], shared: Container[Node], calls: Container[Node]) -> set[Node]:
    """Layers that only pick: their outputs are ranked, what is picked says which rows later layers see, and apart from
    that ranking nothing of them goes on to a layer."""
    scores = _Scores(nodes, calls)
    found: set[Node] = set()
    for ranking in nodes:
        if scores.is_ranking(ranking) and _leads_to_layer(ranking, calls, lambda node: node.target in _LOOK_UP):
            found |= {node for node in scores.before(ranking) if node in calls}
    return {node for node in found if not _leads_to_layer(node, calls, lambda user: user in shared)}


def _leads_to_layer(node: Node, calls: Container[Node], ends: Callable[[Node], bool]) -> bool:
    """Whether what follows a node reaches a layer, on ways that end where `ends` says."""
    seen: set[Node] = set()
    open_nodes = [node]
    while open_nodes:
        for user in open_nodes.pop().users:
            if user not in seen and not ends(user):
                if user in calls:
                    return True
                seen.add(user)
                open_nodes.append(user)
    return False


def _decides(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _SHAPE_ONLY or node.target in _RANKED:
        return node.target in _SHAPE_ONLY or _index_is_used(node)
    leaves = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if leaf is not None]
    if not leaves or not all(_is_whole(leaf) for leaf in leaves):
        return False
    return not all(_is_truth(leaf) for leaf in leaves) or not _only_chooses(node)


def _index_is_used(node: Node) -> bool:
    return any(user.args[1] == 1 for user in node.users)


def _is_whole(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return isinstance(value, torch.SymInt | torch.SymBool | int)


def _is_truth(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _only_chooses(node: Node) -> bool:
    """Whether all that reads a truth value, also through others, only chooses between numbers by it."""
    for user in node.users:
        name = getattr(user.target, "__name__", str(user.target))
        operation, _, overload = name.partition(".")
        # With one argument it lists places.
        if operation not in _CHOICES or (operation == "where" and overload == "default"):
            return False
        leaves = pytree.tree_leaves(user.meta.get("val"))
        if all(map(_is_truth, leaves)):
            if not _only_chooses(user):
                return False
        elif any(map(_is_whole, leaves)):
            return False
    return True


class _Scores:
    """Which tensors the indices of a ranking were taken from."""

    def __init__(self, nodes: Sequence[Node], calls: Container[Node]) -> None:
        self._calls = calls
        self._ranked_from: dict[Node, set[Node]] = {}
        # Tensors that are ranked as they are.
        self._ranked: set[Node] = set()
        for node in nodes:
            if self.is_ranking(node):
                self._ranked_from[node] = self._before(node)
                self._ranked.add(node.all_input_nodes[0])
            elif node.op == "call_function" and all(map(_is_whole, pytree.tree_leaves(node.meta.get("val")))):
                # An index is passed on through what makes an index of it.
                before = [self._ranked_from[source] for source in node.all_input_nodes if source in self._ranked_from]
                if before:
                    self._ranked_from[node] = set.union(*before)

    @staticmethod
    def is_ranking(node: Node) -> bool:
        if node.target in _ARGUMENT:
            return True
        return node.target in _RANKED and _index_is_used(node)

    def before(self, ranking: Node) -> set[Node]:
        """All that a ranking depends on, back to the nearest layers."""
        return self._ranked_from[ranking]

    def _before(self, node: Node) -> set[Node]:
        found: set[Node] = set()
        open_nodes = list(node.all_input_nodes)
        while open_nodes:
            source = open_nodes.pop()
            if source not in found:
                found.add(source)
                open_nodes.extend(() if source in self._calls else source.all_input_nodes)
        return found

    def are_picked(self, node: Node, shared: Container[Node]) -> bool:
        """Whether a node takes scores by an index that was ranked from the same scores, or the best of them."""
        if node.target in _BEST:
            return node.all_input_nodes[0] in self._ranked
        if node.target not in _GATHER:
            return False
        scores, *others = node.all_input_nodes
        return any(other in shared and scores in self._ranked_from.get(other, ()) for other in others)
