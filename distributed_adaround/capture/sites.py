"""What the capture of a model hands to whoever solves it: sites, units, batches, parameters left in float.

A *site* is one layer whose weight is rounded, a *unit* the sites that are learned together. The two captures (the graph
of torch.export, and hooks) describe a model with the same words, so nothing above them knows which one is at work.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor

from distributed_adaround.data.microbatches import Microbatches
from distributed_adaround.numerics.layers import LayerGeometry
from distributed_adaround.numerics.weight_view import WeightView

Activation = Literal["identity", "relu", "relu6"]


@dataclass(frozen=True)
class BatchNormAfter:
    """Names of the tensors of an inference batch norm that directly follows a layer (None: not affine)."""

    weight: str | None
    bias: str | None
    running_mean: str
    running_var: str
    eps: float


@dataclass(frozen=True)
class Site:
    """One layer whose weight is rounded.

    name: path of the module, as in `named_modules`. module_class: its class name ("Conv2d"), for `ignore` and
    `overrides`. batch_norm, activation: what follows the layer's output, when nothing else reads that output.
    num_calls: how often the layer runs in one forward; rounding is learned from all calls. shift_name: tensor that
    can shift the layer's outputs and nothing else, its bias or the mean of the batch norm after it, or None. source:
    name of what its input is; sites with the same source have the same inputs. None: not known. view, bias_view: how
    weight and bias lie in the tensors of these names, None: they are the whole tensors. part: which part of the
    parameter, "[0:16]", where it holds several weights; the name ends in it. is_router: its output only picks which
    rows later layers see. is_table: an embedding, with a channel for each row; no layer.
    """

    name: str
    module_class: str
    weight_name: str
    bias_name: str | None
    geometry: LayerGeometry
    batch_norm: BatchNormAfter | None = None
    activation: Activation = "identity"
    num_calls: int = 1
    shift_name: str | None = None
    source: str | None = None
    view: WeightView | None = None
    bias_view: WeightView | None = None
    part: str = ""
    is_router: bool = False
    is_table: bool = False

    @property
    def stored_name(self) -> str:
        """Name of the weight in a checkpoint: of its parameter, with the part where it is not alone in it."""
        return self.weight_name + self.part

    def weight_of(self, parameter: Tensor) -> Tensor:
        """The weight in the shape of the geometry, as the layer computes with it."""
        return parameter if self.view is None else self.view.value(parameter)

    def stored(self, parameter: Tensor, weight: Tensor, changed: Tensor | None = None) -> Tensor:
        """The parameter with a weight, in the shape of the geometry, in its place. changed: a copy of it that has the
        weights of other sites in their places already, and takes this one too."""
        if self.view is None:
            return weight
        changed = parameter.clone() if changed is None else changed
        self.view.of(changed).copy_(weight)
        return changed

    def bias_of(self, tensor: Tensor) -> Tensor:
        """The layer's bias `(O,)` in the tensor named bias_name."""
        return tensor if self.bias_view is None else self.bias_view.value(tensor)

    def shifted(self, tensor: Tensor, shift: Tensor) -> Tensor:
        """The tensor named shift_name, changed so that the layer's outputs grow by shift `(O,)`."""
        shift = shift.to(tensor.device, tensor.dtype)
        if self.shift_name != self.bias_name:
            return tensor - shift
        if self.bias_view is None:
            return tensor + shift
        changed = tensor.clone()
        self.bias_view.of(changed).add_(shift)
        return changed


@dataclass(frozen=True)
class Unit:
    """Sites that are reached and committed together: one layer, or the experts that one operation runs."""

    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        """That of its site; of experts the name of their parameter."""
        return self.sites[0].name if len(self.sites) == 1 else self.sites[0].name.removesuffix(self.sites[0].part)

    @property
    def site(self) -> Site:
        (site,) = self.sites
        return site


@dataclass(frozen=True)
class FloatParameter:
    """A parameter that stays in float, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def largest_first(parameters: Iterable[FloatParameter]) -> list[FloatParameter]:
    """What a user should look at first."""
    return sorted(parameters, key=lambda parameter: -parameter.numel)


@dataclass(frozen=True)
class Batch:
    """What both streams hold at one call of a unit for one microbatch.

    index: a place of its own, the same on any number of ranks: (microbatch) * num_calls + (call). x_hat: the input,
    from the quantized prefix. x: the float input. y: `W x + b`, before batch norm and activation. mask: `(N, T)`,
    nonzero where a token counts, or None. size: samples. ends: where the rows of each site of a unit end, which lie
    one after the other; None: the unit is one site.
    """

    index: int
    x_hat: Tensor
    x: Tensor
    y: Tensor
    mask: Tensor | None
    size: int
    ends: tuple[int, ...] | None = None

    def of_site(self, place: int) -> "Batch":
        """What one of the unit's sites sees."""
        if self.ends is None:
            return self
        rows = slice(self.ends[place - 1] if place else 0, self.ends[place])
        x = self.x[rows]
        return replace(self, x_hat=x if self.x_hat is self.x else self.x_hat[rows], x=x, y=self.y[rows], ends=None)

    def keep(self, channel_dim: int) -> Tensor | None:
        """Which rows of the layer's outputs count: bool of y's shape without the channels, on y's device; None: all."""
        keep = rows_that_count(self.mask, tuple(self.y.movedim(channel_dim, -1).shape[:-1]))
        return None if keep is None else keep.to(self.y.device)


class Walker(Protocol):
    """Two streams through a model, float and quantized, unit by unit.

    units: in the order in which they are reached, that of their last calls. float_parameters: those that are not the
    weight of a site. notes: what a user should know about this capture (for instance that export failed and why). rows:
    of each unit in a microbatch, by name, where they are known before the walk.
    """

    units: tuple[Unit, ...]
    float_parameters: tuple[FloatParameter, ...]
    notes: list[str]
    rows: Mapping[str, float]

    def tensor(self, name: str) -> Tensor:
        """Parameter or buffer by its name in the model's state dict."""

    def start(self, microbatches: Microbatches) -> None:
        """Read the data and set both streams before the first unit."""

    def reach(self, unit: Unit) -> list[Batch]:
        """Advance both streams up to the unit's last call, the float stream also through it; batches of all calls."""

    def commit(self, unit: Unit, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors (weights, biases) into the model by name, and let the quantized stream pass the unit. `reach` may
        be left out before it, where nothing is to be learned."""

    def finish(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Run the rest of the model: (microbatch index, float output, quantized output), for each output of real
        numbers, without the rows that are padding."""


def unusable_values(weight: Tensor) -> str | None:
    """Why numbers like these cannot be rounded; None: they can."""
    if not weight.is_floating_point():
        return f"its dtype is {weight.dtype}, not a real floating-point type"
    return None if weight.numel() else "has no elements"


def rows_that_count(mask: Tensor | None, leading: tuple[int, ...]) -> Tensor | None:
    """Which rows of an output count, bool of shape `leading` (the output's, less its channels); None: all.

    mask: `(N, T)`. Rows are tokens when the shapes agree or the tokens were flattened; else (pooled, say) all count.
    """
    if mask is None or (leading != tuple(mask.shape) and leading != (mask.numel(),)):
        return None
    return (mask != 0).reshape(leading)


def counting_rows(output: Tensor, mask: Tensor | None) -> Tensor:
    """Rows `(rows, channels)` of a model's output that count; the whole output when the mask does not fit it."""
    keep = rows_that_count(mask, tuple(output.shape[:-1]))
    # Without padding there is nothing to copy.
    return output if keep is None or bool(keep.all()) else output[keep.to(output.device)]
