"""Weights that a module computes from other tensors at every forward (weight_norm, spectral_norm, pruning), folded into
plain ones: only a weight that is stored can be rounded and saved."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Hooks of torch's older interface compute the attribute `name` before every forward, from tensors with these suffixes.
_SUFFIXES = ("_g", "_v", "_orig", "_u", "_mask")


@torch.no_grad()
def fold_parametrizations(model: nn.Module) -> list[str]:
    """Put in the place of every computed tensor of the model, in eval mode, the one it computes. Returns their names.

    A parametrized module is again of its own class; parametrizations shared by modules are folded in each of them.
    """
    # All values first: parametrizations may share tensors.
    new = [(path, module, name, getattr(module, name)) for path, module, name in _parametrized(model)]
    old = [(path, module, name, _computed(module, name, hook)) for path, module, name, hook in _hooked(model)]
    values = {id(value): value.detach().clone() for *_, value in (*new, *old)}
    for _, module, name, value in new:
        if parametrize.is_parametrized(module):
            # Not by torch's own function: it changes the class, which copies of the module share.
            del module._modules["parametrizations"]
            module.__class__ = type(module).__bases__[0]
        _store(module, name, values[id(value)])
    for _, module, name, value in old:
        for key in [key for key, hook in module._forward_pre_hooks.items() if _target(hook) == name]:
            del module._forward_pre_hooks[key]
        for suffix in _SUFFIXES:
            module._parameters.pop(name + suffix, None)
            module._buffers.pop(name + suffix, None)
        _store(module, name, values[id(value)])
    return [f"{path}.{name}" if path else name for path, _, name, _ in (*new, *old)]


def computed_tensors(model: nn.Module) -> list[Tensor]:
    """What hooks of torch's older interface left behind: tensors with a history, which cannot be copied."""
    return [getattr(module, name) for _, module, name, _ in _hooked(model)]


def _parametrized(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    return [
        (path, module, name)
        for path, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for name in list(module.parametrizations)
    ]


def _hooked(model: nn.Module) -> list[tuple[str, nn.Module, str, Any]]:
    """Tensors computed by a hook; of several hooks for one tensor the last, which stands for all."""
    found: dict[tuple[int, str], tuple[str, nn.Module, str, Any]] = {}
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if (name := _target(hook)) is not None and isinstance(getattr(module, name, None), Tensor):
                found[id(module), name] = (path, module, name, hook)
    return list(found.values())


def _target(hook: Any) -> str | None:
    """Name of the tensor that a hook of torch computes; None: another hook."""
    if type(hook).__module__.split(".")[0] != "torch":
        return None
    name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
    return name if isinstance(name, str) else None


def _computed(module: nn.Module, name: str, hook: Any) -> Tensor:
    """As before a forward."""
    hook(module, ())
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value


def _store(module: nn.Module, name: str, value: Tensor) -> None:
    module.__dict__.pop(name, None)
    if name in module._buffers:
        module._buffers[name] = value
    else:
        module._parameters.pop(name, None)
        module.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))
