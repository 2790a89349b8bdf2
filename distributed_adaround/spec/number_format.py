"""One number format: from the fields that a job gives, or leaves out, to the grid of a layer, all rules checked.

qint8, int8: -128..127; quint8, uint8: 0..255; intN: -2^(N-1)..2^(N-1)-1; uintN: 0..2^N-1. `quant_min` and `quant_max`
narrow the range. A symmetric grid has a fixed zero point; an affine one has a zero point from the observer.
Float formats are symmetric and have fixed values; the block formats (mx, nv) fix the qscheme and group_size too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from distributed_adaround.errors import SpecError
from distributed_adaround.spec.explain import ABSENT, ContradictionError, shown

IntegerDtype = Literal[
    "qint8", "quint8", "int8", "uint8", "int2", "int3", "int4", "int5", "int6", "int7",
    "uint2", "uint3", "uint4", "uint5", "uint6", "uint7",
]  # fmt: skip
Dtype = Literal[IntegerDtype, "float8_e4m3fn", "fp8", "float4_e2m1fn", "fp4", "mxfp8", "mxfp4", "nvfp4"]
QScheme = Literal[
    "per_tensor_symmetric",
    "per_tensor_affine",
    "per_channel_symmetric",
    "per_channel_affine",
    "per_group_symmetric",
    "per_group_affine",
]
Observer = Literal["minmax", "mse", "percentile", "output_mse"]
Strategy = Literal["tensor", "channel", "group"]
ElementFormat = Literal["e4m3", "e2m1"]
ScaleFormat = Literal["float32", "e8m0", "e4m3"]


@dataclass(frozen=True)
class LayerFormat:
    """The grid of one layer's weight, everything resolved.

    strategy: how many weights share a scale: all (tensor), those of an output channel (channel), or `group_size`
    consecutive inputs of one output channel (group). quant_min, quant_max: smallest and largest code; codes of a float
    format are the places of its values in ascending order. element_format: of the values, None for integers.
    scale_format: what a scale may be; e8m0: a power of two, e4m3: an 8-bit float times one factor per tensor.
    """

    dtype: str
    num_bits: int
    signed: bool
    quant_min: int
    quant_max: int
    symmetric: bool
    strategy: Strategy
    group_size: int | None
    observer: Observer
    percentile: float
    element_format: ElementFormat | None = None
    scale_format: ScaleFormat = "float32"

    @property
    def zero_point(self) -> int:
        """Code of the real 0 on a symmetric grid; an affine grid takes its own from the observer."""
        assert self.symmetric, "the zero point of an affine grid depends on the weights"
        return 0 if self.signed else (self.quant_min + self.quant_max + 1) // 2

    def check(self, layer_name: str, inputs_per_output: int) -> None:
        """Raises SpecError when groups of `group_size` do not fill the inputs of one output of this layer exactly."""
        if self.group_size is None or inputs_per_output % self.group_size == 0:
            return
        fitting = next(g for g in range(min(self.group_size, inputs_per_output), 0, -1) if inputs_per_output % g == 0)
        fixed = self.scale_format != "float32"
        way_out = "another dtype" if fixed else f"group_size: {fitting} fits"
        raise SpecError(
            f"quantize.{'dtype' if fixed else 'group_size'}: {f'{self.dtype!r}, blocks of ' if fixed else ''}"
            f"{self.group_size} must divide the {inputs_per_output} inputs of each output of layer "
            f"{shown(layer_name)}; add an override for this layer ({way_out}) or ignore it"
        )


@dataclass(frozen=True)
class _FloatDtype:
    """name: in the result, the same for all its aliases. group_size: of a block format, which fixes it."""

    name: str
    num_bits: int
    element_format: ElementFormat
    scale_format: ScaleFormat = "float32"
    group_size: int | None = None

    @property
    def num_values(self) -> int:
        """Distinct finite ones: one pattern is -0, and e4m3 has two patterns for NaN."""
        return (1 << self.num_bits) - (3 if self.element_format == "e4m3" else 1)


_FP8 = _FloatDtype("float8_e4m3fn", 8, "e4m3")
_FP4 = _FloatDtype("float4_e2m1fn", 4, "e2m1")
_FLOAT_DTYPES = {
    "float8_e4m3fn": _FP8,
    "fp8": _FP8,
    "float4_e2m1fn": _FP4,
    "fp4": _FP4,
    "mxfp8": _FloatDtype("mxfp8", 8, "e4m3", "e8m0", 32),
    "mxfp4": _FloatDtype("mxfp4", 4, "e2m1", "e8m0", 32),
    "nvfp4": _FloatDtype("nvfp4", 4, "e2m1", "e4m3", 16),
}


def stale_fields(dtype: object) -> tuple[str, ...]:
    """Fields of a format that a new dtype makes void: they belong to the old one. None: there is no new one."""
    if not isinstance(dtype, str):
        return ()
    own_scheme = dtype in _FLOAT_DTYPES and _FLOAT_DTYPES[dtype].group_size is not None
    return ("quant_min", "quant_max", *(("qscheme", "group_size") if own_scheme else ()))


def dtype_range(dtype: str) -> tuple[int, bool, int, int]:
    """(number of bits, signed, smallest code, largest code) of an integer type: "int4" is (4, True, -8, 7)."""
    assert dtype in get_args(IntegerDtype), dtype
    num_bits, signed = int(dtype[-1]), "u" not in dtype
    lowest = -(2 ** (num_bits - 1)) if signed else 0
    return num_bits, signed, lowest, lowest + 2**num_bits - 1


def _code_range(fields: Mapping[str, Any]) -> tuple[int, int]:
    """(quant_min, quant_max), each the dtype's own where it is not given. Raises ContradictionError."""
    _, _, lowest, highest = dtype_range(fields["dtype"])
    low, high = (
        default if fields[name] is None else fields[name]
        for name, default in (("quant_min", lowest), ("quant_max", highest))
    )
    for name, value in (("quant_min", low), ("quant_max", high)):
        if not lowest <= value <= highest:
            raise ContradictionError(
                (name,),
                value,
                f"is outside the range of {fields['dtype']}, {lowest} to {highest}; use a value inside or remove it",
            )
    if low >= high:
        name = "quant_min" if fields["quant_min"] is not None else "quant_max"
        raise ContradictionError(
            (name,), fields[name], f"leaves no range: quant_min {low} must be below quant_max {high}; widen the range"
        )
    return low, high


