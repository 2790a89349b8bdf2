"""What single nodes of a captured graph compute: shapes of layers, and what may follow them inside the loss."""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from distributed_adaround.capture.sites import Activation, BatchNormAfter
from distributed_adaround.numerics.layers import LayerGeometry, padding_pairs

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv1d, _aten.conv2d, _aten.conv3d)
_TRANSPOSED = (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)
LINEAR = (_aten.linear.default,)
_ALL_CONVOLUTIONS = (
    *(_aten.convolution.default, *_TRANSPOSED),
    *(overload for packet in _CONVOLUTIONS for overload in (packet.default, packet.padding)),
)
_BATCH_NORM = (_aten._native_batch_norm_legit_no_training.default, _aten.batch_norm.default)
_RELU = (_aten.relu.default, _aten.clamp_min.default, _aten.clamp.default, _aten.hardtanh.default, _aten.relu6.default)


def is_convolution(node: Node) -> bool:
    return node.target in _ALL_CONVOLUTIONS


def module_class(node: Node) -> str:
    """Class name of the innermost module that ran this node."""
    stack = node.meta.get("nn_module_stack") or {}
    for _, owner in reversed(stack.values()):
        return str(owner if isinstance(owner, str) else owner.__name__).rpartition(".")[2]
    return "Conv" if is_convolution(node) else "Linear"


def operation_name(node: Node) -> str:
    """For messages: "embedding"."""
    target = node.target
    return target.__name__.split(".")[0].removeprefix("_") if callable(target) else str(node.op)


def layer_geometry(node: Node, weight_shape: tuple[int, ...]) -> LayerGeometry:
    if not is_convolution(node):
        return LayerGeometry(weight_shape)
    dims = len(weight_shape) - 2
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    values |= dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    dilation, padding = _per_dim(values["dilation"], dims), values["padding"]
    if not isinstance(padding, str):
        padding = _per_dim(padding, dims)
    return LayerGeometry(
        weight_shape=weight_shape,
        stride=_per_dim(values["stride"], dims),
        padding=padding_pairs(padding, weight_shape[2:], dilation),
        dilation=dilation,
        output_padding=_per_dim(values.get("output_padding", 0), dims),
        groups=int(values["groups"]),
        transposed=bool(values.get("transposed", node.target in _TRANSPOSED)),
    )


def _per_dim(value: Any, dims: int) -> tuple[int, ...]:
    """torch allows one number for all dimensions."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return tuple(int(v) for v in (values * dims if len(values) == 1 else values))


def what_follows(node: Node) -> tuple[BatchNormAfter | None, Activation]:
    """Batch norm and activation that read this layer's output, if nothing else does."""
    follower = _only_user(node)
    batch_norm = None
    if follower is not None and follower.target in _BATCH_NORM:
        batch_norm = _batch_norm(follower)
        if batch_norm is None or not _channels_come_second(node):
            return None, "identity"
        follower = _only_user(follower)
        if follower is not None and follower.target is operator.getitem:
            follower = _only_user(follower)
    return batch_norm, _activation(follower)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _channels_come_second(node: Node) -> bool:
    """Batch norm works on dimension 1. A linear layer has its channels there in `(N, O)`, but not in `(N, T, O)`."""
    output = node.meta.get("val")
    return is_convolution(node) or (isinstance(output, Tensor) and output.dim() == 2)


def _batch_norm(node: Node) -> BatchNormAfter | None:
    inference = node.target == _BATCH_NORM[0] or node.args[5] is False
    tensors = node.args[1:5]
    computed = any(
        tensor is not None and not (isinstance(tensor, Node) and tensor.op == "get_attr") for tensor in tensors
    )
    weight, bias, mean, var = (str(tensor.target) if isinstance(tensor, Node) else None for tensor in tensors)
    if not inference or computed or mean is None or var is None:
        return None
    eps: Any = node.args[6] if node.target == _BATCH_NORM[0] else node.args[7]
    return BatchNormAfter(weight, bias, mean, var, float(eps))


def _activation(node: Node | None) -> Activation:
    if node is None or node.target not in _RELU or node.kwargs:
        return "identity"
    limits = tuple(node.args[1:])
    if node.target == _aten.relu.default or (node.target != _aten.hardtanh.default and limits in ((0,), (0, None))):
        return "relu"
    return "relu6" if node.target == _aten.relu6.default or limits == (0, 6) else "identity"
