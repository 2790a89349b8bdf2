"""Files of weights, read without running anything they contain, and checks that hold for all weights."""

import hashlib
import json
import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from distributed_adaround.errors import InputError, first_line, shorten
from distributed_adaround.files.integrity import check_safetensors, load_tensors

logger = logging.getLogger(__name__)

# Where files that hold more than a state dict keep it, and what wrappers of a module put before every name.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_NUM_NAMED = 3
_PIECE_ELEMENTS = 1 << 22


def model_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) over sorted names, dtypes, shapes and bytes. Holds at most one tensor's copy at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors, key=lambda item: item[0]):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        for part in torch.split(tensor.detach().reshape(-1), _PIECE_ELEMENTS):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def explained(named: str, kind: str) -> Iterator[None]:
    """Name the file in every error: what the libraries raise is of all sorts. kind: what it is when they fail."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{named} {shorten(str(error))}") from error
    except OSError as error:
        raise InputError(f"{named} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # The first line of torch's own message advises to turn weights_only off, so it is not repeated.
        unpickling = type(error).__name__ == "UnpicklingError"
        why = "it holds other things than tensors; save model.state_dict()" if unpickling else first_line(error)
        raise InputError(f"{named} is {kind}: {why}") from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Strict load of a state dict. A name missing from the file is filled when it is tied to one that is there.

    As users of torch expect, wrappers around the state dict and before its names are taken off, counters of batch norms
    (`num_batches_tracked`) may be missing, and buffers that the model does not save are left out: all that is said.
    Raises InputError for a file that is missing, damaged or no state dict, or that does not fit.
    """
    named = f"model.weights {str(path)!r}"
    state = _read(path, named)
    own = module.state_dict(keep_vars=True)
    state, said = _as_the_model_names_it(state, module, own)
    given = {id(tensor): name for name, tensor in own.items() if name in state}
    tied = {name: given[id(tensor)] for name, tensor in own.items() if given.get(id(tensor), name) != name}
    for name, source in tied.items():
        if name in state and not torch.equal(state[name], state[source]):
            raise InputError(f"{named}: {name!r} and {source!r} are tied in the model but differ")
    complete = {name: state[source] for name, source in tied.items()} | state
    counters = [name for name in own if name not in complete and name.endswith("num_batches_tracked")]
    complete |= {name: own[name] for name in counters}
    said += [counted("kept the model's own", counters)] if counters else []
    problems = {
        "missing": [name for name in own if name not in complete],
        "unexpected": [name for name in complete if name not in own],
        "other shape": [
            f"{name} {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the model"
            for name, tensor in own.items()
            if name in state and isinstance(tensor, Tensor) and state[name].shape != tensor.shape
        ],
    }
    texts = [counted(label, names) for label, names in problems.items() if names]
    if texts:
        raise InputError(f"{named} does not fit the model: {'; '.join(texts)}")
    try:
        module.load_state_dict(complete)
    except Exception as error:
        raise InputError(f"{named} cannot be loaded into the model: {first_line(error)}") from error
    if said:
        logger.info("%s: %s", named, "; ".join(said))


def _as_the_model_names_it(
    state: dict[str, Tensor], module: nn.Module, own: Mapping[str, object]
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict under the model's names, without buffers that the model does not save, and what was done to it."""
    said = []
    for prefix in _PREFIXES * 2:  # a compiled module may be wrapped, and a wrapped one compiled
        if state and all(name.startswith(prefix) for name in state) and not any(n.startswith(prefix) for n in own):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            said.append(f"took {prefix!r} off all names")
    unsaved = {name for name, _ in module.named_buffers()} - own.keys()
    extra = [name for name, tensor in state.items() if name in unsaved or (name not in own and _is_counter(tensor))]
    if extra:
        state = {name: tensor for name, tensor in state.items() if name not in extra}
        said.append(counted("left out the buffers", extra))
    return state, said


def _is_counter(tensor: Tensor) -> bool:
    """Positions, masks and counts, which no layer learns."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def _read(path: Path, named: str) -> dict[str, Tensor]:
    with explained(named, "damaged or not a file of weights"):
        if path.suffix == ".safetensors":
            check_safetensors(path)
            state: Any = safetensors.torch.load_file(path)
        elif path.suffix in (".pt", ".pth"):
            state = load_tensors(path)
        else:
            raise InputError(f"ends in {path.suffix!r}; use .safetensors, .pt or .pth")
    for key in _WRAPPERS if isinstance(state, Mapping) else ():
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping):
        raise InputError(f"{named} holds a {type(state).__name__}; it must hold a state dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{named}: {shorten(repr(name))} is a {type(tensor).__name__}, not a tensor")
    refuse_expanded(state, path)
    return dict(state)


def refuse_expanded(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A few bytes can claim to be a tensor of terabytes by stride 0; copying it would end the job without a word."""
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise InputError(f"{str(path)!r}: {shorten(name)!r} is a sparse tensor; weights must be dense")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            what = f"{shorten(name)!r} of shape {tuple(tensor.shape)} has fewer bytes in the file than elements"
            raise InputError(f"{str(path)!r}: {what}; save it with .contiguous()")


def refuse_non_finite(named: Iterable[tuple[str, Tensor]], parameters: Container[str], what: str) -> None:
    """Parameters must be finite. Buffers may hold infinities, as attention masks do, but no NaN."""
    bad = [name for name, tensor in named if not tensor.is_meta and _has_bad_values(tensor, name in parameters)]
    if bad:
        raise InputError(f"{what} has values that are not finite: {counted('in', bad)}")


def _has_bad_values(tensor: Tensor, infinity_is_bad: bool) -> bool:
    """In pieces, since the test of a tensor needs more memory than the tensor."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    for part in torch.split(tensor.detach().reshape(-1), _PIECE_ELEMENTS):
        # 8-bit floats have few operators of their own.
        values = part.float() if part.element_size() == 1 else part
        if bool((~values.isfinite() if infinity_is_bad else values.isnan()).any()):
            return True
    return False


def counted(label: str, names: Sequence[str]) -> str:
    """ "missing a, b, c and 7 more (10)" """
    more = len(names) - _NUM_NAMED
    named = ", ".join(shorten(name, 120) for name in names[:_NUM_NAMED])
    return f"{label} {named}" + (f" and {more} more ({len(names)} in all)" if more > 0 else "")
