"""From a record of a file to the tensors of a sample: the contract of all encoders, and the one for arrays.

Encoding happens per sample, on the rank that owns it, before samples are collated.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from distributed_adaround.data.manifest import FieldInfo

Record = Mapping[str, Tensor]


class Encoder(Protocol):
    """Made from `data.encoder_args`."""

    def __init__(self, args: Mapping[str, Any]) -> None: ...

    def fields(self, fields: tuple[FieldInfo, ...]) -> tuple[FieldInfo, ...]:
        """What every encoded sample has, from what every record has. A size that differs between samples is None."""

    def __call__(self, record: Record) -> dict[str, Tensor]:
        """The tensors of one sample, without a batch axis. Raises InputError."""


class ArraysEncoder:
    """Arrays as they are."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        pass

    def fields(self, fields: tuple[FieldInfo, ...]) -> tuple[FieldInfo, ...]:
        return fields

    def __call__(self, record: Record) -> dict[str, Tensor]:
        return dict(record)
