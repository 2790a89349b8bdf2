"""A model as an ONNX graph, by torch.onnx: what `onnx_graph.py` puts the codes into."""

import copy
import json
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from distributed_adaround import __version__
from distributed_adaround.capture.exported import export_as_it_is, export_model, quiet_torch
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError, first_line

logger = logging.getLogger(__name__)

INPUTS_KEY = "distributed_adaround.inputs"
_CPU = torch.device("cpu")


def onnx_graph(model: nn.Module | ExportedProgram, inputs: ModelInputs, opset: int) -> Any:
    """The model as an onnx_ir.Model, with float weights under their own names, not optimized.

    Batch and other dimensions are of any size, where the model can be exported so. Raises InputError.
    """
    inputs = inputs.to(_CPU)
    failures = []
    for note, trace in _ways(model, inputs):
        try:
            program = trace()
            with quiet_torch(), torch.no_grad():
                found: Any = torch.onnx.export(
                    program, (), dynamo=True, opset_version=opset, optimize=False, verbose=False
                )
        except Exception as error:  # torch raises all kinds
            failures.append(first_line(error))
            continue
        if note:
            logger.warning("onnx: %s", note)
        return _tidied(found.model, program, inputs)
    what = "cannot be exported by torch.onnx"
    raise InputError(f"the model {what}: {failures[0]}; remove onnx from output.formats") from None


def _ways(model: nn.Module | ExportedProgram, inputs: ModelInputs) -> list[tuple[str, Callable[[], ExportedProgram]]]:
    """What to try, one after the other, and what the user should know when it is what works."""
    if isinstance(model, ExportedProgram):
        return [("", partial(move_to_device_pass, model, "cpu"))]
    host = on_host(model)
    only_batch = "the batch may have any size, other dimensions of the inputs are fixed to those of the data"
    fixed = "the model cannot be exported for other sizes of inputs; the batch is fixed too"
    return [
        ("", partial(export_model, host, inputs, varying=True)),
        (only_batch, partial(export_model, host, inputs)),
        (fixed, partial(export_as_it_is, host, inputs)),
    ]


def on_host(model: nn.Module) -> nn.Module:
    """The model itself where it is in host memory, else a copy there; nothing is copied on the device."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.device == _CPU for tensor in tensors):
        return model
    copies: dict[int, Any] = {}
    for tensor in tensors:
        moved: Tensor = tensor.detach().to(_CPU)
        is_parameter = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    return copy.deepcopy(model, copies)


def _tidied(model: Any, program: ExportedProgram, inputs: ModelInputs) -> Any:
    """Without what depends on where and by which torch the model was exported; dimensions have names that say more."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    graph = model.graph
    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    graph.metadata_props.clear()
    model.producer_name, model.producer_version = "distributed_adaround", __version__
    values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
    for value in values:
        value.metadata_props.clear()
    model.metadata_props[INPUTS_KEY] = json.dumps(_input_places(graph, program, inputs))
    _name_dimensions(graph, values)
    return model


def _input_places(graph: Any, program: ExportedProgram, inputs: ModelInputs) -> dict[str, str]:
    """Where each input of the graph lies in the arguments: `[0][0]` is the first, `[1]['input_ids']` a keyword."""
    args, kwargs = program.example_inputs if program.example_inputs is not None else (inputs.args, inputs.kwargs)
    leaves, _ = pytree.tree_flatten_with_path((args, kwargs))
    names = program.graph_signature.user_inputs
    known = {value.name for value in graph.inputs}
    places = dict(zip(names, (pytree.keystr(path) for path, _ in leaves), strict=False))
    return {str(name): place for name, place in places.items() if name in known}


def _name_dimensions(graph: Any, values: list[Any]) -> None:
    """ "batch" and "input_ids_1" for torch's s77; a dimension that torch found to be fixed becomes a number."""
    names: dict[str, str] = {}
    for place, value in enumerate(graph.inputs):
        for dim, size in enumerate(value.shape or ()):
            symbol = str(getattr(size, "value", size))
            if re.fullmatch(r"[A-Za-z_]\w*", symbol):
                names.setdefault(symbol, "batch" if place == dim == 0 else f"{value.name}_{dim}")
    for value in values:
        if value.shape is not None:
            value.shape = type(value.shape)([_renamed(size, names) for size in value.shape])


def _renamed(size: Any, names: dict[str, str]) -> int | str | None:
    if isinstance(size, int):
        return size
    if size.value is None:
        return None
    text = re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), str(size.value))
    return int(text) if text.isdigit() else text
