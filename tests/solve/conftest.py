"""One layer's problem for any number of ranks, and ranks as threads of this process with real sums between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_formats import layer_format

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.layer_modules import geometry_of
from distributed_adaround.capture.sites import Batch
from distributed_adaround.numerics.ranges import choose_grid
from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.solve.problem import LayerProblem

# Layers, and the spatial sizes of three microbatches of 2, 1 and 3 samples: all different, or all the same.
torch.manual_seed(0)  # layers made while modules load come before the fixture that seeds each test
LAYERS: dict[str, tuple[nn.Module, list[tuple[int, ...]]]] = {
    "linear": (nn.Linear(4, 6), [(), (), ()]),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=1), [(9,), (7,), (8,)]),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=(1, 0)), [(5, 4), (4, 5), (5, 4)]),
    "conv2d-one-size": (nn.Conv2d(4, 6, 3, stride=2, groups=2), [(7, 5)] * 3),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), [(3, 3), (4, 4), (5, 5)]),
    "conv3d": (nn.Conv3d(2, 4, 2, groups=2), [(3, 3, 2), (2, 4, 3), (2, 2, 2)]),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), [(4,), (3,), (4,)]),
    "transposed2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), padding=1, output_padding=(1, 2), groups=2, dilation=2),
        [(3, 4), (4, 4), (2, 3)],
    ),
    "transposed3d": (nn.ConvTranspose3d(2, 4, 2, stride=2, padding=1), [(2, 3, 2), (3, 2, 2), (2, 2, 3)]),
}


# Grids of up to 64 inputs, by name: arguments of toy_formats.layer_format.
_INT3: dict[str, Any] = {"dtype": "int3", "observer": "mse"}
_GROUPS: dict[str, Any] = {"strategy": "group", "group_size": 8}
GRIDS: dict[str, dict[str, Any]] = {
    "per tensor": _INT3 | {"strategy": "tensor"},
    "per channel": _INT3,
    "per group": _INT3 | _GROUPS,
    "affine": _INT3 | {"dtype": "uint3", "symmetric": False},
    "affine per tensor": _INT3 | {"symmetric": False, "strategy": "tensor"},
    "affine per group": _INT3 | {"symmetric": False} | _GROUPS,
    "float16": _INT3 | {"scale": "float16"} | _GROUPS,
    "bfloat16": _INT3 | {"scale": "bfloat16"},
    "fp4": {"dtype": "fp4", "observer": "mse"},
    "fp4 per group": {"dtype": "fp4", "observer": "mse"} | _GROUPS,
    "nvfp4": {"dtype": "nvfp4", "observer": "mse"},
    "mxfp4": {"dtype": "mxfp4", "observer": "mse"},
    "fp8": {"dtype": "fp8", "observer": "mse"},
}


class ThreadComm:
    """One of several ranks in one process. Sums go over ranks in order, as in a ring."""

    def __init__(self, rank: int, barrier: threading.Barrier, box: list[Any]) -> None:
        self.rank, self.world_size = rank, barrier.parties
        self._barrier, self._box = barrier, box

    def all_gather_object(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait(60)
        values = list(self._box)
        self._barrier.wait(60)
        return values

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.all_gather_object(tensor.clone())).sum(dim=0))

    def broadcast_object(self, value: Any) -> Any:
        return self.all_gather_object(value)[0]

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.broadcast_object(tensor.clone()))


def _run_ranks(world_size: int, work: Callable[[ThreadComm], Any]) -> list[Any]:
    """Results of `work` on every rank, or the first error a rank raised itself."""
    barrier = threading.Barrier(world_size)
    box: list[Any] = [None] * world_size
    results: list[Any] = [None] * world_size
    errors: list[Exception] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadComm(rank, barrier, box))
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return results


def _make_problem(
    layer: nn.Module,
    inputs: Sequence[Tensor],
    *,
    float_inputs: Sequence[Tensor] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    batch_sizes: Sequence[int] | None = None,
    transform: OutputTransform | None = None,
    num_bits: int = 3,
    seed: int = 0,
    host_budget: int = 10**9,
    geometry: Any = None,
) -> LayerProblem:
    """The problem of a layer with all microbatches on one rank; in the dtype of its weight."""
    geometry = geometry_of(layer) if geometry is None else geometry
    float_inputs = inputs if float_inputs is None else float_inputs
    weight = geometry.to_channels(layer.weight.detach()).clone()
    with torch.no_grad():
        float_outputs = [layer(x.to(weight.dtype)) for x in float_inputs]
    grid = choose_grid(weight, layer_format(f"int{num_bits}", observer="mse"))
    masks = masks or [None] * len(inputs)
    sizes = batch_sizes or [x.shape[0] for x in inputs]
    return LayerProblem(
        name="block.layer",
        geometry=geometry,
        weight=weight,
        bias=None if layer.bias is None else layer.bias.detach().clone(),
        grid=grid.to(weight.dtype),
        transform=transform or OutputTransform(),
        batches=[
            Batch(index, *streams)
            for index, streams in enumerate(zip(inputs, float_inputs, float_outputs, masks, sizes, strict=True))
        ],
        total_microbatches=len(inputs),
        store=ActivationStore(torch.device("cpu"), device_budget=0, host_budget=host_budget),
        seed=seed,
    )


def _with_grid(problem: LayerProblem, name: str) -> LayerProblem:
    """The same problem on one of GRIDS."""
    return replace(problem, grid=choose_grid(problem.weight, layer_format(**GRIDS[name])).to(problem.dtype))


def _share(problem: LayerProblem, rank: int, world_size: int) -> LayerProblem:
    """The same problem as one of several ranks sees it: every world_size-th microbatch is its own."""
    return replace(problem, batches=[batch for batch in problem.batches if batch.index % world_size == rank])


@pytest.fixture
def make_problem() -> Callable[..., LayerProblem]:
    return _make_problem


@pytest.fixture(params=GRIDS)
def grid_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def with_grid() -> Callable[[LayerProblem, str], LayerProblem]:
    return _with_grid


@pytest.fixture
def share() -> Callable[[LayerProblem, int, int], LayerProblem]:
    return _share


@pytest.fixture
def run_ranks() -> Callable[[int, Callable[[ThreadComm], Any]], list[Any]]:
    return _run_ranks


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, list[Tensor]]:
    layer, sizes = LAYERS[request.param]
    layer = layer.double()
    channels = layer.in_channels if sizes[0] else layer.in_features
    return layer, [torch.randn(n, channels, *size).double() for n, size in zip((2, 1, 3), sizes, strict=True)]
