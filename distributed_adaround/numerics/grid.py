"""The grid that weights are rounded to: integers, or the values of a small floating-point format, times a scale.

Shape legend: O out channels, I inputs of one output, n groups of one row (1 unless per group), V values of a format.

    integers    code = round(w / scale) + zero_point, clamped to qmin..qmax    w = (code - zero_point) * scale
    floats      code = place of the value nearest to w / scale                 w = values[code] * scale

Codes are kept as floating-point tensors while they are worked on: every code of up to 8 bits is exact in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

# float32: any. e8m0: a power of two (OCP Microscaling Formats v1.0). e4m3: an 8-bit float times one factor for the
# whole tensor (NVFP4).
ScaleFormat = Literal["float32", "e8m0", "e4m3"]

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of one weight matrix `(O, I)`.

    scale, zero_point: floating point, `(1, 1)` per tensor, `(O, 1)` per channel, `(O, n)` per group of I/n
    consecutive inputs. qmin, qmax: smallest and largest code. values: `(V,)`, the representable values in ascending
    order, in units of the scale; codes are then places in it, qmin is 0, qmax is V - 1 and zero_point is 0. None:
    integers. scale_format: what a scale may be. tensor_scale: `(1, 1)`, the factor of the whole tensor, with e4m3
    scales only; `scale` holds it already.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    values: Tensor | None = None
    scale_format: ScaleFormat = "float32"
    tensor_scale: Tensor | None = None

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Grid:
        """The same grid in another floating dtype or on another device."""
        return replace(
            self,
            scale=self.scale.to(device, dtype),
            zero_point=self.zero_point.to(device, dtype),
            values=None if self.values is None else self.values.to(device, dtype),
            tensor_scale=None if self.tensor_scale is None else self.tensor_scale.to(device, dtype),
        )

    def _expand(self, values: Tensor, num_inputs: int) -> Tensor:
        """`(1|O, n)` to something that broadcasts against `(O, I)`."""
        groups = values.shape[1]
        return values if groups == 1 else values.repeat_interleave(num_inputs // groups, dim=1)

    def scale_like(self, weight: Tensor) -> Tensor:
        """Scale of every weight, broadcastable to `(O, I)`."""
        return self._expand(self.scale, weight.shape[1])

    def zero_point_like(self, weight: Tensor) -> Tensor:
        """Zero point of every weight, broadcastable to `(O, I)`."""
        return self._expand(self.zero_point, weight.shape[1])

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest codes `(O, I)` of a weight `(O, I)`.

        Ties go to the even integer; of a float format, to the value whose last bit is 0, as IEEE 754 rounds. Weights
        beyond the ends take the end.
        """
        steps = weight / self.scale_like(weight)
        if self.values is not None:
            return torch.bucketize(steps.to(self.values.dtype), _boundaries(self.values)).to(self.scale.dtype)
        return (torch.round(steps) + self.zero_point_like(weight)).clamp_(self.qmin, self.qmax)

    def levels(self, codes: Tensor) -> Tensor:
        """Weights `(O, I)` of codes `(O, I)` in units of the scale, in its dtype."""
        if self.values is not None:
            return self.values[codes.long()]
        codes = codes.to(self.scale.dtype)
        return codes - self.zero_point_like(codes)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Weights `(O, I)` of codes `(O, I)`, in the dtype of the scale."""
        return self.levels(codes) * self.scale_like(codes)

    def neighbours(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the grid values below and above each weight, both clamped to the range; `(O, I)` each.

        A weight on the grid is its own value below. Beyond the ends of the range both are the end itself: there is
        nothing to choose.
        """
        steps = weight / self.scale_like(weight)
        if self.values is None:
            below = torch.floor(steps) + self.zero_point_like(weight)
        else:
            below = torch.bucketize(steps.to(self.values.dtype), self.values, right=True).to(self.scale.dtype) - 1
        return below.clamp(self.qmin, self.qmax), (below + 1).clamp(self.qmin, self.qmax)

    def with_scale(self, scale: Tensor) -> Grid:
        """The grid with another scale of the same shape, each entry at the nearest one that scale_format can hold.

        Nearest on a linear axis: with the codes kept, the squared error is a parabola over the scale. Entries that
        are not finite or below the smallest normal float32 are no scale: there the grid keeps its own.
        """
        assert scale.shape == self.scale.shape, (scale.shape, self.scale.shape)
        scale = scale.to(torch.float32)
        usable = torch.isfinite(scale) & (scale >= _TINY)
        chosen = torch.where(usable, scale, self.scale.to(torch.float32))
        return replace(self, scale=round_scale(chosen, self.scale_format, self.tensor_scale).to(self.scale.dtype))


def round_scale(scale: Tensor, scale_format: ScaleFormat, tensor_scale: Tensor | None = None) -> Tensor:
    """Positive float32 scales to the nearest ones that the format can hold; float32, normal, of the same shape."""
    if scale_format == "e8m0":
        # Adding half of the mantissa's range carries into the exponent from 1.5 on. 2^-127 is left out: float32
        # holds it as a denormal number only, and those are flushed to 0 while a job runs.
        bits = scale.clamp(_TINY, 2.0**127).view(torch.int32)
        return ((bits + 0x0040_0000) & 0x7F80_0000).view(torch.float32)
    if scale_format == "e4m3":
        assert tensor_scale is not None, "e4m3 scales need the factor of the whole tensor"
        factor = tensor_scale.to(torch.float32)
        # The cast makes 0 of what is far below the smallest value; that it stops at the largest, 448, is not promised.
        return (scale / factor).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).to(torch.float32) * factor
    return scale


def _boundaries(values: Tensor) -> Tensor:
    """`(V - 1,)`: the largest number that is rounded to each value but the last; values: symmetric around 0."""
    middle = (values[:-1] + values[1:]) / 2
    # The values next to each other differ in the last bit of their pattern, and 0 in the middle is even. A tie above
    # an odd value goes up: the boundary is the number just below the tie.
    places = torch.arange(len(middle), device=values.device) - len(middle) // 2
    below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
    return torch.where(places % 2 == 0, middle, below)
