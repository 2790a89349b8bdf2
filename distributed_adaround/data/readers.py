"""Samples in files: opens a file of any known type and reads it sample by sample.

    .npy              one array, field "input"; memory mapped
    .npz              arrays by name; an array is read whole when first used
    .safetensors      tensors by name; memory mapped
    .pt .pth          a tensor (field "input"), a dict of tensors, a list of tensors or of dicts, one sample each
    .jsonl            a line per sample: an object of numbers or (nested) lists, or a bare list (field "input_ids")
    .parquet          columns of numbers or (nested) lists of numbers; one row group in memory

The first axis counts samples, unless one_sample_per_file says that the whole array is one. Fields that are not numeric
are left out, unless asked for; a field that cannot be read for any other reason is an error.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from distributed_adaround.data import arrays, tables
from distributed_adaround.data.arrays import NOT_NUMERIC, Column, Columns
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.errors import InputError, shorten

_READERS: dict[str, Callable[[Path], Columns]] = {
    ".npy": arrays.read_npy,
    ".npz": arrays.read_npz,
    ".safetensors": arrays.read_safetensors,
    ".pt": arrays.read_torch,
    ".pth": arrays.read_torch,
    ".jsonl": tables.read_jsonl,
    ".parquet": tables.read_parquet,
}
SUFFIXES = tuple(_READERS)


@dataclass(frozen=True)
class SampleFile:
    """An open file: its samples, and their fields under the names of the model's inputs."""

    shown: str
    num_samples: int
    fields: tuple[FieldInfo, ...]
    one_sample_per_file: bool
    _columns: Mapping[str, Column]

    def read(self, row: int) -> dict[str, Tensor]:
        """One sample, without a batch axis. Raises InputError, also for NaN and infinity."""
        assert 0 <= row < self.num_samples, f"row {row} of {self.num_samples}"
        with explained(f"{self.shown}, sample {row}"):
            index = ... if self.one_sample_per_file else row
            sample = {name: column.read(index) for name, column in self._columns.items()}
            for name, value in sample.items():
                _check_finite(name, value)
            return sample


def open_samples(path: Path, *, shown: str, fields: Mapping[str, str] | None, one_sample_per_file: bool) -> SampleFile:
    """Open a local file. shown: its name in messages. fields: model input name -> its field; None: all numeric fields.

    Raises: InputError when it is damaged, empty, holds pickled objects or lacks a field.
    """
    with explained(shown):
        columns = _READERS[path.suffix.lower()](path)
        sources = fields or {name: name for name, column in columns.items() if column != NOT_NUMERIC}
        chosen = {name: _readable(columns, source) for name, source in sources.items()}
        if not chosen:
            raise InputError("holds no numeric field")
        lengths = {sources[name]: _num_samples(sources[name], c, one_sample_per_file) for name, c in chosen.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{source}: {length}" for source, length in lengths.items())
            raise InputError(f"its fields differ in the number of samples ({counts}); choose by data.fields")
        num_samples = next(iter(lengths.values()))
        first_axis = 0 if one_sample_per_file else 1
        infos = tuple(
            FieldInfo(name, c.dtype, c.shape[first_axis:], None if sources[name] == name else sources[name])
            for name, c in chosen.items()
        )
        if num_samples == 0 or any(0 in info.shape for info in infos):
            raise InputError("is empty: no samples, or samples without elements; remove the file")
        return SampleFile(shown, num_samples, infos, one_sample_per_file, chosen)


def _readable(columns: Columns, source: str) -> Column:
    if source not in columns:
        raise InputError(f"has no field {source!r}; it has {', '.join(sorted(columns))}")
    column = columns[source]
    if isinstance(column, str):
        raise InputError(f"the field {source!r} {column}; mend it, or choose others by data.fields")
    return column


def _num_samples(source: str, column: Column, one_sample_per_file: bool) -> int:
    if one_sample_per_file:
        if column.is_list:
            raise InputError("is a list of samples already; one_sample_per_file is for arrays")
        return 1
    if not column.shape or column.shape[0] is None:
        raise InputError(f"the field {source!r} is a single number without a sample axis; set one_sample_per_file")
    return column.shape[0]


def _check_finite(name: str, value: Tensor) -> None:
    if not (value.is_floating_point() or value.is_complex()):
        return
    # 8-bit floats have few operators of their own.
    finite = (value.float() if value.element_size() == 1 else value).isfinite()
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        where = f" at {place}" if place else ""
        raise InputError(f"the field {name!r} is {value[place].item()}{where}; mend it, or leave the sample out")


@contextmanager
def explained(shown: str) -> Iterator[None]:
    """Name the file in every error: what the libraries raise for a damaged file is of all sorts."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{shown}: {shorten(str(error))}") from error
    except Exception as error:
        reason = shorten(str(error).partition("\n")[0]) or type(error).__name__
        raise InputError(f"{shown}: cannot be read, damaged or not of this type: {reason}") from error
