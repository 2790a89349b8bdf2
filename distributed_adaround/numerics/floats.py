"""Small floats as tensors: rounding to their values, and the bit patterns that stand for them in files.

A code is the place of a value in the ascending list of all of them (formats.FloatFormat.values).
"""

import torch
from torch import Tensor

from distributed_adaround.formats import FloatFormat


def nearest_values(numbers: Tensor, element: FloatFormat) -> Tensor:
    """The nearest values, ties to the one whose last bit is 0, beyond the ends the end; float32, any shape.

    What `Grid.quantize` and `Grid.levels` find by search in a list, by arithmetic: about 15 times faster on a CPU.
    """
    # The exponent bits alone, as a float32, are the power of two at or below the number.
    power = (numbers.abs().clamp_(min=2.0**element.smallest_exponent).view(torch.int32) & 0x7F80_0000).view(
        numbers.dtype
    )
    step = power.mul_(2.0**-element.mantissa_bits)
    largest = element.values[-1]
    return torch.round(numbers / step).mul_(step).clamp_(-largest, largest)


def encode(codes: Tensor, element: FloatFormat) -> Tensor:
    """Codes of any shape and dtype as bit patterns, one in each number of the format's storage dtype."""
    place = codes.to(torch.int16) - element.largest
    pattern = place.abs() + element.sign * (place < 0)
    return pattern.to(torch.uint8).view(getattr(torch, element.storage))


def decode(stored: Tensor, element: FloatFormat) -> Tensor:
    """Codes, float32, of what `encode` gives, of the same shape.

    Raises ValueError when a pattern stands for no finite value, or the dtype is another one.
    """
    dtype: torch.dtype = getattr(torch, element.storage)
    if stored.dtype != dtype:
        raise ValueError(f"codes are {stored.dtype}, not the {dtype} of {element.name}")
    pattern = stored.view(torch.uint8).to(torch.int16)
    magnitude = pattern % element.sign
    if bool((magnitude > element.largest).any() | (pattern >= 2 * element.sign).any()):
        raise ValueError(f"a code is no finite value of {element.name}")
    return torch.where(pattern >= element.sign, element.largest - magnitude, element.largest + magnitude).float()
