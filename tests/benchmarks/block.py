"""One decoder block of an 8-billion Llama on synthetic tokens: seconds of a solver, beside bare matrix products.

The ceiling is what the steps' products `(O, I) x (I, I)` of all layers and the products of the moments would take
alone, with the same shapes and dtype, measured in the same process. The bar for `gram` is its share of that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed_adaround.capture.open import activation_store
from distributed_adaround.capture.sites import Batch
from distributed_adaround.errors import SpecError
from distributed_adaround.numerics.layers import LayerGeometry
from distributed_adaround.numerics.ranges import choose_grid
from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.runtime.context import RankContext
from distributed_adaround.solve.problem import LayerProblem, Monitor
from distributed_adaround.spec.job import MethodSpec
from tests.benchmarks import records
from tests.benchmarks.configurations import FORMATS, method_spec
from tests.benchmarks.layers import round_as_job, timed_solver, warm_up
from tests.benchmarks.measure import Stopwatch, peak_memory

WARM_UP_LAYER = "q"
# How far the quantized prefix moves the inputs, in standard deviations of the features.
_PREFIX_NOISE = 0.05
_MIN_SECONDS, _MIN_REPEATS = 0.3, 3


@dataclass(frozen=True)
class BlockOptions:
    """scale: every width and the number of sequences are divided by it. precision: of torch's float32 products."""

    out: Path
    solvers: Sequence[str]
    number_format: str
    settings: Sequence[str]
    scale: int
    precision: str
    device: str
    seed: int


