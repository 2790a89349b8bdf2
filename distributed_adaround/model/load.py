"""From what a job file names to a model in memory: factory and weights, or an exported program; inputs by name.

A factory is an import path, so it runs code; only the author of the job names it. Weights and programs may come from
elsewhere and are read without running anything they contain.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distributed_adaround.capture.sites import ModelInputs
from distributed_adaround.errors import InputError, shorten
from distributed_adaround.files.integrity import check_safetensors, check_zip, is_zip
from distributed_adaround.model.archive import unsafe_content

_NUM_NAMED = 3
_DIGEST_ELEMENTS = 1 << 22


def load_factory(
    factory: str, factory_args: Mapping[str, Any], weights: Path | None, search_path: Path | None
) -> nn.Module:
    """Call `factory` ("module:callable") and load `weights` into the module it returns.

    search_path: the folder of the job file, searched after Python's own path. weights: .safetensors, or .pt and .pth
    with a state dict (also under the key "state_dict"), read with `weights_only=True`; every tensor must fit by name
    and shape. The module comes back in eval mode, its parameters without gradients.

    Raises InputError in one line for anything that cannot be found, does not fit, or holds values that are not finite.
    """
    build = load_callable(factory, search_path)
    with _importable(search_path):
        try:
            module = build(**factory_args)
        except Exception as error:
            raise InputError(f"model.factory {factory!r} failed: {_first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(
            f"model.factory {factory!r} returned a {type(module).__name__}; it must return a torch.nn.Module"
        )
    for name, parameter in module.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise InputError(
                f"model.factory {factory!r} left {name!r} without values; run or materialize the model in it"
            )
    if weights is not None:
        _load_state(module, _read_weights(weights), weights)
    _refuse_non_finite(module.named_parameters(), module.named_buffers(), f"the model of {factory!r}")
    return module.eval().requires_grad_(False)


def load_program(path: Path) -> torch.export.ExportedProgram:
    """Read a `.pt2` file of `torch.export.save`.

    `torch.export.load` (torch 2.13) unpickles without `weights_only`, evaluates strings and resolves any attribute of
    torch; see `archive.py`. A file that would need any of that is refused before torch loads it, and the guard
    expressions of the program, which torch compiles as Python, are dropped: the caller checks its own inputs.

    Raises InputError for a missing, damaged or unsafe file and for weights that are not finite.
    """
    try:
        if is_zip(path):
            check_zip(path, compressed=False)
        found = unsafe_content(path)
        if found is not None:
            raise InputError(f"is refused: {found}; use model.factory for such a model")
        with _silent("torch.export"):  # which logs a traceback of what it then raises
            program = torch.export.load(path)
    except InputError as error:
        raise InputError(f"model.program {str(path)!r} {shorten(str(error))}") from error
    except OSError as error:
        raise InputError(f"model.program {str(path)!r} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise InputError(
            f"model.program {str(path)!r} is not a program of torch.export.save that torch {torch.__version__} "
            f"can load: {_first_line(error)}"
        ) from error
    program._guards_code = []
    tensors = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, Tensor)}}
    _refuse_expanded(tensors, path)
    parameters = set(program.graph_signature.parameters)
    _refuse_non_finite(
        ((name, tensor) for name, tensor in tensors.items() if name in parameters),
        ((name, tensor) for name, tensor in tensors.items() if name not in parameters),
        str(path),
    )
    return program


def load_callable(target: str, search_path: Path | None) -> Callable[..., Any]:
    """Import "module:attribute"; the attribute may be dotted. Raises InputError when it does not exist."""
    module_name, separator, attribute = target.partition(":")
    if not (separator and module_name and attribute):
        raise InputError(f"{target!r} is not of the form 'module:callable', for instance 'my_models:resnet50'")
    with _importable(search_path):
        _forget_namesake(module_name.partition(".")[0], search_path)
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and (module_name == missing or module_name.startswith(f"{missing}.")):
                where = f"{str(search_path)!r} and " if search_path is not None else ""
                raise InputError(
                    f"module {module_name!r} of {target!r} is not found in {where}Python's path"
                ) from error
            raise InputError(f"importing {module_name!r} of {target!r} failed: {_first_line(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{target!r}: {getattr(found, '__name__', module_name)!r} has no attribute {part!r}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{target!r} is a {type(found).__name__}; it must be callable")
    return found  # type: ignore[no-any-return]


def call_transform(transform: Callable[..., Any], name: str, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`transform(batch)`, checked to be a mapping from field names to tensors. name: for messages."""
    try:
        result = transform(dict(batch))
    except Exception as error:
        raise InputError(f"data.transform {name!r} failed: {_first_line(error)}") from error
    if not isinstance(result, Mapping) or not result:
        raise InputError(
            f"data.transform {name!r} returned a {type(result).__name__}; it must return a dict of tensors"
        )
    for field, value in result.items():
        if not isinstance(field, str) or not isinstance(value, Tensor):
            raise InputError(
                f"data.transform {name!r} returned {field!r}: {type(value).__name__}; fields must be tensors"
            )
    return dict(result)


