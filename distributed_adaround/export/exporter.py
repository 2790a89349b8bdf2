"""The contract of all that write a result down: what they get, and what they do with it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import SpecError
from distributed_adaround.export.stored import QuantizedLayer, StoredResult
from distributed_adaround.files import storage, uris
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.runtime.imports import implementation
from distributed_adaround.spec.job import EXPORTERS, OutputSpec
from distributed_adaround.spec.model import ModelSpec


@dataclass(frozen=True)
class ExportPlan:
    """What is known before the first layer is solved. dtype: of most of the model's numbers. directory: of model.hf,
    local; None: the model came from elsewhere. files: local copies of files behind URIs. exported: torch.export takes
    the model."""

    layers: Sequence[QuantizedLayer]
    output: OutputSpec
    source: ModelSpec
    dtype: torch.dtype
    directory: Path | None
    files: LocalFiles
    exported: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class ExportTask(ExportPlan):
    """A finished job. result: read from its files, tensor by tensor. model: with the quantized weights, on whatever
    device it is; loaded when first asked for. inputs: a few microbatches of the calibration data."""

    result: StoredResult
    model: Callable[[], nn.Module | ExportedProgram]
    inputs: Callable[[], Sequence[ModelInputs]]


@dataclass(frozen=True)
class Loaded:
    """An export as its own library reads it. weights: tensors of the model by its own names, dequantized, one at a
    time; those of quantized layers at least. run: outputs of a microbatch, those of real numbers, on the host; None:
    the library runs nothing. tolerance: largest difference of an output, over the largest output, that is allowed.
    note: what a user should know, in a few words."""

    weights: Iterable[tuple[str, Tensor]]
    run: Callable[[ModelInputs], Sequence[Tensor]] | None = None
    tolerance: float = 0.0
    note: str = ""


class Exporter(Protocol):
    """One way to write a result. files: names that it writes into the output, on rank 0. published: paths of which one
    is there when all is written, and none before: what readers open first."""

    files: ClassVar[tuple[str, ...]]
    published: ClassVar[tuple[str, ...]]

    def scale_dtype(self, plan: ExportPlan) -> str | None:
        """Precision in which the format stores scales, where it has one ("bfloat16")."""
        return None

    def check(self, plan: ExportPlan) -> None:
        """Before anything is solved. Raises SpecError, with a setting that fits, when this cannot hold the result or a
        package is missing; InputError when a file that it needs does not fit."""

    def notes(self, plan: ExportPlan) -> Sequence[str]:
        """What a user should know before the job starts."""
        return ()

    def write(self, task: ExportTask, uri: str) -> None:
        """Write into the folder `uri`. Raises InputError when the model holds what the format cannot, OutputError."""

    def load(self, task: ExportTask, uri: str) -> Loaded:
        """Read what `write` left in the folder `uri`, by the library that users read it with. Raises InputError."""


def exporters(names: Sequence[str]) -> list[Exporter]:
    return [implementation(EXPORTERS, name)() for name in names]


def write_formats(task: ExportTask, chosen: Sequence[Exporter], uri: str) -> None:
    """Write them into the folder `uri`, one after the other. Raises InputError, OutputError."""
    for exporter in chosen:
        for name in exporter.files:
            storage.remove_leftovers(uris.join(uri, name))
        exporter.write(task, uri)


def scale_dtype(chosen: Sequence[Exporter], plan: ExportPlan) -> str:
    """Precision of scales that all formats hold, for layers whose own is not given. Raises SpecError."""
    wanted = {name: one.scale_dtype(plan) for name, one in zip(plan.output.formats, chosen, strict=True)}
    # float32 holds the numbers of the others.
    narrow = {name: dtype for name, dtype in wanted.items() if dtype not in (None, "float32")}
    if len(set(narrow.values())) > 1:
        stored = ", ".join(f"{name} stores {dtype}" for name, dtype in narrow.items())
        raise SpecError(f"output.formats: {stored} scales, which are not the same numbers; run a job for each of them")
    return next((dtype for dtype in narrow.values() if dtype is not None), "float32")


def result_files() -> tuple[str, ...]:
    """Names of the files that any job may leave as its result."""
    return (*(name for one in exporters([*EXPORTERS]) for name in one.files), "report.json")
