"""How the matrix of a layer lies in the parameter that stores it.

A parameter may hold a matrix transposed, or several matrices: stacked (packed attention projections) or one after the
other (experts). Whatever operations a model takes a matrix out with, as long as they copy nothing the result is
`parameter.as_strided(shape, strides, offset)`, so that writing into it writes into the parameter.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class WeightView:
    """shape, strides, offset: of the matrix in the contiguous parameter, in numbers. dtype: name of the one in which
    the model runs the layer, where it casts the parameter first ("bfloat16" under autocast); None: as it is stored."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    dtype: str | None = None

    @classmethod
    def like(cls, part: Tensor, dtype: torch.dtype | None = None) -> "WeightView":
        """That of a view whose base starts at the beginning of its storage."""
        name = None if dtype is None else dtype_name(dtype)
        return cls(tuple(part.shape), tuple(part.stride()), int(part.storage_offset()), name)

    def of(self, parameter: Tensor) -> Tensor:
        """The part of a contiguous parameter, as a view into it."""
        return parameter.as_strided(self.shape, self.strides, parameter.storage_offset() + self.offset)

    def value(self, parameter: Tensor) -> Tensor:
        """The part as the layer computes with it."""
        part = self.of(parameter)
        return part if self.dtype is None else part.to(getattr(torch, self.dtype))

    def transposed(self) -> "WeightView":
        """`(I, O)` to `(O, I)`."""
        return WeightView(self.shape[::-1], self.strides[::-1], self.offset, self.dtype)

    def entry(self, index: int) -> "WeightView":
        """The matrix at a place of the first dimension."""
        return WeightView(self.shape[1:], self.strides[1:], self.offset + index * self.strides[0], self.dtype)

    @property
    def last(self) -> int:
        """Place of its last number in the flat parameter."""
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    def label(self, parameter_shape: tuple[int, ...]) -> str:
        """ "[0:16]", "[3]" or "[:,8:16]": the box of the parameter that it lies in; empty for all of it."""
        parts, low, high = [], self.offset, self.last
        for dim, size in enumerate(parameter_shape):
            pitch = math.prod(parameter_shape[dim + 1 :])
            start, stop = low // pitch, high // pitch
            low, high = low % pitch, high % pitch
            whole = start == 0 and stop == size - 1
            parts.append(":" if whole else str(start) if start == stop else f"{start}:{stop + 1}")
        while parts and parts[-1] == ":":
            parts.pop()
        return f"[{','.join(parts)}]" if parts else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"shape": list(self.shape), "strides": list(self.strides), "offset": self.offset, "dtype": self.dtype}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], size: int) -> "WeightView":
        """Inverse of `to_dict`. Raises ValueError when it does not lie inside a parameter of `size` numbers."""
        shape, strides = ([int(number) for number in values[key]] for key in ("shape", "strides"))
        view = cls(tuple(shape), tuple(strides), int(values["offset"]), values["dtype"])
        if min([view.offset, *strides, *(length - 1 for length in shape)]) < 0 or view.last >= size:
            raise ValueError(f"{dict(values)} does not lie in a parameter of {size} numbers")
        return view
