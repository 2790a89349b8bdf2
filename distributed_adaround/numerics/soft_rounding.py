"""The learned part of AdaRound: rectified sigmoid, regularizer, schedule and the gradient of one step.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization". alpha is V in the paper.

    soft weight   Ŵ = lo + h(alpha) (hi - lo)                         eq. 22
    h(alpha)      = clamp(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1)  eq. 23
    regularizer   sum (1 - |2 h(alpha) - 1|^beta)                     eq. 24
    loss          ||f(W x) - f(Ŵ x̂)||² + reg_param * regularizer       eq. 25

Gradients are written out instead of recorded by autograd: two matrix products and a few passes over alpha per step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ZETA = 1.1
GAMMA = -0.1
_WIDTH = ZETA - GAMMA
# Between these two values of the sigmoid h is linear in it; at and beyond them h is 0 and 1.
_SIGMOID_OF_0, _SIGMOID_OF_1 = -GAMMA / _WIDTH, (1 - GAMMA) / _WIDTH
# A soft value nearer than this to 0 or 1 has settled.
SETTLED = 0.01


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(alpha) in 0..1, of alpha's shape (eq. 23)."""
    return torch.sigmoid(alpha).mul_(_WIDTH).add_(GAMMA).clamp_(0.0, 1.0)


def initial_alpha(weight: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """alpha with `lo + h(alpha) (hi - lo) == weight`; finite also where the weight lies beyond lo..hi or lo == hi."""
    width = hi - lo
    fraction = ((weight - lo) / torch.where(width > 0, width, 1.0)).clamp(0.0, 1.0)
    return -torch.log(_WIDTH / (fraction - GAMMA) - 1)


@dataclass(frozen=True)
class RoundingSchedule:
    """beta and the regularizer's weight, functions of the step alone. num_steps is the bound of the loop itself.

    During the first `warm_start` share of the steps the regularizer is off; then beta falls by half a cosine.
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
        cosine = math.cos(math.pi * min(1.0, after_warm_up))
        return self.beta_end + (self.beta_start - self.beta_end) * 0.5 * (1 + cosine)

    def weight(self, step: int) -> float:
        """lambda at this step: 0 during the warm-up."""
        return self.reg_param if step >= self._warm_steps else 0.0


def regularizer(sigmoid: Tensor, beta: float) -> Tensor:
    """Sum of `1 - |2h-1|^beta` (a scalar, eq. 24), from the clamped sigmoid."""
    return (1 - _one_minus_2h(sigmoid).abs_().pow_(beta)).sum()


def add_regularizer_gradient(gradient: Tensor, sigmoid: Tensor, beta: float, weight: float) -> None:
    """Add `weight` times the derivative of the regularizer by the clamped sigmoid to `gradient`, in place."""
    centred = _one_minus_2h(sigmoid)
    # |2h-1|^(beta-1), as powers of two: twice as fast as pow on a CPU. 0 becomes -inf, and 0 again.
    power = centred.abs().log2_().mul_(beta - 1).exp2_().copysign_(centred)
    gradient.add_(power, alpha=weight * beta * 2 * _WIDTH)


def _one_minus_2h(sigmoid: Tensor) -> Tensor:
    """In one pass, and exactly 0 in the middle, since ZETA + GAMMA = 1."""
    return torch.rsub(sigmoid, _WIDTH, alpha=2 * _WIDTH)


@dataclass(frozen=True)
class OutputTransform:
    """What follows the layer inside the loss: an inference batch norm, then an activation,
    `f(y) = activation(y * scale + shift)`, scale and shift `(O,)` or None; a shift needs a scale."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: Literal["identity", "relu", "relu6"] = "identity"

    def __call__(self, y: Tensor, channel_dim: int = -1) -> Tensor:
        return self._activate(self._affine(y, channel_dim))

    @property
    def is_affine(self) -> bool:
        """No activation: only differences of outputs matter."""
        return self.activation == "identity"

    def linear_part(self) -> "OutputTransform":
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
        aten = torch.ops.aten
        if self.activation == "relu":
            aten.threshold_backward.grad_input(gradient, z, 0.0, grad_input=gradient)
        elif self.activation == "relu6":
            aten.hardtanh_backward.grad_input(gradient, z, 0.0, 6.0, grad_input=gradient)
        return loss, gradient if self.scale is None else gradient.mul_(self.scale)


# On a CPU, passes over arrays of the weight's size go piece by piece: the next pass finds a piece in the cache, and
# what is allocated in between is too small to be handed back to the system and cleared again at every step.
_PIECE = 1 << 18
# What torch.optim.Adam has by default.
_ADAM = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "amsgrad": False, "maximize": False}


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A contiguous tensor as one-dimensional views, of a size that a CPU's cache holds; elsewhere it stays whole."""
    flat = tensor.view(-1)
    return torch.split(flat, _PIECE) if flat.device.type == "cpu" else (flat,)


