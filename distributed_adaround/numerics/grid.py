"""The grid that weights are rounded to: integers, or the values of a small float, times a scale.

Shape legend: G conv groups, R out channels of a group, J inputs of an output, n runs that share a scale, V values.

    integers    code = round(w / scale) + zero_point, clamped to qmin..qmax    w = (code - zero_point) * scale
    floats      code = place of the value nearest to w / scale                 w = values[code] * scale

A *level* is a weight in units of its scale: an integer less the zero point, or a value, for weights on the grid. Codes
are kept as floating-point tensors while they are worked on: every code of up to 24 bits is exact in float32.

Soft rounding of a level c between its neighbours lo <= c <= hi, f = (c - lo) / (hi - lo), is

    S_m(c) = lo + (hi - lo) * clamp((f - m/2) / (1 - m), 0, 1)

the point that minimizes (v - c)² + m (hi - lo)² f_v (1 - f_v) over v: the regularizer of AdaRound at beta = 2, with
weight m. S_0 leaves c as it is, S_1 is rounding to the nearest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed_adaround.formats import FloatFormat, ScaleFormat

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a weight `(G, R, J)`.

    scale, zero_point: floating point, `(G, R, n)`, or `(1, 1, 1)` for the whole tensor. qmin, qmax: ends of the codes.
    values: `(V,)`, ascending; codes are then places in it, qmin is 0, qmax is V - 1 and zero_point is 0. None:
    integers. tensor_scale: `(1, 1, 1)`, the factor of the whole tensor where the scale format has one; `scale` holds it
    already. per_channel: channels have scales of their own, which can be refitted; the shape of one's part hides it.
    keep_zeros: float weights of exactly 0 (pruned ones) are rounded to 0 and nothing else.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    scale_format: ScaleFormat
    values: Tensor | None = None
    tensor_scale: Tensor | None = None
    per_channel: bool = True
    keep_zeros: bool = False

    def frozen(self, weight: Tensor) -> Tensor | None:
        """Which weights must stay 0, bool of any shape; None: none."""
        return weight == 0 if self.keep_zeros else None

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Grid":
        """The same grid in another floating dtype or on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        return replace(self, **moved)

    def part(self, place: tuple[slice, slice]) -> "Grid":
        """The part of some conv groups and of some out channels in each of them."""
        if not self.per_channel:
            return self
        return replace(self, scale=self.scale[place], zero_point=self.zero_point[place])

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest codes `(G, R, J)` of a weight; beyond the ends the end. Ties go to the even integer; of a float
        format, to the value whose last bit is 0, as IEEE 754 rounds."""
        steps = weight / _of_inputs(self.scale, weight)
        if self.values is not None:
            return torch.bucketize(steps.to(self.values.dtype), _boundaries(self.values)).to(self.scale.dtype)
        return (torch.round(steps) + _of_inputs(self.zero_point, weight)).clamp_(self.qmin, self.qmax)

    def levels(self, codes: Tensor) -> Tensor:
        """Levels `(G, R, J)` of codes `(G, R, J)`, in the dtype of the scale."""
        if self.values is not None:
            return self.values[codes.long()]
        return codes.to(self.scale.dtype) - _of_inputs(self.zero_point, codes)

    def codes(self, levels: Tensor) -> Tensor:
        """Codes `(G, R, J)` of levels `(G, R, J)` on the grid."""
        if self.values is not None:
            return torch.searchsorted(self.values, levels.contiguous()).to(levels.dtype)
        return levels + _of_inputs(self.zero_point, levels)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Weights `(G, R, J)` of codes `(G, R, J)`, in the dtype of the scale."""
        return self.levels(codes) * _of_inputs(self.scale, codes)

    def neighbours(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `(G, R, J)` of the grid values below and above each weight; one on the grid is its own value below.

        Beyond the ends of the range both are the end itself, and of weights that must stay 0 both are 0: there is
        nothing to choose.
        """
        steps = weight / _of_inputs(self.scale, weight)
        if self.values is None:
            below = torch.floor(steps) + _of_inputs(self.zero_point, weight)
        else:
            below = torch.bucketize(steps.to(self.values.dtype), self.values, right=True).to(self.scale.dtype) - 1
        low, high = below.clamp(self.qmin, self.qmax), (below + 1).clamp(self.qmin, self.qmax)
        frozen = self.frozen(weight)
        return low, high if frozen is None else torch.where(frozen, low, high)

    def representable(self, scale: Tensor) -> Tensor:
        """The nearest scales that the format can hold, of any shape and in their dtype.

        Nearest on a linear axis: with the codes kept, the squared error is a parabola over the scale. NaN for what is
        not finite or below the smallest normal float32.
        """
        narrow = scale.float()
        usable = torch.isfinite(narrow) & (narrow >= _TINY)
        rounded = round_scale(torch.where(usable, narrow, 1.0), self.scale_format, self.tensor_scale)
        return torch.where(usable, rounded.to(scale.dtype), torch.nan)

    def with_scale(self, scale: Tensor) -> "Grid":
        """The grid with another scale of the same shape, as the format can hold it; where it can not, its own."""
        assert scale.shape == self.scale.shape, (scale.shape, self.scale.shape)
        held = self.representable(scale).to(self.scale.dtype)
        return replace(self, scale=torch.where(held.isnan(), self.scale, held))

    def at_shares(self, shares: Sequence[float]) -> "Grid":
        """The channels of each group so often, all of them after the other, each time with one share of the scales."""
        copies = [self.with_scale(self.scale * share).scale for share in shares]
        return replace(self, scale=torch.cat(copies, dim=1), zero_point=self.zero_point.repeat(1, len(shares), 1))

    def runs(self) -> list["GridRun"]:
        """What each run of inputs that share scales has in common; copies."""
        parts = (part[:, None].movedim(3, 0).contiguous() for part in (self.scale, self.zero_point))
        return [self._run_of(scale.clone(), zero_point) for scale, zero_point in zip(*parts, strict=True)]

    def of_inputs(self, index: Tensor) -> "GridRun":
        """The same for one input of each conv group. index: int64 `(G, 1)`, the run that the input is in."""
        if self.scale.shape[2] == 1:
            return self.runs()[0]
        place = index[:, :, None].expand(-1, self.scale.shape[1], -1)
        return self._run_of(*(part.gather(2, place).transpose(1, 2) for part in (self.scale, self.zero_point)))

    def _run_of(self, scale: Tensor, zero_point: Tensor) -> "GridRun":
        if self.values is not None:
            return GridRun(scale, self.values[0], self.values[-1], self.values)
        return GridRun(scale, self.qmin - zero_point, self.qmax - zero_point, None)


@dataclass(frozen=True)
class GridRun:
    """A run of inputs that share scales `(G, 1, R)`, with the inputs first; low, high: ends of its levels."""

    scale: Tensor
    low: Tensor
    high: Tensor
    values: Tensor | None

    def round(self, levels: Tensor, softness: float = 1.0) -> Tensor:
        """S_m of levels `(G, p, R)`, m = softness; 1 is the nearest level."""
        if self.values is not None:
            return self._round_to_values(levels, softness)
        nearest = levels.round()
        if softness < 1:
            rest = F.softshrink(levels - nearest, softness / 2)
            nearest.add_(rest, alpha=1 / (1 - softness))
        return torch.minimum(torch.maximum(nearest, self.low, out=nearest), self.high, out=nearest)

    def _round_to_values(self, levels: Tensor, softness: float) -> Tensor:
        assert self.values is not None
        last = self.values.numel() - 1
        below = (torch.searchsorted(self.values, levels.contiguous(), right=True) - 1).clamp_(0, last)
        lo, hi = self.values[below], self.values[(below + 1).clamp_(max=last)]
        width = hi - lo
        fraction = ((levels - lo) / torch.where(width > 0, width, 1.0)).clamp_(0, 1)
        if softness < 1:
            return lo + fraction.sub_(softness / 2).div_(1 - softness).clamp_(0, 1) * width
        return lo + (fraction > 0.5).to(levels.dtype) * width


def round_scale(scale: Tensor, scale_format: ScaleFormat, tensor_scale: Tensor | None = None) -> Tensor:
    """Positive float32 scales to the nearest ones that the format can hold; float32, of the same shape."""
    smallest, largest = scale_format.smallest, scale_format.largest
    if scale_format.powers_of_two:
        # Adding half of the mantissa's range carries into the exponent from 1.5 on.
        bits = scale.clamp(smallest, largest).view(torch.int32)
        return ((bits + 0x0040_0000) & 0x7F80_0000).view(torch.float32)
    if scale_format.per_tensor:
        assert tensor_scale is not None, f"{scale_format.name} scales need the factor of the whole tensor"
        factor = tensor_scale.to(torch.float32)
        # The cast makes 0 of what is far below the smallest value; that it stops at the largest is not promised.
        return (scale / factor).clamp(smallest, largest).to(torch.float8_e4m3fn).to(torch.float32) * factor
    dtype: torch.dtype = getattr(torch, scale_format.storage)
    return scale if dtype == torch.float32 else scale.clamp(smallest, largest).to(dtype).to(torch.float32)


def _of_inputs(values: Tensor, like: Tensor) -> Tensor:
    """`(G, R, n)` to something that broadcasts against `like`, `(G, R, J)`."""
    runs = values.shape[2]
    return values if runs == 1 else values.repeat_interleave(like.shape[2] // runs, dim=2)


def _boundaries(values: Tensor) -> Tensor:
    """`(V - 1,)`: the largest number that is rounded to each value but the last; values: symmetric around 0."""
    middle = (values[:-1] + values[1:]) / 2
    # The values next to each other differ in the last bit of their pattern, and 0 in the middle is even. A tie above
    # an odd value goes up: the boundary is the number just below the tie.
    places = torch.arange(len(middle), device=values.device) - len(middle) // 2
    below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
    return torch.where(places % 2 == 0, middle, below)


def nearest_values(numbers: Tensor, element: FloatFormat) -> Tensor:
    """The nearest values, ties to the one whose last bit is 0, beyond the ends the end; float32, any shape.

    What `Grid.quantize` and `Grid.levels` find by search in a list, by arithmetic: about 15 times faster on a CPU.
    """
    # Below the smallest normal number the steps between values shrink no further.
    bits = numbers.abs().clamp_(min=2.0 ** (1 - element.bias)).view(torch.int32)
    # The exponent bits alone, as a float32, are the power of two at or below the number.
    step = (bits & 0x7F80_0000).view(numbers.dtype).mul_(2.0**-element.mantissa_bits)
    largest = element.values[-1]
    return torch.round(numbers / step).mul_(step).clamp_(-largest, largest)


def encode(codes: Tensor, element: FloatFormat) -> Tensor:
    """Codes of any shape and dtype as bit patterns, one in each number of the format's storage dtype.

    A code is the place of a value in the ascending list of all of them (formats.FloatFormat.values).
    """
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
