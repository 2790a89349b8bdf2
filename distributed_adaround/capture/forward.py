"""One forward of a model as its user would run it, which leaves no trace in the model or in its inputs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distributed_adaround.data.microbatches import ModelInputs


def run_once(module: nn.Module, inputs: ModelInputs, device: torch.device, seed: int) -> Any:
    """The module's output for copies of the inputs on the device; random numbers depend on the seed alone."""
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda tensor: tensor.detach().to(device, copy=True), (inputs.args, inputs.kwargs)
    )
    devices = [device] if device.type == "cuda" else []
    with undisturbed(module), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return module(*args, **kwargs)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Forwards in here are as in inference, call every layer, return no cache, and change no buffer."""
    with ExitStack() as stack:
        # Autograd would refuse operations that work in place on parameters.
        for context in (torch.no_grad(), _without_fast_path(), _without_cache(module), _unchanged_buffers(module)):
            stack.enter_context(context)
        yield


def real_tensors(output: Any) -> list[Tensor]:
    """The tensors of real numbers in an output, in order."""
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """torch's fused transformer layers run without calling the layers inside them, and on nested tensors."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _without_cache(module: nn.Module) -> Iterator[None]:
    """transformers' decoders return a key-value cache by default, an object that no graph can hold.

    Submodules may have configurations of their own, copies of the model's or parts of it.
    """
    cached = [config for config in _configurations(module) if getattr(config, "use_cache", False)]
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True


def _configurations(module: nn.Module) -> list[Any]:
    """What the modules hold as `config` or `generation_config`, with the configurations inside; each once."""
    found: dict[int, Any] = {}
    for owner in module.modules():
        ahead = [getattr(owner, name, None) for name in ("config", "generation_config")]
        while ahead:
            config = ahead.pop()
            if hasattr(config, "__dict__") and not isinstance(config, nn.Module | type) and id(config) not in found:
                found[id(config)] = config
                ahead += [value for value in vars(config).values() if hasattr(value, "use_cache")]
    return list(found.values())


@contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Buffers that a forward changes or replaces (caches, counters) are put back."""
    before = [
        (owner, key, buffer, buffer.clone(), buffer._version)
        for owner in module.modules()
        for key, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for owner, key, buffer, values, version in before:
            if buffer._version != version:
                buffer.copy_(values)
            owner._buffers[key] = buffer
