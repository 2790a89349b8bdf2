"""Clocks, memory and bytes handed to collectives."""

from __future__ import annotations

import pickle
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Collectives by name, with the position of the argument that this rank sends.
_TENSOR_COLLECTIVES = {
    "all_reduce": 0,
    "broadcast": 0,
    "reduce": 0,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "gather": 0,
    "reduce_scatter_tensor": 1,
    "all_to_all_single": 1,
}
_OBJECT_COLLECTIVES = {"all_gather_object": 1, "gather_object": 0, "broadcast_object_list": 0}


class Stopwatch:
    """Wall seconds since it was made; waits for the device before it reads the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._now() - self._start


def peak_memory() -> dict[str, int]:
    """Largest memory of this process so far, in bytes: on the host, and on the GPU what torch allocated."""
    peak = {"peak_host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peak["peak_device"] = torch.cuda.max_memory_allocated()
    return peak


@contextmanager
def counted_collectives() -> Iterator[dict[str, int]]:
    """Bytes and calls that this rank hands to torch.distributed, by collective; a tensor counts once, whatever the
    algorithm under it sends."""
    counts: dict[str, int] = {"bytes": 0, "calls": 0}
    originals: dict[str, Callable[..., Any]] = {}
    sizes = {**dict.fromkeys(_TENSOR_COLLECTIVES, _tensor_bytes), **dict.fromkeys(_OBJECT_COLLECTIVES, _pickled_bytes)}
    for name, position in (_TENSOR_COLLECTIVES | _OBJECT_COLLECTIVES).items():
        originals[name] = getattr(dist, name)
        setattr(dist, name, _counting(originals[name], position, sizes[name], counts))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _counting(
    collective: Callable[..., Any], position: int, size: Callable[[Any], int], counts: dict[str, int]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts["bytes"] += size(args[position])
        counts["calls"] += 1
        return collective(*args, **kwargs)

    return call


def _tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pickled_bytes(value: Any) -> int:
    return len(pickle.dumps(value))
