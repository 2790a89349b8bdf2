"""What the model capture hands to the walk: sites, activations at a site, parameters left in float.

A *site* is one layer whose weight is rounded. The two captures (`graph.py` by torch.export, `replay.py` by hooks)
describe a model with the same words, so nothing above them knows which one is at work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from distributed_adaround.numerics.layers import LayerGeometry

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
    num_calls: how often the layer runs in one forward; rounding is learned at the first call. shift_name: tensor that
    can shift the layer's outputs and nothing else, its bias or the mean of the batch norm behind it, or None.
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

    def shifted(self, tensor: Tensor, shift: Tensor) -> Tensor:
        """The tensor named shift_name, changed so that the layer's outputs grow by shift `(O,)`."""
        shift = shift.to(tensor.device, tensor.dtype)
        return tensor + shift if self.shift_name == self.bias_name else tensor - shift


@dataclass(frozen=True)
class FloatParameter:
    """A parameter that stays in float, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class ModelInputs:
    """One microbatch as the model takes it. mask: `(N, T)`, nonzero where a token counts, or None."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    mask: Tensor | None = None


class Microbatches(Protocol):
    """The calibration data of one rank. Microbatch indices are global: the same on any number of ranks."""

    @property
    def total(self) -> int:
        """Number of microbatches of the whole job."""

    @property
    def owned(self) -> Sequence[int]:
        """Global indices of this rank's microbatches, ascending. May be empty."""

    def load(self, index: int) -> ModelInputs:
        """Any one microbatch, on the host."""

    def __iter__(self) -> Iterator[tuple[int, ModelInputs]]:
        """This rank's microbatches as (index, inputs), in the order of `owned`."""


@dataclass
class SiteActivations:
    """What both streams hold at a site, one entry per owned microbatch.

    indices: global microbatch indices. inputs: x̂, from the quantized prefix. float_inputs: x. float_outputs: the float
    layer's output `W x + b`, before batch norm and activation. masks: see ModelInputs. batch_sizes: samples. source:
    name of what the inputs are; sites with the same source have the same inputs. None: not known.
    """

    indices: list[int]
    inputs: list[Tensor]
    float_inputs: list[Tensor]
    float_outputs: list[Tensor]
    masks: list[Tensor | None]
    batch_sizes: list[int] = field(default_factory=list)
    source: str | None = None


class Walker(Protocol):
    """Two streams through a model, float and quantized, site by site."""

    @property
    def sites(self) -> Sequence[Site]:
        """All sites in the order in which they are reached."""

    @property
    def float_parameters(self) -> Sequence[FloatParameter]:
        """Parameters that are not the weight of a site, each with its reason."""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know about this capture (for instance that export failed and why)."""

    def tensor(self, name: str) -> Tensor:
        """Parameter or buffer by its name in the model's state dict."""

    def start(self, microbatches: Microbatches) -> None:
        """Read the data and set both streams before the first site."""

    def reach(self, site: Site) -> SiteActivations:
        """Advance both streams up to the site's inputs; the float stream also through the site."""

    def commit(self, site: Site, weight: Tensor | None, shift: Tensor | None = None) -> None:
        """Put the dequantized weight, in torch's shape, into the model (None: it stays as it is), shift the layer's
        outputs by `(O,)` through the tensor named site.shift_name, and let the quantized stream pass the site. `reach`
        may be left out before it, where nothing is to be learned."""

    def finish(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Run the rest of the model: (microbatch index, float output, quantized output), for each output of real
        numbers, without the rows that are padding."""


def row_mask(mask: Tensor | None, leading: tuple[int, ...]) -> Tensor | None:
    """Which rows count, bool of shape `leading`, or None for all.

    mask: `(N, T)` of a microbatch. leading: shape of an output without its channels. Rows belong to tokens
    when the shapes agree or the tokens were flattened; otherwise (pooled outputs, say) all rows count.
    """
    if mask is None or (leading != tuple(mask.shape) and leading != (mask.numel(),)):
        return None
    return (mask != 0).reshape(leading)


def counting_rows(output: Tensor, mask: Tensor | None) -> Tensor:
    """Rows `(rows, channels)` of a model's output that count; the output as it is when the mask does not fit it."""
    keep = row_mask(mask, tuple(output.shape[:-1]))
    # Without padding there is nothing to copy.
    return output if keep is None or bool(keep.all()) else output[keep.to(output.device)]
