"""Where a trained network comes from: the contract of all sources, and what they give."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from distributed_adaround.errors import InputError, redact
from distributed_adaround.files import storage
from distributed_adaround.model.weights import model_digest
from distributed_adaround.runtime.imports import implementation
from distributed_adaround.spec.model import SOURCES, ModelSpec


@dataclass(frozen=True)
class OpenedModel:
    """A model in memory. files: URIs of what belongs beside its weights (configuration, tokenizer)."""

    model: nn.Module | ExportedProgram
    files: tuple[str, ...] = ()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's tensors under its own names."""
        return dict(self.model.state_dict if isinstance(self.model, ExportedProgram) else self.model.state_dict())

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, in hex."""
        return model_digest((name, tensor) for name, tensor in self.weights.items() if isinstance(tensor, Tensor))

    @property
    def parameters(self) -> list[str] | None:
        """Names of the model's inputs, in order; None when it takes any (`**kwargs`)."""
        if isinstance(self.model, ExportedProgram):
            return [str(name) for name in self.model.graph_signature.user_inputs]
        parameters = inspect.signature(self.model.forward).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return None
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return [parameter.name for parameter in parameters if parameter.kind in kinds]

    @property
    def batch_size(self) -> int | None:
        """Number of samples that a program was exported with, if it takes no other."""
        return fixed_batch_size(self.model) if isinstance(self.model, ExportedProgram) else None


class ModelSource(Protocol):
    """One way to name a model in a job; made from the section `model` and the folder of the job file."""

    def __init__(self, spec: ModelSpec, folder: Path | None) -> None: ...

    def open(self) -> OpenedModel:
        """Raises InputError when what the job names cannot be found or used."""


def open_model(spec: ModelSpec, folder: Path | None) -> OpenedModel:
    """The model that a job names. Raises InputError."""
    source: type[ModelSource] = implementation(SOURCES, spec.source_name)
    return source(spec, folder).open()


@contextmanager
def checked_file(uri: str | None, sha256: str | None) -> Iterator[Path | None]:
    """A file of weights as a local path; None for None. Raises InputError when its SHA-256 is another one."""
    if uri is None:
        yield None
        return
    with storage.local_file(uri) as path:
        if sha256 is not None and storage.sha256_file(path) != sha256.lower():
            raise InputError(
                f"{redact(uri)}: its SHA-256 is not model.sha256: it is damaged or another file; get it again, or "
                "correct the field"
            )
        yield path


def fixed_batch_size(program: ExportedProgram) -> int | None:
    """Batch size that the program was exported with, if it takes no other."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        is_input = node.op == "placeholder" and node.name in program.graph_signature.user_inputs
        if is_input and isinstance(value, Tensor) and value.dim() and is_concrete_int(value.shape[0]):
            return int(value.shape[0])
    return None
