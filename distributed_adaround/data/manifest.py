"""Who reads which sample: calibration files, cut into microbatches and virtual shards, dealt to the ranks.

Rank 0 builds the manifest, every rank gets the same one. Sample ids are global and count through the files in order:

    files sorted by URI     a.npy: samples 0 1 2 3 4       b.npy: samples 5 6 7
    microbatches of 2       [0 1] [2 3] [4 5] [6 7]        the last one may be smaller
    shard = index % V        0     1     2     0           V virtual shards, a property of the job
    rank  = shard % W        0     1     0     0           W ranks, a property of the machine

Nothing but the rank depends on W. No torch here: a login node can build and check all of it but the file contents.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate

from pydantic import TypeAdapter

from distributed_adaround.errors import InputError, redact
from distributed_adaround.files import jsontext, uris


@dataclass(frozen=True)
class FieldInfo:
    """One tensor of a sample. name: the model's input. dtype: torch's name for it. shape: None where samples differ.

    source: the field in the file, where it has another name.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    source: str | None = None

    def __str__(self) -> str:
        shape = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.dtype} ({shape})"


@dataclass(frozen=True)
class DataFile:
    """size: in bytes. sha256: as hex."""

    uri: str
    size: int
    sha256: str
    num_samples: int
    fields: tuple[FieldInfo, ...]


@dataclass(frozen=True)
class Microbatch:
    """Samples (global ids, ascending) that go through the model together, and the virtual shard they belong to."""

    index: int
    shard: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """All calibration data of a job. num_available: samples in the files; num_samples of them are taken. encoding: the
    encoder's digest.

    skipped: URIs of files in the folder that no reader knows; for the report, not part of the digest.
    """

    files: tuple[DataFile, ...]
    num_available: int
    microbatches: tuple[Microbatch, ...]
    num_shards: int
    encoding: str = ""
    skipped: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        return sum(len(microbatch.samples) for microbatch in self.microbatches)

    @cached_property
    def fields(self) -> tuple[FieldInfo, ...]:
        """What every sample has; a size is None where it differs. Raises InputError when the files disagree."""
        first = self.files[0]
        merged = {info.name: info for info in first.fields}
        for file in self.files[1:]:
            pair = f"{redact(file.uri)} and {redact(first.uri)}"
            names = sorted(info.name for info in file.fields)
            if names != sorted(merged):
                both = f"{', '.join(names)} and {', '.join(sorted(merged))}"
                raise InputError(f"{pair} have different fields: {both}; choose common ones by data.fields")
            for info in file.fields:
                known = merged[info.name]
                if (info.dtype, len(info.shape), info.source) != (known.dtype, len(known.shape), known.source):
                    what = f"{pair} differ in the field {info.name!r}: {info} and {known}"
                    raise InputError(f"{what}; all files must have the same dtypes and numbers of dimensions")
                shape = tuple(a if a == b else None for a, b in zip(known.shape, info.shape, strict=True))
                merged[info.name] = replace(known, shape=shape)
        return tuple(merged.values())

    def common_files(self, other: "Manifest") -> list[str]:
        """URIs of the files whose content is also that of a file of another set of data."""
        theirs = {file.sha256 for file in other.files}
        return [file.uri for file in self.files if file.sha256 in theirs]

    def digest(self) -> str:
        """SHA-256 of what the data is: names, sizes, checksums, fields, microbatches; not of the folder it lies in."""
        content = asdict(replace(self, skipped=()))
        for file in content["files"]:
            file["uri"] = uris.file_name(file["uri"])
        return hashlib.sha256(jsontext.dumps(content).encode()).hexdigest()

    def to_json(self) -> str:
        """For the other ranks. Holds the URIs with their credentials: not for logs, reports or checkpoints."""
        return jsontext.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Inverse of `to_json`."""
        return TypeAdapter(cls).validate_json(text)

    def owned(self, rank: int, world_size: int) -> tuple[int, ...]:
        """Indices of one rank's microbatches, ascending; empty when there are more ranks than shards in use."""
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        return tuple(m.index for m in self.microbatches if owner(m.shard, world_size) == rank)

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(index of the file, row in it) of a global sample id."""
        assert 0 <= sample_id < self.num_available, f"sample {sample_id} of {self.num_available}"
        file = bisect_right(self._first_ids, sample_id) - 1
        return file, sample_id - self._first_ids[file]

    @cached_property
    def _first_ids(self) -> list[int]:
        return [0, *accumulate(file.num_samples for file in self.files)][:-1]


def owner(shard: int, world_size: int) -> int:
    return shard % world_size


def take(num_available: int, num_samples: int | None) -> list[int]:
    """Global ids of the samples taken: all, or `num_samples` of them evenly spaced. Raises InputError."""
    if num_samples is None:
        return list(range(num_available))
    if not 1 <= num_samples <= num_available:
        what = f"num_samples is {num_samples}, but the files hold {num_available} samples"
        raise InputError(f"{what}: it must be between 1 and {num_available}, or left out to take all")
    return [i * num_available // num_samples for i in range(num_samples)]


def cut(samples: Sequence[int], microbatch_size: int, virtual_shards: int) -> tuple[Microbatch, ...]:
    """Runs of the samples, dealt to the shards in turn. The last microbatch may be smaller."""
    for name, value in (("microbatch_size", microbatch_size), ("virtual_shards", virtual_shards)):
        if value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    runs = [samples[start : start + microbatch_size] for start in range(0, len(samples), microbatch_size)]
    return tuple(Microbatch(index, index % virtual_shards, tuple(run)) for index, run in enumerate(runs))


def prove_coverage(total: int, owned_by_rank: Sequence[Sequence[int]]) -> None:
    """Raises: InputError unless the ranks own every microbatch index below `total` exactly once."""
    owners: dict[int, list[int]] = {}
    for rank, owned in enumerate(owned_by_rank):
        for index in owned:
            owners.setdefault(index, []).append(rank)
    remedy = "all ranks must see the same files and the same job file"
    for index, ranks in sorted(owners.items()):
        if not 0 <= index < total:
            raise InputError(f"rank {ranks[0]} owns microbatch {index}, but there are only {total}: {remedy}")
        if len(ranks) > 1:
            raise InputError(f"microbatch {index} is owned by ranks {', '.join(map(str, ranks))} at once: {remedy}")
    missing = [index for index in range(total) if index not in owners]
    if missing:
        what = f"{len(missing)} of {total} microbatches, the first of them {missing[0]}"
        raise InputError(f"{what}, are owned by none of the ranks 0 to {len(owned_by_rank) - 1}: {remedy}")
