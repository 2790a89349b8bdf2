"""Capture of a model as a graph by torch.export, and what the graph says about its layers.

The captured graph is functional (no in-place operations), holds the model's own parameters, and names them as the
model does. This file finds the sites in it, says why every other parameter stays in float, and sorts the nodes:

    constant   depends on parameters and constants only: computed once
    common     depends on the data, but on no site, or decides where rows go (see routing.py): the same in both
               streams, computed once per microbatch
    streamed   depends on a site: computed once per microbatch and stream
"""

import inspect
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

from distributed_adaround.capture.find_sites import UnitCalls, find_sites
from distributed_adaround.capture.routing import shared_nodes
from distributed_adaround.capture.sites import FloatParameter, Site
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError
from distributed_adaround.model.source import fixed_batch_size


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


def export_model(model: nn.Module, example: ModelInputs, varying: bool = False) -> ExportedProgram:
    """Export a module with a dynamic batch dimension; varying: other dimensions differ between microbatches too.

    Raises InputError when the graph holds the example's batch size as a constant, and whatever torch.export raises.
    """
    example = _odd_batch(example)
    # As in inference: autograd would refuse in-place operations. torch 2.13 warns about a call of its own.
    with torch.no_grad(), without_cache(model), warnings.catch_warnings(action="ignore", category=FutureWarning):
        program = torch.export.export(
            model, example.args, example.kwargs, dynamic_shapes=_dynamic_shapes(model, example, varying), strict=False
        )
    if (size := fixed_batch_size(program)) is not None:
        raise InputError(f"its graph only takes batches of {size} samples")
    return program


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """transformers' decoders return a key-value cache by default, an object that no graph can hold."""
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", False)
    if cached:
        config.use_cache = False
    try:
        yield
    finally:
        if cached:
            config.use_cache = True


def _dynamic_shapes(model: nn.Module, example: ModelInputs, varying: bool) -> dict[str, Any]:
    """Dynamic dimensions by the names of forward's parameters; `*args` holds several inputs."""

    def dims(value: object) -> dict[int, Any] | None:
        if not isinstance(value, Tensor):
            return None
        return dict.fromkeys(range(value.dim() if varying else min(1, value.dim())), Dim.AUTO)

    signature = inspect.signature(model.forward)
    bound = signature.bind(*example.args, **example.kwargs).arguments
    dynamic: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            dynamic[name] = tuple(dims(item) for item in value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            # torch 2.13 knows no dynamic sizes there.
            raise InputError(f"its forward takes {', '.join(value)} as **{name}, which torch.export cannot resize")
        else:
            dynamic[name] = dims(value)
    return dynamic


def _odd_batch(example: ModelInputs) -> ModelInputs:
    """The same inputs with a batch of 2 or more that equals no other dimension.

    torch.export bakes in sizes of 0 and 1, and a model that compares two sizes would be captured with them equal. It is
    not the example's own batch size either, so that running the graph on the example tells whether it was baked in.
    """
    tensors = [v for v in (*example.args, *example.kwargs.values()) if isinstance(v, Tensor)]
    taken = {size for tensor in tensors for size in tensor.shape}
    size = next(n for n in range(2, 3 + len(taken)) if n not in taken)

    def resize(value: object) -> object:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return torch.cat([value] * (size // value.shape[0] + 1))[:size]

    args = tuple(resize(value) for value in example.args)
    return replace(example, args=args, kwargs={name: resize(value) for name, value in example.kwargs.items()})


def straight_line(program: ExportedProgram) -> GraphModule:
    """The program as functional operations, one after the other, on the model's own tensors.

    Raises InputError when the graph holds control flow or other calls of submodules.
    """
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        module = program.run_decompositions({}).module(check_guards=False)
    assert isinstance(module, GraphModule)
    for node in module.graph.nodes:
        if node.op in ("call_module", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise InputError("its graph holds control flow that cannot be walked node by node")
    return module


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
    found = find_sites(module, nodes, constant)
    calls = {call.node for unit in found.units for call in unit.calls}
    return CapturedGraph(
        module=module,
        nodes=nodes,
        units=found.units,
        float_parameters=found.float_parameters,
        constant=constant,
        common=shared_nodes(nodes, constant, calls),
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
