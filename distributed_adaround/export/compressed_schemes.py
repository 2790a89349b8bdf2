"""How compressed-tensors stores each of our number formats, and which of them it cannot hold."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distributed_adaround.errors import SpecError, shorten
from distributed_adaround.export.exporter import ExportPlan
from distributed_adaround.export.stored import QuantizedLayer
from distributed_adaround.numerics.weight_view import dtype_name


@dataclass(frozen=True)
class Scheme:
    """How a layer is stored. format: of compressed-tensors. bits, type, symmetric, strategy, group_size, scale_dtype:
    of its weights. dynamic: activations are quantized to fp8 as well."""

    format: str
    bits: int
    type: str
    symmetric: bool
    strategy: str
    group_size: int | None = None
    scale_dtype: torch.dtype | None = None
    dynamic: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """What is stored in the place of a weight."""
        packed = ("weight_packed",) if self.bits < 8 or self.type == "int" else ("weight",)
        shape = ("weight_shape",) if self.type == "int" else ()
        zero_point = () if self.symmetric else ("weight_zero_point",)
        global_scale = ("weight_global_scale",) if self.strategy == "tensor_group" else ()
        return (*packed, "weight_scale", *shape, *zero_point, *global_scale)

    def library(self, targets: Sequence[str]) -> Any:
        """The same in the words of the library."""
        words = importlib.import_module("compressed_tensors.quantization")
        weights = words.QuantizationArgs(
            num_bits=self.bits,
            type=self.type,
            symmetric=self.symmetric,
            strategy=self.strategy,
            group_size=self.group_size,
            scale_dtype=self.scale_dtype,
        )
        activations = None
        if self.dynamic:
            activations = words.QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
        return words.QuantizationScheme(
            targets=list(targets), weights=weights, input_activations=activations, format=self.format
        )


def scheme_of(layer: QuantizedLayer, plan: ExportPlan) -> Scheme:
    """How a layer is stored. Raises SpecError, with a setting that fits, where the format cannot hold it."""
    number, strategy = layer.number, layer.strategy
    if number.element is not None and number.scale == "float32":
        if number.bits < 8:
            raise refused(layer, "floats of 4 bits need scales of their own kind", "dtype: mxfp4 or nvfp4")
        if strategy != "channel":
            raise refused(layer, "fp8 has one scale for each channel", "qscheme: per_channel_symmetric")
    elif strategy == "tensor":
        raise refused(layer, "runtimes read one scale for each channel or group", "qscheme: per_channel_symmetric")
    scales, dtype = layer.format["scale_format"], dtype_name(plan.dtype)
    if number.scale == "float32" and scales != dtype and dtype != "float32":
        what = f"runtimes load scales in the model's {dtype}, and these are {scales}"
        raise refused(layer, what, f"scale_dtype: {dtype}, or none")
    if number.element is None:
        symmetric = layer.symmetric and _zero_point(layer) == 0
        return Scheme("pack-quantized", number.bits, "int", symmetric, strategy, layer.group_size)
    if number.scale == "float32":
        dynamic = plan.output.dynamic_activations
        return Scheme("float-quantized" if dynamic else "naive-quantized", 8, "float", True, strategy, dynamic=dynamic)
    if number.scale == "e4m3":
        return Scheme("nvfp4-pack-quantized", 4, "float", True, "tensor_group", 16, torch.float8_e4m3fn)
    name = "mxfp4-pack-quantized" if number.bits == 4 else "mxfp8-quantized"
    return Scheme(name, number.bits, "float", True, "group", 32, torch.uint8)


def _zero_point(layer: QuantizedLayer) -> int:
    """That of a symmetric grid of integers, in signed codes."""
    if layer.number.signed:
        return 0
    return (int(layer.format["quant_min"]) + int(layer.format["quant_max"]) + 1) // 2 - (1 << (layer.number.bits - 1))


def refused(layer: QuantizedLayer, rule: str, remedy: str) -> SpecError:
    what = f"compressed_tensors cannot hold layer {shorten(layer.name, 80)!r}, {layer.scheme}: {rule}"
    return SpecError(f"output.formats: {what}; set quantize.{remedy}, or remove the format")
