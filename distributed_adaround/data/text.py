"""Texts: tokenized, and cut into windows of equal length or padded text by text."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distributed_adaround.data.classes import Classes
from distributed_adaround.data.encoder import (
    DECODER_INPUT,
    DECODER_MASK,
    LABELS,
    Encoder,
    EncoderContext,
    NoSampleError,
    Samples,
)
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.data.readers import explained
from distributed_adaround.data.text_files import (
    JSONL,
    PARQUET,
    TXT,
    Row,
    TextColumns,
    TextFile,
    Values,
    open_text_file,
    read_document,
)
from distributed_adaround.data.tokenizer import TextTokenizer
from distributed_adaround.errors import InputError
from distributed_adaround.spec.encoders import TextSpec

logger = logging.getLogger(__name__)

_IDS = "input_ids"
# Texts that go through the tokenizer at once.
_BATCH = 256


class TextEncoder(Encoder):
    """Token ids of texts, int64, as `input_ids`, for encoder-decoders also as `decoder_input_ids`.

    Packed: all tokens of a file in windows `(sequence_length,)`; what fills none is left out. Else: a text, cut to
    sequence_length, is a sample `(None,)`. What reads a whole file is done once on a machine.
    """

    suffixes = (TXT, JSONL, PARQUET)

    def __init__(self, context: EncoderContext) -> None:
        spec = context.spec.text or TextSpec()
        self._tokenizer = TextTokenizer(context)
        self.digest = self._tokenizer.digest
        self._classes = Classes(self._tokenizer.config) if context.labels else None
        self._spec = spec
        self._files = context.files
        by_default = self._tokenizer.is_causal and self._classes is None
        self._packed = by_default if spec.packed is None else spec.packed
        self._length = spec.sequence_length or self._tokenizer.usual_length
        self._check_spec()
        pad = self._tokenizer.pad
        self.pad_values: Mapping[str, int | float] = {_IDS: pad, DECODER_INPUT: pad, DECODER_MASK: 0}
        self._decoder_start = self._tokenizer.decoder_start if self._tokenizer.is_encoder_decoder else None

    def _check_spec(self) -> None:
        """What the fields say against the model. Raises InputError."""
        spec, tokenizer = self._spec, self._tokenizer
        most, least = tokenizer.most_tokens, 0 if self._packed else tokenizer.num_special
        if self._packed and self._classes is not None:
            raise InputError("data.text.packed is true, but windows of joined texts have no class; make it false")
        if spec.target_column is not None and not tokenizer.is_encoder_decoder:
            raise InputError("data.text.target_column is for encoder-decoders, which this model is not; remove it")
        if most is not None and self._length > most:
            raise InputError(f"data.text.sequence_length is {self._length}; the model takes at most {most}, lower it")
        if self._length <= least:
            what = f"the tokenizer adds {least} tokens of its own to every text"
            raise InputError(f"data.text.sequence_length is {self._length}, but {what}; raise it")

    def open(self, path: Path, shown: str) -> Samples:
        settings = f"{path.suffix.lower()} {self._packed} {self._length} {self._classes} {self._spec.model_dump_json()}"
        key = f"{self._files.sha256(path)} {self.digest} {settings}"
        if self._packed:
            made = self._files.derived(key, lambda to: self._write_windows(to, path, shown))
            return _Windows(np.load(made, mmap_mode="r"), self._decoder_start)
        with explained(shown):
            file = open_text_file(path)
            columns = TextColumns.choose(file, self._spec, self._classes)
        made = self._files.derived(key, lambda to: self._write_places(to, shown, file, columns))
        return _Texts(self, file, columns, np.load(made, mmap_mode="r"), shown)

    @property
    def fields(self) -> tuple[FieldInfo, ...]:
        """What `encode` makes; also texts that happen to be of one length vary."""
        names = (_IDS,) if self._decoder_start is None else (_IDS, DECODER_INPUT, DECODER_MASK)
        varying = tuple(FieldInfo(name, "int64", (None,)) for name in names)
        return varying if self._classes is None else (*varying, self._classes.field)

    def encode(self, values: Values, columns: TextColumns) -> dict[str, Tensor]:
        """The tensors of a row. Raises InputError when it holds no text."""
        text, special = self._text(values, columns), not columns.chats
        ids = self._tokenizer.ids([text], special=special, length=self._length)[0]
        if len(ids) <= special * self._tokenizer.num_special:
            raise InputError("the tokenizer makes no token of its text; correct or remove it")
        sample = {_IDS: torch.tensor(ids)}
        if self._decoder_start is not None:
            target = columns.target_of(values)
            written, special = (text, special) if target is None else (target, True)
            ids = self._tokenizer.ids([written], special=special, target=True, length=self._length)[0]
            sample[DECODER_INPUT] = torch.tensor([self._decoder_start, *ids[:-1]])
            sample[DECODER_MASK] = torch.ones_like(sample[DECODER_INPUT])
        if columns.label is not None:
            sample[LABELS] = torch.tensor(columns.label_of(values))
        return sample

    def _text(self, values: Values, columns: TextColumns) -> str:
        found = columns.text_of(values)
        return found if isinstance(found, str) else self._tokenizer.chat_text(found)

    def _write_windows(self, to: Path, path: Path, shown: str) -> None:
        """Token ids, int32 `(windows, sequence_length)`."""
        with explained(shown):
            ids = self._document_ids(path) if path.suffix.lower() == TXT else self._joined_ids(path, shown)
            count, rest = divmod(len(ids), self._length)
            if not count:
                what = f"holds {len(ids)} tokens, and a window takes {self._length}"
                raise NoSampleError(f"{what}; lower data.text.sequence_length, or make data.text.packed false")
        if rest:
            text = "%s: %d tokens are %d windows of %d; the last %d tokens fill none and are left out"
            logger.info(text, shown, len(ids), count, self._length, rest)
        with to.open("wb") as file:
            np.save(file, ids[: count * self._length].reshape(count, self._length))

    def _document_ids(self, path: Path) -> np.ndarray:
        """A .txt file is one document."""
        return np.array(self._tokenizer.ids([read_document(path)])[0], np.int32)

    def _joined_ids(self, path: Path, shown: str) -> np.ndarray:
        """Rows are documents. Where the tokenizer marks no bounds between them, the token that ends a text does."""
        file, tokenizer = open_text_file(path), self._tokenizer
        columns = TextColumns.choose(file, self._spec)
        marked = columns.chats or tokenizer.num_special or tokenizer.eos is None
        between = [] if marked else [tokenizer.eos]
        texts = (text for _, text in self._filled(file, columns, shown))
        pieces: list[np.ndarray] = []
        while batch := list(islice(texts, _BATCH)):
            for ids in tokenizer.ids(batch, special=not columns.chats):
                pieces.append(np.array([*between, *ids] if pieces else ids, np.int32))
        return np.concatenate(pieces)

    def _write_places(self, to: Path, shown: str, file: TextFile, columns: TextColumns) -> None:
        """Rows that hold a text, int64 `(samples, 2)`: place and number of each."""
        with explained(shown):
            places = [(row.place, row.number) for row, _ in self._filled(file, columns, shown)]
        with to.open("wb") as out:
            np.save(out, np.array(places, np.int64))

    def _filled(self, file: TextFile, columns: TextColumns, shown: str) -> Iterator[tuple[Row, str]]:
        """Rows that hold a text, and it. Raises InputError when there is none, or a row is not as it should be."""
        filled = blank = 0
        for row in file.rows(columns.names):
            with explained(f"{file.unit} {row.number}"):
                text = self._text(row.values, columns)
                columns.target_of(row.values)
                if columns.label is not None:
                    columns.label_of(row.values)
            if text.strip():
                filled += 1
                yield row, text
            else:
                blank += 1
        if not filled:
            raise InputError("holds no text; remove the file")
        if blank:
            logger.info("%s: %d of %d rows hold no text and are left out", shown, blank, blank + filled)


@dataclass(frozen=True)
class _Windows:
    """ids: int32 `(windows, sequence_length)`."""

    ids: np.ndarray
    decoder_start: int | None

    @property
    def num_samples(self) -> int:
        return len(self.ids)

    @property
    def fields(self) -> tuple[FieldInfo, ...]:
        names = (_IDS,) if self.decoder_start is None else (_IDS, DECODER_INPUT)
        return tuple(FieldInfo(name, "int64", self.ids.shape[1:]) for name in names)

    def read(self, row: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.ids[row].astype(np.int64))
        if self.decoder_start is None:
            return {_IDS: ids}
        return {_IDS: ids, DECODER_INPUT: torch.cat([torch.tensor([self.decoder_start]), ids[:-1]])}


@dataclass(frozen=True)
class _Texts:
    """places: int64 `(samples, 2)`, where the file has each row and the number of it."""

    encoder: TextEncoder
    file: TextFile
    columns: TextColumns
    places: np.ndarray
    shown: str

    @property
    def num_samples(self) -> int:
        return len(self.places)

    @property
    def fields(self) -> tuple[FieldInfo, ...]:
        return self.encoder.fields

    def read(self, row: int) -> dict[str, Tensor]:
        place, number = self.places[row].tolist()
        with explained(f"{self.shown}: {self.file.unit} {number}"):
            return self.encoder.encode(self.file.read(place, self.columns.names), self.columns)