@dataclass(frozen=True)
class BlockShape:
    """Widths and tokens of the block."""

    hidden: int
    intermediate: int
    key_value: int
    sequences: int
    length: int = 2048

    @classmethod
    def scaled(cls, scale: int) -> BlockShape:
        return cls(4096 // scale, 14336 // scale, 1024 // scale, max(1, 128 // scale))

    @property
    def groups(self) -> tuple[tuple[int, dict[str, int]], ...]:
        """(inputs, {layer: outputs}) for the layers that read the same tensor."""
        return (
            (self.hidden, {"q": self.hidden, "k": self.key_value, "v": self.key_value}),
            (self.hidden, {"o": self.hidden}),
            (self.hidden, {"gate": self.intermediate, "up": self.intermediate}),
            (self.intermediate, {"down": self.hidden}),
        )


def run_block(options: BlockOptions) -> None:
    """One line for each solver."""
    torch.set_float32_matmul_precision(options.precision)
    device, shape = torch.device(options.device), BlockShape.scaled(options.scale)
    for solver in options.solvers:
        head = {
            "part": "block", "solver": solver, "format": options.number_format, "seed": options.seed,
            "settings": [*options.settings, f"float32 products: {options.precision}"], "device": str(device),
            "shape": f"{shape.hidden}/{shape.intermediate}/{shape.key_value}",
            "tokens": shape.sequences * shape.length,
        }  # fmt: skip
        fields = dict(FORMATS[options.number_format])
        try:
            spec = method_spec(solver, fields, seed=options.seed, device=str(device), settings=options.settings)
            timed_solver(spec, device)
        except SpecError as error:
            line: records.Record = {**head, "refused": str(error)}
        else:
            line = {**head, **_measure(spec, shape, device, options.seed), **peak_memory(), "load": os.getloadavg()[0]}
        records.append(options.out, line)
        print({key: value for key, value in line.items() if key != "layers"}, flush=True)


def _measure(spec: MethodSpec, shape: BlockShape, device: torch.device, seed: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(seed)
    layers: dict[str, dict[str, float]] = {}
    moments_ceiling = 0.0
    for inputs, outputs in shape.groups:
        features = _Features(inputs, shape, generator)
        moments_ceiling += features.moments_seconds()
        for name, width in outputs.items():
            layers[name] = _solve(spec, name, width, features, generator)
            print(f"{name}: {layers[name]}", flush=True)
        # The next inputs need the room.
        del features
    ceiling = moments_ceiling + sum(layer["product_seconds"] * layer["steps"] for layer in layers.values())
    seconds, solver_seconds = (sum(layer[key] for layer in layers.values()) for key in ("seconds", "solver_seconds"))
    return {
        "seconds": seconds,
        "solver_seconds": solver_seconds,
        "ceiling_seconds": ceiling,
        "moments_ceiling_seconds": moments_ceiling,
        "share": ceiling / seconds,
        "solver_share": ceiling / solver_seconds,
        "max_iter": spec.rounding.max_iter,
        "layers": layers,
    }


class _Features:
    """Inputs that several layers share: float ones, and those that the quantized prefix would give."""

    def __init__(self, width: int, shape: BlockShape, generator: torch.Generator) -> None:
        self.width, self._device = width, generator.device
        few = max(1, width // 8)
        mixing = self._normal((few, width), generator) / few**0.5
        # Some features are much larger than others, as in real blocks.
        sizes = self._normal((width,), generator).exp()
        self.float_inputs: list[Tensor] = []
        self.inputs: list[Tensor] = []
        for _ in range(shape.sequences):
            common = self._normal((shape.length, few), generator) @ mixing
            own, noise = (self._normal((shape.length, width), generator) for _ in range(2))
            self.float_inputs.append((common + 0.5 * own) * sizes)
            self.inputs.append(self.float_inputs[-1] + _PREFIX_NOISE * noise * sizes)

    def _normal(self, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(size, generator=generator, device=self._device)

    def batches(self, weight: Tensor) -> list[Batch]:
        """What a layer with this weight sees; the inputs are the same tensors for every layer."""
        streams = enumerate(zip(self.inputs, self.float_inputs, strict=True))
        return [Batch(index, x_hat, x, x @ weight.T, None, 1) for index, (x_hat, x) in streams]

    def moments_seconds(self) -> float:
        """Seconds of the bare products of both moments: x̂ᵀx̂ and xᵀx̂."""
        first, second = self.inputs[0], self.float_inputs[0]
        out = torch.empty(self.width, self.width, device=self._device)

        def both() -> None:
            torch.mm(first.T, first, out=out)
            torch.mm(second.T, first, out=out)

        return len(self.inputs) * _seconds_of(both, self._device)


def _solve(
    spec: MethodSpec, name: str, outputs: int, features: _Features, generator: torch.Generator
) -> dict[str, float]:
    device = generator.device
    weight = torch.randn((outputs, features.width), generator=generator, device=device) * 0.02
    layer_format = spec.quantize.for_layer(name, "Linear")
    assert layer_format is not None
    context = RankContext.from_environment(str(device))
    problem = LayerProblem(
        name=name,
        geometry=LayerGeometry(weight_shape=(outputs, features.width)),
        weight=weight[None],
        bias=None,
        grid=choose_grid(weight[None], layer_format),
        transform=OutputTransform(),
        batches=features.batches(weight),
        total_microbatches=len(features.inputs),
        store=activation_store(spec.runtime, context),
        seed=spec.runtime.seed,
    )
    if name == WARM_UP_LAYER:
        warm_up(spec, problem, layer_format)
    solver, steps = timed_solver(spec, device), [0]
    watch = Stopwatch(device)
    result = round_as_job(spec, problem, layer_format, solver, Monitor(lambda step, loss: steps.append(step)))
    return {
        "seconds": watch.seconds,
        "solver_seconds": solver.seconds,
        # A solver may stop early; it tells its last step.
        "steps": max(steps),
        "product_seconds": _product_seconds(outputs, features.width, device),
        "error": result.hard_error,
        "nearest_error": result.nearest_error,
    }


def _product_seconds(outputs: int, inputs: int, device: torch.device) -> float:
    """Seconds of one bare product `(O, I) x (I, I)`."""
    left, right = torch.randn(outputs, inputs, device=device), torch.randn(inputs, inputs, device=device)
    out = torch.empty(outputs, inputs, device=device)
    return _seconds_of(lambda: torch.mm(left, right, out=out), device)


def _seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of a call in a loop without waiting between calls, after one to warm up."""
    call()
    repeats, seconds = _MIN_REPEATS, 0.0
    while seconds < _MIN_SECONDS:
        repeats *= 2
        watch = Stopwatch(device)
        for _ in range(repeats):
            call()
        seconds = watch.seconds
    return seconds / repeats
