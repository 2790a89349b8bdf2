"""Small floating-point formats: their values, and the bit patterns that stand for them in files.

    e4m3    sign, 4 exponent bits, 3 mantissa bits: 0, +-2^-9 .. +-448; no infinity, one NaN pattern per sign.
            Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; torch.float8_e4m3fn
    e2m1    sign, 2 exponent bits, 1 mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
            OCP Microscaling Formats (MX) v1.0; torch.float4_e2m1fn_x2 holds two of them

A code is the place of a value in the ascending list of all of them. 0 is one value there: the pattern of -0 is read
as 0 and never written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ElementFormat = Literal["e4m3", "e2m1"]


@dataclass(frozen=True)
class _Layout:
    """largest: pattern of the largest finite value. sign: pattern of the sign bit. dtype: of stored patterns."""

    mantissa_bits: int
    bias: int
    largest: int
    sign: int
    dtype: torch.dtype

    def magnitude(self, pattern: int) -> float:
        exponent, mantissa = divmod(pattern, 1 << self.mantissa_bits)
        if exponent:
            mantissa += 1 << self.mantissa_bits
        return mantissa * 2.0 ** (max(exponent, 1) - self.bias - self.mantissa_bits)

    @property
    def smallest_exponent(self) -> int:
        """Of the normal numbers; below it the steps between values shrink no further."""
        return 1 - self.bias


_LAYOUTS: dict[str, _Layout] = {
    "e4m3": _Layout(mantissa_bits=3, bias=7, largest=0x7E, sign=0x80, dtype=torch.float8_e4m3fn),
    "e2m1": _Layout(mantissa_bits=1, bias=1, largest=0x7, sign=0x8, dtype=torch.uint8),
}


def float_values(element_format: ElementFormat) -> Tensor:
    """All finite values `(V,)`, ascending, float32: 253 of e4m3, 15 of e2m1."""
    layout = _LAYOUTS[element_format]
    magnitudes = [layout.magnitude(pattern) for pattern in range(layout.largest + 1)]
    return torch.tensor([-value for value in magnitudes[:0:-1]] + magnitudes)


def nearest_values(numbers: Tensor, element_format: ElementFormat) -> Tensor:
    """The nearest values, ties to the one whose last bit is 0, beyond the ends the end; float32, any shape.

    What `Grid.quantize` and `Grid.levels` find by search in a list, by arithmetic: about 15 times faster on a CPU.
    """
    layout = _LAYOUTS[element_format]
    # The exponent bits alone, as a float32, are the power of two at or below the number.
    power = (numbers.abs().clamp_(min=2.0**layout.smallest_exponent).view(torch.int32) & 0x7F80_0000).view(
        numbers.dtype
    )
    step = power.mul_(2.0**-layout.mantissa_bits)
    largest = layout.magnitude(layout.largest)
    return torch.round(numbers / step).mul_(step).clamp_(-largest, largest)


def encode(codes: Tensor, element_format: ElementFormat) -> Tensor:
    """Codes of any shape and dtype as bit patterns: float8_e4m3fn for e4m3, one e2m1 pattern in each uint8."""
    layout = _LAYOUTS[element_format]
    place = codes.to(torch.int16) - layout.largest
    pattern = place.abs() + layout.sign * (place < 0)
    return pattern.to(torch.uint8).view(layout.dtype)


def decode(stored: Tensor, element_format: ElementFormat) -> Tensor:
    """Codes, float32, of what `encode` gives, of the same shape.

    Raises ValueError when a pattern stands for no finite value, or the dtype is another one.
    """
    layout = _LAYOUTS[element_format]
    if stored.dtype != layout.dtype:
        raise ValueError(f"codes are {stored.dtype}, not the {layout.dtype} of {element_format}")
    pattern = stored.view(torch.uint8).to(torch.int16)
    magnitude = pattern % layout.sign
    if bool((magnitude > layout.largest).any() | (pattern >= 2 * layout.sign).any()):
        raise ValueError(f"a code is no finite value of {element_format}")
    return torch.where(pattern >= layout.sign, layout.largest - magnitude, layout.largest + magnitude).float()
