"""Which rows of a layer are padding: masks are followed through the graph to the rows that they speak of.

    mask (n, t) ── its t is joined with the keys' axis by the attention scores ── keys (n, s) ── linear ── hidden (n, s)

so a decoder's rows, whose axis came with another input, are left alone even where its length is the same.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from distributed_adaround.capture.axes import AxesOfNodes, Axis
from distributed_adaround.data.microbatches import ModelInputs

_MASK = "attention_mask"


@dataclass(frozen=True)
class TokenMasks:
    """Masks `(N, T)` of one microbatch. of_axis: by the axis of tokens, as its atoms. other: axes of tokens that have
    none. by_shape: a mask that nothing in the graph says where it belongs, for rows of its shape on no known axis."""

    of_axis: Mapping[Axis, Tensor]
    other: frozenset[Axis]
    by_shape: Tensor | None


class MaskedRows:
    """Where the masks among a graph's inputs belong."""

    def __init__(self, nodes: Sequence[Node], constant: Container[Node]) -> None:
        self._axes = AxesOfNodes(nodes, constant)
        self._inputs = [node for node in nodes if node.op == "placeholder"]

    def of_microbatch(self, bound: Mapping[Node, Any], inputs: ModelInputs) -> TokenMasks:
        """bound: the values of the graph's inputs."""
        tensors = [node for node in self._inputs if isinstance(bound[node], Tensor) and bound[node].dim() > 1]
        masks = [node for node in tensors if bound[node] is inputs.mask or _is_mask(node, bound[node])]
        # Tokens come in along these axes.
        tokens = {node: axes[1] for node in tensors if node not in masks and (axes := self._axes.of(node)) is not None}
        of_axis: dict[Axis, Tensor] = {}
        for node in masks:
            axes = self._axes.of(node)
            if axes is not None and axes[1] in tokens.values():
                of_axis.setdefault(axes[1], bound[node])
        unplaced = inputs.mask if not any(mask is inputs.mask for mask in of_axis.values()) else None
        by_shape = None
        if unplaced is not None:
            alike = {axis for node, axis in tokens.items() if bound[node].shape[:2] == unplaced.shape}
            if len(alike) == 1:
                by_shape = of_axis.setdefault(alike.pop(), unplaced)
            elif not alike:
                # Of rows that are made of the input's, as frames of a waveform.
                by_shape = unplaced
        elif len(set(tokens.values())) == 1:
            by_shape = inputs.mask
        return TokenMasks(of_axis, frozenset(set(tokens.values()) - of_axis.keys()), by_shape)

    def mask_of(self, node: Node, channel_dim: int, masks: TokenMasks) -> Tensor | None:
        """The mask of a node's rows, in their order; None: all count. channel_dim: the axis that is no row."""
        axes = self._axes.of(node)
        if axes is None:
            return None
        rows = [axis for place, axis in enumerate(axes) if place != channel_dim % len(axes)]
        atoms = tuple(atom for axis in rows for atom in axis)
        for axis, mask in masks.of_axis.items():
            if len(atoms) == 1 + len(axis) and atoms[1:] == axis:
                return mask
            if len(atoms) == 1 + len(axis) and atoms[:-1] == axis:
                return mask.t()
        # Flat rows on no known axis may be in any order (sorted by expert, say), whatever their number.
        known = len(rows) < 2 or any(set(axis) <= set(atoms) for axis in masks.other)
        return None if known else masks.by_shape


def _is_mask(node: Node, value: Tensor) -> bool:
    return str(node.target).endswith(_MASK) and value.dim() == 2


def mask_by_shape(inputs: ModelInputs) -> Tensor | None:
    """Where nothing can be followed: the microbatch's mask, unless several inputs have tokens of its shape."""
    mask = inputs.mask
    if mask is None:
        return None
    leaves = [leaf for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(leaf, Tensor)]
    return mask if sum(leaf is not mask and leaf.shape[:2] == mask.shape for leaf in leaves) <= 1 else None
