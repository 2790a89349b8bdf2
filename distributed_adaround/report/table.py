"""What became of each layer, as rows and as a table."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Protocol, Self, SupportsIndex, overload

from rich.table import Table

from distributed_adaround import errors
from distributed_adaround.capture.sites import FloatParameter
from distributed_adaround.files import jsontext
from distributed_adaround.metrics.figures import MetricFigures
from distributed_adaround.report import text
from distributed_adaround.report.coverage import Coverage
from distributed_adaround.solve.record import LayerFigures

WIDTH = 120
_MIN_NAME = 8
_MAX_SHAPE = 14
_HELD_OUT = "held-out"
_HEADER = ("layer", "kind", "shape", "nearest", "soft", "hard", _HELD_OUT, "SQNR dB", "flipped", "unsettled", "seconds",
           "note")  # fmt: skip
_NUMBERS = frozenset(_HEADER) - {"layer", "kind", "shape", "note"}
# Of weights the number; of outputs the largest difference over the largest output.
EXPORT_HEADER = ("format", "weights", "different", "outputs", "allowed", "note")
_LEGEND = (
    "nearest, soft, hard: relative output error (squared error / squared output) on the calibration data of nearest "
    "rounding, of the soft weights at the end and of the result; held-out: of the result on other data. flipped: "
    "weights not at their nearest grid value. unsettled: soft values still between 0.01 and 0.99. Totals: means of the "
    "errors and of SQNR over layers, shares of all weights."
)


@dataclass(frozen=True)
class Totals:
    """Figures over all layers: means of errors and SQNR over layers where they are finite, shares of all weights."""

    num_layers: int
    num_weights: int
    nearest_error: float
    soft_error: float
    hard_error: float
    held_out_error: float
    sqnr_db: float
    flipped: float
    unsettled: float
    num_kept_nearest: int
    num_resumed: int
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """JSON values; a figure that is not finite becomes None."""
        return {name: jsontext.json_safe(value) for name, value in asdict(self).items()}


class ExportFigures(Protocol):
    """What came of one format, read again by its own library."""

    @property
    def cells(self) -> tuple[str, ...]:
        """Those of EXPORT_HEADER."""


def export_table(rows: Iterable[ExportFigures]) -> Table:
    return text.layout(EXPORT_HEADER, (row.cells for row in rows), {"weights", "different", "outputs", "allowed"})


class LayerTable(tuple[LayerFigures, ...]):
    """The rows of all layers in the order of the walk. Prints as a table, in notebooks as HTML.

    float_parameters: what stayed in float, with the reasons. output_error: squared error of the network's outputs over
    their squared values, on the calibration data; held_out_output_error: on other data; NaN where it is not known.
    metrics: what the job measured besides, of the float and of the quantized network. exports: what came of the formats
    that it wrote, read again.
    """

    float_parameters: tuple[FloatParameter, ...]
    output_error: float
    held_out_output_error: float
    metrics: tuple[MetricFigures, ...]
    exports: tuple[ExportFigures, ...]

    def __new__(
        cls,
        rows: Iterable[LayerFigures] = (),
        float_parameters: Iterable[FloatParameter] = (),
        output_error: float = math.nan,
        held_out_output_error: float = math.nan,
        metrics: Iterable[MetricFigures] = (),
        exports: Iterable[ExportFigures] = (),
    ) -> Self:
        table = super().__new__(cls, rows)
        table.float_parameters = tuple(float_parameters)
        table.output_error, table.held_out_output_error = output_error, held_out_output_error
        table.metrics, table.exports = tuple(metrics), tuple(exports)
        return table

    @overload
    def __getitem__(self, index: SupportsIndex) -> LayerFigures: ...
    @overload
    def __getitem__(self, index: slice) -> LayerTable: ...
    def __getitem__(self, index: SupportsIndex | slice) -> LayerFigures | LayerTable:
        return LayerTable(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    @property
    def coverage(self) -> Coverage:
        return Coverage.of((row.shape for row in self), self.float_parameters)

    @property
    def totals(self) -> Totals:
        return Totals(
            num_layers=len(self),
            num_weights=sum(row.num_weights for row in self),
            nearest_error=_mean((row.nearest_error, 1) for row in self),
            soft_error=_mean((row.soft_error, 1) for row in self),
            hard_error=_mean((row.hard_error, 1) for row in self),
            held_out_error=_mean((row.held_out_error, 1) for row in self),
            sqnr_db=_mean((row.sqnr_db, 1) for row in self),
            flipped=_mean((row.flipped, row.num_weights) for row in self),
            unsettled=_mean((row.unsettled, row.num_weights) for row in self),
            num_kept_nearest=sum(row.kept_nearest for row in self),
            num_resumed=sum(row.resumed for row in self),
            seconds=sum(row.seconds for row in self if math.isfinite(row.seconds)),
        )

    def to_dicts(self) -> list[dict[str, object]]:
        return [row.to_dict() for row in self]

    def __repr__(self) -> str:
        return f"<LayerTable of {len(self)} layers>"

    def __str__(self) -> str:
        """Plain text of at most 120 columns: coverage, title, one line per layer, totals, numbered notes, the network's
        error, metrics, legend."""
        title, header, body, totals, notes = self._cells()

        def table(longest_name: int) -> Table:
            rows = [(errors.shorten(name, longest_name), *others) for name, *others in body]
            return text.layout(header, rows, _NUMBERS, totals)

        longest = max((len(line[0]) for line in body), default=0)
        excess = max(text.console(text.ANY_WIDTH).measure(table(longest)).maximum - WIDTH, 0)
        listed = Table.grid(padding=(0, 1, 0, 0))
        for number, note in enumerate(notes, start=1):
            listed.add_row(f"{number}:", note)
        layers = table(max(longest - excess, _MIN_NAME))
        exports = [export_table(self.exports)] if self.exports else []
        return text.rendered(
            text.console(WIDTH), *title, layers, *([listed] if notes else []), *exports, *self._ending()
        )

    def _repr_html_(self) -> str:
        title, header, body, totals, notes = self._cells()
        head, rows = _html_row(header, "th"), "".join(_html_row(line, "td") for line in (*body, totals))
        listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        exports = ""
        if self.exports:
            lines = "".join(_html_row(row.cells, "td") for row in self.exports)
            exports = f"<table><thead>{_html_row(EXPORT_HEADER, 'th')}</thead><tbody>{lines}</tbody></table>"
        return (
            f"{_html_paragraphs(title)}<table><thead>{head}</thead><tbody>{rows}</tbody></table>"
            f"<ol>{listed}</ol>{exports}{_html_paragraphs(self._ending())}"
        )

    def _title(self) -> tuple[str, ...]:
        usual = Counter((row.format, row.solver) for row in self).most_common(1)
        title = f"{usual[0][0][0]}, solver {usual[0][0][1]}" if usual else "no layers"
        coverage = self.coverage
        warning = f"Warning: {coverage.warning}" if coverage.warning else ""
        return tuple(line for line in (f"{coverage}" if self else "", warning, title) if line)

    def _ending(self) -> tuple[str, ...]:
        errors = {"the calibration data": self.output_error, "other data": self.held_out_output_error}
        known = [f"{value:.2e} on {data}" for data, value in errors.items() if math.isfinite(value)]
        outputs = [f"Error of the network's outputs: {', '.join(known)}."] if known else []
        return (*outputs, *(f"{figures}." for figures in self.metrics), _LEGEND)

    def _cells(
        self,
    ) -> tuple[tuple[str, ...], tuple[str, ...], list[tuple[str, ...]], tuple[str, ...], list[str]]:
        """Lines of the title, header, one tuple of cells per layer, the cells of the totals, and the notes that the
        cells number. Format and solver stand in the title; a layer that differs says so in a note. What was measured on
        other data has a column where there is any."""
        usual = Counter((row.format, row.solver) for row in self).most_common(1)
        notes: dict[str, int] = {}
        body = []
        for row in self:
            remarks = [] if (row.format, row.solver) == usual[0][0] else [f"{row.format}, solver {row.solver}"]
            remarks += ["learning did not beat nearest rounding, which was kept"] if row.kept_nearest else []
            remarks += ["resumed from a commit"] if row.resumed else []
            remarks += [row.note] if row.note else []
            remarks += [f"warning: {row.warning}"] if row.warning else []
            numbers = sorted(notes.setdefault(remark, len(notes) + 1) for remark in remarks)
            shape = errors.shorten("x".join(str(size) for size in row.shape), _MAX_SHAPE)
            body.append((row.name, row.kind, shape, *_figures(row), ",".join(str(number) for number in numbers)))
        last = (f"{len(self)} layers", "", f"{self.totals.num_weights:,}", *_figures(self.totals), "")
        unknown = {_HEADER.index(_HELD_OUT)} if all(math.isnan(row.held_out_error) for row in self) else set()
        header, last, *body = (_without(cells, unknown) for cells in (_HEADER, last, *body))
        return self._title(), header, body, last, list(notes)


def _without(cells: tuple[str, ...], columns: set[int]) -> tuple[str, ...]:
    return tuple(cell for column, cell in enumerate(cells) if column not in columns)


def _html_paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _html_row(cells: Iterable[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _figures(row: LayerFigures | Totals) -> tuple[str, ...]:
    values = (row.nearest_error, row.soft_error, row.hard_error, row.held_out_error)
    errors = (_number(value, ".2e") for value in values)
    shares = (_number(100 * value, ".1f", "%") for value in (row.flipped, row.unsettled))
    return (*errors, _number(row.sqnr_db, ".1f"), *shares, _number(row.seconds, ".1f"))


def _number(value: float, spec: str, unit: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{spec}}{unit}"


def _mean(weighted: Iterable[tuple[float, int]]) -> float:
    """Mean of (value, weight) pairs over the finite values; NaN when there is none."""
    pairs = [(value, weight) for value, weight in weighted if math.isfinite(value)]
    weight_sum = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / weight_sum if weight_sum else math.nan
