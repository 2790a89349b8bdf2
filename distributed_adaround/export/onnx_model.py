"""Exporter `onnx`: the model as a graph for ONNX Runtime, with codes and DequantizeLinear in the place of weights.

    <output>/onnx/model.onnx         the graph with its weights
    <output>/onnx/model.onnx.data    the weights, where all together they are too large for one protobuf

ONNX Runtime turns DequantizeLinear and MatMul into MatMulNBits, which by default computes with activations of int8; at
`session.qdq_matmulnbits_accuracy_level` 0 it computes in float, as everything else does. `load` sets that.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError, SpecError, first_line, redact, shorten
from distributed_adaround.export.exporter import Exporter, ExportPlan, ExportTask, Loaded
from distributed_adaround.export.onnx_graph import drop_zero_biases, float_piece, insert_codes
from distributed_adaround.export.onnx_program import INPUTS_KEY, onnx_graph
from distributed_adaround.export.onnx_weights import StoredWeight, container, dequantized, is_whole, pieces
from distributed_adaround.export.stored import QuantizedLayer, StoredResult
from distributed_adaround.files import storage, uris
from distributed_adaround.numerics.weight_view import dtype_name

FOLDER, MODEL, DATA = "onnx", "model.onnx", "model.onnx.data"
_INSTALL = "pip install 'distributed_adaround[onnx]'"
# A protobuf holds less than 2 GiB.
_LARGEST_INLINE = 2_000_000_000
# Shapes and other small constants stay in the graph, which is understood by them.
_SMALLEST_EXTERNAL = 1024
# Sums in another order: 2e-5 of the largest output in a BERT of 6 layers, where torch itself is 8e-6 off from float64.
# Activations of int8 would be 1e-3 and more. Of float16 models ONNX Runtime computes in float32 what it has no kernels
# for, torch rounds every step.
_TOLERANCE = {"float32": 1e-4, "float16": 5e-3}
# Parts that lie one after the other, "[0:16]" or "[:,8:16]".
_RUN = re.compile(r"\[(:,)?\d+:\d+\]")


@dataclass(frozen=True)
class OnnxExporter(Exporter):
    """largest_inline: bytes of weights up to which all is one file."""

    files = (FOLDER,)
    published = (f"{FOLDER}/{MODEL}",)
    largest_inline: int = _LARGEST_INLINE

    def scale_dtype(self, plan: ExportPlan) -> str | None:
        """DequantizeLinear gives what its scales are."""
        return "float16" if plan.dtype == torch.float16 else None

    def check(self, plan: ExportPlan) -> None:
        missing = [name for name in ("onnx", "onnx_ir", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise SpecError(f"output.formats: onnx needs {', '.join(missing)}: {_INSTALL}")
        if not plan.exported:
            raise SpecError(
                "output.formats: onnx needs a model that torch.export can capture, which this is not; remove it"
            )
        for layer in plan.layers:
            if problem := _problem(layer, plan):
                raise SpecError(f"output.formats: onnx: layer {shorten(layer.name, 80)!r} {problem}")

    def write(self, task: ExportTask, uri: str) -> None:
        folder = uris.join(uri, FOLDER)
        target, data = uris.join(folder, MODEL), uris.join(folder, DATA)
        storage.remove_tree(target)  # what counts, until it comes last
        storage.remove_tree(data)
        model = quantized_graph(task)
        values = list(model.graph.initializers.values())
        if sum(value.const_value.nbytes for value in values) > self.largest_inline:
            large = [value for value in values if value.const_value.nbytes >= _SMALLEST_EXTERNAL]
            storage.write_file(data, partial(_write_data, large))
        storage.write_bytes(target, _checked(model))

    def load(self, task: ExportTask, uri: str) -> Loaded:
        import onnx_ir as ir

        folder = task.files.directory(uris.join(uri, FOLDER), lambda name: name in (MODEL, DATA))
        path = folder / MODEL
        try:
            model: Any = ir.load(path)
        except Exception as error:  # of protobuf, numpy or the system
            raise InputError(f"{redact(uri)}: {FOLDER}/{MODEL} cannot be read: {first_line(error)}") from error
        weights = _weights(model, task.result)
        if importlib.util.find_spec("onnxruntime") is None:
            return Loaded(weights, note=f"weights only; to run it: {_INSTALL}")
        places = json.loads(model.metadata_props.get(INPUTS_KEY, "{}"))
        names = [value.name for value in model.graph.inputs]
        tolerance = _TOLERANCE.get(dtype_name(task.dtype), _TOLERANCE["float32"])
        return Loaded(
            weights,
            _runner(path, names, places),
            tolerance,
            "accuracy level 0; by default ONNX Runtime rounds activations to int8",
        )


def _problem(layer: QuantizedLayer, plan: ExportPlan) -> str | None:
    """What ONNX or ONNX Runtime cannot hold of a layer, and what to do; None: nothing."""
    if layer.dtype == "bfloat16":
        remedy = "set model.dtype: float32" if plan.source.hf is not None else "give the model in float32"
        return f"is bfloat16, for which ONNX Runtime has no DequantizeLinear on CPUs; {remedy}"
    element = layer.number.element
    if element is not None and element.name != "e4m3":
        return f"is {layer.number.name}, for which ONNX Runtime has no kernel on CPUs; use dtype int4 or fp8"
    if layer.view is None:
        return None
    part = layer.stored_name.removeprefix(layer.owner)
    if not part and is_whole(layer.view.shape, layer.view.strides):
        return None
    if _RUN.fullmatch(part) and len(layer.view.shape) == 2:
        return None
    if re.match(r"\[\d+[],]", part):
        what = f"is one of several weights in {layer.owner}, as of experts, and torch.onnx does not know the operation"
        return f"{what} that runs them; remove onnx"
    what = f"is a part of {layer.owner} that does not lie in one piece, which ONNX cannot put together"
    return f"{what}; leave it in float with quantize.ignore, or remove onnx"


def quantized_graph(task: ExportTask) -> Any:
    """The model as an onnx_ir.Model with codes in it, that are read when it is written. Raises InputError."""
    import onnx_ir as ir

    inputs = task.inputs()
    if not inputs:
        raise InputError("onnx needs a microbatch of the calibration data, of which rank 0 has none; use fewer ranks")
    two_bits = any(container(layer.number).endswith("INT2") for layer in task.result.layers.values())
    model = onnx_graph(task.model(), inputs[0], opset=25 if two_bits else 21)
    # IR versions 10 and 13 go with opsets 21 and 25.
    model.ir_version = 13 if two_bits else 10
    insert_codes(model, task.result)
    drop_zero_biases(model)
    assert isinstance(model, ir.Model)
    return model


def _write_data(values: Sequence[Any], path: Path) -> None:
    """One tensor after the other, each out of memory when it is written; the values point there afterwards."""
    import onnx_ir as ir

    tensors = [value.const_value for value in values]
    written = ir.external_data.convert_tensors_to_external(tensors, path.parent, path.name)
    for value, one in zip(values, written, strict=True):
        value.const_value = ir.ExternalTensor(
            DATA, one.offset, one.length, one.dtype, shape=one.shape, name=one.name or value.name
        )


def _checked(model: Any) -> bytes:
    """The model as a protobuf. Raises InputError when onnx finds it wrong."""
    import onnx
    import onnx_ir as ir

    proto: Any = ir.to_proto(model)
    data: bytes = proto.SerializeToString(deterministic=True)
    # The checker looks for the file of weights. Weights that are inputs are checked as well, without the file.
    graph = proto.graph
    outside = {tensor.name for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in outside]:
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        graph.initializer.remove(tensor)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(f"onnx refuses the graph of this model: {first_line(error)}; remove onnx") from error
    return data


def _weights(model: Any, result: StoredResult) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the model by its own names: those of quantized layers from DequantizeLinear, then floats."""
    nodes: dict[str, Any] = {}
    for node in model.graph:
        if (stored := StoredWeight.read(node.metadata_props, result)) is not None:
            nodes |= {layer.stored_name: (node, stored) for layer in stored.layers}
    missing = result.layers.keys() - nodes.keys()
    if missing:
        raise InputError(
            f"the ONNX model holds no codes of {shorten(', '.join(sorted(missing)), 200)}; run the job again"
        )
    for owner in result.owners:
        yield owner, _parameter(model, owner, nodes, result)
    for name, value in model.graph.initializers.items():
        known = name in result.shapes or name in result.tied
        if known and not result.layers_of(name):
            yield name, torch.from_numpy(np.array(value.const_value.numpy()))


