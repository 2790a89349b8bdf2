"""A plain restatement of PyTorch's experimental AdaptiveRoundingOptimizer, from its description, for comparison.

For each layer in the order of registration: every batch runs through the whole float model and through the whole twin
quantized so far, and hooks keep the layer's inputs and outputs. Then Adam by autograd on batches of whole samples, at
learning rate 1e-3, on the mean squared error plus 1e-3 times the regularizer, with scales from the largest weight. The
twin goes on with the soft weights as they come. Padding counts like everything else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from distributed_adaround.formats import LayerFormat
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.ranges import choose_grid
from tests.benchmarks.cases import Batch, OnDevice, forward
from tests.benchmarks.measure import Stopwatch


@dataclass(frozen=True)
class AncestorSettings:
    """Its defaults. max_layers, max_steps: measure only so many of each; the time of all is then extrapolated."""

    max_iter: int = 10000
    batch_size: int = 256
    lr: float = 1e-3
    reg_param: float = 1e-3
    warm_start: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    max_layers: int | None = None
    max_steps: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class AncestorResult:
    """soft: the twin with the weights as they come. hard: with h rounded to 0 or 1. seconds: of the whole job,
    extrapolated where note says so. complete: every layer was learned with every step."""

    soft: nn.Module
    hard: nn.Module
    seconds: float
    measured_seconds: float
    complete: bool
    note: str


class SoftWeight:
    """`scale * (clamp(floor(w / scale) + zero_point + h(V), qmin, qmax) - zero_point)` for a weight matrix `(O, I)`."""

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        self._grid = grid
        self._floor = torch.floor(weight / grid.scale_like(weight))
        fraction = weight / grid.scale_like(weight) - self._floor
        self.V = (-torch.log(1.2 / (fraction + 0.1) - 1)).requires_grad_()

    def h(self) -> Tensor:
        return torch.clamp(torch.sigmoid(self.V) * 1.2 - 0.1, 0, 1)

    def value(self, hard: bool = False) -> Tensor:
        h = (self.h() >= 0.5).to(self._floor.dtype) if hard else self.h()
        zero_point = self._grid.zero_point_like(self._floor)
        codes = torch.clamp(self._floor + zero_point + h, self._grid.qmin, self._grid.qmax)
        return (codes - zero_point) * self._grid.scale_like(self._floor)


def beta_at(step: int, settings: AncestorSettings) -> float:
    """Exponent at a step after the warm-up: half a cosine over the steps that are left."""
    warm = settings.warm_start * settings.max_iter
    share = (step - warm) / (settings.max_iter - warm)
    high, low = settings.beta
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * share))


def loss_at(step: int, output: Tensor, target: Tensor, h: Tensor, settings: AncestorSettings) -> Tensor:
    """Mean squared error, and after the warm-up the regularizer."""
    loss = F.mse_loss(output, target)
    if step < settings.warm_start * settings.max_iter:
        return loss
    return loss + settings.reg_param * (1 - (2 * h - 1).abs() ** beta_at(step, settings)).sum()


def round_network(
    model: nn.Module,
    batches: Sequence[Batch],
    formats: Mapping[str, LayerFormat],
    settings: AncestorSettings,
    device: torch.device,
) -> AncestorResult:
    """Round all layers that have a format, or the share of them that the settings allow."""
    names = [name for name, _ in model.named_modules() if name in formats]
    count = min(settings.max_layers or len(names), len(names))
    # Spread over the network, since layers differ in size with their depth.
    chosen = [names[index * len(names) // count] for index in range(count)]
    original, twin = (OnDevice(copy.deepcopy(model), device).eval() for _ in range(2))
    hard = copy.deepcopy(model)
    steps = min(settings.max_steps or settings.max_iter, settings.max_iter)
    watch = Stopwatch(device)
    whole = 0.0
    for name in chosen:
        layer = Stopwatch(device)
        inputs, targets = capture(original, twin, name, batches)
        capture_seconds = layer.seconds
        learning = Stopwatch(device)
        soft = learn(twin.model.get_submodule(name), inputs, targets, formats[name], settings, steps)
        hard.get_submodule(name).weight.data.copy_(soft.value(hard=True).detach().view_as(_weight(hard, name)))
        whole += capture_seconds + learning.seconds / steps * settings.max_iter
    complete = count == len(names) and steps == settings.max_iter
    note = "" if complete else (
        f"{count} of {len(names)} layers and {steps} of {settings.max_iter} steps measured; time extrapolated, "
        "no quality"
    )  # fmt: skip
    return AncestorResult(twin.model.cpu(), hard, whole * len(names) / count, watch.seconds, complete, note)


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def capture(original: OnDevice, twin: OnDevice, name: str, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """The twin's inputs and the float model's outputs of a layer for all samples, on the device."""
    kept: dict[str, list[Tensor]] = {"inputs": [], "targets": []}
    hooks = (
        twin.model.get_submodule(name).register_forward_hook(lambda _, args, __: kept["inputs"].append(args[0])),
        original.model.get_submodule(name).register_forward_hook(lambda _, __, out: kept["targets"].append(out)),
    )
    for batch in batches:
        forward(original, batch)
        forward(twin, batch)
    for hook in hooks:
        hook.remove()
    return torch.cat(kept["inputs"]), torch.cat(kept["targets"])


def learn(
    layer: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    layer_format: LayerFormat,
    settings: AncestorSettings,
    num_steps: int,
) -> SoftWeight:
    """The first num_steps steps of learning one layer; its weight becomes the soft one."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    soft = SoftWeight(weight.detach().flatten(1), minmax_grid(weight.detach().flatten(1), layer_format))
    adam = torch.optim.Adam([soft.V], lr=settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    size = min(settings.batch_size, len(inputs))
    order: list[Tensor] = []
    for step in range(num_steps):
        if not order:
            order = list(torch.randperm(len(inputs), generator=generator).split(size))
        drawn = order.pop().to(inputs.device)
        output = functional_call(layer, {"weight": soft.value().view_as(weight)}, (inputs[drawn],))
        loss = loss_at(step, output, targets[drawn], soft.h(), settings)
        adam.zero_grad()
        loss.backward()
        adam.step()
    weight.data.copy_(soft.value().detach().view_as(weight))
    return soft


def minmax_grid(weight: Tensor, layer_format: LayerFormat) -> Grid:
    """The grid that covers the largest weight; one scale per tensor, channel or group as the format says."""
    grid = choose_grid(
        weight.cpu(),
        qmin=layer_format.quant_min,
        qmax=layer_format.quant_max,
        symmetric=layer_format.symmetric,
        zero_point=layer_format.zero_point if layer_format.symmetric else 0,
        strategy=layer_format.strategy,
        group_size=layer_format.group_size,
        observer="minmax",
    )
    return grid.to(weight.dtype, weight.device)
