"""Quantized weights as ONNX's DequantizeLinear takes them, and back.

Legend: O outputs, J inputs of an output, n runs of them that share a scale, R outputs of a conv group.

    layout          codes in the file     scale per channel, per group     read by
    weight          as in torch           (O,), (O, n)                     Gemm, Conv, ConvTranspose, Gather
    inputs_first    (J, O)                (O,), (n, O)                     MatMul; ONNX Runtime's fast form
    channels        (O, J)                (O,), (O, n)                     Reshape and Transpose, to torch's shape

`channels` is for what one axis of blocks cannot say in torch's shape: groups of a convolution's inputs, and outputs
of a transposed convolution with several conv groups.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distributed_adaround.errors import InputError
from distributed_adaround.export.stored import QuantizedLayer, StoredResult
from distributed_adaround.formats import NumberFormat
from distributed_adaround.numerics.layers import LayerGeometry
from distributed_adaround.solve.record import LayerRecord

Layout = Literal["weight", "inputs_first", "channels"]
# ONNX has integers of 2, 4 and 8 bits.
_BITS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
_KEY = "distributed_adaround.weight"


def container(number: NumberFormat) -> str:
    """Name of the ONNX type that holds the codes of a format ("INT4"); scales are float32 or float16."""
    if number.element is not None:
        return "FLOAT8E4M3FN"
    return f"{'' if number.signed else 'U'}INT{_BITS[number.bits]}"


@dataclass(frozen=True)
class FoldedNorm:
    """A batch norm whose factors are in the scales of the layer before it. weight, variance: names of its tensors."""

    weight: str | None
    variance: str
    epsilon: float

    def factor(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """Of each output channel, float64 `(O,)`. tensor: gives one of the model's by its name."""
        inverse = (tensor(self.variance).double() + self.epsilon).rsqrt()
        return inverse if self.weight is None else tensor(self.weight).double() * inverse


