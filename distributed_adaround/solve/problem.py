"""One layer's rounding problem, as every solver sees it, and what a solver returns."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.sites import Batch
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.layers import LayerGeometry
from distributed_adaround.numerics.moments import Moments, Quadratic
from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.spec.rounding import RoundingSpec


class Monitor:
    """What a solver tells its caller now and then, and asks. This one keeps nothing and never asks to stop.

    on_step: called with (steps done, loss), every 100 steps or so, since reading a loss waits for the device.
    stop_requested: of this process. save_due: whether it is time to save the solver's state.
    """

    def __init__(self, on_step: Callable[[int, float], None] | None = None) -> None:
        self._on_step = on_step

    def step(self, step: int, loss: float) -> None:
        if self._on_step is not None:
            self._on_step(step, loss)

    @property
    def stop_requested(self) -> bool:
        return False

    @property
    def save_due(self) -> bool:
        return False

    def save(self, key: str, state: Mapping[str, Tensor]) -> None:
        """Keep a state of the layer's solver until the layer is committed. No collective."""

    def load(self, key: str) -> dict[str, Tensor] | None:
        """A state that was saved before the job was started again. No collective."""
        return None


@dataclass(frozen=True)
class LayerProblem:
    """Everything about one layer that its rounding depends on.

    weight: `(G, R, J)` in the compute dtype on the compute device; bias `(O,)` or None likewise. grid: of the weight,
    in the compute dtype. transform: what follows the layer inside the loss. batches: of this rank. total_microbatches:
    of all ranks. source: see Site. asymmetry: share of the error in the inputs that the rounding is to make up for.
    correct_bias: the bias will restore the mean of the float outputs; correct_scale: the scales will restore their
    spread. rows_per_input: how many rows moments are taken from, for each input of an output; None: from all.
    num_calls: batches of one microbatch, whose index is that of the microbatch times this, plus the call. quadratic:
    the squared output error as it is expected on other data, where the solver needs moments and no activation is in the
    loss. trial: what shows how far that holds, where samples are enough to leave some out. effective_rows: how many
    independent rows the moments are worth, where they are taken.
    """

    name: str
    geometry: LayerGeometry
    weight: Tensor
    bias: Tensor | None
    grid: Grid
    transform: OutputTransform
    batches: Sequence[Batch]
    total_microbatches: int
    store: ActivationStore
    seed: int
    source: str | None = None
    asymmetry: float = 1.0
    correct_bias: bool = False
    correct_scale: bool = False
    rows_per_input: int | None = None
    num_calls: int = 1
    quadratic: Quadratic | None = None
    trial: "Trial | None" = None
    effective_rows: float = math.nan

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def on_device(self, activation: Tensor) -> Tensor:
        """An activation on the compute device, in the compute dtype."""
        return activation.to(self.device, self.dtype)

    def outputs(self, x_hat: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's outputs with another weight `(G, R, J)`. x_hat: as `on_device` gives it."""
        return self.geometry.apply(x_hat, self.geometry.from_channels(weight), bias)

    def base(self, batch: Batch, x_hat: Tensor) -> Tensor:
        """`W x̂ + b` of a microbatch; no product where both streams are the same. x_hat: as `on_device` gives it."""
        return self.on_device(batch.y) if batch.x is batch.x_hat else self.outputs(x_hat, self.weight, self.bias)

    def target(self, batch: Batch, base: Tensor | None) -> Tensor:
        """What the rounded layer is to make of a microbatch: `W (x̂ + asymmetry (x - x̂)) + b`, before batch norm and
        activation. base: as `base` gives it; with an asymmetry of 1 none is needed."""
        y = self.on_device(batch.y)
        return y if base is None else torch.lerp(base, y, self.asymmetry)


@dataclass(frozen=True)
class Trial:
    """Some channels of a layer, to be solved without one fold of the samples and judged on it.

    problem: with the quadratic of the other folds. held_out: moments of the fold left out. channels: which they are,
    int64, of the layer's outputs. effective_rows: how many independent rows that fold is worth, at least 1.
    """

    problem: LayerProblem
    held_out: Moments
    channels: Tensor
    effective_rows: float


@dataclass(frozen=True)
class OutputErrors:
    """Squared output error of candidate weights on the whole calibration set, summed over rows.

    error: `(candidates, O)` float64, against the targets of the rounding. apart: likewise, against the outputs of the
    float layer on its float inputs, which is the same measure for every solver and asymmetry. energy: `(O,)`, of those
    outputs. from_inputs: `(O,)`, of the part of them that the error of the inputs takes away. num_rows: that count.
    """

    error: Tensor
    apart: Tensor
    energy: Tensor
    from_inputs: Tensor
    num_rows: int

    def relative(self, candidate: int) -> float:
        """Distance of one candidate from the float outputs over their energy; without energy that distance."""
        return over_energy(float(self.apart[candidate].sum()), float(self.energy.sum()))


def over_energy(error: float, energy: float) -> float:
    """A relative error; where there is nothing to relate it to, the error itself."""
    return error / energy if energy > 0 else error


@dataclass(frozen=True)
class Solution:
    """Hard codes `(G, R, J)` of `grid` (None: the problem's own); where learned, the soft weight `(G, R, J)` at the end
    and the share of weights not settled; note: what a user should know of this layer."""

    codes: Tensor
    grid: Grid | None = None
    soft_weight: Tensor | None = None
    unsettled: float = 0.0
    note: str = ""


class Solver(Protocol):
    """One way to round a layer; made from the section `rounding` of a job, as it is.

    needs_moments: whether it works on the layer's quadratic. num_steps: steps or sweeps of a layer; 0: it has none.
    """

    needs_moments: bool

    def __init__(self, settings: RoundingSpec) -> None: ...

    @property
    def num_steps(self) -> int: ...

    def solve(self, problem: LayerProblem, comm: Comm, monitor: Monitor) -> Solution:
        """Round one layer, on all ranks together. Raises InputError when activations or loss are not finite,
        StoppedError when a rank was asked to stop."""
