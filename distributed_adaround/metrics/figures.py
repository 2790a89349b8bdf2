"""Figures of the float and the quantized model, with standard errors, from the same samples."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from torch import Tensor

from distributed_adaround.files import jsontext

_MAX_DECIMALS = 6
# Above it a figure is written in powers of ten.
_MAX_PLAIN = 1e7


@dataclass(frozen=True)
class MetricFigures:
    """One metric of both models. samples: those it was measured on. calibrated: some of their files are calibration
    data too. Each figure has its standard error, NaN where one sample cannot tell; that of the difference, quantized
    less float, is of pairs: both models saw the same samples."""

    name: str
    unit: str
    samples: int
    calibrated: bool
    float_value: float
    float_error: float
    quantized_value: float
    quantized_error: float
    difference: float
    difference_error: float

    @property
    def within_noise(self) -> bool:
        """Whether other samples might well show no difference: it is less than twice its standard error."""
        return abs(self.difference) < 2 * self.difference_error

    def to_dict(self) -> dict[str, object]:
        """JSON values; a figure that is not finite becomes None."""
        return {key: jsontext.json_safe(value) for key, value in asdict(self).items()} | {
            "within_noise": self.within_noise
        }

    def __str__(self) -> str:
        name = f"{self.name} in {self.unit}" if self.unit else self.name
        data = "samples of files that calibration used too" if self.calibrated else "other samples"
        errors = (self.float_error, self.quantized_error, self.difference_error)
        shown = _Shown(_decimals(errors))
        figures = (
            f"{shown.pair(self.float_value, self.float_error)} float",
            f"{shown.pair(self.quantized_value, self.quantized_error)} quantized",
            f"difference {shown.pair(self.difference, self.difference_error)}",
        )
        noise = ", within noise" if self.within_noise else ""
        return f"{name} on {self.samples} {data}: {', '.join(figures)}{noise}"


def compare(
    name: str, unit: str, before: Tensor, after: Tensor, value: Callable[[float], tuple[float, float]], calibrated: bool
) -> MetricFigures:
    """Figures from the sums and counts of each sample. before, after: `(samples, 2)`, float64, of the float and of the
    quantized model. value: `Metric.value`. Sums are exact, in any order."""
    first, second = estimate(before, value), estimate(after, value)
    pairs = [b - a for a, b in zip(first.parts, second.parts, strict=True)]
    return MetricFigures(
        name=name,
        unit=unit,
        samples=len(before),
        calibrated=calibrated,
        float_value=first.value,
        float_error=_standard_error(first.parts),
        quantized_value=second.value,
        quantized_error=_standard_error(second.parts),
        difference=second.value - first.value,
        difference_error=_standard_error(pairs),
    )


class Estimate(NamedTuple):
    """A figure, and by how much each sample moves it."""

    value: float
    parts: list[float]


def estimate(sums: Tensor, value: Callable[[float], tuple[float, float]]) -> Estimate:
    """The figure of all sums over all counts, a ratio of two means; to first order it is moved by
    `slope * (sum - mean * count) / all counts` of each sample. NaN where nothing was counted."""
    totals, counts = sums.T.tolist()
    count = _total(counts)
    if not count:
        return Estimate(math.nan, [math.nan] * len(counts))
    mean = _total(totals) / count
    figure, slope = value(mean)
    return Estimate(figure, [slope * (a - mean * b) / count for a, b in zip(totals, counts, strict=True)])


def _standard_error(parts: list[float]) -> float:
    """Of a sum of independent parts with mean 0."""
    samples = len(parts)
    if samples < 2:
        return math.nan
    return math.sqrt(samples / (samples - 1) * _total(part * part for part in parts))


def _total(values: Iterable[float]) -> float:
    held = list(values)
    try:
        return math.fsum(held)
    except (OverflowError, ValueError):  # sums beyond the range of floats, and inf - inf
        return sum(held)


class _Shown(NamedTuple):
    """How numbers of one line are written. decimals: None where no standard error tells."""

    decimals: int | None

    def number(self, value: float) -> str:
        if self.decimals is None or abs(value) >= _MAX_PLAIN:
            return f"{value:.4g}"
        return f"{value:.{self.decimals}f}"

    def pair(self, value: float, error: float) -> str:
        return self.number(value) if math.isnan(error) else f"{self.number(value)} +- {self.number(error)}"


def _decimals(errors: Iterable[float]) -> int | None:
    """Two digits of the smallest standard error."""
    known = [error for error in errors if 0 < error < math.inf]
    return None if not known else min(max(0, 1 - math.floor(math.log10(min(known)))), _MAX_DECIMALS)