@dataclass(frozen=True)
class StoredWeight:
    """A weight of the file: one layer's, or those of parts of a parameter that have one format, output after output."""

    layers: tuple[QuantizedLayer, ...]
    layout: Layout
    norm: FoldedNorm | None = None

    @property
    def number(self) -> NumberFormat:
        return self.layers[0].number

    @property
    def strategy(self) -> str:
        own = self.layers[0].strategy
        return "channel" if own == "tensor" and (len(self.layers) > 1 or self.norm is not None) else own

    @cached_property
    def geometry(self) -> LayerGeometry:
        first = self.layers[0]
        shape = first.shape
        if len(self.layers) > 1:
            shape = (sum(layer.shape[0] for layer in self.layers), *shape[1:])
        return LayerGeometry(shape, groups=first.format["groups"], transposed=first.format["transposed"])

    @property
    def has_zero_points(self) -> bool:
        """Whether one may differ from 0, which stands for all where there are none."""
        symmetric = all(layer.symmetric for layer in self.layers)
        return self.number.element is None and not (symmetric and self.number.signed)

    @property
    def scale_dtype(self) -> str:
        """DequantizeLinear's result has it too, and is rounded to it once."""
        layer = self.layers[0]
        return "float16" if layer.dtype == "float16" and layer.format["scale_format"] == "float16" else "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes in the file."""
        geometry = self.geometry
        if self.layout == "weight":
            return geometry.weight_shape
        matrix = (geometry.out_channels, geometry.inputs_per_output)
        return matrix[::-1] if self.layout == "inputs_first" else matrix

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of scales and zero points in the file."""
        outputs = self.geometry.out_channels
        if self.strategy != "group":
            return () if self.strategy == "tensor" else (outputs,)
        runs = self.geometry.inputs_per_output // self._group_size
        return (runs, outputs) if self.layout == "inputs_first" else (outputs, runs)

    @property
    def attributes(self) -> dict[str, int]:
        """Of the DequantizeLinear."""
        inputs_first = self.layout == "inputs_first"
        if self.strategy == "group":
            return {"axis": 0 if inputs_first else 1, "block_size": self._group_size}
        if self.strategy == "tensor":
            return {}
        return {"axis": 1 if inputs_first or (self.layout == "weight" and self.geometry.transposed) else 0}

    @property
    def _group_size(self) -> int:
        size = self.layers[0].group_size
        assert size is not None
        return size

    def arrays(self, result: StoredResult) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, float32 scales and zero points as they lie in the file."""
        records = [result.record(layer.stored_name) for layer in self.layers]
        codes = torch.cat([_by_output(record) for record in records])
        scale, zero_point = (
            torch.cat([_of_outputs(record, name) for record in records]) for name in ("scale", "zero_point")
        )
        if self.norm is not None:
            factor = self.norm.factor(result.tensor)
            scale = (scale.double() * factor[:, None]).float()
        return self._laid_codes(codes), self._laid(scale), self._laid(zero_point)

    def _laid_codes(self, codes: Tensor) -> Tensor:
        if self.layout == "inputs_first":
            return codes.T
        if self.layout == "channels":
            return codes
        return self.geometry.from_channels(codes.reshape(self.geometry.groups, -1, codes.shape[1]))

    def _laid(self, values: Tensor) -> Tensor:
        """`(O, n)`, or `(O, 1)`, in the shape of the file."""
        if self.strategy == "tensor":
            return values[0, 0]
        if self.strategy == "channel":
            return values[:, 0]
        return values.T if self.layout == "inputs_first" else values

    def weights(self, values: np.ndarray[Any, Any]) -> list[Tensor]:
        """The weight of each layer in torch's shape and the dtype of the layer, of dequantized values in the file's."""
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self.layout == "weight":
            tensor = self.geometry.to_channels(tensor).reshape(self.geometry.out_channels, -1)
        elif self.layout == "inputs_first":
            tensor = tensor.T
        counts = [_geometry(layer).out_channels for layer in self.layers]
        found = []
        for layer, part in zip(self.layers, torch.split(tensor, counts), strict=True):
            geometry = _geometry(layer)
            channels = part.reshape(geometry.groups, -1, geometry.inputs_per_output)
            found.append(geometry.from_channels(channels).to(getattr(torch, layer.dtype)))
        return found

    def metadata(self) -> dict[str, str]:
        """What a node says about itself, for `read`."""
        names = [layer.stored_name for layer in self.layers]
        norm = None if self.norm is None else asdict(self.norm)
        return {_KEY: json.dumps({"names": names, "layout": self.layout, "batch_norm": norm})}

    @classmethod
    def read(cls, metadata: dict[str, str], result: StoredResult) -> "StoredWeight | None":
        """Inverse of `metadata`; None: the node is none of ours."""
        if _KEY not in metadata:
            return None
        try:
            found = json.loads(metadata[_KEY])
            norm = None if found["batch_norm"] is None else FoldedNorm(**found["batch_norm"])
            return cls(tuple(result.layers[name] for name in found["names"]), found["layout"], norm)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the ONNX model does not fit the result beside it: {error!r}; run the job again"
            ) from error


