"""What a model decides by its data, taken from the float stream where it runs under hooks.

A router that picks other experts in the quantized stream would bring other rows, which no longer pair up. So whatever
gives indices or plain Python numbers is recorded in the float stream, and given again in the quantized one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# Where these give real numbers too, those stay the stream's own, apart from the winners of a top-k.
# fmt: off
_DECIDING = frozenset((
    "argmax", "argmin", "argsort", "argwhere", "bincount", "bucketize", "equal", "histc", "is_nonzero", "item",
    "max", "min", "mode", "multinomial", "nonzero", "searchsorted", "sort", "tolist", "topk", "unique",
    "unique_consecutive", "where", "__bool__", "__float__", "__index__", "__int__",
))
# fmt: on
_INDEXING = frozenset(("__getitem__", "__setitem__", "masked_select", "masked_scatter", "index_put", "index_put_"))

Tape = list[tuple[str, Any]]


class Decisions(TorchFunctionMode):
    """Records decisions of one forward on the tape, or (replay) gives those of the tape again, as long as the forward
    asks for the same ones in the same order. keep: stores a tensor of the tape."""

    def __init__(self, tape: Tape, *, replay: bool, keep: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._tape, self._replay, self._keep = tape, replay, keep
        self._place = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _INDEXING:
            masks = (torch.bool, torch.uint8)
            picks = pytree.tree_map_only(Tensor, lambda t: self._decide(name, t) if t.dtype in masks else t, args[1:])
            return func(args[0], *picks, **kwargs)
        result = func(*args, **kwargs)
        # With three arguments `where` is no index, but a choice between two values.
        if name not in _DECIDING or (name == "where" and len(args) + len(kwargs) > 1):
            return result
        return pytree.tree_map(lambda leaf: self._decide(name, leaf, whole=name == "topk"), result)

    def _decide(self, name: str, value: Any, whole: bool = False) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and not whole:
            return value
        if not self._replay:
            self._tape.append((name, self._keep(value.clone()) if isinstance(value, Tensor) else value))
            return value
        before: Any
        known, before = self._tape[self._place] if self._place < len(self._tape) else ("", ...)
        if known != name or type(before) is not type(value):
            # Another path after all: from here on the stream decides by itself.
            self._place = len(self._tape)
            return value
        self._place += 1
        return before.to(value.device) if isinstance(value, Tensor) else before
