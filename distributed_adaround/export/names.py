"""Names of tensors in a checkpoint of transformers, and where in the model each of them comes from.

transformers renames, splits and joins tensors when it loads and saves: experts are one parameter of the model, and many
tensors of its checkpoint. It only moves rows, so its own conversion, run on numbers of rows instead of weights, tells
where every row of the checkpoint comes from.
"""

import bisect
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distributed_adaround.errors import InputError, first_line, shorten


@dataclass(frozen=True)
class Source:
    """Where a tensor of a checkpoint comes from. name: of a tensor of the model. rows: int64, of that tensor as (rows,
    its last dimension); of a vector, of its numbers; None: the whole tensor. shape: in the checkpoint."""

    name: str
    rows: Tensor | None
    shape: tuple[int, ...]


def checkpoint_sources(model: nn.Module) -> dict[str, Source]:
    """Every tensor of the model's checkpoint, in order. model: on the meta device. Raises InputError when transformers
    does more than to move rows."""
    convert: Any = importlib.import_module("transformers.core_model_loading").revert_weight_conversion
    state = model.state_dict()
    starts: list[int] = []
    numbered: dict[str, Tensor] = {}
    start = 0
    for name, tensor in state.items():
        shape = (*tensor.shape[:-1], 1) if tensor.dim() > 1 else tuple(tensor.shape)
        count = torch.Size(shape).numel()
        starts.append(start)
        numbered[name] = torch.arange(start, start + count).reshape(shape)
        start += max(count, 1)
    try:
        converted: Mapping[str, Tensor] = convert(model, numbered)
    except Exception as error:
        raise InputError(f"transformers cannot name the tensors of its checkpoint: {first_line(error)}") from error
    names = list(state)
    found = {}
    for key, numbers in converted.items():
        owner = names[bisect.bisect_right(starts, int(numbers.reshape(-1)[0])) - 1] if numbers.numel() else key
        found[key] = _source(key, numbers, owner, state[owner], numbered[owner])
    return found


def _source(key: str, numbers: Tensor, owner: str, tensor: Tensor, own: Tensor) -> Source:
    if torch.equal(numbers, own):
        return Source(owner, None, tuple(tensor.shape))
    rows = numbers.reshape(-1) - own.reshape(-1)[0]
    moved = tensor.dim() == 1 or (numbers.dim() > 1 and numbers.shape[-1] == 1)
    if not moved or int(rows.min()) < 0 or int(rows.max()) >= own.numel():
        raise InputError(f"{shorten(key)}: transformers makes it of {owner} by more than a choice of rows")
    width = tensor.shape[-1:] if tensor.dim() > 1 else ()
    return Source(owner, rows, (*numbers.shape[: numbers.dim() - len(width)], *width))


def names_in(checkpoint: Mapping[str, str], sources: Iterable[str], prefix: str) -> dict[str, str]:
    """The name that each tensor has in the checkpoint that the model came in, by the name transformers gives it.

    A model with a head may have come from a checkpoint without one, and the other way round: then `prefix` stands
    before all names, or is missing. Names that are in the checkpoint in neither form are left out.
    """
    found = {}
    for name in sources:
        forms = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        held = [form for form in forms if form in checkpoint]
        if held:
            found[name] = held[0]
    return found