def model_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) over sorted names, dtypes, shapes and bytes. Holds at most one tensor's copy at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors, key=lambda item: item[0]):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        for part in torch.split(tensor.detach().reshape(-1), _DIGEST_ELEMENTS):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def forward_parameters(module: nn.Module) -> list[str] | None:
    """Names that `module.forward` takes as keywords, in order; None when it takes any (`**kwargs`)."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]


def bind_inputs(batch: Mapping[str, Tensor], parameters: Sequence[str] | None, mask_field: str) -> ModelInputs:
    """Fields of a batch to the arguments of forward.

    parameters: see `forward_parameters`. Fields become keywords of the same name. When there is only one field besides
    the mask and forward has no such parameter, it is passed by position. The mask goes to the model when forward
    takes it, and is kept as `ModelInputs.mask` when it is `(N, T)`.

    Raises InputError listing the fields and forward's parameters when they do not match.
    """
    mask = batch.get(mask_field)
    mask_is_passed = mask is not None and (parameters is None or mask_field in parameters)
    names = [name for name in batch if name != mask_field]
    unknown = [] if parameters is None else [name for name in names if name not in parameters]
    takes = "any keyword" if parameters is None else ", ".join(parameters) or "nothing by name"
    if not names or (unknown and len(names) > 1):
        raise InputError(
            f"data fields {', '.join(batch) or '(none)'} do not match the model's forward, which takes {takes}; "
            "rename or leave out fields with data.fields"
        )
    if mask is not None and mask.ndim != 2 and not mask_is_passed:
        raise InputError(
            f"data field {mask_field!r} has shape {tuple(mask.shape)} and the model's forward, which takes {takes}, "
            "does not use it; a mask of rows must be (samples, tokens)"
        )
    kwargs: dict[str, object] = {name: batch[name] for name in names if name not in unknown}
    if mask_is_passed:
        kwargs[mask_field] = mask
    return ModelInputs(
        args=tuple(batch[name] for name in unknown),
        kwargs=kwargs,
        mask=mask if mask is not None and mask.ndim == 2 else None,
    )


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """A library's logger says nothing for the time of the block."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _importable(search_path: Path | None) -> Iterator[None]:
    """search_path at the end of sys.path for the time of the block."""
    if search_path is None:
        yield
        return
    entry = str(search_path.resolve())
    sys.path.append(entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)


