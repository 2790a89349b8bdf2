"""Codes in the place of float weights, in a graph of torch.onnx.

    DequantizeLinear -> Gemm, Conv, ConvTranspose, Gather, MatMul        weights that lie as the node wants them
    DequantizeLinear -> Reshape (-> Transpose -> Reshape) -> ...         layout `channels` (onnx_weights.py)
    DequantizeLinear -> Cast -> ...                                      scales more precise than the weight
    DequantizeLinear, DequantizeLinear, float -> Concat -> ...           parts of one parameter

A batch norm that alone reads a convolution or Gemm goes into its scales and its bias: no code changes.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_adaround.errors import InputError, shorten
from distributed_adaround.export.onnx_weights import FoldedNorm, Layout, Piece, StoredWeight, container, pieces
from distributed_adaround.export.stored import QuantizedLayer, StoredResult

_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_DTYPES = {"float32": "FLOAT", "float16": "FLOAT16", "float64": "DOUBLE"}
_NO_READERS = (("Shape", 0), ("CastLike", 1))
_ONE_NUMBER = ("Expand", "CastLike", "Cast", "Identity", "Reshape")


def insert_codes(model: Any, result: StoredResult) -> None:
    """Replace the float weights of all quantized layers. Raises InputError when one is not in the graph, naming it."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    writer = _GraphWriter(model, result)
    for owner in result.owners:
        writer.replace(owner, result.layers_of(owner))
    RemoveUnusedNodesPass()(model)
    writer.check()


