"""Which share of a model's parameters a job quantizes: the first thing that its user must know."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

from distributed_adaround.capture.open import CapturedModel
from distributed_adaround.capture.sites import FloatParameter, largest_first
from distributed_adaround.errors import shorten
from distributed_adaround.runtime.comm import Comm

logger = logging.getLogger(__name__)

ENOUGH = 0.8
_NUM_NAMED, _SMALL = 5, 0.02


@dataclass(frozen=True)
class Coverage:
    """quantized: weights in `num_layers` layers. left: the parameters that stay in float, largest first."""

    num_layers: int
    quantized: int
    left: tuple[FloatParameter, ...]

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]], left: Iterable[FloatParameter]) -> Coverage:
        """shapes: of the weights that are quantized."""
        sizes = [math.prod(shape) for shape in shapes]
        return cls(len(sizes), sum(sizes), tuple(largest_first(left)))

    @classmethod
    def of_model(cls, captured: CapturedModel) -> Coverage:
        """Of a job that is planned."""
        quantized = [site for planned in captured.planned if planned.format is not None for site in planned.sites]
        return cls.of([site.geometry.weight_shape for site in quantized], captured.float_parameters)

    @property
    def total(self) -> int:
        return self.quantized + sum(parameter.numel for parameter in self.left)

    @property
    def share(self) -> float:
        return self.quantized / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % of {self.total:,} parameters are quantized, in {self.num_layers} layers"

    @property
    def warning(self) -> str:
        """Where little is quantized: the largest parameters that stay in float, with their reasons; else empty."""
        if self.share >= ENOUGH or not self.left:
            return ""
        shown = [parameter for parameter in self.left if parameter.numel >= _SMALL * self.total]
        large = (shown or self.left)[:_NUM_NAMED]
        named = "; ".join(
            f"{shorten(parameter.name, 80)} ({parameter.numel:,}): {parameter.reason}" for parameter in large
        )
        more = len(self.left) - len(large)
        rest = f"; and {more} smaller ones" if more > 0 else ""
        return f"less than {100 * ENOUGH:.0f} % of the parameters are quantized; in float stay {named}{rest}"


def tell_coverage(captured: CapturedModel, comm: Comm) -> None:
    """Among the first lines of a job, and in a script too: by rank 0."""
    found = Coverage.of_model(captured)
    if comm.rank == 0:
        logger.info("%s", found)
        if found.warning:
            logger.warning("%s", found.warning)
