"""The data of a microbatch as the inputs of a captured graph, checked against what the graph was captured for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def bind(graph: GraphModule, inputs: ModelInputs, index: int) -> dict[Node, Any]:
    """Values of the graph's placeholders: positional arguments in order, the others by name. index: of the microbatch.

    Raises InputError when an input is not what the graph was captured for: it may hold sizes and plain values of the
    example as constants, and would compute nonsense with others.
    """
    info = graph.graph._codegen.pytree_info  # type: ignore[attr-defined]
    names: list[str] = info.orig_args
    given = dict(zip(names, inputs.args, strict=False)) | inputs.kwargs
    if len(inputs.args) > len(names) or set(given) != set(names):
        raise InputError(f"the model takes the inputs {names}, the data has {sorted(given)}; map them with data.fields")
    positional, by_name = info.in_spec.children()
    specs = (*positional.children(), *by_name.children())
    try:
        values = [leaf for name, spec in zip(names, specs, strict=True) for leaf in spec.flatten_up_to(given[name])]
    except ValueError as error:
        what = "the data nests its tensors in another way than the example that the graph was captured with"
        raise InputError(f"microbatch {index}: {what}; every microbatch must give the same") from error
    bound = dict(zip((node for node in graph.graph.nodes if node.op == "placeholder"), values, strict=True))
    for node, value in bound.items():
        _check_fit(node, value, index)
        _check_ranges(node, value, index, graph.meta.get("ranges", {}))
    return bound


def _check_ranges(placeholder: Node, value: Any, index: int, ranges: Mapping[Any, Any]) -> None:
    """Raises InputError for a size at which the model would take another branch than the one that was captured."""
    captured = placeholder.meta.get("val")
    if not isinstance(captured, Tensor) or not isinstance(value, Tensor):
        return
    for dim, (size, actual) in enumerate(zip(captured.shape, value.shape, strict=False)):
        found = ranges.get(size.node.expr) if isinstance(size, torch.SymInt) else None
        # torch.export says 2 where it means any size.
        if found is not None and not (actual < 2 >= found.lower or found.lower <= actual <= found.upper):
            raise InputError(
                f"microbatch {index}: the model's graph takes {placeholder.target!r} with sizes {found.lower} to "
                f"{found.upper} in dimension {dim}, the data has shape {tuple(value.shape)}; pad or cut the samples"
            )


def _check_fit(placeholder: Node, value: Any, index: int) -> None:
    captured = placeholder.meta.get("val")
    if isinstance(captured, Tensor) and isinstance(value, Tensor):
        # Rank and dtype need no check: an operation that depends on them fails by itself.
        fixed = [(dim, int(size)) for dim, size in enumerate(captured.shape) if is_concrete_int(size)]
        odd = next((pair for pair in fixed if pair[0] >= value.dim() or value.shape[pair[0]] != pair[1]), None)
        if odd is not None:
            raise InputError(
                f"microbatch {index}: the model's graph takes {placeholder.target!r} with size {odd[1]} in dimension "
                f"{odd[0]}, the data has shape {tuple(value.shape)}; pad or cut all samples to one size"
            )
    elif not isinstance(captured, _SYMBOLIC):
        before, now = ("a tensor" if isinstance(part, Tensor) else repr(part) for part in (captured, value))
        if before != now:
            what = f"the model's graph was captured for {placeholder.target!r} = {before}, the data has {now}"
            raise InputError(f"microbatch {index}: {what}; every microbatch must give the same")
