"""Which layers a model runs, how often and in which order: over all microbatches of all ranks, seen by hooks."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from distributed_adaround.capture.forward import run_once
from distributed_adaround.data.microbatches import Microbatches
from distributed_adaround.errors import InputError, first_line


@dataclass(frozen=True)
class Calls:
    """per_microbatch: by index, how often each layer runs, in order of the last call. with_output_size: layers that
    are ever given an output_size."""

    per_microbatch: Mapping[int, Mapping[str, int]]
    with_output_size: frozenset[str]

    @property
    def order(self) -> list[str]:
        """All layers. One that the first microbatch does not reach stands behind the layer that ran before it."""
        order: list[str] = []
        for _, counts in sorted(self.per_microbatch.items()):
            place = 0
            for name in counts:
                if name not in order:
                    order.insert(place, name)
                place = order.index(name) + 1
        return order

    def most(self, names: Iterable[str]) -> int:
        """The most calls of these layers together in any microbatch."""
        return max((self.of(index, names) for index in self.per_microbatch), default=0)

    def of(self, index: int, names: Iterable[str]) -> int:
        """Calls of these layers together in one microbatch."""
        counts = self.per_microbatch[index]
        return sum(counts.get(name, 0) for name in names)


def count_calls(
    module: nn.Module, layers: Mapping[str, nn.Module], microbatches: Microbatches, device: torch.device
) -> Calls:
    """Run this rank's microbatches. Raises InputError where the forward fails."""
    found: dict[int, dict[str, int]] = {}
    with_output_size: set[str] = set()

    def count(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts[name] = counts.pop(name, 0) + 1  # behind the others: units stand in the order of their last calls
        if (args[1] if len(args) > 1 else kwargs.get("output_size")) is not None:
            with_output_size.add(name)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(count, name), with_kwargs=True))
        for index, inputs in microbatches:
            counts = found[index] = {}
            try:
                run_once(module, inputs, device, seed=index)
            except Exception as error:
                raise forward_failed(index, error, inputs.hint) from error
    return Calls(found, frozenset(with_output_size))


def forward_failed(index: int, error: Exception, hint: str = "") -> InputError:
    return InputError(f"the model's forward failed on microbatch {index}: {first_line(error)}{hint}")


def together(calls: Iterable[Calls]) -> Calls:
    """Those of all ranks as one."""
    counts: dict[int, Mapping[str, int]] = {}
    with_output_size: frozenset[str] = frozenset()
    for each in calls:
        counts |= each.per_microbatch
        with_output_size |= each.with_output_size
    return Calls(counts, with_output_size)