def _parameter(model: Any, owner: str, nodes: dict[str, Any], result: StoredResult) -> Tensor:
    layers = result.layers_of(owner)
    tensor = torch.zeros(result.shapes[owner], dtype=getattr(torch, result.dtypes[owner]))
    axis, parts = pieces(owner, tensor.shape, layers)
    for part in parts:
        if not part.layers:
            array = model.graph.initializers[float_piece(owner, axis, part)].const_value.numpy()
            place = tensor.view(-1, tensor.shape[-1]).narrow(axis, part.start, part.stop - part.start)
            place.copy_(torch.from_numpy(np.array(array)))
    for layer in layers:
        node, stored = nodes[layer.stored_name]
        weight = _read(node, stored, result)[stored.layers.index(layer)]
        place = tensor if layer.view is None else layer.view.of(tensor)
        place.copy_(weight)
    return tensor


def _read(node: Any, stored: StoredWeight, result: StoredResult) -> list[Tensor]:
    """The weights of a DequantizeLinear's layers, those with a batch norm in their scales as they were before."""
    codes, scale, *zero_points = (value.const_value.numpy() for value in node.inputs)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if stored.norm is not None:
        scale = _unfolded(stored, scale, result)
    values = dequantized(
        codes,
        scale,
        zero_points[0] if zero_points else None,
        attributes.get("axis", 1),
        attributes.get("block_size", 0),
    )
    return stored.weights(values)


