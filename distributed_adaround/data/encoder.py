"""From a file of data to the tensors of its samples: the contract, and the plainest encoder, for files of arrays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from distributed_adaround.data.arrays import common_shape
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.data.readers import SUFFIXES, SampleFile, open_samples
from distributed_adaround.errors import InputError
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.numerics.weight_view import dtype_name
from distributed_adaround.runtime.imports import implementation
from distributed_adaround.spec.data import ENCODERS, DataSpec

# Where a sample has one, its class is a field of this name, which no model gets.
LABELS = "labels"
# Where a sample has one, it says which rows of the layers count, and no model gets it: int64 (rows,), for data whose
# padding a mask for the model does not show.
ROW_MASK = "row_mask"
# What a decoder has written before the next token, and which of these count, under the names that transformers takes.
DECODER_INPUT, DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"


_Item = TypeVar("_Item")


class NoSampleError(InputError):
    """A file that is whole, but too short for one sample. Others beside it may do."""


class Samples(Protocol):
    """An open file. fields: what every sample of it has, under the names of the model's inputs; a size that differs
    between samples is None."""

    @property
    def num_samples(self) -> int: ...
    @property
    def fields(self) -> tuple[FieldInfo, ...]: ...
    def read(self, row: int) -> dict[str, Tensor]:
        """The tensors of one sample, without a batch axis. Called on the rank that owns it. Raises InputError."""


@dataclass(frozen=True)
class EncoderContext:
    """What an encoder may use. files: where to keep what all ranks of this machine need. processor: local directory
    with the tokenizer, image processor or feature extractor. labels: whether samples must have the field LABELS,
    int64, their class. model: local directory of model.hf. None: the job names none."""

    spec: DataSpec
    files: LocalFiles
    processor: Path | None = None
    labels: bool = False
    model: Path | None = None

    def beside(self, name: str) -> Path | None:
        """A file that says something of the model: of its directory, else of the processor's; None: neither has it."""
        paths = (directory / name for directory in (self.model, self.processor) if directory is not None)
        return next((path for path in paths if path.exists()), None)


@dataclass(frozen=True)
class ListedSamples(Generic[_Item]):
    """An open file, of whose samples each is made of an item of a list."""

    items: Sequence[_Item]
    fields: tuple[FieldInfo, ...]
    make: Callable[[_Item], dict[str, Tensor]]

    @property
    def num_samples(self) -> int:
        return len(self.items)

    def read(self, row: int) -> dict[str, Tensor]:
        return self.make(self.items[row])


def common_fields(found: Sequence[Sequence[FieldInfo]]) -> tuple[FieldInfo, ...]:
    """What samples with these fields, in one order, have in common; sizes in which they differ are None."""
    return tuple(
        replace(infos[0], shape=common_shape([info.shape for info in infos])) for infos in zip(*found, strict=True)
    )


def fields_of(*samples: Mapping[str, Tensor]) -> tuple[FieldInfo, ...]:
    """What these samples have in common."""
    names = list(samples[0])
    return common_fields(
        [[FieldInfo(name, dtype_name(each[name].dtype), tuple(each[name].shape)) for name in names] for each in samples]
    )


class Encoder(Protocol):
    """One way to make samples of files; the rank that lists the data and those that read them have one each.

    suffixes: of the files it reads, in lower case. pad_values: by field, instead of data.pad_value. digest: of all
    that decides what is made of a file, apart from the job file; it is part of the manifest.
    """

    suffixes: tuple[str, ...]
    pad_values: Mapping[str, int | float]
    digest: str

    def __init__(self, context: EncoderContext) -> None:
        """Raises InputError when the processor is missing or damaged."""

    def open(self, path: Path, shown: str) -> Samples:
        """Open a local file. shown: its name in messages. Raises InputError, which names it, when it cannot be read;
        NoSampleError."""


def make_encoder(context: EncoderContext) -> Encoder:
    encoder: Encoder = implementation(ENCODERS, context.spec.encoder_name)(context)
    return encoder


class ArrayEncoder(Encoder):
    """Arrays as they are. Subclasses change `encoded` and `encode`."""

    suffixes = SUFFIXES
    pad_values: Mapping[str, int | float] = {}
    digest = ""

    def __init__(self, context: EncoderContext) -> None:
        self._spec = context.spec
        self.args: Mapping[str, Any] = context.spec.encoder_args

    def open(self, path: Path, shown: str) -> Samples:
        whole = self._spec.one_sample_per_file
        file = open_samples(path, shown=shown, fields=self._spec.fields, one_sample_per_file=whole)
        return _Encoded(self, file)

    def encoded(self, fields: tuple[FieldInfo, ...]) -> tuple[FieldInfo, ...]:
        """What every sample has, from what every record of a file has."""
        return fields

    def encode(self, record: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a sample, from the arrays of its record. Raises InputError."""
        return record


@dataclass(frozen=True)
class _Encoded:
    encoder: ArrayEncoder
    file: SampleFile

    @property
    def num_samples(self) -> int:
        return self.file.num_samples

    @property
    def fields(self) -> tuple[FieldInfo, ...]:
        return self.encoder.encoded(self.file.fields)

    def read(self, row: int) -> dict[str, Tensor]:
        return self.encoder.encode(self.file.read(row))
