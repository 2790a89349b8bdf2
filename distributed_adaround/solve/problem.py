"""One layer's rounding problem, as every solver sees it, and what a solver returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.sites import SiteActivations
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.layers import LayerGeometry
from distributed_adaround.numerics.moments import Moments
from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.runtime.comm import Comm


class Monitor:
    """What a solver tells its caller now and then, and asks. This one keeps nothing and never asks to stop.

    on_step: called with (step, loss), every 100 steps or so, since reading a loss waits for the device.
    """

    def __init__(self, on_step: Callable[[int, float], None] | None = None) -> None:
        self._on_step = on_step

    def step(self, step: int, loss: float) -> None:
        """`step` steps are done."""
        if self._on_step is not None:
            self._on_step(step, loss)

    @property
    def stop_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return False

    @property
    def save_due(self) -> bool:
        """Whether it is time to save the solver's state."""
        return False

    def save(self, key: str, state: Mapping[str, Tensor]) -> None:
        """Keep a state of the layer's solver until the layer is committed. No collective."""

    def load(self, key: str) -> dict[str, Tensor] | None:
        """A state that was saved before the job was started again. No collective."""
        return None


@dataclass
class MomentCache:
    """Moments of the last input that a solver asked for, and what tells it from others (solve/moments.py)."""

    key: object = None
    moments: Moments | None = None


@dataclass(frozen=True)
class LayerProblem:
    """Everything about one layer that its rounding depends on.

    weight: `(O, I)` in the compute dtype on the compute device; bias `(O,)` or None likewise. grid: of the weight, in
    the compute dtype. transform: what follows the layer inside the loss. activations: of this rank.
    total_microbatches: of all ranks. asymmetry: share of the error in the inputs that the rounding is to make up for.
    correct_bias: the bias will restore the mean of the float outputs; correct_scale: the scales will restore their
    spread. rows_per_input: how many rows moments are taken from, for each input of an output; None: from all.
    """

    name: str
    geometry: LayerGeometry
    weight: Tensor
    bias: Tensor | None
    grid: Grid
    transform: OutputTransform
    activations: SiteActivations
    total_microbatches: int
    store: ActivationStore
    seed: int
    asymmetry: float = 1.0
    correct_bias: bool = False
    correct_scale: bool = False
    rows_per_input: int | None = None
    moments: MomentCache = field(default_factory=MomentCache)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def target(self, x_hat: Tensor, output: Tensor) -> Tensor:
        """What the rounded layer is to make of a microbatch: `W (x̂ + asymmetry (x - x̂)) + b`, before batch norm and
        activation. x_hat: on the compute device in the compute dtype. output: `W x + b`, anywhere.
        """
        output = output.to(self.device, self.dtype)
        if self.asymmetry == 1:
            return output
        return torch.lerp(
            self.geometry.apply(x_hat, self.geometry.from_matrix(self.weight), self.bias), output, self.asymmetry
        )


@dataclass(frozen=True)
class Solution:
    """Hard codes `(O, I)` of `grid` (None: the problem's own); where learned, the soft weight `(O, I)` at the end and
    the share of weights not settled. solver: which one it was, where that is not the one asked for."""

    codes: Tensor
    grid: Grid | None = None
    soft_weight: Tensor | None = None
    unsettled: float = 0.0
    solver: str | None = None


# All solvers have this signature; their own settings are bound beforehand (functools.partial).
Solver = Callable[[LayerProblem, "OutputErrors", Comm, Monitor], Solution]


@dataclass(frozen=True)
class OutputErrors:
    """Squared output error of candidate weights on the whole calibration set, summed over rows.

    error: `(candidates, O)` float64. energy: `(O,)`, of the float layer's outputs. num_rows: rows that count.
    """

    error: Tensor
    energy: Tensor
    num_rows: int

    def relative(self, candidate: int) -> float:
        """Error of one candidate over the energy of the float outputs; 0 when there is neither."""
        error, energy = float(self.error[candidate].sum()), float(self.energy.sum())
        return error / energy if energy > 0 else error
