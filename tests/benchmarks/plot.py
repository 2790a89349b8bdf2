"""Error against seconds, log-log, one panel for each case and format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from tests.benchmarks.aggregate import Record, Row, rows_of

# Pictures go to files; there may be no screen.
plt.switch_backend("Agg")

# Part -> (figure of the y axis, what it is).
_PARTS = {
    "layers": ("error", "held-out output error, mean over layers"),
    "networks": ("layer_error", "held-out layer error in the network"),
}
_COLUMNS = 4
_MARKERS = "osD^vP*Xph<>"


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write one picture for each part that has results; returns their paths."""
    paths = []
    for part, (figure, label) in _PARTS.items():
        rows = [row for row in rows_of(records, part) if {figure, "seconds"} <= row.figures.keys()]
        if rows:
            paths.append(_draw_part(rows, figure, label, folder / f"{part}.png"))
    return paths


def _draw_part(rows: Sequence[Row], figure: str, label: str, path: Path) -> Path:
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(row.panel, []).append(row)
    families = list(dict.fromkeys(_family(row) for row in rows))
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    drawing, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.6 * lines + 0.25 * (len(families) // columns + 2)), squeeze=False
    )
    for axis, (panel, members) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(axis, panel, members, families, figure)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    drawing.supxlabel("seconds per layer" if figure == "error" else "seconds")
    drawing.supylabel(label)
    handles = [plt.Line2D([], [], label=name, **_style(families.index(name))) for name in families]
    drawing.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize="small")
    drawing.set_layout_engine("constrained")
    drawing.savefig(path, dpi=150)
    plt.close(drawing)
    return path


def _draw_panel(axis: Any, panel: tuple[Any, ...], rows: Sequence[Row], families: Sequence[str], figure: str) -> None:
    """Numbers of steps of one solver are joined by a line; bars are the spread over seeds."""
    _, case, number_format, samples, device = panel
    axis.set_title(f"{case}, {number_format}, {samples[0]} samples, {device}", fontsize="small")
    for name in families:
        members = sorted((row for row in rows if _family(row) == name), key=lambda row: row.figures["seconds"].mean)
        if members:
            seconds, errors = ([row.figures[key].mean for row in members] for key in ("seconds", figure))
            spread = [row.figures[figure].spread for row in members]
            axis.errorbar(seconds, errors, yerr=spread, capsize=2, **_style(families.index(name)))
    for direction in ("x", "y"):
        axis.set(**{f"{direction}scale": "log"})
        ticks = getattr(axis, f"{direction}axis")
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize="small")
    axis.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)


def _family(row: Row) -> str:
    """The row's label without the number of steps."""
    solver = row.group["solver"]
    return row.label.replace(solver, solver.partition("@")[0], 1)


def _style(index: int) -> dict[str, Any]:
    return {"color": f"C{index % 10}", "marker": _MARKERS[index % len(_MARKERS)], "linewidth": 1, "markersize": 5}
