"""What lies beside a model: processors of the library transformers, and the configuration that goes with them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distributed_adaround.data.archives import Record
from distributed_adaround.data.encoder import LABELS, EncoderContext
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.errors import InputError, first_line, redact, shorten
from distributed_adaround.runtime.transformers_library import offline_transformers


def load_pretrained(context: EncoderContext, auto_class: str, shown: str, remedy: str) -> Any:
    """The processor in the directory of the model, or in data.processor. auto_class: of transformers. shown: what needs
    it. remedy: when there is none. Raises InputError."""
    if context.processor is None:
        raise InputError(f"{shown} needs a directory of transformers, and there is no model.hf; {remedy}")
    with offline_transformers(shown) as transformers:
        try:
            return getattr(transformers, auto_class).from_pretrained(
                context.processor, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            what = f"{auto_class} cannot be loaded from {directory_of(context)}: {shorten(first_line(error), 160)}"
            raise InputError(f"{shown}: {what}; {remedy}") from error


def directory_of(context: EncoderContext) -> str:
    """The directory with the processor, for messages."""
    named = context.spec.processor
    return f"data.processor {redact(named)!r}" if named is not None else "the directory of model.hf"


def read_config(directory: Path | None, name: str = "config.json") -> dict[str, Any]:
    """A JSON object beside a processor; {}: there is none. Raises InputError when it is damaged."""
    if directory is None or not (directory / name).exists():
        return {}
    try:
        found = json.loads((directory / name).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{name} of the model cannot be read: {first_line(error)}; get it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{name} of the model holds no object; get it again")
    return found


class Classes:
    """Numbers of the classes of samples, where evaluation asks for them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """config: of the model; its label2id, where it has one, says which classes there are."""
        known = config.get("label2id") or {}
        if not isinstance(known, dict) or not all(isinstance(number, int) for number in known.values()):
            raise InputError("config.json of the model: label2id does not map names to numbers; correct it")
        self._numbers: dict[str, int] = known

    def __repr__(self) -> str:
        return f"Classes({self._numbers})"

    def field_of(self, records: Iterable[Record]) -> FieldInfo:
        """The field of labels. Raises InputError unless every record has a class."""
        for record in records:
            self.number(record)
        return FieldInfo(LABELS, "int64", ())

    def number(self, record: Record) -> int:
        """What the member .cls says, else the folder: a name in label2id or a number. Raises InputError."""
        written = record.beside.get(".cls")
        name = record.folder if written is None else written.text()
        if name in self._numbers:
            return self._numbers[name]
        numbers = set(self._numbers.values())
        if name.isascii() and name.isdigit() and (not numbers or int(name) in numbers):
            return int(name)
        place = "folder" if written is None else "member .cls"
        what = f"the name of its {place}, {shorten(name, 80)!r}, is no class in label2id of config.json and no number"
        remedy = "name folders after classes, or give webdataset archives with a member .cls"
        raise InputError(f"{record.main.shown}: {what} of one; {remedy}")
