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

from distributed_adaround.data.arrays import read_npy, read_npz, read_safetensors, read_torch
from distributed_adaround.data.columns import NOT_NUMERIC, Column
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.data.tables import read_jsonl, read_parquet
from distributed_adaround.errors import InputError, shorten
from distributed_adaround.files import uris

_READERS: dict[str, Callable[[Path], dict[str, Column]]] = {
    ".npy": read_npy,
    ".npz": read_npz,
    ".safetensors": read_safetensors,
    ".pt": read_torch,
    ".pth": read_torch,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
SUFFIXES = tuple(_READERS)


@dataclass(frozen=True)
class SampleFile:
    """An open file: its samples, and their fields under the names of the model's inputs."""

    shown: str
    num_samples: int
    fields: tuple[FieldInfo, ...]
    _rows: Mapping[str, Callable[[int], Tensor]]

    def read(self, row: int) -> dict[str, Tensor]:
        """One sample, without a batch axis. Raises InputError, also for NaN and infinity."""
        assert 0 <= row < self.num_samples, f"row {row} of {self.num_samples}"
        with _explained(f"{self.shown}, sample {row}"):
            sample = {name: read(row) for name, read in self._rows.items()}
            for name, value in sample.items():
                _check_finite(name, value)
            return sample


def has_reader(uri: str) -> bool:
    """Whether the file's suffix is a known one."""
    return _suffix(uris.file_name(uri)) in _READERS


def scan(
    path: Path, *, shown: str, fields: Mapping[str, str] | None, one_sample_per_file: bool
) -> tuple[int, tuple[FieldInfo, ...]]:
    """(number of samples, fields). Arguments and errors as in `open_samples`."""
    file = open_samples(path, shown=shown, fields=fields, one_sample_per_file=one_sample_per_file)
    return file.num_samples, file.fields


def open_samples(path: Path, *, shown: str, fields: Mapping[str, str] | None, one_sample_per_file: bool) -> SampleFile:
    """Open a local file; its suffix says which type it is.

    shown: its name in messages. fields: model input name -> field in the file; None: all numeric fields.

    Raises: InputError when it is damaged, empty, holds pickled objects or lacks a field.
    """
    with _explained(shown):
        columns = _READERS[_suffix(path.name)](path)
        sources = _sources(columns, fields)
        chosen = {name: columns[source] for name, source in sources.items()}
        lengths = {sources[name]: _num_samples(sources[name], c, one_sample_per_file) for name, c in chosen.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{source}: {length}" for source, length in lengths.items())
            raise InputError(f"its fields differ in the number of samples ({counts}); choose by data.fields")
        num_samples = next(iter(lengths.values()))
        shapes = {name: c.shape if one_sample_per_file else c.shape[1:] for name, c in chosen.items()}
        if num_samples == 0 or any(0 in shape for shape in shapes.values()):
            raise InputError("is empty: no samples, or samples without elements; remove the file")
        infos = tuple(
            FieldInfo(name, c.dtype, shapes[name], None if sources[name] == name else sources[name])
            for name, c in chosen.items()
        )
        return SampleFile(
            shown, num_samples, infos, {n: _row_reader(c, one_sample_per_file) for n, c in chosen.items()}
        )


def _sources(columns: Mapping[str, Column], fields: Mapping[str, str] | None) -> dict[str, str]:
    """Model input name -> field in the file, all of them readable."""
    sources = dict(fields or {name: name for name, column in columns.items() if column.problem != NOT_NUMERIC})
    if not sources:
        raise InputError("holds no numeric field")
    for source in sources.values():
        if source not in columns:
            raise InputError(f"has no field {source!r}; it has {', '.join(sorted(columns))}")
        if columns[source].problem is not None:
            raise InputError(
                f"the field {source!r} {columns[source].problem}; mend it, or choose others by data.fields"
            )
    return sources


def _num_samples(source: str, column: Column, one_sample_per_file: bool) -> int:
    if one_sample_per_file:
        if column.whole is None:
            raise InputError("is a list of samples already; one_sample_per_file is for arrays")
        return 1
    if not column.shape or column.shape[0] is None:
        raise InputError(f"the field {source!r} is a single number without a sample axis; set one_sample_per_file")
    return column.shape[0]


def _row_reader(column: Column, one_sample_per_file: bool) -> Callable[[int], Tensor]:
    whole = column.whole
    return (lambda _: whole()) if one_sample_per_file and whole is not None else column.row


def _check_finite(name: str, value: Tensor) -> None:
    if not (value.is_floating_point() or value.is_complex()):
        return
    # 8-bit floats have few operators of their own.
    finite = (value.float() if value.element_size() == 1 else value).isfinite()
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        where = f" at {place}" if place else ""
        raise InputError(f"the field {name!r} is {value[place].item()}{where}; mend it, or leave the sample out")


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


@contextmanager
def _explained(shown: str) -> Iterator[None]:
    """Name the file in every error: what the libraries raise for a damaged file is of all sorts."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{shown}: {shorten(str(error))}") from error
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{shown}: cannot be read, damaged or not of this type: {shorten(lines[0])}") from error