def dequantized(
    codes: np.ndarray[Any, Any],
    scale: np.ndarray[Any, Any],
    zero_point: np.ndarray[Any, Any] | None,
    axis: int,
    block_size: int,
) -> np.ndarray[Any, Any]:
    """What DequantizeLinear computes, float32, as the ONNX specification of opset 21 says."""

    def spread(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        values = values.astype(np.float32)
        if values.ndim == 1:
            return values.reshape([-1 if dim == axis else 1 for dim in range(codes.ndim)])
        return values.repeat(block_size, axis) if values.ndim else values

    steps = codes.astype(np.float32)
    if zero_point is not None:
        steps -= spread(zero_point)
    steps *= spread(scale)
    return steps


def _geometry(layer: QuantizedLayer) -> LayerGeometry:
    return LayerGeometry(layer.shape, groups=layer.format["groups"], transposed=layer.format["transposed"])


def _by_output(record: LayerRecord) -> Tensor:
    """Codes `(O, J)`."""
    return record.geometry.to_channels(record.codes).reshape(-1, record.geometry.inputs_per_output)


def _of_outputs(record: LayerRecord, name: str) -> Tensor:
    """Scales or zero points `(O, n)`, `(O, 1)` where an output has one."""
    values: Tensor = getattr(record, name)
    values = values.float() if name == "scale" else values
    if values.dim() == 0:
        return values.expand(record.geometry.out_channels, 1)
    return values.reshape(values.shape[0], -1)


@dataclass(frozen=True)
class Piece:
    """A part of a parameter, seen as a matrix, from `start` to `stop` on one of its axes. layers: none where it is
    float. swapped: its weights lie in it as `(J, O)`."""

    layers: tuple[QuantizedLayer, ...]
    start: int
    stop: int
    swapped: bool = False


def pieces(owner: str, shape: Sequence[int], layers: Sequence[QuantizedLayer]) -> tuple[int, list[Piece]]:
    """What a parameter of two or more dimensions is made of, along an axis of `(product of the others, last)`.

    Raises InputError when its parts do not lie one after the other.
    """
    flat = (math.prod(shape[:-1]), shape[-1])
    first = layers[0]
    if first.view is None or (
        math.prod(first.view.shape) == math.prod(flat) and is_whole(first.view.shape, first.view.strides)
    ):
        swapped = first.view is not None and not _natural(first.view.shape, first.view.strides)
        return 0, [Piece((first,), 0, flat[0], swapped)]
    boxes = [_box(layer, flat) for layer in layers]
    for axis in (0, 1):
        if all(box[1 - axis] == (0, flat[1 - axis]) for box, _ in boxes):
            found = [Piece((layer,), *box[axis], swapped) for layer, (box, swapped) in zip(layers, boxes, strict=True)]
            if (filled := _filled(sorted(found, key=lambda piece: piece.start), flat[axis])) is not None:
                return axis, _merged(axis, filled)
    what = "holds weights that do not lie one after the other"
    raise InputError(f"{owner} {what}, which ONNX cannot put together; leave them in float with quantize.ignore")


def is_whole(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a view that is all of a parameter is it as it is, or transposed."""
    return _natural(shape, strides) or (len(shape) == 2 and _natural(shape[::-1], strides[::-1]))


def _natural(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether these are the strides of a contiguous tensor; of an axis of one number they do not count."""
    wanted = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return all(size == 1 or own == best for size, own, best in zip(shape, strides, wanted, strict=True))


def _box(layer: QuantizedLayer, flat: tuple[int, int]) -> tuple[tuple[tuple[int, int], tuple[int, int]], bool]:
    """Rows and columns of a part in the parameter's matrix, each from and to, and whether it lies there transposed."""
    view = layer.view
    assert view is not None
    row, column = divmod(view.offset, flat[1])
    none = ((-1, -1), (-1, -1))
    if len(view.shape) != 2:
        return none, False
    for swapped in (False, True):
        (rows, columns), strides = view.shape, view.strides
        if swapped:
            rows, columns, strides = columns, rows, strides[::-1]
        if (rows == 1 or strides[0] == flat[1]) and (columns == 1 or strides[1] == 1):
            return ((row, row + rows), (column, column + columns)), swapped
    return none, False


def _filled(found: Sequence[Piece], size: int) -> list[Piece] | None:
    """With float pieces in the gaps; None: two pieces overlap."""
    whole: list[Piece] = []
    end = 0
    for piece in (*found, Piece((), size, size)):
        if piece.start < end:
            return None
        if piece.start > end:
            whole.append(Piece((), end, piece.start))
        if piece.layers:
            whole.append(piece)
        end = piece.stop
    return whole


def _merged(axis: int, found: list[Piece]) -> list[Piece]:
    """One piece, which has a fast form, where all are weights of one format whose outputs follow each other."""
    layers = tuple(layer for piece in found for layer in piece.layers)
    alike = len({(json.dumps({**layer.format, "tensor_scale": None}), layer.dtype) for layer in layers}) == 1
    outputs_follow = all(piece.layers and piece.swapped == (axis == 1) for piece in found)
    if not (alike and outputs_follow):
        return found
    return [Piece(layers, found[0].start, found[-1].stop, found[0].swapped)]