class _GraphWriter:
    """New nodes go before all others, in the order in which they are made."""

    def __init__(self, model: Any, result: StoredResult) -> None:
        self._graph, self._result = model.graph, result
        self._first = next(iter(model.graph), None)
        self._written: list[tuple[StoredWeight, Any]] = []
        self._arrays = _Arrays(result)
        self._names: Counter[str] = Counter()

    def replace(self, owner: str, layers: Sequence[QuantizedLayer]) -> None:
        """One parameter, under any of its names."""
        names = self._result.all_names(owner)
        value = next((self._graph.initializers[name] for name in names if name in self._graph.initializers), None)
        if value is None or self._first is None:
            raise self._not_found(layers)
        shape = tuple(int(size) for size in value.shape)
        axis, parts = pieces(owner, shape, layers)
        if len(parts) == 1:
            self._replace_whole(value, parts[0], shape)
            return
        found = [self._piece(owner, value, axis, part) for part in parts]
        flat = (math.prod(shape[:-1]), shape[-1])
        joined = self._node("Concat", found, owner, flat, axis=axis)
        self._redirect(value, joined if len(shape) == 2 else self._reshaped(joined, shape, owner))

    def check(self) -> None:
        """After all is written. Raises InputError when a weight is read by nothing."""
        for stored, output in self._written:
            if not output.uses() and not output.is_graph_output():
                raise self._not_found(stored.layers)

    def _not_found(self, layers: Sequence[QuantizedLayer]) -> InputError:
        names = shorten(", ".join(layer.name for layer in layers), 200)
        what = "was not found in the graph that torch.onnx makes of the model"
        return InputError(f"layer {names} {what}; leave it in float with quantize.ignore, or remove onnx")

    def _replace_whole(self, value: Any, part: Piece, shape: tuple[int, ...]) -> None:
        layer = part.layers[0]
        norm = _fold_batch_norm(self._graph, value, layer, self._result) if len(part.layers) == 1 else None
        turned = [node for node, _ in value.uses() if node.op_type == "Transpose"]
        # MatMul reads a weight `(O, J)` through a Transpose: codes stored the other way round need none.
        turns = len(shape) == 2 and len(turned) == len(value.uses()) > 0 and not value.is_graph_output()
        layout: Layout = "inputs_first" if part.swapped != turns else "weight"
        if len(layer.shape) > 2:
            spanned = layer.format["transposed"] and layer.format["groups"] > 1 and layer.strategy != "tensor"
            layout = "channels" if spanned or layer.strategy == "group" else "weight"
        stored = StoredWeight(part.layers, layout, norm)
        found = self._dequantized(stored, value)
        if not turns:
            if layout != "channels" and tuple(shape) != stored.shape:
                found = self._reshaped(found, shape, value.name)
            self._redirect(value, found)
            return
        for node in turned:
            self._redirect(node.outputs[0], found)

    def _piece(self, owner: str, value: Any, axis: int, part: Piece) -> Any:
        if part.layers:
            return self._dequantized(StoredWeight(part.layers, "inputs_first" if part.swapped else "weight"), value)
        columns = value.shape[-1]
        place = slice(part.start, part.stop) if axis == 0 else (slice(None), slice(part.start, part.stop))
        array = value.const_value.numpy().reshape(-1, columns)[place]
        return self._initializer(float_piece(owner, axis, part), array)

    def _dequantized(self, stored: StoredWeight, value: Any) -> Any:
        """The weight in torch's shape, or swapped, in the dtype of the parameter."""
        import onnx_ir as ir

        name = stored.layers[0].stored_name if len(stored.layers) == 1 else stored.layers[0].owner
        inputs = [
            self._lazy(f"{name}.codes", stored, 0, container(stored.number), stored.shape),
            self._lazy(f"{name}.scale", stored, 1, _DTYPES[stored.scale_dtype], stored.scale_shape),
        ]
        if stored.has_zero_points:
            zero_points = f"{name}.zero_point"
            inputs.append(self._lazy(zero_points, stored, 2, container(stored.number), stored.scale_shape))
        found = self._node("DequantizeLinear", inputs, name, stored.shape, inputs[1].dtype, **stored.attributes)
        found.producer().metadata_props.update(stored.metadata())
        self._written.append((stored, found))
        if stored.layout == "channels":
            found = self._from_channels(found, stored, name)
        for kind in (ir.DataType[_DTYPES[stored.layers[0].dtype]], value.dtype):
            if found.dtype != kind:
                found = self._node("Cast", [found], name, found.shape, kind, to=int(kind))
        return found

    def _from_channels(self, found: Any, stored: StoredWeight, name: str) -> Any:
        geometry = stored.geometry
        shape = geometry.weight_shape
        if geometry.transposed:
            # The steps of LayerGeometry.from_channels.
            split = (geometry.groups, shape[1], geometry.in_channels // geometry.groups, *geometry.kernel_size)
            found = self._reshaped(found, split, name)
            order = [0, 2, 1, *range(3, len(split))]
            found = self._node("Transpose", [found], name, [split[dim] for dim in order], perm=order)
        return self._reshaped(found, shape, name)

    def _reshaped(self, found: Any, shape: Sequence[int], name: str) -> Any:
        sizes = self._initializer(f"{name}.shape_{'x'.join(map(str, shape))}", np.array(shape, dtype=np.int64))
        return self._node("Reshape", [found, sizes], name, shape)

    def _redirect(self, value: Any, found: Any) -> None:
        import onnx_ir as ir

        ir.convenience.replace_all_uses_with(value, found, replace_graph_outputs=True)

    def _node(
        self, kind: str, inputs: Sequence[Any], name: str, shape: Sequence[int], dtype: Any = None, **attributes: Any
    ) -> Any:
        """The output of a new node. dtype: its own, where it is not that of the first input."""
        import onnx_ir as ir

        self._names[f"{name}/{kind}"] += 1
        count = self._names[f"{name}/{kind}"]
        label = f"{name}/{kind}" + (f"_{count}" if count > 1 else "")
        kept = ir.TensorType(inputs[0].dtype if dtype is None else dtype)
        output = ir.Value(name=label, shape=ir.Shape(shape), type=kept)
        node = ir.node(kind, inputs, attributes=attributes, outputs=[output], name=f"{label}/node")
        self._graph.insert_before(self._first, node)
        return output

    def _initializer(self, name: str, array: np.ndarray[Any, Any]) -> Any:
        import onnx_ir as ir

        if name in self._graph.initializers:
            return self._graph.initializers[name]
        return register(self._graph, ir.tensor(np.ascontiguousarray(array), name=name))

    def _lazy(self, name: str, stored: StoredWeight, part: int, dtype: str, shape: tuple[int, ...]) -> Any:
        """Read and laid out only when the file is written."""
        import onnx_ir as ir

        kind = ir.DataType[dtype]

        def make() -> Any:
            return ir.Tensor(_array(self._arrays.of(stored)[part], dtype), dtype=kind, name=name)

        return register(self._graph, ir.LazyTensor(make, kind, ir.Shape(shape), name=name))


class _Arrays:
    """Those of the weight that was asked for last."""

    def __init__(self, result: StoredResult) -> None:
        self._result = result
        self._last: tuple[StoredWeight, tuple[Tensor, Tensor, Tensor]] | None = None

    def of(self, stored: StoredWeight) -> tuple[Tensor, Tensor, Tensor]:
        if self._last is None or self._last[0] is not stored:
            self._last = (stored, stored.arrays(self._result))
        return self._last[1]


def register(graph: Any, tensor: Any) -> Any:
    """A tensor as an initializer of the graph. Raises InputError when the model has one of this name."""
    import onnx_ir as ir

    if tensor.name in graph.initializers:
        raise InputError(f"{tensor.name} is a tensor of the model, but needed for codes in ONNX; rename it")
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def float_piece(owner: str, axis: int, part: Piece) -> str:
    """Name of the initializer with what is float of a parameter."""
    return f"{owner}[{':,' if axis else ''}{part.start}:{part.stop}]"


def _array(values: Tensor, dtype: str) -> np.ndarray[Any, Any]:
    """In numpy's type for an ONNX type."""
    import ml_dtypes  # gives numpy the small types by their names

    if dtype == "FLOAT8E4M3FN":
        return values.contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    names = {"FLOAT": "float32", "FLOAT16": "float16"}
    return values.contiguous().numpy().astype(np.dtype(names.get(dtype, dtype.lower())))


@dataclass(frozen=True)
class _NormAfter:
    """A layer's node, the batch norm that alone reads it, and what that adds up to."""

    layer: Any
    norm: Any
    folded: FoldedNorm
    result: StoredResult

    @cached_property
    def bias(self) -> np.ndarray[Any, Any] | None:
        """Of the layer with the batch norm in it, float32 `(O,)`; None: it is not constant."""
        count = self.folded.factor(self.result.tensor).shape[0]
        own = _constant(self.layer.inputs[2], count) if len(self.layer.inputs) > 2 else np.zeros(count)
        shift, mean = (_constant(self.norm.inputs[place], count) for place in (2, 3))
        if own is None or shift is None or mean is None:
            return None
        factor = self.folded.factor(self.result.tensor).numpy()
        folded: np.ndarray[Any, Any] = ((own - mean) * factor + shift).astype(np.float32)
        return folded


def _fold_batch_norm(graph: Any, weight: Any, layer: QuantizedLayer, result: StoredResult) -> FoldedNorm | None:
    """Take the batch norm after a layer out of the graph, its shift into the layer's bias; None: nothing to fold."""
    import onnx_ir as ir

    after = _norm_after(weight, layer, result)
    bias = None if after is None else after.bias
    if after is None or bias is None:
        return None
    value = register(graph, ir.tensor(bias, name=f"{layer.stored_name}.folded_bias"))
    after.layer.resize_inputs(3)
    after.layer.replace_input_with(2, value)
    ir.convenience.replace_all_uses_with(after.norm.outputs[0], after.layer.outputs[0], replace_graph_outputs=True)
    return after.folded


def _norm_after(weight: Any, layer: QuantizedLayer, result: StoredResult) -> _NormAfter | None:
    readers = [user for user, place in weight.uses() if (user.op_type, place) not in _NO_READERS]
    if layer.dtype != "float32" or layer.view is not None or len(readers) != 1 or readers[0].op_type not in _LAYERS:
        return None
    node = readers[0]
    output = node.outputs[0]
    # What only asks for the output's type and size, as torch.onnx does for a batch norm without factors, reads nothing.
    uses = [(user, place) for user, place in output.uses() if (user.op_type, place) not in _NO_READERS]
    if len(uses) != 1 or output.is_graph_output() or node.inputs[1] is not weight:
        return None
    if any(node.attributes[name].value != 1.0 for name in ("alpha", "beta") if name in node.attributes):
        return None
    norm, place = uses[0]
    training = norm.attributes.get("training_mode")
    if norm.op_type != "BatchNormalization" or place != 0 or (training is not None and training.value):
        return None
    if any(extra.uses() or extra.is_graph_output() for extra in norm.outputs[1:]):
        return None
    scale, variance = norm.inputs[1], norm.inputs[4]
    named = scale.name if scale.name in result.shapes else None
    plain = scale.producer() is not None and _number(scale) == 1
    if variance.name not in result.shapes or (named is None and not plain):
        return None
    epsilon = norm.attributes.get("epsilon")
    return _NormAfter(
        node, norm, FoldedNorm(named, variance.name, 1e-5 if epsilon is None else float(epsilon.value)), result
    )


def _constant(value: Any, count: int) -> np.ndarray[Any, Any] | None:
    """The value as float64 `(count,)`: an initializer, or one number for all, which torch.onnx spells out in several
    nodes; None: neither."""
    if value is None:
        return np.zeros(count)
    if value.const_value is not None and value.is_initializer():
        array = value.const_value.numpy().astype(np.float64)
        return array if array.shape == (count,) else None
    number = _number(value)
    return None if number is None else np.full(count, number)


def _number(value: Any) -> float | None:
    """The only number in a value that is Constant, Cast and Expand."""
    node = value.producer()
    while node is not None and node.op_type in _ONE_NUMBER:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Constant":
        return None
    (attribute,) = node.attributes.values()
    array = attribute.value.numpy() if hasattr(attribute.value, "numpy") else np.asarray(attribute.value)
    return float(array.reshape(-1)[0]) if array.size == 1 and array.dtype.kind in "fiu" else None


def drop_zero_biases(model: Any) -> None:
    """torch.onnx gives a convolution without bias a computed one of zeros."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in model.graph:
        has_bias = node.op_type in _LAYERS[:2] and len(node.inputs) > 2 and node.inputs[2] is not None
        if has_bias and node.inputs[2].producer() is not None and _number(node.inputs[2]) == 0:
            node.resize_inputs(2)
    RemoveUnusedNodesPass()(model)
