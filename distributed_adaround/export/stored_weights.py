"""A tensor of the model as a function of what is stored for it: codes, scales, zero points.

The function is plain torch on tensors of fixed shapes, so that it can be traced into a graph; its arithmetic is that of
LayerRecord.dequantize, bit by bit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distributed_adaround.export.stored import QuantizedLayer, StoredResult
from distributed_adaround.formats import FloatFormat, small_float
from distributed_adaround.numerics.layers import LayerGeometry
from distributed_adaround.numerics.weight_view import WeightView


@dataclass(frozen=True)
class StoredCodes:
    """What lies in a tensor of the model, or in a part of it.

    codes: as in LayerRecord. scale: `()`, `(O,)` or `(O, n)`, in its stored dtype. zero_point: a number that serves all
    codes, or one for each scale, in the dtype of the codes. element: of floats. dtype: that the layer computes with.
    """

    codes: Tensor
    scale: Tensor
    zero_point: int | Tensor
    geometry: LayerGeometry
    element: FloatFormat | None
    dtype: torch.dtype
    view: WeightView | None

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by what it is."""
        found = {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point, "values": self._values()}
        return {name: tensor.contiguous() for name, tensor in found.items() if isinstance(tensor, Tensor)}

    def weight(self, stored: Mapping[str, Tensor]) -> Tensor:
        """In torch's shape and the layer's dtype. stored: as `tensors` gives it."""
        geometry, codes, zero_point = self.geometry, stored["codes"], stored.get("zero_point", self.zero_point)
        if "values" in stored:
            levels = geometry.to_channels(stored["values"][codes.int()])
        else:
            levels = geometry.to_channels(codes.float())
        scale = stored["scale"].float()
        if scale.dim() == 0:
            levels = levels - zero_point if isinstance(zero_point, Tensor) or zero_point else levels
            return geometry.from_channels(levels * scale).to(self.dtype)
        runs = scale.numel() // geometry.out_channels
        shape = (geometry.groups, geometry.out_channels // geometry.groups, runs)
        parts = levels.reshape(*shape, geometry.inputs_per_output // runs)
        if isinstance(zero_point, Tensor):
            parts = parts - zero_point.float().reshape(*shape, 1)
        elif zero_point:
            parts = parts - zero_point
        return geometry.from_channels((parts * scale.reshape(*shape, 1)).reshape(levels.shape)).to(self.dtype)

    def _values(self) -> Tensor | None:
        """Values of the bit patterns 0, 1, ...; None where torch has the dtype itself."""
        if self.element is None or self.element.storage != "uint8":
            return None
        magnitudes = [self.element.magnitude(pattern) for pattern in range(self.element.largest + 1)]
        return torch.tensor([*magnitudes, *(-value + 0.0 for value in magnitudes)])


@dataclass(frozen=True)
class StoredWeight:
    """All that is quantized in one tensor of the model. shape, dtype: the tensor's. whole: itself, where some of it is
    not. transposed: how many matrices of one size it is, that lie `(in, out)` in it; 0: they lie `(out, in)`."""

    parts: Sequence[StoredCodes]
    shape: tuple[int, ...]
    dtype: torch.dtype
    whole: Tensor | None = None
    transposed: int = 0

    @classmethod
    def of(cls, result: StoredResult, name: str) -> "StoredWeight":
        """name: of a tensor of the model that holds quantized weights, its own."""
        layers = result.layers_of(name)
        shape, dtype = result.shapes[name], getattr(torch, result.dtypes[name])
        parts = [_stored(result, layer) for layer in layers]
        covered = sum(part.codes.numel() for part in parts)
        if covered < math.prod(shape):
            return cls(parts, shape, dtype, result.tensor(name))
        for transposed in (False, True):
            if (joined := _joined(parts, transposed)) is not None:
                return cls([joined], shape, dtype, transposed=len(parts) if transposed else 0)
        return cls(parts, shape, dtype)

    def tensor(self, stored: Sequence[Mapping[str, Tensor]], whole: Tensor | None) -> Tensor:
        """The tensor of the model. stored: of each part; whole: as the field."""
        weights = [part.weight(tensors) for part, tensors in zip(self.parts, stored, strict=True)]
        if len(self.parts) == 1 and self.parts[0].view is None:
            weight = weights[0].to(self.dtype)
            if self.transposed:
                weight = weight.reshape(self.transposed, -1, weight.shape[1]).transpose(1, 2)
            # Which kernels compute with it, and so its last bits, may depend on how it lies in memory.
            return weight.reshape(self.shape).contiguous()
        tensor = torch.zeros(self.shape, dtype=self.dtype) if whole is None else whole
        for part, weight in zip(self.parts, weights, strict=True):
            view = part.view
            assert view is not None
            tensor = torch.as_strided_scatter(tensor, weight.to(self.dtype), view.shape, view.strides, view.offset)
        return tensor


def _stored(result: StoredResult, layer: QuantizedLayer) -> StoredCodes:
    record = result.record(layer.stored_name)
    low, high = (int(number) for number in record.zero_point.aminmax())
    return StoredCodes(
        codes=record.codes,
        scale=record.scale,
        zero_point=low if low == high else record.zero_point.to(record.codes.dtype),
        geometry=record.geometry,
        element=small_float(record.format["element_format"]),
        dtype=getattr(torch, layer.dtype),
        view=layer.view,
    )


def _joined(parts: Sequence[StoredCodes], transposed: bool) -> StoredCodes | None:
    """Matrices that lie in one tensor one after the other, as one with all their outputs: a graph with an operation for
    each of a hundred experts would be slow. None: they do not."""
    end = 0
    parts = sorted(parts, key=lambda part: 0 if part.view is None else part.view.offset)
    for part in parts:
        if part.view is None or len(part.view.shape) != 2 or _kind(part, transposed) != _kind(parts[0], transposed):
            return None
        strides = (1, part.view.shape[0]) if transposed else (part.view.shape[1], 1)
        if part.view.strides != strides or part.view.offset != end:
            return None
        end += part.codes.numel()
    codes = torch.cat([part.codes for part in parts])
    return replace(
        parts[0],
        codes=codes,
        scale=torch.cat([_by_output(part.scale, part) for part in parts]),
        zero_point=_zero_points(parts),
        geometry=LayerGeometry(tuple(codes.shape)),
        view=None,
    )


def _kind(part: StoredCodes, transposed: bool) -> tuple[object, ...]:
    """What parts have in common that are put together."""
    size = part.codes.shape if transposed else part.codes.shape[1:]
    return part.codes.dtype, part.element, part.dtype, size, part.scale.dim(), part.scale.dtype, part.scale.shape[1:]


def _by_output(values: Tensor, part: StoredCodes) -> Tensor:
    return values.expand(part.geometry.out_channels) if values.dim() == 0 else values


def _zero_points(parts: Sequence[StoredCodes]) -> int | Tensor:
    """One number where all have the same, else one for each scale."""
    first = parts[0].zero_point
    if isinstance(first, int) and all(isinstance(part.zero_point, int) and part.zero_point == first for part in parts):
        return first
    found = []
    for part in parts:
        own = part.zero_point
        own = torch.full(part.scale.shape, own, dtype=part.codes.dtype) if isinstance(own, int) else own
        found.append(_by_output(own, part))
    return torch.cat(found)
