"""A walk in the words of tests: by site instead of unit, and lists over microbatches instead of batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.calls import count_calls
from distributed_adaround.capture.exported import export_model, straight_line
from distributed_adaround.capture.graph import capture
from distributed_adaround.capture.graph_walk import GraphWalker
from distributed_adaround.capture.layer_modules import find_layers
from distributed_adaround.capture.replay_walk import ReplayWalker
from distributed_adaround.capture.sites import Site, Unit, Walker
from distributed_adaround.data.microbatches import ModelInputs


@dataclass(frozen=True)
class Reached:
    """One entry per microbatch."""

    indices: list[int]
    inputs: list[Tensor]
    float_inputs: list[Tensor]
    float_outputs: list[Tensor]
    masks: list[Tensor | None]
    batch_sizes: list[int]


CPU = torch.device("cpu")
PLENTY = 1 << 40


class Batches:
    """Microbatches in memory; owns all of them, under the global indices 10, 11, ..."""

    def __init__(self, inputs: Sequence[ModelInputs]) -> None:
        self._inputs = {10 + position: each for position, each in enumerate(inputs)}
        self.total = 10 + len(inputs)
        self.owned: Sequence[int] = tuple(self._inputs)

    def load(self, index: int) -> ModelInputs:
        return self._inputs[index]

    def __iter__(self) -> Iterator[tuple[int, ModelInputs]]:
        yield from self._inputs.items()


def store_of(host_budget: int = PLENTY, folder: Any = None) -> ActivationStore:
    return ActivationStore(
        CPU, device_budget=0, host_budget=host_budget, spill_dir=None if folder is None else str(folder)
    )


def inputs_of(*batches: Any) -> list[ModelInputs]:
    """A batch is a tensor, a tuple of arguments or a dict of keywords."""
    return [
        ModelInputs((), batch, batch.get("attention_mask"))
        if isinstance(batch, dict)
        else ModelInputs(batch if isinstance(batch, tuple) else (batch,), {})
        for batch in batches
    ]


def walker_for(
    model: nn.Module, batches: Sequence[ModelInputs], *, varying: bool = False, store: ActivationStore | None = None
) -> GraphWalker:
    graph = capture(straight_line(export_model(model.eval(), batches[0], varying)))
    walker = GraphWalker(graph, store or store_of())
    walker.start(Batches(batches))
    return walker


def rounded(weight: Tensor) -> Tensor:
    return torch.round(weight.detach() * 4) / 4


def clone(tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, tree)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


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


def commit_weight(walker: Walker, site: Site, weight: Tensor) -> None:
    """weight: in the shape of the site, which may be a part of its parameter."""
    walker.commit(Unit((site,)), {site.weight_name: site.stored(walker.tensor(site.weight_name), weight)})
