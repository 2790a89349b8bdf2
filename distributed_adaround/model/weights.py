"""Files of weights, read without running anything they contain, and checks that hold for all weights."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from distributed_adaround.errors import InputError, first_line, shorten
from distributed_adaround.files.integrity import check_safetensors, check_zip, is_zip

_NUM_NAMED = 3
_DIGEST_ELEMENTS = 1 << 22


def model_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) over sorted names, dtypes, shapes and bytes. Holds at most one tensor's copy at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors, key=lambda item: item[0]):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        for part in torch.split(tensor.detach().reshape(-1), _DIGEST_ELEMENTS):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
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
        why = "it holds other things than tensors; save model.state_dict()" if unpickling else first_line(error)
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
    refuse_expanded(state, path)
    return dict(state)


def load_state(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
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
        raise InputError(f"model.weights {str(path)!r} cannot be loaded into the model: {first_line(error)}") from error


def refuse_expanded(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A few bytes can claim to be a tensor of terabytes by stride 0; copying it would end the job without a word."""
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise InputError(f"{str(path)!r}: {shorten(name)!r} is a sparse tensor; weights must be dense")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise InputError(
                f"{str(path)!r}: {shorten(name)!r} of shape {tuple(tensor.shape)} has fewer bytes in the file than "
                "elements; save it with .contiguous()"
            )


def refuse_non_finite(
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
