"""The integer grid that weights are rounded to.

Shape legend: O out channels, I inputs of one output, n groups of one row (1 unless per group).

`code = round(w / scale) + zero_point`, clamped to qmin..qmax; `w = (code - zero_point) * scale`. Codes are kept as
floating-point tensors while they are worked on: every code of up to 8 bits is exact in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of one weight matrix `(O, I)`.

    scale, zero_point: floating point, `(1, 1)` per tensor, `(O, 1)` per channel, `(O, n)` per group of I/n
    consecutive inputs. qmin, qmax: smallest and largest code.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Grid:
        """The same grid in another floating dtype or on another device."""
        return replace(self, scale=self.scale.to(device, dtype), zero_point=self.zero_point.to(device, dtype))

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
        """Nearest codes `(O, I)` of a weight `(O, I)`, ties to even."""
        steps = torch.round(weight / self.scale_like(weight)) + self.zero_point_like(weight)
        return steps.clamp_(self.qmin, self.qmax)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Weights `(O, I)` of codes `(O, I)`, in the dtype of the scale."""
        codes = codes.to(self.scale.dtype)
        return (codes - self.zero_point_like(codes)) * self.scale_like(codes)

    def neighbours(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the grid values below and above each weight, both clamped to the range; `(O, I)` each.

        Beyond the ends of the range both are the end itself: there is nothing to choose.
        """
        below = torch.floor(weight / self.scale_like(weight)) + self.zero_point_like(weight)
        return below.clamp(self.qmin, self.qmax), (below + 1).clamp(self.qmin, self.qmax)
