"""All number formats, in one table: spec, grids, commits, exporters and documentation read it. Imports no torch.

A weight is a code times a scale that it shares with others:

    integers   w = (code - zero_point) * scale                codes from quant_min to quant_max
    floats     w = values[code] * scale                       values: of a small float, in ascending order

A new format is one line of FORMATS.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from distributed_adaround.errors import SpecError, shorten

Observer = Literal["minmax", "mse", "percentile", "output_mse"]
Strategy = Literal["tensor", "channel", "group"]


@dataclass(frozen=True)
class FloatFormat:
    """A small float without infinities: bit patterns are sign, exponent, mantissa.

    largest: pattern of the largest finite value. sign: pattern of the sign bit. storage: torch's dtype of a pattern.
    """

    name: str
    mantissa_bits: int
    bias: int
    largest: int
    sign: int
    storage: str = "uint8"

    def magnitude(self, pattern: int) -> float:
        """Value of a pattern without its sign bit."""
        exponent, mantissa = divmod(pattern, 1 << self.mantissa_bits)
        if exponent:
            mantissa += 1 << self.mantissa_bits
        return math.ldexp(mantissa, max(exponent, 1) - self.bias - self.mantissa_bits)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """All finite values, ascending. 0 is one value: the pattern of -0 is read as 0 and never written."""
        magnitudes = [self.magnitude(pattern) for pattern in range(self.largest + 1)]
        return (*(-value for value in magnitudes[:0:-1]), *magnitudes)


@dataclass(frozen=True)
class ScaleFormat:
    """What a scale may be: any number of this many mantissa bits between smallest and largest.

    storage: torch's dtype of a stored scale. per_tensor: scales are in units of one float32 factor of the whole tensor,
    and are stored times that factor. refits: fine enough to be refitted and restored channel by channel.
    """

    name: str
    smallest: float
    largest: float
    storage: str = "float32"
    powers_of_two: bool = False
    per_tensor: bool = False
    refits: bool = True


@dataclass(frozen=True)
class NumberFormat:
    """What a weight may be. element: of floats; None: integers. name: in results, the same for all its aliases. scale:
    one that is not float32 is part of the format. block_size: inputs that share a scale, where the format fixes it."""

    name: str
    bits: int
    signed: bool = True
    element: FloatFormat | None = None
    scale: str = "float32"
    block_size: int | None = None

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code: (-8, 7) of int4."""
        if self.element is not None:
            return 0, len(self.element.values) - 1
        lowest = -(1 << (self.bits - 1)) if self.signed else 0
        return lowest, lowest + (1 << self.bits) - 1

    @property
    def storage(self) -> str:
        """torch's dtype that holds one stored code."""
        if self.element is not None:
            return self.element.storage
        if self.bits <= 8:
            return "int8" if self.signed else "uint8"
        return "int16" if self.signed and self.bits <= 16 else "int32"


# Micikevicius et al. 2022, "FP8 Formats for Deep Learning": 0, +-2^-9 .. +-448, one NaN pattern per sign.
E4M3 = FloatFormat("e4m3", mantissa_bits=3, bias=7, largest=0x7E, sign=0x80, storage="float8_e4m3fn")
# OCP Microscaling Formats (MX) v1.0: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; torch.float4_e2m1fn_x2 holds two.
E2M1 = FloatFormat("e2m1", mantissa_bits=1, bias=1, largest=0x7, sign=0x8)

_FLOAT32_TINY, _FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127
SCALE_FORMATS: dict[str, ScaleFormat] = {
    "float32": ScaleFormat("float32", _FLOAT32_TINY, _FLOAT32_MAX),
    "float16": ScaleFormat("float16", 2.0**-24, 65504.0, storage="float16"),
    "bfloat16": ScaleFormat("bfloat16", _FLOAT32_TINY, (2 - 2.0**-7) * 2.0**127, storage="bfloat16"),
    # Of MX. 2^-127 is left out: float32 holds it as a denormal number only, and those are flushed to 0 in a job.
    "e8m0": ScaleFormat("e8m0", _FLOAT32_TINY, 2.0**127, powers_of_two=True, refits=False),
    # Of NVFP4.
    "e4m3": ScaleFormat("e4m3", 2.0**-9, 448.0, per_tensor=True, refits=False),
}

