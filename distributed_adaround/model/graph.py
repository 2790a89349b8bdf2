"""Capture of a model as a graph by torch.export, and what the graph says about its layers.

The captured graph is functional (no in-place operations), holds the model's own parameters, and names them as the
model does. This file finds the sites in it, says why every other parameter stays in float, and sorts the nodes:

    constant   depends on parameters and constants only: computed once
    common     depends on the data, but on no site: the same in both streams, computed once per microbatch
    streamed   depends on a site: computed once per microbatch and stream
"""

from __future__ import annotations

import inspect
import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

from distributed_adaround.errors import InputError
from distributed_adaround.model.sites import Activation, BatchNormAfter, FloatParameter, ModelInputs, Site
from distributed_adaround.numerics.layers import LayerGeometry

logger = logging.getLogger(__name__)

_aten = torch.ops.aten
# Spatial dimensions of each layer operation; 0 is Linear.
_LAYERS: dict[Any, int] = {
    _aten.linear.default: 0,
    _aten.conv1d.default: 1,
    _aten.conv1d.padding: 1,
    _aten.conv2d.default: 2,
    _aten.conv2d.padding: 2,
    _aten.conv3d.default: 3,
    _aten.conv3d.padding: 3,
    _aten.conv_transpose1d.default: 1,
    _aten.conv_transpose2d.input: 2,
    _aten.conv_transpose3d.input: 3,
    _aten.convolution.default: -1,
}
_TRANSPOSED = (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)
_BATCH_NORM = (_aten._native_batch_norm_legit_no_training.default, _aten.batch_norm.default)
_RELU = (_aten.relu.default, _aten.clamp_min.default, _aten.clamp.default, _aten.hardtanh.default, _aten.relu6.default)


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
    notes: tuple[str, ...] = field(default=())


def export_model(model: nn.Module, example: ModelInputs, varying: bool = False) -> ExportedProgram:
    """Export a module with a dynamic batch dimension.

    example: one microbatch. varying: other dimensions of the inputs differ between microbatches too.

    Raises:
        Exception: whatever torch.export raises; the caller falls back to replay.
        InputError: the graph holds the example's batch size as a constant.
    """
    example = _odd_batch(example)
    names = list(inspect.signature(model.forward).parameters)
    named = dict(zip(names, example.args, strict=False)) | example.kwargs
    dynamic = {name: _dims(value, varying) for name, value in named.items()}
    with _without_cache(model), warnings.catch_warnings():
        # torch 2.13 warns about a call of its own.
        warnings.filterwarnings("ignore", message="`isinstance\\(treespec, LeafSpec\\)`", category=FutureWarning)
        program = torch.export.export(model, example.args, example.kwargs, dynamic_shapes=dynamic, strict=False)
    if fixed_batch_size(program) is not None:
        raise InputError(f"its graph only takes batches of {fixed_batch_size(program)} samples")
    return program


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """transformers' decoders return a key-value cache by default, an object that no graph can hold."""
    config = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    assert config is not None
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


def _dims(value: object, varying: bool) -> dict[int, Any] | None:
    if not isinstance(value, Tensor):
        return None
    return dict.fromkeys(range(value.dim() if varying else min(1, value.dim())), Dim.AUTO)


