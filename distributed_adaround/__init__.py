"""Adaptive rounding (AdaRound) of a network's weights, on as many machines as there are.

    from distributed_adaround import quantize

    model, table = quantize(model, batches, dtype="int4", max_iter=2000)

Importing the package does not import torch: `quantize` and `Quantized` are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distributed_adaround.errors import AdaRoundError, InputError, OutputError, PeerError, SpecError

if TYPE_CHECKING:
    from distributed_adaround.api import Quantized, quantize
    from distributed_adaround.spec.job import JobSpec, MethodSpec

__version__ = "0.1.0"
__all__ = [
    "AdaRoundError",
    "InputError",
    "JobSpec",
    "MethodSpec",
    "OutputError",
    "PeerError",
    "Quantized",
    "SpecError",
    "__version__",
    "quantize",
]

_LAZY = {"quantize": "api", "Quantized": "api", "JobSpec": "spec.job", "MethodSpec": "spec.job"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
