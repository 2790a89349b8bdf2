"""Where a trained network comes from: a factory with weights, or an exported program; huggingface.py has the third.

Each source is a function of the section `model` of a job and the folder of the job file. A factory is an import path,
so it runs code; only the author of the job names it. A program is read without running anything.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.nn.parameter import is_lazy

from distributed_adaround.errors import InputError, first_line, redact
from distributed_adaround.files.integrity import check_zip, is_zip
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.model.archive import unsafe_content
from distributed_adaround.model.weights import explained, load_weights, model_digest, refuse_expanded, refuse_non_finite
from distributed_adaround.runtime.imports import implementation, importable, load_callable
from distributed_adaround.spec.model import SOURCES, ModelSpec


@dataclass(frozen=True)
class OpenedModel:
    """A model in memory. checkpoint: of a model directory, the file that each tensor lies in, by the tensor's name
    there. shard_bytes: size of the largest of these files, 0: it is the only one."""

    model: nn.Module | ExportedProgram
    checkpoint: Mapping[str, str] = field(default_factory=dict)
    shard_bytes: int = 0

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict if isinstance(self.model, ExportedProgram) else self.model.state_dict())

    @property
    def dtype(self) -> torch.dtype | None:
        """Of all its parameters of real numbers; None where they have several, or it has none."""
        named = self.model.named_parameters()
        found = {parameter.dtype for _, parameter in named if parameter.is_floating_point()}
        return found.pop() if len(found) == 1 else None

    @property
    def widest_dtype(self) -> torch.dtype:
        """Of most of its parameters of real numbers; float32 where it has none."""
        numbers: Counter[torch.dtype] = Counter()
        for _, parameter in self.model.named_parameters():
            if parameter.is_floating_point():
                numbers[parameter.dtype] += parameter.numel()
        return numbers.most_common(1)[0][0] if numbers else torch.float32

    @property
    def digest(self) -> str:
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
    """One way to name a model in a job."""

    def __call__(self, spec: ModelSpec, folder: Path | None, files: LocalFiles) -> OpenedModel:
        """Open it. folder: of the job file. files: local copies of files. Raises InputError when what the job names
        cannot be found or used."""


def open_model(spec: ModelSpec, folder: Path | None, files: LocalFiles) -> OpenedModel:
    """The model that a job names. Raises InputError."""
    source: ModelSource = implementation(SOURCES, spec.source_name)
    return source(spec, folder, files)


def fixed_batch_size(program: ExportedProgram) -> int | None:
    """Batch size that the program was exported with, if it takes no other."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        is_input = node.op == "placeholder" and node.name in program.graph_signature.user_inputs
        if is_input and isinstance(value, Tensor) and value.dim() and is_concrete_int(value.shape[0]):
            return int(value.shape[0])
    return None


def checked_file(uri: str, sha256: str | None, files: LocalFiles) -> Path:
    """A file of weights as a local path. Raises InputError when its SHA-256 is another one."""
    path = files.path(uri)
    if sha256 is not None and files.sha256(path) != sha256.lower():
        what = "its SHA-256 is not model.sha256: it is damaged or another file"
        raise InputError(f"{redact(uri)}: {what}; get it again, or correct the field")
    return path


def open_factory(spec: ModelSpec, folder: Path | None, files: LocalFiles) -> OpenedModel:
    """`model.factory`, called with `model.factory_args`, and `model.weights`."""
    assert spec.factory is not None
    weights = None if spec.weights is None else checked_file(spec.weights, spec.sha256, files)
    return OpenedModel(load_factory(spec.factory, spec.factory_args, weights, folder))


def load_factory(
    factory: str, factory_args: Mapping[str, Any], weights: Path | None, search_path: Path | None
) -> nn.Module:
    """Call `factory` ("module:callable") and load `weights` into the module, in eval mode and without gradients.

    search_path: the folder of the job file, searched after Python's own path. Raises InputError for anything that
    cannot be found, does not fit, or holds values that are not finite.
    """
    build, named = load_callable(factory, search_path), f"model.factory {factory!r}"
    with importable(search_path):
        try:
            module = build(**factory_args)
        except Exception as error:
            raise InputError(f"{named} failed: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{named} returned a {type(module).__name__}; it must return a torch.nn.Module")
    check_module(module, f"{named} returned a model that")
    if weights is not None:
        load_weights(module, weights)
    parameters = dict(module.named_parameters())
    refuse_non_finite((*parameters.items(), *module.named_buffers()), parameters, f"the model of {factory!r}")
    return module.eval().requires_grad_(False)


def check_module(module: nn.Module, named: str) -> None:
    """Raises InputError for a module whose layers or weights cannot be seen. named: it, in the message."""
    if isinstance(module, torch.jit.ScriptModule):
        what = "is a torch.jit.ScriptModule, whose layers are hidden"
        raise InputError(f"{named} {what}; give the Python module before it")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise InputError(f"{named} has no shape yet for {name!r}; run it once on a batch before")
        if tensor.is_meta:
            raise InputError(f"{named} has {name!r} on the meta device, without values; load its weights before")


def open_program(spec: ModelSpec, folder: Path | None, files: LocalFiles) -> OpenedModel:
    """`model.program`."""
    assert spec.program is not None
    return OpenedModel(load_program(checked_file(spec.program, spec.sha256, files)))


def load_program(path: Path) -> ExportedProgram:
    """Read a `.pt2` file of `torch.export.save`, unless `archive.py` finds that it could run code.

    The guard expressions of the program, which torch compiles as Python, are dropped: the caller checks its own inputs.
    Raises InputError for a missing, damaged or unsafe file and for weights that are not finite.
    """
    kind = f"not a program of torch.export.save that torch {torch.__version__} can load"
    with explained(f"model.program {str(path)!r}", kind):
        if is_zip(path):
            check_zip(path, compressed=False)
        found = unsafe_content(path)
        if found is not None:
            raise InputError(f"is refused: {found}; use model.factory for such a model")
        logger = logging.getLogger("torch.export")
        before, logger.disabled = logger.disabled, True  # it logs a traceback of what it then raises
        try:
            program = torch.export.load(path)
        finally:
            logger.disabled = before
    program._guards_code = []
    tensors = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, Tensor)}}
    refuse_expanded(tensors, path)
    refuse_non_finite(tensors.items(), set(program.graph_signature.parameters), str(path))
    return program
