"""Microbatches as tensors: reads the samples of a manifest, pads and stacks them, some microbatches ahead.

    owned indices -> torchdata MapStyleWrapper(load) -> Prefetcher (one thread) -> (index, tensors), in order

What arrives depends on the manifest alone, never on the rank, the prefetching or the order of calls. torchdata's
ParallelMapper is not used: its workers call `torch.set_num_threads(1)`, which holds for every later thread, and its
errors come back as text. One thread that reads ahead is what a walk through a model needs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torchdata.nodes import BaseNode, MapStyleWrapper, Prefetcher

from distributed_adaround.data.encode import ArraysEncoder, Encoder
from distributed_adaround.data.manifest import FieldInfo, Manifest
from distributed_adaround.data.readers import SampleFile, open_samples
from distributed_adaround.errors import InputError, redact
from distributed_adaround.files import storage

# Some readers hold their file's content. The samples come in file order, so few files are in use at once.
_OPEN_FILES = 4

Loaded = dict[str, Tensor]


class SampleLoader:
    """Any microbatch by index, and those of one rank in order. Close it, or use it as a context manager.

    owned: indices of this rank's microbatches. pad_value: fills fields that vary in size, at the end, up to the longest
    sample of the microbatch. mask_field: where a field varies and the data has no field of this name, it is added:
    int64 `(N, T)`, 1 for real, 0 for padding, T the first varying dimension of the first varying field. Where the data
    has it, it is padded with 0. prefetch: microbatches read ahead by a thread; 0 for none. encoder: makes the tensors
    of each sample; None: arrays as they are.

    Each file is compared with the manifest's size and checksum before its first sample is used; remote files are
    downloaded once, and removed by `close`.

    Raises: InputError, from the constructor for a pad_value that a field's dtype cannot hold, from reading for a file
    that changed or cannot be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        owned: Sequence[int],
        *,
        pad_value: int | float = 0,
        mask_field: str,
        prefetch: int = 2,
        encoder: Encoder | None = None,
    ) -> None:
        self._manifest = manifest
        self._encode = encoder or ArraysEncoder({})
        self._fields = self._encode.fields(manifest.fields)
        self._owned = tuple(sorted(owned))
        self._mask_field = mask_field
        self._prefetch = prefetch
        varying = [info for info in self._fields if None in info.shape]
        names = {info.name for info in self._fields}
        self._masked_by = varying[0] if varying and mask_field not in names else None
        self._pad_values = {info.name: 0 if info.name == mask_field else pad_value for info in varying}
        for info in varying:
            _check_pad_value(info, self._pad_values[info.name])
        self._lock = Lock()
        self._closed = False
        self._resources = ExitStack()
        self._paths: dict[int, Path] = {}
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_file)

    @property
    def total(self) -> int:
        """Number of microbatches of the whole job."""
        return len(self._manifest.microbatches)

    @property
    def varying(self) -> bool:
        """Samples differ in size."""
        return any(None in info.shape for info in self._fields)

    @property
    def owned(self) -> tuple[int, ...]:
        """Global indices of this rank's microbatches, ascending. May be empty."""
        return self._owned

    def load(self, index: int) -> Loaded:
        """Any one microbatch: `(N, *sample shape)` per field, on the host. Thread-safe."""
        with self._lock:
            assert not self._closed, "the loader is closed"
            assert 0 <= index < self.total, f"microbatch {index} of {self.total}"
            located = map(self._manifest.locate, self._manifest.microbatches[index].samples)
            samples = [self._encode(self._open(file).read(row)) for file, row in located]
        return self._collate(samples)

    def __iter__(self) -> Iterator[tuple[int, Loaded]]:
        """This rank's microbatches as (index, tensors), in the order of `owned`."""
        node: BaseNode[Loaded | Exception] = MapStyleWrapper(_Outcomes(self), self._owned)
        if self._prefetch:
            node = Prefetcher(node, prefetch_factor=self._prefetch, snapshot_frequency=0)
        try:
            for index, outcome in zip(self._owned, node, strict=True):
                if isinstance(outcome, Exception):
                    raise outcome
                yield index, outcome
        finally:
            # The thread ends with its node: also when this generator is dropped, and when an error, whose traceback
            # keeps this frame, lives on.
            del node

    def close(self) -> None:
        """Close all files and remove the downloads. Waits for a read in progress."""
        with self._lock:
            self._closed = True
            self._open.cache_clear()
            self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open_file(self, index: int) -> SampleFile:
        file = self._manifest.files[index]
        shown = redact(file.uri)
        if index not in self._paths:
            path = self._resources.enter_context(storage.local_file(file.uri))
            size = path.stat().st_size
            if size != file.size or storage.sha256_file(path) != file.sha256:
                raise InputError(
                    f"{shown}: the file is not the one in the manifest ({size} bytes, {file.size} expected, or another "
                    f"SHA-256): it changed while the job ran; start the job again"
                )
            self._paths[index] = path
        fields = {info.name: info.source or info.name for info in file.fields}
        one_sample_per_file = self._manifest.one_sample_per_file
        return open_samples(self._paths[index], shown=shown, fields=fields, one_sample_per_file=one_sample_per_file)

    def _collate(self, samples: Sequence[Mapping[str, Tensor]]) -> Loaded:
        batch = {}
        for info in self._fields:
            rows = [sample[info.name] for sample in samples]
            batch[info.name] = _stack(rows, self._pad_values[info.name]) if None in info.shape else torch.stack(rows)
        if self._masked_by is not None:
            batch[self._mask_field] = _mask(samples, self._masked_by)
        return batch


class _Outcomes:
    """`load` as a mapping. Errors are handed over as values: torchdata would wrap them in text of many lines."""

    def __init__(self, loader: SampleLoader) -> None:
        self._loader = loader

    def __getitem__(self, index: int) -> Loaded | Exception:
        try:
            return self._loader.load(index)
        except Exception as error:
            return error


def _stack(rows: Sequence[Tensor], pad_value: int | float) -> Tensor:
    """`(N, *longest)`, padded at the end of every dimension."""
    longest = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    stacked = torch.full((len(rows), *longest), pad_value, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        stacked[i][tuple(slice(size) for size in row.shape)] = row
    return stacked


def _mask(samples: Sequence[Mapping[str, Tensor]], info: FieldInfo) -> Tensor:
    """int64 `(N, T)`: 1 below each sample's size in the first varying dimension of the field."""
    dimension = info.shape.index(None)
    lengths = torch.tensor([sample[info.name].shape[dimension] for sample in samples])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


def _check_pad_value(info: FieldInfo, value: int | float) -> None:
    dtype: torch.dtype = getattr(torch, info.dtype)
    try:
        kept = torch.full((), value, dtype=dtype).item()
    except (RuntimeError, OverflowError):
        kept = None
    if kept is None or (kept != value and not dtype.is_floating_point):
        raise InputError(
            f"pad_value {value} does not fit the field {info.name!r} of dtype {info.dtype}; choose another"
        )