class SoftRounding:
    """State and gradient of the soft weights of one layer; lo, hi: the neighbours of every weight on the grid.

    The learning works with the difference `Ŵ - W`, which is exactly 0 at the start for every weight between its
    neighbours: computed as `Ŵ` less `W` it would be rounding noise, which Adam turns into full steps.

    sigmoid: of alpha, clamped to where h is between 0 and 1. h is linear in it, so the loss is seen as a function of
    it, and h itself is never written: every pass over arrays of the weight's size counts. slope: derivative of the
    difference by it.
    """

    def __init__(self, weight: Tensor, lo: Tensor, hi: Tensor) -> None:
        self.delta = hi - lo
        self.alpha = initial_alpha(weight, lo, hi)
        self.slope = self.delta * _WIDTH
        self.sigmoid = torch.sigmoid(self.alpha).clamp_(_SIGMOID_OF_0, _SIGMOID_OF_1)
        self.difference = torch.empty_like(self.alpha)
        start = self.sigmoid.clone()
        # Weights beyond the range start at its end, not at themselves.
        clipped = torch.where(
            (weight < lo) | (weight > hi) | (self.delta == 0),
            lo - weight + rectified_sigmoid(self.alpha) * self.delta,
            0.0,
        )
        arrays = (self.alpha, self.sigmoid, start, self.slope, clipped, self.difference)
        self._pieces = list(zip(*map(pieces, arrays), strict=True))
        first, second = torch.zeros_like(self.alpha), torch.zeros_like(self.alpha)
        self._moments = list(zip(pieces(first), pieces(second), strict=True))
        self._state = {"alpha": self.alpha, "first": first, "second": second}
        self._steps = [torch.zeros((), dtype=torch.float32, device=weight.device) for _ in self._pieces]
        self.refresh()

    def refresh(self) -> Tensor:
        """Recompute sigmoid and difference from alpha; returns the latter (a buffer, overwritten next time)."""
        for piece in self._pieces:
            _refresh(*piece)
        return self.difference

    def descend(self, gradient: Tensor, lr: float, eps: float) -> None:
        """One step of Adam along the derivative by the clamped sigmoid, which is overwritten; then a refresh."""
        fused_adam = torch.ops.aten._fused_adam_
        parts = zip(self._pieces, self._moments, self._steps, pieces(gradient), strict=True)
        for piece, (first, second), steps, derivative in parts:
            alpha, sigmoid, *_ = piece
            _to_gradient_by_alpha(derivative, sigmoid)
            steps.add_(1)
            # What torch.optim.Adam(fused=True) calls, without the 30 microseconds of Python around it.
            fused_adam([alpha], [derivative], [first], [second], [], [steps], lr=lr, eps=eps, **_ADAM)
            _refresh(*piece)

    def state(self) -> dict[str, Tensor]:
        """alpha and Adam's two moments: all that further steps depend on, apart from their number. Copies."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def restore(self, state: Mapping[str, Tensor], num_steps: int) -> None:
        """Go on where another one of the same layer stood after `num_steps` steps."""
        for name, tensor in self._state.items():
            tensor.copy_(state[name])
        for steps in self._steps:
            steps.fill_(num_steps)
        self.refresh()

    @property
    def rounds_up(self) -> Tensor:
        """Hard decision, bool: h >= 0.5."""
        return rectified_sigmoid(self.alpha) >= 0.5

    @property
    def unsettled(self) -> Tensor:
        """Bool: soft values further than 0.01 from both ends, where there is a choice at all."""
        h = rectified_sigmoid(self.alpha)
        return (h > SETTLED) & (h < 1 - SETTLED) & (self.delta > 0)


def _refresh(alpha: Tensor, sigmoid: Tensor, start: Tensor, slope: Tensor, clipped: Tensor, difference: Tensor) -> None:
    torch.sigmoid(alpha, out=sigmoid).clamp_(_SIGMOID_OF_0, _SIGMOID_OF_1)
    torch.sub(sigmoid, start, out=difference)
    torch.addcmul(clipped, difference, slope, out=difference)


def _to_gradient_by_alpha(gradient: Tensor, sigmoid: Tensor) -> None:
    aten = torch.ops.aten
    aten.hardtanh_backward.grad_input(gradient, sigmoid, _SIGMOID_OF_0, _SIGMOID_OF_1, grad_input=gradient)
    aten.sigmoid_backward.grad_input(gradient, sigmoid, grad_input=gradient)
