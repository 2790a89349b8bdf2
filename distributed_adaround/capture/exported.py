"""A model as a graph by torch.export: one graph for all kinds of microbatches, or the reason why there is none."""

import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from distributed_adaround.capture.contractions import einsum_table
from distributed_adaround.capture.forward import undisturbed
from distributed_adaround.capture.recurrent import any_length, open_recurrent
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError
from distributed_adaround.model.source import fixed_batch_size


def export_model(model: nn.Module, example: ModelInputs, varying: bool = False) -> ExportedProgram:
    """Export a module with a dynamic batch dimension; varying: other dimensions differ between microbatches too.

    Raises InputError when the graph holds the example's batch size as a constant, and whatever torch.export raises.
    """
    example = _odd_batch(example)
    with undisturbed(model), quiet_torch(), any_length():
        program = torch.export.export(
            model, example.args, example.kwargs, dynamic_shapes=_dynamic_shapes(model, example, varying), strict=False
        )
    if (size := fixed_batch_size(program)) is not None:
        raise InputError(f"its graph only takes batches of {size} samples")
    return program


def export_as_it_is(model: nn.Module, example: ModelInputs) -> ExportedProgram:
    """Export a module for inputs of exactly these sizes. Raises whatever torch.export raises."""
    with undisturbed(model), quiet_torch(), any_length():
        return torch.export.export(model, example.args, example.kwargs, strict=False)


def straight_line(program: ExportedProgram) -> GraphModule:
    """The program as functional operations, one after the other, on the model's own tensors.

    Raises InputError when the graph holds control flow or other calls of submodules.
    """
    with quiet_torch(), any_length():
        flat = program.run_decompositions(einsum_table(program))
        module = flat.module(check_guards=False)
    assert isinstance(module, GraphModule)
    for node in module.graph.nodes:
        if node.op in ("call_module", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise InputError("its graph holds control flow that cannot be walked node by node")
    open_recurrent(module)
    module.meta["ranges"] = flat.range_constraints
    return module


@contextmanager
def quiet_torch() -> Iterator[None]:
    """What fails in here is told in one line by who catches it; torch itself logs tracebacks and prints whole graphs,
    and warns about calls of its own and about weights of recurrent layers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


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
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            # torch 2.13 knows no dynamic sizes there.
            raise InputError(f"its forward takes {', '.join(value)} as **{name}, which torch.export cannot resize")
        dynamic[name] = pytree.tree_map(dims, value)
    return dynamic


def _odd_batch(example: ModelInputs) -> ModelInputs:
    """The same inputs with a batch of 2 or more that equals no other dimension.

    torch.export bakes in sizes of 0 and 1, and a model that compares two sizes would be captured with them equal. It is
    not the example's own batch size either, so that running the graph on the example tells whether it was baked in.
    """
    leaves = pytree.tree_leaves((example.args, example.kwargs))
    taken = {size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape}
    size = next(n for n in range(2, 3 + len(taken)) if n not in taken)

    def resize(value: Tensor) -> Tensor:
        return torch.cat([value] * (size // value.shape[0] + 1))[:size] if value.dim() else value.clone()

    args, kwargs = pytree.tree_map_only(Tensor, resize, (example.args, example.kwargs))
    return replace(example, args=args, kwargs=kwargs)