def _unfolded(stored: StoredWeight, scale: np.ndarray[Any, Any], result: StoredResult) -> np.ndarray[Any, Any]:
    """The layer's own scales, where those of the file are these times the batch norm's factors, bit by bit; what they
    come to otherwise, which then differs from the model."""
    assert stored.norm is not None
    _, expected, _ = stored.arrays(result)
    plain = StoredWeight(stored.layers, stored.layout)
    own = plain.arrays(result)[1].numpy()
    if np.array_equal(expected.numpy(), scale):
        return own
    factor = stored.norm.factor(result.tensor).numpy()
    found: np.ndarray[Any, Any] = (scale / factor.reshape(-1, *[1] * (scale.ndim - 1))).astype(np.float32)
    return found


def _runner(path: Path, names: Sequence[str], places: dict[str, str]) -> Callable[[ModelInputs], Sequence[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # classes of its own, of several kinds
        raise InputError(f"ONNX Runtime cannot open {FOLDER}/{MODEL}: {first_line(error)}") from error

    def run(inputs: ModelInputs) -> list[Tensor]:
        leaves, _ = pytree.tree_flatten_with_path((inputs.args, inputs.kwargs))
        given = {pytree.keystr(key): leaf for key, leaf in leaves}
        feeds = {name: given.get(f"[1][{name!r}]", given.get(places.get(name, ""))) for name in names}
        arrays = {name: value.cpu().numpy() for name, value in feeds.items() if isinstance(value, Tensor)}
        try:
            outputs = session.run(None, arrays)
        except Exception as error:
            raise InputError(f"ONNX Runtime cannot run {FOLDER}/{MODEL}: {first_line(error)}") from error
        return [torch.from_numpy(output) for output in outputs if output.dtype.kind == "f"]

    return run
