"""What every file type gives: named columns, read sample by sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The one problem for which a field that nobody asked for is left out; every other one is an error.
NOT_NUMERIC = "is not numeric"


@dataclass(frozen=True)
class Column:
    """One field of a file.

    dtype: torch's name for it. shape: the first axis counts samples; in lists of samples the others are None where
    they vary. row: one sample. whole: the array itself, None for lists of samples. problem: why it cannot be read.
    """

    dtype: str
    shape: tuple[int | None, ...]
    row: Callable[[int], Tensor]
    whole: Callable[[], Tensor] | None = None
    problem: str | None = None


def unreadable(problem: str) -> Column:
    """A field that is there but cannot be read; `problem` continues "the field 'x' ..."."""

    def refuse(row: int) -> Tensor:
        raise AssertionError(problem)

    return Column("", (), refuse, problem=problem)


def common_shape(shapes: Sequence[Sequence[int | None]]) -> tuple[int | None, ...]:
    """Sizes that all samples share, None where they differ. All have the same number of dimensions."""
    return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))


def dtype_name(dtype: torch.dtype) -> str:
    """For instance "float32"."""
    return str(dtype).removeprefix("torch.")
