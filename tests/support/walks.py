"""A walk in the words of tests: by site instead of unit, and lists over microbatches instead of batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.calls import count_calls
from distributed_adaround.capture.layer_modules import find_layers
from distributed_adaround.capture.replay_walk import ReplayWalker
from distributed_adaround.capture.sites import Site, Unit, Walker


@dataclass(frozen=True)
class Reached:
    """One entry per microbatch."""

    indices: list[int]
    inputs: list[Tensor]
    float_inputs: list[Tensor]
    float_outputs: list[Tensor]
    masks: list[Tensor | None]
    batch_sizes: list[int]


def plenty() -> ActivationStore:
    """Room for all activations on the host."""
    return ActivationStore(torch.device("cpu"), device_budget=0, host_budget=1 << 40)


def sites_of(walker: Walker) -> Sequence[Site]:
    return [unit.site for unit in walker.units]


def reach(walker: Walker, site: Site) -> Reached:
    batches = walker.reach(Unit((site,)))
    columns = ([getattr(batch, name) for batch in batches] for name in ("index", "x_hat", "x", "y", "mask", "size"))
    return Reached(*columns)


def commit(walker: Walker, site: Site, weight: Tensor | None, shift: Tensor | None = None) -> None:
    tensors = {} if weight is None else {site.weight_name: weight}
    if shift is not None:
        assert site.shift_name is not None
        tensors[site.shift_name] = site.shifted(walker.tensor(site.shift_name), shift)
    walker.commit(Unit((site,)), tensors)


def replayed(module: nn.Module, microbatches: Any, store: ActivationStore | None = None) -> ReplayWalker:
    """The walker by hooks, started."""
    module.eval()
    calls = count_calls(module, find_layers(module)[0], microbatches, torch.device("cpu"))
    walker = ReplayWalker(module, calls, "a test", store or plenty())
    walker.start(microbatches)
    return walker
