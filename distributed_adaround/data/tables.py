"""Readers of tables, a row per sample: .jsonl and .parquet. Numbers become int64, float32 or bool."""

import json
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_adaround.data.arrays import NOT_NUMERIC, Column, Columns, common_shape
from distributed_adaround.errors import InputError
from distributed_adaround.files.integrity import check_expansion
from distributed_adaround.numerics.weight_view import dtype_name


def read_jsonl(path: Path) -> Columns:
    """Every line is parsed once for dtypes and shapes; what stays in memory are the offsets of the lines."""
    offsets: list[int] = []
    fields: dict[str, _JsonField] = {}
    end = 0
    with path.open("rb") as file:
        for line in file:
            start, end = end, end + len(line)
            if not line.strip():
                continue
            row = len(offsets)
            values = _parse(line, row)
            if row == 0:
                fields = {name: _JsonField() for name in values}
            elif values.keys() != fields.keys():
                raise InputError(f"sample {row} has other fields than the first: {', '.join(values)}")
            for name, value in values.items():
                fields[name].add(value, row)
            offsets.append(start)
    return {name: field.column(partial(_read_row, path, offsets, name, field.dtype)) for name, field in fields.items()}


class _JsonField:
    """What the lines so far say about a field."""

    def __init__(self) -> None:
        self.dtype = torch.bool
        self._shapes: list[tuple[int, ...]] = []
        self._not_numeric: int | None = None
        self._ragged: int | None = None

    def add(self, value: object, row: int) -> None:
        try:
            tensor = torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):
            if _holds_numbers(value):
                self._ragged = row
            else:
                self._not_numeric = row
            return
        self._shapes.append(tuple(tensor.shape))
        # 1 beside 1.5 is a float. An empty list has no say: torch makes it a float.
        if tensor.numel():
            self.dtype = torch.promote_types(self.dtype, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    def column(self, read: Callable[[int], Tensor]) -> Column | str:
        if self._ragged is not None:
            return f"is ragged, too large for int64 or holds other things beside numbers in sample {self._ragged}"
        if self._not_numeric is not None:
            return f"is not a number in sample {self._not_numeric}" if self._shapes else NOT_NUMERIC
        if len(set(map(len, self._shapes))) > 1:
            return "mixes numbers of dimensions"
        return Column(dtype_name(self.dtype), (len(self._shapes), *common_shape(self._shapes)), read, is_list=True)


def _parse(line: bytes, row: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"sample {row} is not JSON: {error}") from error
    if isinstance(value, list):
        return {"input_ids": value}
    if not isinstance(value, dict):
        raise InputError(f"sample {row} is neither an object nor a list")
    return value


def _holds_numbers(value: object) -> bool:
    return any(map(_holds_numbers, value)) if isinstance(value, list) else isinstance(value, int | float)


def _read_row(path: Path, offsets: list[int], name: str, dtype: torch.dtype, row: int) -> Tensor:
    with path.open("rb") as file:
        file.seek(offsets[row])
        return torch.tensor(_parse(file.readline(), row)[name], dtype=dtype)


def read_parquet(path: Path) -> Columns:
    """One row group at a time is in memory."""
    file = open_parquet(path)
    return {field.name: _parquet_column(file, field) for field in file.schema_arrow}


def open_parquet(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile. Raises InputError when it would unpack to far more than its size."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("reading .parquet needs pyarrow: pip install 'distributed_adaround[parquet]'") from error
    # Pages have checksums where the writer was told so.
    file = parquet.ParquetFile(path, page_checksum_verification=True)
    groups = map(file.metadata.row_group, range(file.num_row_groups))
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    claimed = sum(max(8 * chunk.num_values, chunk.total_uncompressed_size) for chunk in chunks)
    check_expansion(claimed, path.stat().st_size)
    return file


def first_rows(file: Any) -> list[int]:
    """The first row of each row group, and the number of rows."""
    sizes = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    return [0, *accumulate(sizes)]


def _parquet_column(file: Any, field: Any) -> Column | str:
    from pyarrow import types

    value_type, depth = field.type, 0
    while types.is_list(value_type) or types.is_large_list(value_type) or types.is_fixed_size_list(value_type):
        value_type, depth = value_type.value_type, depth + 1
    if types.is_boolean(value_type):
        dtype = "bool"
    elif types.is_integer(value_type):
        dtype = "int64"
    elif types.is_floating(value_type):
        dtype = "float32"
    else:
        return NOT_NUMERIC
    starts = first_rows(file)

    @lru_cache(maxsize=1)
    def read_group(group: int) -> Any:
        return file.read_row_group(group, columns=[field.name]).column(0).combine_chunks()

    def read(row: int) -> Tensor:
        group = bisect_right(starts, row) - 1
        values, (_, *shape) = _flatten(read_group(group).slice(row - starts[group], 1), depth)
        if None in shape:
            raise InputError(f"the field {field.name!r} is ragged")
        return torch.from_numpy(np.array(values.cast(dtype).to_numpy(zero_copy_only=False)).reshape(shape))

    # Groups without rows have no shape.
    flat = [_flatten(read_group(group), depth) for group, (a, b) in enumerate(pairwise(starts)) if a < b]
    if any(values.null_count for values, _ in flat):
        return "holds nulls"
    return Column(dtype, (starts[-1], *common_shape([shape[1:] for _, shape in flat])), read, is_list=True)


def _flatten(array: Any, depth: int) -> tuple[Any, list[int | None]]:
    """All numbers of nested lists, and the shape; None where lengths vary. Stops at the first level with nulls."""
    from pyarrow import compute

    shape: list[int | None] = [len(array)]
    for _ in range(depth):
        if array.null_count:
            return array, shape
        lengths = compute.min_max(compute.list_value_length(array)).as_py()
        shape.append(lengths["min"] if lengths["min"] == lengths["max"] else None)
        array = array.flatten()
    return array, shape
