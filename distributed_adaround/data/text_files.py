"""Files with texts, row by row: .txt, .jsonl and .parquet. Errors leave out the file's name.

Lines are counted from 1, as editors do, rows of .parquet from 0.
"""

import codecs
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from distributed_adaround.data.classes import Classes
from distributed_adaround.data.readers import explained
from distributed_adaround.data.tables import first_rows, open_parquet
from distributed_adaround.errors import InputError, first_line, shorten
from distributed_adaround.spec.encoders import TextSpec

TXT, JSONL, PARQUET = ".txt", ".jsonl", ".parquet"
# Columns that hold the texts where the job names none, the first of them first.
_USUAL = ("messages", "text")
_BOM = "\ufeff"

Values = Mapping[str, Any]
Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """place: where the file has it. number: as messages name it. values: by column."""

    place: int
    number: int
    values: Values


class TextFile(Protocol):
    """unit: what a row is called in messages."""

    unit: str

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """All rows but blank lines, with these columns at least; None: all columns."""

    def read(self, place: int, columns: Sequence[str]) -> Values:
        """One row again."""


def open_text_file(path: Path) -> TextFile:
    """Raises: InputError when the file is damaged. So does reading rows, also for lines that are not UTF-8 or JSON."""
    return _ParquetFile(path) if path.suffix.lower() == PARQUET else _LineFile(path)


def read_document(path: Path) -> str:
    """A .txt file as one text, its line ends "\\n". Raises InputError when it is not UTF-8 or blank."""
    text = _decode(path.read_bytes(), 0)
    if not text.strip():
        raise InputError("holds no text; remove the file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _LineFile:
    """A line of .txt is {"text": line}, one of .jsonl an object."""

    unit = "line"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = _object if path.suffix.lower() == JSONL else _line

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        start = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                with explained(f"line {number}"):
                    text = _decode(line, start)
                    values = self._values(text) if text.strip() else None
                if values is not None:
                    yield Row(start, number, values)
                start += len(line)

    def read(self, place: int, columns: Sequence[str]) -> Values:
        with self._path.open("rb") as file:
            file.seek(place)
            return self._values(_decode(file.readline(), place))


class _ParquetFile:
    """One row group at a time is in memory."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        self._file = open_parquet(path)
        self._starts = first_rows(self._file)
        self._group = lru_cache(maxsize=1)(self._file.read_row_group)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        number = 0
        for batch in self._file.iter_batches(batch_size=256, columns=columns):
            for values in batch.to_pylist():
                yield Row(number, number, values)
                number += 1

    def read(self, place: int, columns: Sequence[str]) -> Values:
        group = bisect_right(self._starts, place) - 1
        rows = self._group(group, columns=tuple(columns)).slice(place - self._starts[group], 1).to_pylist()
        values: Values = rows[0]
        return values


# The marks that files of Windows begin with.
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _decode(data: bytes, start: int) -> str:
    """start: of these bytes in the file."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        what, kind = f"is not UTF-8 at byte {start + error.start}", "UTF-16" if data.startswith(_UTF16) else "LATIN1"
        raise InputError(f"{what}; convert it, for instance by iconv -f {kind} -t UTF-8") from None
    # What ASCII in UTF-16 and most binary files have, and no text.
    if "\0" in text:
        place = start + data.index(b"\0")
        raise InputError(f"holds a zero at byte {place}, so it is not text in UTF-8; convert it by iconv -t UTF-8")
    return text.removeprefix(_BOM) if start == 0 else text


def _line(text: str) -> Values:
    return {"text": text.rstrip("\r\n")}


def _object(text: str) -> Values:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InputError(f"is not JSON: {first_line(error)}; correct it") from None
    if not isinstance(values, dict):
        raise InputError('is not an object of columns; write {"text": ...} on every line')
    return values


@dataclass(frozen=True)
class TextColumns:
    """Which columns of a file hold what. chats: whether text is one of chats. classes: those that label names."""

    text: str
    chats: bool
    target: str | None = None
    label: str | None = None
    classes: Classes | None = None

    @classmethod
    def choose(cls, file: TextFile, spec: TextSpec, classes: Classes | None = None) -> "TextColumns":
        """As the job names them, or as the first row lets see. classes: rows must have one. Raises InputError."""
        first = next(file.rows(), None)
        if first is None:
            raise InputError("holds no text; remove the file")
        label = None if classes is None else spec.label_column or "label"
        for name in (spec.column, spec.target_column, label):
            if name is not None and name not in first.values:
                raise InputError(f"has no column {name!r}; it has {_listed(first.values)}")
        text = spec.column or _text_column(first.values, (spec.target_column, label))
        return cls(text, isinstance(first.values[text], list), spec.target_column, label, classes)

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [name for name in (self.text, self.target, self.label) if name is not None]

    def text_of(self, values: Values) -> str | Chat:
        """The text or chat of a row. Raises InputError when it holds something else."""
        value = values.get(self.text)
        if not self.chats:
            return _text(self.text, value)
        if not _is_chat(value):
            rule = "it must be a list of messages with role and content"
            raise InputError(f"the column {self.text!r} is {_shown(value)}; {rule}")
        return value

    def target_of(self, values: Values) -> str | None:
        """The text to write; None where the job names no column. Raises InputError."""
        return None if self.target is None else _text(self.target, values.get(self.target))

    def label_of(self, values: Values) -> int:
        """Number of the class of a row. Raises InputError."""
        assert self.label is not None
        assert self.classes is not None
        value, named = values.get(self.label), self.classes.numbers
        found = self.classes.number(value)
        if found is None:
            rule = f"a class of config.json, {_listed(named)}, or its number" if named else "a number from 0"
            raise InputError(f"the column {self.label!r} is {_shown(value)}; it must be {rule}")
        return found


def _text_column(values: Values, others: Sequence[str | None]) -> str:
    found = [
        name for name, value in values.items() if name not in others and (isinstance(value, str) or _is_chat(value))
    ]
    usual = [name for name in _USUAL if name in found] or found
    if not found or (len(found) > 1 and usual is found):
        what = f"texts are in {_listed(found)}" if found else f"none of its columns holds texts ({_listed(values)})"
        raise InputError(f"has no column messages or text, and {what}; choose one by data.text.column")
    return usual[0]


def _is_chat(value: object) -> TypeGuard[Chat]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    )


def _text(column: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"the column {column!r} is {_shown(value)}, not a text; correct or remove it")
    # What JSON can write, and no tokenizer reads.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"the column {column!r} holds half of a surrogate pair; write the text in UTF-8") from None
    return value


def _shown(value: object) -> str:
    return "null" if value is None else shorten(repr(value), 40)


def _listed(names: Mapping[str, object] | Sequence[str]) -> str:
    return shorten(", ".join(map(str, names)), 200) or "none"
