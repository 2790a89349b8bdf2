"""Microbatches as tensors: reads the samples of a manifest, pads and stacks them, some microbatches ahead.

What arrives depends on the manifest alone, never on the rank, the prefetching or the order of calls. torchdata's
ParallelMapper is not used: its workers call `torch.set_num_threads(1)`, which holds for every later thread. One thread
that reads ahead is what a walk through a model needs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor
from torchdata.nodes import BaseNode, IterableWrapper, Prefetcher

from distributed_adaround.data.encoder import ROW_MASK, Encoder, Samples
from distributed_adaround.data.manifest import FieldInfo, Manifest
from distributed_adaround.errors import InputError, redact
from distributed_adaround.files.local_files import LocalFiles

# Some readers hold their file's content. The samples come in file order, so few files are in use at once.
_OPEN_FILES = 4

Loaded = dict[str, Tensor]


class SampleLoader(AbstractContextManager["SampleLoader"]):
    """Any microbatch by index, and those of one rank in order. Close it, or use it as a context manager.

    total: microbatches of the whole job. varying: samples differ in size. Each file is compared with the manifest's
    size and checksum before its first sample is used.

    Args:
        manifest: all data of the job.
        owned: indices of this rank's microbatches; may be empty.
        encoder: makes the tensors of each sample.
        files: local copies of the files.
        pad_value: fills fields that vary in size, at the end, up to the longest sample of the microbatch.
        mask_field: padded with 0; made where a field varies and no mask is in the data: int64 `(N, T)`, 0 for padding.
        prefetch: microbatches read ahead by a thread; 0 for none.

    Raises: InputError for a pad_value that a field's dtype cannot hold, and for a file that changed or is damaged.
    """

    def __init__(
        self,
        manifest: Manifest,
        owned: Sequence[int],
        encoder: Encoder,
        files: LocalFiles,
        *,
        pad_value: int | float = 0,
        mask_field: str,
        prefetch: int = 2,
    ) -> None:
        self._manifest = manifest
        self._encoder = encoder
        self._files = files
        self._fields = manifest.fields
        self._mask_field = mask_field
        self._prefetch = prefetch
        varying = [info for info in self._fields if None in info.shape]
        names = {info.name for info in self._fields}
        self._masked_by = varying[0] if varying and names.isdisjoint((mask_field, ROW_MASK)) else None
        self._pad_values = {info.name: pad_value for info in varying} | {mask_field: 0} | dict(encoder.pad_values)
        for info in varying:
            _check_pad_value(info, self._pad_values[info.name])
        self.total = len(manifest.microbatches)
        self.owned = tuple(sorted(owned))
        self.varying = bool(varying)
        self._lock = Lock()
        self._closed = False
        self._paths: dict[int, Path] = {}
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_file)

    def load(self, index: int) -> Loaded:
        """Any one microbatch: `(N, *sample shape)` per field, on the host. Thread-safe."""
        with self._lock:
            assert not self._closed, "the loader is closed"
            assert 0 <= index < self.total, f"microbatch {index} of {self.total}"
            located = map(self._manifest.locate, self._manifest.microbatches[index].samples)
            samples = [self._open(file).read(row) for file, row in located]
        return self._collate(samples)

    def __iter__(self) -> Iterator[tuple[int, Loaded]]:
        """This rank's microbatches as (index, tensors), in the order of `owned`."""
        node: BaseNode[Loaded | Exception] = IterableWrapper(map(self._outcome, self.owned))
        if self._prefetch:
            node = Prefetcher(node, prefetch_factor=self._prefetch, snapshot_frequency=0)
        try:
            for index, outcome in zip(self.owned, node, strict=True):
                if isinstance(outcome, Exception):
                    raise outcome
                yield index, outcome
        finally:
            # The thread ends with its node, also when an error, whose traceback keeps this frame, lives on.
            del node

    def _outcome(self, index: int) -> Loaded | Exception:
        """Errors are handed over as values: torchdata would wrap them in text of many lines."""
        try:
            return self.load(index)
        except Exception as error:
            return error

    def close(self) -> None:
        """Close all files. Waits for a read in progress."""
        with self._lock:
            self._closed = True
            self._open.cache_clear()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_file(self, index: int) -> Samples:
        file = self._manifest.files[index]
        shown = redact(file.uri)
        if index not in self._paths:
            path = self._files.path(file.uri)
            size = path.stat().st_size
            if size != file.size or self._files.sha256(path) != file.sha256:
                found = f"{size} bytes, {file.size} expected, or another SHA-256"
                what = f"the file is not the one in the manifest ({found}): it changed while the job ran"
                raise InputError(f"{shown}: {what}; start the job again")
            self._paths[index] = path
        return self._encoder.open(self._paths[index], shown)

    def _collate(self, samples: Sequence[Mapping[str, Tensor]]) -> Loaded:
        batch = {}
        for info in self._fields:
            rows = [sample[info.name] for sample in samples]
            batch[info.name] = _stack(rows, self._pad_values[info.name]) if None in info.shape else torch.stack(rows)
        if self._masked_by is not None:
            # 1 below each sample's size in the first varying dimension.
            dimension = self._masked_by.shape.index(None)
            lengths = torch.tensor([sample[self._masked_by.name].shape[dimension] for sample in samples])
            batch[self._mask_field] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch


def _stack(rows: Sequence[Tensor], pad_value: int | float) -> Tensor:
    """`(N, *longest)`, padded at the end of every dimension."""
    longest = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    stacked = torch.full((len(rows), *longest), pad_value, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        stacked[i][tuple(slice(size) for size in row.shape)] = row
    return stacked


def _check_pad_value(info: FieldInfo, value: int | float) -> None:
    dtype: torch.dtype = getattr(torch, info.dtype)
    try:
        kept = torch.full((), value, dtype=dtype).item()
    except (RuntimeError, OverflowError):
        kept = None
    if kept is None or (kept != value and not dtype.is_floating_point):
        raise InputError(f"pad_value {value} does not fit the field {info.name!r} of dtype {info.dtype}; use another")
