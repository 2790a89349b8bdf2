"""The learned part of AdaRound: rectified sigmoid, regularizer, schedule and the gradient of one step.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization". alpha is V in the paper.

    soft weight   Ŵ = lo + h(alpha) (hi - lo)                         eq. 22
    h(alpha)      = clamp(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1)  eq. 23
    regularizer   sum (1 - |2 h(alpha) - 1|^beta)                     eq. 24
    loss          ||f(W x) - f(Ŵ x̂)||² + reg_param * regularizer       eq. 25

Gradients are written out instead of recorded by autograd: two matrix products and a few passes over alpha per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ZETA = 1.1
GAMMA = -0.1
# A soft value nearer than this to 0 or 1 has settled.
SETTLED = 0.01


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(alpha) in 0..1, of alpha's shape (eq. 23)."""
    return torch.sigmoid(alpha).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0.0, 1.0)


def initial_alpha(weight: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """alpha with `lo + h(alpha) (hi - lo) == weight`; finite also where the weight lies beyond lo..hi or lo == hi."""
    width = hi - lo
    fraction = ((weight - lo) / torch.where(width > 0, width, 1.0)).clamp(0.0, 1.0)
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


@dataclass(frozen=True)
class RoundingSchedule:
    """beta and the regularizer's weight as functions of (step, num_steps) and nothing else.

    num_steps is the bound of the loop itself. During the first `warm_start` share of the steps the regularizer is
    off; then beta falls from beta_start to beta_end by half a cosine.
    """

    num_steps: int
    warm_start: float
    beta_start: float
    beta_end: float
    reg_param: float

    @property
    def _warm_steps(self) -> float:
        return self.warm_start * self.num_steps

    def beta(self, step: int) -> float:
        """Exponent of the regularizer at step 0 .. num_steps - 1."""
        after_warm_up = max(0.0, step - self._warm_steps) / max(1.0, self.num_steps - 1 - self._warm_steps)
        return self.beta_end + (self.beta_start - self.beta_end) * 0.5 * (
            1 + math.cos(math.pi * min(1.0, after_warm_up))
        )

    def weight(self, step: int) -> float:
        """lambda at this step: 0 during the warm-up."""
        return self.reg_param if step >= self._warm_steps else 0.0


def regularizer(h: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Sum of `1 - |2h-1|^beta` over h (a scalar), and its derivative by h, of h's shape (eq. 24)."""
    centred = h.mul(2).sub_(1)
    magnitude = centred.abs()
    # |2h-1|^(beta-1), as powers of two: twice as fast as pow on a CPU. 0 becomes -inf, and 0 again.
    power = magnitude.log2().mul_(beta - 1).exp2_()
    value = h.numel() - torch.dot(power.flatten(), magnitude.flatten())
    return value, power.copysign_(centred).mul_(-2 * beta)


@dataclass(frozen=True)
class OutputTransform:
    """What follows the layer inside the loss: an inference batch norm, then an activation.

    scale, shift: `(O,)` or None, `f(y) = activation(y * scale + shift)`; a shift needs a scale.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: Literal["identity", "relu", "relu6"] = "identity"

    def __call__(self, y: Tensor, channel_dim: int = -1) -> Tensor:
        """f(y); y holds out channels at `channel_dim`."""
        return self._activate(self._affine(y, channel_dim))

    @property
    def is_affine(self) -> bool:
        """No activation: only differences of outputs matter."""
        return self.activation == "identity"

    def linear_part(self) -> OutputTransform:
        """The same transform of differences of outputs: without shift and activation."""
        return OutputTransform(self.scale)

    def _affine(self, y: Tensor, channel_dim: int) -> Tensor:
        if self.scale is None:
            return y
        shape = [1] * y.dim()
        shape[channel_dim] = -1
        scaled = y * self.scale.view(shape)
        return scaled if self.shift is None else scaled.add_(self.shift.view(shape))

    def _activate(self, z: Tensor) -> Tensor:
        if self.activation == "relu":
            return z.clamp(min=0)
        return z.clamp(0, 6) if self.activation == "relu6" else z

    def forward_backward(self, y: Tensor, target: Tensor, channel_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted squared error `sum w_o (f(y) - target)²` and its derivative by y.

        y, target: `(R, O)`, target already transformed. channel_weight: `(O,)`. Returns a scalar and `(R, O)`.
        """
        z = self._affine(y, -1)
        error = self._activate(z) - target
        gradient = error * (2 * channel_weight)
        loss = torch.dot(error.flatten(), gradient.flatten()) / 2
        if self.activation == "relu":
            gradient.mul_(z > 0)
        elif self.activation == "relu6":
            gradient.mul_((z > 0) & (z < 6))
        return loss, gradient if self.scale is None else gradient.mul_(self.scale)


class SoftRounding:
    """State and gradient of the soft weights of one layer.

    lo, hi: the two neighbours of every weight on the grid, in weight units, any shape. alpha: the learned variable.

    The learning works with the difference `Ŵ - W`, which is exactly 0 at the start for every weight between its
    neighbours: computed as `Ŵ` less `W` it would be rounding noise, which Adam turns into full steps.
    """

    def __init__(self, weight: Tensor, lo: Tensor, hi: Tensor) -> None:
        self.delta = hi - lo
        self.alpha = initial_alpha(weight, lo, hi)
        self.sigmoid = torch.empty_like(self.alpha)
        self.h = torch.empty_like(self.alpha)
        self.difference = torch.empty_like(self.alpha)
        self._start = rectified_sigmoid(self.alpha)
        # Weights beyond the range start at its end, not at themselves.
        clipped = torch.where(
            (weight < lo) | (weight > hi) | (self.delta == 0), lo - weight + self._start * self.delta, 0.0
        )
        self._clipped = clipped if bool(clipped.any()) else None

    def refresh(self) -> Tensor:
        """Recompute h from alpha; returns `Ŵ - W` (a buffer, overwritten next time)."""
        torch.sigmoid(self.alpha, out=self.sigmoid)
        torch.mul(self.sigmoid, ZETA - GAMMA, out=self.h).add_(GAMMA).clamp_(0.0, 1.0)
        torch.sub(self.h, self._start, out=self.difference).mul_(self.delta)
        return self.difference if self._clipped is None else self.difference.add_(self._clipped)

    def gradient_by_alpha(self, grad_h: Tensor) -> Tensor:
        """Derivative by alpha from the derivative by h, in place: the slope of h, 0 where h is clamped."""
        aten = torch.ops.aten
        aten.hardtanh_backward.grad_input(grad_h, self.h, 0.0, 1.0, grad_input=grad_h)
        aten.sigmoid_backward.grad_input(grad_h, self.sigmoid, grad_input=grad_h)
        return grad_h.mul_(ZETA - GAMMA)

    @property
    def rounds_up(self) -> Tensor:
        """Hard decision, bool: h >= 0.5."""
        return rectified_sigmoid(self.alpha) >= 0.5

    @property
    def unsettled(self) -> Tensor:
        """Bool: soft values further than 0.01 from both ends, where there is a choice at all."""
        h = rectified_sigmoid(self.alpha)
        return (h > SETTLED) & (h < 1 - SETTLED) & (self.delta > 0)
