"""The source `factory`: a callable that returns the module, and a file of weights for it.

A factory is an import path, so it runs code; only the author of the job names it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from distributed_adaround.errors import InputError, first_line
from distributed_adaround.model.source import OpenedModel, checked_file
from distributed_adaround.model.weights import load_state, read_weights, refuse_non_finite
from distributed_adaround.runtime.imports import importable, load_callable
from distributed_adaround.spec.model import ModelSpec


class FactorySource:
    """`model.factory`, called with `model.factory_args`, and `model.weights`."""

    def __init__(self, spec: ModelSpec, folder: Path | None) -> None:
        self._spec, self._folder = spec, folder

    def open(self) -> OpenedModel:
        spec = self._spec
        assert spec.factory is not None
        with checked_file(spec.weights, spec.sha256) as weights:
            return OpenedModel(load_factory(spec.factory, spec.factory_args, weights, self._folder))


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
    with importable(search_path):
        try:
            module = build(**factory_args)
        except Exception as error:
            raise InputError(f"model.factory {factory!r} failed: {first_line(error)}") from error
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
        load_state(module, read_weights(weights), weights)
    refuse_non_finite(module.named_parameters(), module.named_buffers(), f"the model of {factory!r}")
    return module.eval().requires_grad_(False)
