"""Classes of samples, as the configuration of a model numbers them."""

from collections.abc import Iterable, Mapping
from typing import Any

from distributed_adaround.data.archives import Record
from distributed_adaround.data.encoder import LABELS
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.errors import InputError, shorten


class Classes:
    """Numbers of classes, where evaluation asks for them. field: of a sample, its class."""

    field = FieldInfo(LABELS, "int64", ())

    def __init__(self, config: Mapping[str, Any]) -> None:
        """config: of the model; its label2id, where it has one, says which classes there are. Raises InputError."""
        known = config.get("label2id") or {}
        if not isinstance(known, dict) or not all(isinstance(number, int) for number in known.values()):
            raise InputError("config.json of the model: label2id does not map names to numbers; correct it")
        self.numbers: dict[str, int] = known

    def __repr__(self) -> str:
        return f"Classes({self.numbers})"

    def number(self, value: object) -> int | None:
        """Of the class of this name or number, which text may hold too; None: there is none."""
        if isinstance(value, str):
            if value in self.numbers:
                return self.numbers[value]
            value = int(value) if value.isascii() and value.isdigit() else None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return None
        return value if not self.numbers or value in self.numbers.values() else None

    def check(self, records: Iterable[Record]) -> None:
        """Raises InputError unless every record has a class."""
        for record in records:
            self.of_record(record)

    def of_record(self, record: Record) -> int:
        """What the member .cls says, else the folder. Raises InputError."""
        written = record.beside.get(".cls")
        name = record.folder if written is None else written.text()
        number = self.number(name)
        if number is None:
            place = "folder" if written is None else "member .cls"
            what = f"{record.main.shown}: the name of its {place}, {shorten(name, 80)!r}"
            remedy = "name folders after classes, or give webdataset archives with a member .cls"
            raise InputError(f"{what}, is no class in label2id of config.json and no number of one; {remedy}")
        return number
