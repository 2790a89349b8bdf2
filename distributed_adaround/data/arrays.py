"""Named columns, which every reader of files gives, and the readers of .npy, .npz, .safetensors, .pt and .pth.

No pickled object is ever built, no array may claim more than its file holds, and the checksums that zip files (.npz,
.pt) carry are compared before anything is read.
"""

import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from distributed_adaround.errors import InputError
from distributed_adaround.files.integrity import check_safetensors, check_zip, load_tensors
from distributed_adaround.numerics.weight_view import dtype_name

# The one problem for which a field that nobody asked for is left out; every other one is an error.
NOT_NUMERIC = "is not numeric"


@dataclass(frozen=True)
class Column:
    """One field of a file.

    dtype: torch's name for it. shape: the first axis counts samples; in lists of samples the others are None where
    they vary. read: one sample, or for `...` the whole array, which lists of samples do not have.
    """

    dtype: str
    shape: tuple[int | None, ...]
    read: Callable[[Any], Tensor]
    is_list: bool = False


# By field of the file. A text instead of a column says why it cannot be read: "the field 'x' ...".
Columns = dict[str, Column | str]


def common_shape(shapes: Sequence[Sequence[int | None]]) -> tuple[int | None, ...]:
    """Sizes that all share, None where they differ. All have the same number of dimensions."""
    return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))


def read_npy(path: Path) -> Columns:
    with path.open("rb") as file:
        shape, dtype = _npy_header(file)
        missing = file.tell() + math.prod(shape) * dtype.itemsize - path.stat().st_size
    if missing and not dtype.hasobject:
        raise InputError(f"has {abs(missing)} bytes {'less' if missing > 0 else 'more'} than its header says")
    load = cache(lambda: np.load(path, mmap_mode="r", allow_pickle=False))
    return {"input": _numpy_column(shape, dtype, load)}


def read_npz(path: Path) -> Columns:
    """Each array is read whole when first used, since it may be compressed."""
    check_zip(path, compressed=True)
    columns: Columns = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                raise InputError(f"holds {name!r}, which is not a .npy array")
            with archive.open(member) as file:
                shape, dtype = _npy_header(file)
            if math.prod(shape) * dtype.itemsize > member.file_size:
                raise InputError(f"the array {name!r} claims more elements than the file holds")
            columns[name] = _numpy_column(shape, dtype, _npz_member(path, member.filename))
    return columns


def read_safetensors(path: Path) -> Columns:
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        return {name: _column(file.get_tensor(name)) for name in sorted(file.keys())}


def read_torch(path: Path) -> Columns:
    content = load_tensors(path)
    if isinstance(content, Tensor):
        return {"input": _column(content)}
    if isinstance(content, dict):
        return {str(name): _column(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        if all(isinstance(item, Tensor) for item in content):
            return {"input": _column(list(content), is_list=True)}
        if all(isinstance(item, dict) and item.keys() == content[0].keys() for item in content):
            return {str(name): _column([item[name] for item in content], is_list=True) for name in content[0]}
    raise InputError("must hold a tensor, a dict of tensors, a list of tensors, or a list of dicts with the same keys")


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (3, 0):
        # Used only for structured arrays with non-Latin names, which are not numeric.
        return (), np.dtype([("structured", "u1")])
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if any(size < 0 for size in shape):
        raise InputError(f"has the shape {shape} in its header")
    return shape, dtype


def _npz_member(path: Path, member: str) -> Callable[[], Any]:
    @cache
    def load() -> Any:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    return load


def _numpy_column(shape: tuple[int, ...], dtype: np.dtype[Any], load: Callable[[], Any]) -> Column | str:
    if dtype.hasobject:
        return "holds pickled Python objects, which are never read"
    native = dtype.newbyteorder("=")
    try:
        torch_dtype = torch.from_numpy(np.empty(0, native)).dtype
    except TypeError:
        return NOT_NUMERIC
    # Copies: the map is read-only.
    return Column(dtype_name(torch_dtype), shape, lambda row: torch.from_numpy(np.array(load()[row], native)))


def _column(value: Any, *, is_list: bool = False) -> Column | str:
    """Of a tensor, or of a list with a tensor for each sample."""
    samples = value if is_list else [value]
    for sample in samples:
        if not isinstance(sample, Tensor):
            return "is not a tensor"
        if sample.layout != torch.strided or sample.is_quantized or sample.device.type != "cpu":
            return "is not a plain dense tensor"
        # torch.zeros(1).expand(10**12) makes a file of 1 kB.
        if sample.untyped_storage().nbytes() < sample.numel() * sample.element_size():
            return "claims more elements than the file holds (an expanded tensor); save a contiguous copy"
    if len({(sample.dtype, sample.dim()) for sample in samples}) > 1:
        return "mixes dtypes or numbers of dimensions"
    dtype = dtype_name(samples[0].dtype) if samples else ""
    shape = (len(samples), *common_shape([x.shape for x in samples])) if is_list else tuple(value.shape)
    # Copies: the map is private to the file, not to a sample.
    return Column(dtype, shape, lambda row: value[row].detach().clone(), is_list)
