"""What a metric is: of every sample a sum and a count, from which figures and their standard errors follow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from distributed_adaround.capture.forward import real_tensors
from distributed_adaround.data.encoder import DECODER_INPUT, DECODER_MASK, ROW_MASK
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError


@dataclass(frozen=True)
class Seen:
    """A microbatch, and what the model made of it. index: of the microbatch, global. fields: `(N, ...)` each, by name,
    with data.encoder.LABELS where the data have it. inputs: the same as the model's arguments, without labels."""

    index: int
    fields: Mapping[str, Tensor]
    inputs: ModelInputs
    output: Any

    @property
    def mask(self) -> Tensor | None:
        """Nonzero where a token of the output counts, `(N, T)`: of the decoder, where the model has one."""
        if DECODER_INPUT in self.fields:
            return self.fields.get(DECODER_MASK, self.fields.get(ROW_MASK))
        return self.inputs.mask

    @property
    def first_output(self) -> Tensor:
        """The first output of real numbers, `(N, ...)`. Raises InputError."""
        found = real_tensors(self.output)
        samples = self.inputs.size
        if not found or found[0].shape[:1] != (samples,):
            what = f"is of shape {tuple(found[0].shape)}" if found else "is no tensor of real numbers"
            raise InputError(f"the model's output {what}; its first axis must be the {samples} samples")
        return found[0]

    @property
    def logits(self) -> Tensor:
        """The output `logits`, or the first one of real numbers, `(N, ...)`. Raises InputError."""
        named = self.output.get("logits") if isinstance(self.output, Mapping) else getattr(self.output, "logits", None)
        return named if isinstance(named, Tensor) else self.first_output


class Metric(Protocol):
    """A way to judge a model. One object sees all microbatches of a rank, first with the float model, then with the
    quantized one.

    needs_labels: the data must have data.encoder.LABELS. unit: of its figures.
    """

    needs_labels: bool = False
    unit: str = ""

    def sums(self, seen: Seen) -> Tensor:
        """`(N, 2)`, float64: for each sample a sum, and of how many things it is one. Raises InputError."""

    def value(self, mean: float) -> tuple[float, float]:
        """The figure for a mean, which is all sums over all counts; and the derivative of it there."""
        return mean, 1.0