def _forget_namesake(name: str, search_path: Path | None) -> None:
    """Drop a module imported earlier for another job's folder, so that this job gets the file beside it.

    Only when Python, asked again, would find the name in `search_path`: installed packages are never dropped.
    """
    loaded = sys.modules.get(name)
    if search_path is None or loaded is None:
        return
    spec = importlib.machinery.PathFinder.find_spec(name, sys.path)
    if spec is None or spec.origin is None or spec.origin == getattr(loaded, "__file__", None):
        return
    if Path(spec.origin).is_relative_to(search_path.resolve()):
        for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[key]


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Name to tensor on the host. Raises InputError for a file that is missing, damaged or no state dict."""
    try:
        if path.suffix == ".safetensors":
            check_safetensors(path)
            state: Any = safetensors.torch.load_file(path)
        elif path.suffix in (".pt", ".pth"):
            if is_zip(path):
                check_zip(path, compressed=False)
            with warnings.catch_warnings(action="ignore"):  # about the pickle protocol of a file it then refuses
                # Mapped, no tensor reaches beyond the file.
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
        else:
            raise InputError(f"ends in {path.suffix!r}; use .safetensors, .pt or .pth")
    except InputError as error:
        raise InputError(f"model.weights {str(path)!r} {shorten(str(error))}") from error
    except OSError as error:
        raise InputError(f"model.weights {str(path)!r} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # The first line of torch's own message advises to turn weights_only off, so it is not repeated.
        unpickling = type(error).__name__ == "UnpicklingError"
        why = "it holds other things than tensors; save model.state_dict()" if unpickling else _first_line(error)
        raise InputError(f"model.weights {str(path)!r} is damaged or not a file of weights: {why}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise InputError(f"model.weights {str(path)!r} holds a {type(state).__name__}; it must hold a state dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(
                f"model.weights {str(path)!r}: {shorten(repr(name))} is a {type(tensor).__name__}, not a tensor"
            )
    _refuse_expanded(state, path)
    return dict(state)


def _load_state(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Strict load. A name missing from the file is filled when it is tied to one that is there."""
    own = module.state_dict(keep_vars=True)
    given = {id(tensor): name for name, tensor in own.items() if name in state}
    tied = {
        name: given[id(tensor)] for name, tensor in own.items() if id(tensor) in given and given[id(tensor)] != name
    }
    for name, source in tied.items():
        if name in state and not torch.equal(state[name], state[source]):
            raise InputError(f"model.weights {str(path)!r}: {name!r} and {source!r} are tied in the model but differ")
    missing = [name for name in own if name not in state and name not in tied]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        parts = [_counted("missing", missing)] if missing else []
        parts += [_counted("unexpected", unexpected)] if unexpected else []
        raise InputError(f"model.weights {str(path)!r} does not fit the model: {'; '.join(parts)}")
    misfits = [
        f"{name} {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in state and isinstance(tensor, Tensor) and state[name].shape != tensor.shape
    ]
    if misfits:
        raise InputError(f"model.weights {str(path)!r} does not fit the model: {_counted('other shape', misfits)}")
    complete = state | {name: state[source] for name, source in tied.items() if name not in state}
    try:
        module.load_state_dict(complete)
    except Exception as error:
        raise InputError(
            f"model.weights {str(path)!r} cannot be loaded into the model: {_first_line(error)}"
        ) from error


def _refuse_expanded(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A few bytes can claim to be a tensor of terabytes by stride 0; copying it would end the job without a word."""
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise InputError(f"{str(path)!r}: {shorten(name)!r} is a sparse tensor; weights must be dense")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise InputError(
                f"{str(path)!r}: {shorten(name)!r} of shape {tuple(tensor.shape)} has fewer bytes in the file than "
                "elements; save it with .contiguous()"
            )


def _refuse_non_finite(
    parameters: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]], what: str
) -> None:
    """Parameters must be finite. Buffers may hold infinities, as attention masks do, but no NaN."""
    bad = [name for name, tensor in parameters if _is_real(tensor) and not _widened(tensor).isfinite().all()]
    bad += [name for name, tensor in buffers if _is_real(tensor) and _widened(tensor).isnan().any()]
    if bad:
        raise InputError(f"{what} has values that are not finite: {_counted('in', bad)}")


def _is_real(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_meta


def _widened(tensor: Tensor) -> Tensor:
    """8-bit floats have few operators of their own."""
    return tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()


def _counted(label: str, names: Sequence[str]) -> str:
    """ "missing a, b, c and 7 more (10)" """
    more = len(names) - _NUM_NAMED
    named = ", ".join(shorten(name, 120) for name in names[:_NUM_NAMED])
    return f"{label} {named}" + (f" and {more} more ({len(names)} in all)" if more > 0 else "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shorten(lines[0])}" if lines else type(error).__name__