def _scheme(fields: Mapping[str, Any]) -> tuple[str, Strategy, int | None]:
    """(qscheme, its strategy, group_size), where not given those of the dtype. Raises ContradictionError."""
    dtype, qscheme, group_size = fields["dtype"], fields["qscheme"], fields["group_size"]
    size = _FLOAT_DTYPES[dtype].group_size if dtype in _FLOAT_DTYPES else None
    if size is not None:
        for name, own in (("qscheme", "per_group_symmetric"), ("group_size", size)):
            if fields[name] not in (None, own):
                rule = f"contradicts dtype {dtype}, which implies {own}; remove it or use another dtype"
                raise ContradictionError((name,), fields[name], rule)
        return "per_group_symmetric", "group", size
    qscheme = qscheme or "per_channel_symmetric"
    strategy = cast(Strategy, qscheme.split("_")[1])
    if strategy == "group" and group_size is None:
        raise ContradictionError(
            ("group_size",), ABSENT, f"is missing, but qscheme {qscheme} needs it; give it, for instance 128"
        )
    if strategy != "group" and group_size is not None:
        raise ContradictionError(
            ("group_size",), group_size, f"does not fit qscheme {qscheme}; use a per_group qscheme or remove group_size"
        )
    return qscheme, strategy, group_size


def resolve(fields: Mapping[str, Any]) -> LayerFormat:
    """Checks the rules between the fields of one format. Raises ContradictionError."""
    scheme = _scheme(fields)
    return _float_format(fields, *scheme) if fields["dtype"] in _FLOAT_DTYPES else _integer_format(fields, *scheme)


def _float_format(fields: Mapping[str, Any], qscheme: str, strategy: Strategy, group_size: int | None) -> LayerFormat:
    dtype = _FLOAT_DTYPES[fields["dtype"]]
    for name in ("quant_min", "quant_max"):
        if fields[name] is not None:
            text = f"does not apply to {fields['dtype']}, whose values are fixed; remove it or use an integer dtype"
            raise ContradictionError((name,), fields[name], text)
    if not qscheme.endswith("symmetric"):
        text = f"does not fit {fields['dtype']}, whose values lie symmetric around zero; use per_{strategy}_symmetric"
        raise ContradictionError(("qscheme",), qscheme, text)
    return LayerFormat(
        dtype=dtype.name,
        num_bits=dtype.num_bits,
        signed=True,
        quant_min=0,
        quant_max=dtype.num_values - 1,
        symmetric=True,
        strategy=strategy,
        group_size=group_size,
        observer=fields["observer"],
        percentile=fields["percentile"],
        element_format=dtype.element_format,
        scale_format=dtype.scale_format,
    )


def _integer_format(fields: Mapping[str, Any], qscheme: str, strategy: Strategy, group_size: int | None) -> LayerFormat:
    num_bits, signed, _, _ = dtype_range(fields["dtype"])
    low, high = _code_range(fields)
    symmetric = qscheme.endswith("symmetric")
    if not symmetric and low == -high:
        raise ContradictionError(
            ("qscheme",),
            qscheme,
            f"contradicts the range {low} to {high}, which is symmetric around zero; use {qscheme[:-6]}symmetric, or "
            "remove quant_min and quant_max",
        )
    layer_format = LayerFormat(
        dtype=fields["dtype"],
        num_bits=num_bits,
        signed=signed,
        quant_min=low,
        quant_max=high,
        symmetric=symmetric,
        strategy=strategy,
        group_size=group_size,
        observer=fields["observer"],
        percentile=fields["percentile"],
    )
    if symmetric and not low < layer_format.zero_point < high:
        name = "quant_max" if layer_format.zero_point >= high else "quant_min"
        raise ContradictionError(
            (name,),
            low if name == "quant_min" else high,
            f"leaves no room around zero: with {qscheme} the zero point {layer_format.zero_point} must lie strictly "
            f"between quant_min {low} and quant_max {high}; widen the range or use {qscheme[:-9]}affine",
        )
    return layer_format