def _odd_batch(example: ModelInputs) -> ModelInputs:
    """The same inputs with a batch of 2 or more that equals no other dimension.

    torch.export bakes in sizes of 0 and 1, and takes two equal dynamic sizes for the same size.
    """
    tensors = [v for v in (*example.args, *example.kwargs.values()) if isinstance(v, Tensor)]
    taken = {size for tensor in tensors for size in tensor.shape[1:]}
    size = next(n for n in range(2, 3 + len(taken)) if n not in taken)

    def resize(value: object) -> object:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return torch.cat([value] * (size // value.shape[0] + 1))[:size]

    args = tuple(resize(value) for value in example.args)
    return replace(example, args=args, kwargs={name: resize(value) for name, value in example.kwargs.items()})


def placeholder_names(program: ExportedProgram) -> list[str]:
    """Names of the program's inputs, in order."""
    return [str(name) for name in program.graph_signature.user_inputs]


def fixed_batch_size(program: ExportedProgram) -> int | None:
    """Batch size that the program was exported with, if it takes no other."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        is_input = node.op == "placeholder" and node.name in program.graph_signature.user_inputs
        if is_input and isinstance(value, Tensor) and value.dim() and isinstance(value.shape[0], int):
            return value.shape[0]
    return None


def capture(program: ExportedProgram) -> CapturedGraph:
    """Read the sites out of an exported program.

    Raises:
        InputError: the graph holds control flow or other calls of submodules.
    """
    module = program.run_decompositions({}).module(check_guards=False)
    assert isinstance(module, GraphModule)
    nodes = tuple(module.graph.nodes)
    if any(node.op in ("call_module", "call_method") or _is_higher_order(node) for node in nodes):
        raise InputError("its graph holds control flow that cannot be walked node by node")
    first_calls, repeat_calls = _find_sites(module, nodes)
    constant, common = _sort_nodes(nodes, {**first_calls, **repeat_calls})
    return CapturedGraph(
        module=module,
        nodes=nodes,
        sites=tuple(first_calls.values()),
        first_calls=first_calls,
        repeat_calls=repeat_calls,
        float_parameters=_float_parameters(module, nodes, first_calls),
        constant=constant,
        common=common,
        placeholders=tuple(node for node in nodes if node.op == "placeholder"),
    )


def _is_higher_order(node: Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def attribute(module: nn.Module, name: str) -> Any:
    """Parameter, buffer or constant by its dotted name."""
    return operator.attrgetter(name)(module)


def _weight_node(node: Node) -> Node | None:
    """The node of a layer's weight, if `node` is a layer whose weight is read as it is."""
    if node.target not in _LAYERS or len(node.args) < 2:
        return None
    weight = node.args[1]
    return weight if isinstance(weight, Node) and weight.op == "get_attr" else None


def _find_sites(module: GraphModule, nodes: Sequence[Node]) -> tuple[dict[Node, Site], dict[Node, Site]]:
    """Sites by the node of their first call, and by the nodes of later calls."""
    readers: dict[str, list[Node]] = {}
    aliases = _aliases(module)
    for node in nodes:
        if node.op == "get_attr":
            readers.setdefault(aliases.get(str(node.target), str(node.target)), []).extend(node.users)
    first: dict[Node, Site] = {}
    repeat: dict[Node, Site] = {}
    by_weight: dict[str, Site] = {}
    for node in nodes:
        weight = _weight_node(node)
        if weight is None or not attribute(module, str(weight.target)).is_floating_point():
            continue
        name = aliases.get(str(weight.target), str(weight.target))
        calls = readers[name]
        if not all(_weight_node(call) is not None and call.target == node.target for call in calls):
            continue
        if name in by_weight:
            repeat[node] = by_weight[name]
        else:
            by_weight[name] = first[node] = _site(module, node, name, len(calls))
    return first, repeat


def _aliases(module: nn.Module) -> dict[str, str]:
    """Other names of shared parameters, each to the first name."""
    names: dict[int, str] = {}
    aliases = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases[name] = names.setdefault(id(parameter), name)
    return aliases


def _site(module: GraphModule, node: Node, weight_name: str, num_calls: int) -> Site:
    bias = node.args[2] if len(node.args) > 2 else None
    path, _, leaf = weight_name.rpartition(".")
    batch_norm, activation = _what_follows(node)
    return Site(
        name=path if leaf == "weight" else weight_name,
        module_class=_module_class(node),
        weight_name=weight_name,
        bias_name=str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else None,
        geometry=_geometry(node, tuple(attribute(module, weight_name).shape)),
        batch_norm=batch_norm,
        activation=activation,
        num_calls=num_calls,
    )


def _module_class(node: Node) -> str:
    """Class name of the innermost module that ran this node."""
    stack = node.meta.get("nn_module_stack") or {}
    for _, owner in reversed(stack.values()):
        return str(owner if isinstance(owner, str) else owner.__name__).rpartition(".")[2]
    return "Linear" if node.target == _aten.linear.default else "Conv"


def _geometry(node: Node, weight_shape: tuple[int, ...]) -> LayerGeometry:
    dims = len(weight_shape) - 2
    if dims == 0:
        return LayerGeometry(weight_shape)
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    values |= dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    dilation = _per_dim(values["dilation"], dims)
    return LayerGeometry(
        weight_shape=weight_shape,
        stride=_per_dim(values["stride"], dims),
        padding=_padding(values["padding"], weight_shape[2:], dilation),
        dilation=dilation,
        output_padding=_per_dim(values.get("output_padding", 0), dims),
        groups=int(values["groups"]),
        transposed=bool(values.get("transposed", node.target in _TRANSPOSED)),
    )


def _per_dim(value: Any, dims: int) -> tuple[int, ...]:
    """torch allows one number for all dimensions."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return tuple(int(v) for v in (values * dims if len(values) == 1 else values))


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in _per_dim(value, len(kernel)))


def _what_follows(node: Node) -> tuple[BatchNormAfter | None, Activation]:
    """Batch norm and activation that read this node's output, if nothing else does."""
    follower = _only_user(node)
    batch_norm = None
    if follower is not None and follower.target in _BATCH_NORM:
        batch_norm = _batch_norm(follower)
        if batch_norm is None:
            return None, "identity"
        follower = _only_user(follower)
        if follower is not None and follower.target is operator.getitem:
            follower = _only_user(follower)
    return batch_norm, _activation(follower)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _batch_norm(node: Node) -> BatchNormAfter | None:
    inference = node.target == _BATCH_NORM[0] or node.args[5] is False
    names = [arg.target if isinstance(arg, Node) and arg.op == "get_attr" else None for arg in node.args[1:5]]
    given = [arg is not None for arg in node.args[1:5]]
    known = [name is not None for name in names]
    if not inference or given != known or not (known[2] and known[3]):
        return None
    eps = node.args[6] if node.target == _BATCH_NORM[0] else node.args[7]
    weight, bias, mean, var = (None if name is None else str(name) for name in names)
    assert mean is not None
    assert var is not None
    assert isinstance(eps, float)
    return BatchNormAfter(weight, bias, mean, var, eps)


def _activation(node: Node | None) -> Activation:
    if node is None or node.target not in _RELU or node.kwargs:
        return "identity"
    limits = tuple(node.args[1:])
    if node.target == _aten.relu.default or (node.target != _aten.hardtanh.default and limits in ((0,), (0, None))):
        return "relu"
    return "relu6" if node.target == _aten.relu6.default or limits == (0, 6) else "identity"


def _sort_nodes(nodes: Sequence[Node], calls: dict[Node, Site]) -> tuple[frozenset[Node], frozenset[Node]]:
    constant: set[Node] = set()
    common: set[Node] = set()
    for node in nodes:
        if node.op == "placeholder":
            common.add(node)
        elif node.op == "get_attr" or (node.op == "call_function" and all(n in constant for n in node.all_input_nodes)):
            constant.add(node)
        elif node not in calls and all(n in constant or n in common for n in node.all_input_nodes):
            common.add(node)
    return frozenset(constant), frozenset(common)


def _float_parameters(
    module: GraphModule, nodes: Sequence[Node], first_calls: dict[Node, Site]
) -> tuple[FloatParameter, ...]:
    """Every parameter that is not the weight of a site, with the reason."""
    aliases = _aliases(module)
    weights = {site.weight_name for site in first_calls.values()}
    users: dict[str, list[Node]] = {}
    for node in nodes:
        if node.op == "get_attr":
            users.setdefault(aliases.get(str(node.target), str(node.target)), []).extend(node.users)
    return tuple(
        FloatParameter(name, tuple(parameter.shape), _reason(name, users.get(name, []), aliases))
        for name, parameter in module.named_parameters()
        if name not in weights
    )


def _reason(name: str, users: Sequence[Node], aliases: dict[str, str]) -> str:
    if not users:
        return "not used in the forward pass"
    weights = {user: _weight_node(user) for user in users}
    as_weight = [user for user, node in weights.items() if node is not None and aliases[str(node.target)] == name]
    if as_weight and len(as_weight) < len(users):
        others = {_operation(user) for user in users if user not in as_weight}
        return f"shared with {', '.join(sorted(others))}"
    if as_weight:
        return "used by layers of different kinds"
    if all(user.target in _LAYERS for user in users):
        return "bias"
    return f"used by {', '.join(sorted({_operation(user) for user in users}))}, not the weight of a layer"


def _operation(node: Node) -> str:
    target = node.target
    return target.__name__.split(".")[0].removeprefix("_") if callable(target) else str(node.op)