_FP8 = NumberFormat("float8_e4m3fn", 8, element=E4M3)
_FP4 = NumberFormat("float4_e2m1fn", 4, element=E2M1)
FORMATS: dict[str, NumberFormat] = {
    "qint8": NumberFormat("qint8", 8),
    "quint8": NumberFormat("quint8", 8, signed=False),
    **{f"int{bits}": NumberFormat(f"int{bits}", bits) for bits in range(2, 9)},
    **{f"uint{bits}": NumberFormat(f"uint{bits}", bits, signed=False) for bits in range(2, 9)},
    "float8_e4m3fn": _FP8,
    "fp8": _FP8,
    "float4_e2m1fn": _FP4,
    "fp4": _FP4,
    "mxfp8": NumberFormat("mxfp8", 8, element=E4M3, scale="e8m0", block_size=32),
    "mxfp4": NumberFormat("mxfp4", 4, element=E2M1, scale="e8m0", block_size=32),
    "nvfp4": NumberFormat("nvfp4", 4, element=E2M1, scale="e4m3", block_size=16),
}


def small_float(name: str | None) -> FloatFormat | None:
    """The small float of that name, of any format in the table; None for None and for a name that is not known."""
    elements = (number.element for number in FORMATS.values() if number.element is not None)
    return next((element for element in elements if element.name == name), None)


@dataclass(frozen=True)
class LayerFormat:
    """The grid of one layer's weight, everything resolved; quant_min, quant_max: smallest and largest code.

    strategy: how many weights share a scale: all (tensor), those of an output channel (channel), or `group_size`
    consecutive inputs of one output channel (group). tensor_amax: largest weight, by size, that the factor of the whole
    tensor is made for where the scales have one; None: the layer's own.
    """

    number: NumberFormat
    quant_min: int
    quant_max: int
    symmetric: bool
    strategy: Strategy
    group_size: int | None
    scale: ScaleFormat
    observer: Observer
    percentile: float
    tensor_amax: float | None = None

    @property
    def zero_point(self) -> int:
        """Code of the real 0 on a symmetric grid; an affine grid takes its own from the observer."""
        assert self.symmetric, "the zero point of an affine grid depends on the weights"
        return 0 if self.number.signed else (self.quant_min + self.quant_max + 1) // 2

    @property
    def qscheme(self) -> str:
        return f"per_{self.strategy}_{'symmetric' if self.symmetric else 'affine'}"

    def __str__(self) -> str:
        """ "int4 per_group_symmetric 128" """
        return f"{self.number.name} {self.qscheme}" + (f" {self.group_size}" if self.group_size else "")

    def check(self, layer_name: str, inputs_per_output: int) -> None:
        """Raises SpecError when groups of `group_size` do not fill the inputs of one output of this layer exactly."""
        if self.group_size is None or inputs_per_output % self.group_size == 0:
            return
        if self.number.block_size is not None:
            given, way_out = f"dtype: {self.number.name!r}, blocks of {self.group_size}", "another dtype"
        else:
            sizes = range(min(self.group_size, inputs_per_output), 0, -1)
            fitting = next(size for size in sizes if inputs_per_output % size == 0)
            given, way_out = f"group_size: {self.group_size}", f"group_size: {fitting} fits"
        layer = f"the {inputs_per_output} inputs of each output of layer {shorten(layer_name, 80)!r}"
        remedy = f"add an override for this layer ({way_out}) or ignore it"
        raise SpecError(f"quantize.{given} must divide {layer}; {remedy}")
