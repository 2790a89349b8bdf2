"""What a job has found, the contract of all that write it down, and the plainest of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from distributed_adaround.capture.open import PlannedUnit
from distributed_adaround.errors import InputError
from distributed_adaround.files import storage, uris
from distributed_adaround.numerics.weight_view import WeightView
from distributed_adaround.runtime.imports import implementation
from distributed_adaround.solve.record import LayerRecord
from distributed_adaround.spec.job import EXPORTERS


@dataclass(frozen=True)
class ExportResult:
    """A quantized model. weights: the model's tensors under its own names, dequantized. records: (name of the weight,
    its record), in the order of the walk. float_parameters: JSON values, each parameter left in float with its reason.
    files: what belongs beside the weights, by their names. parts: of weights that are not a whole tensor of the model
    under that name, the tensor's name and how they lie in it. model: what holds the weights. shard_bytes: of its
    largest file of weights, where it came in such files."""

    weights: Mapping[str, Tensor]
    records: Sequence[tuple[str, LayerRecord]]
    float_parameters: Sequence[Mapping[str, object]] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, WeightView]] = field(default_factory=dict)
    model: nn.Module | ExportedProgram | None = None
    shard_bytes: int = 0


class Exporter(Protocol):
    """One way to write a result. files: names that it writes into the output, on rank 0."""

    files: ClassVar[tuple[str, ...]]

    def check(self, planned: Sequence[PlannedUnit]) -> None:
        """Before anything is solved. Raises SpecError, with a setting that fits, when this cannot hold the result."""

    def write(self, result: ExportResult, uri: str) -> None:
        """Write into the folder `uri`. Raises InputError when the model holds what the format cannot, OutputError."""


class DequantizedExporter(Exporter):
    """Weights on the grid under the model's own names, tied ones as copies, for `load_state_dict(strict=True)`."""

    files = ("dequantized.safetensors",)

    def write(self, result: ExportResult, uri: str) -> None:
        write_safetensors(uris.join(uri, "dequantized.safetensors"), result.weights, {"format": "pt"})


def exporters(names: Sequence[str]) -> list[Exporter]:
    return [implementation(EXPORTERS, name)() for name in names]


def result_files() -> tuple[str, ...]:
    """Names of the files that any job may leave as its result."""
    return (*(name for one in exporters([*EXPORTERS]) for name in one.files), "report.json")


def write_safetensors(uri: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A file whose bytes depend on names and values only, never on the order of a dict or on shared memory.

    Raises InputError when safetensors cannot hold a tensor, OutputError.
    """
    plain = _plain(tensors)

    def write(path: Path) -> None:
        path.touch()
        mode = path.stat().st_mode
        try:
            safetensors.torch.save_file(plain, path, metadata=metadata)
        except KeyError as error:
            raise InputError(f"a tensor of the model has dtype {error}, which safetensors cannot hold") from error
        # safetensors replaces the file by one that only its owner may read.
        path.chmod(mode)

    storage.write_file(uri, write)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the host, contiguous, none sharing memory with another, in the order of their names."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{name} is {kind}, safetensors holds dense tensors only; leave it out of the state dict")
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain
