"""Markdown tables of the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.benchmarks.aggregate import BASELINES, Figure, Record, Row, ratio, rows_of

# Figure of a network -> (heading, factor). What no row of a panel has gets no column.
_NETWORK_COLUMNS = {
    "top1": ("top-1 %", 1.0),
    "spearman": ("Spearman", 1.0),
    "cosine": ("cosine", 1.0),
    "perplexity": ("perplexity", 1.0),
    "layer_error": ("layer error", 1.0),
    "output_error": ("output error", 1.0),
    "seconds": ("seconds", 1.0),
    "peak_host": ("peak MiB", 2.0**-20),
    "peak_device": ("peak GPU MiB", 2.0**-20),
    "sent_bytes": ("sent MB", 1e-6),
}


def markdown(records: Sequence[Record]) -> str:
    """All parts that have results."""
    parts = [_layers(rows_of(records, "layers")), _networks(rows_of(records, "networks")), _blocks(records)]
    return "\n".join(part for part in parts if part)


def _panels(rows: Iterable[Row]) -> dict[tuple[object, ...], list[Row]]:
    panels: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(row.panel, []).append(row)
    return panels


def _layers(rows: Sequence[Row]) -> str:
    text = []
    for (_, case, number_format, samples, device), members in _panels(rows).items():
        text.append(f"\n### Layers of {case}, {number_format} ({_samples(samples)}, {device})\n")
        if shared := _shared_problem(members):
            text.append(shared)
            continue
        head = ["solver", "layers", "held-out error", "seconds", "of it solver", "seeds"]
        lines = []
        for row in members:
            cells = [
                str(len(row.layers)),
                *(_figure(row.figures.get(name)) for name in ("error", "seconds", "solver_seconds")),
                str(max((figure.count for figure in row.figures.values()), default=0)),
            ]
            ratios = [_number(ratio(row, baseline, members, "error"), 3) for baseline in BASELINES]
            times = [_number(ratio(row, baseline, members, "seconds"), 3) for baseline in BASELINES]
            lines.append([row.label, *cells, *ratios, *times, row.problem])
        head += [f"error / {name}" for name in BASELINES] + [f"time / {name}" for name in BASELINES] + ["note"]
        text.append(_table(head, lines))
    return "\n".join(text)


def _networks(rows: Sequence[Row]) -> str:
    text = []
    for (_, case, number_format, samples, device), members in _panels(rows).items():
        names = [name for name in _NETWORK_COLUMNS if any(name in row.figures for row in members)]
        text.append(f"\n### {case}, {number_format} ({_samples(samples)}, {device})\n")
        if shared := _shared_problem(members):
            text.append(shared)
            continue
        lines = []
        for row in members:
            cells = [_figure(row.figures.get(name), _NETWORK_COLUMNS[name][1]) for name in names]
            seeds = str(max((figure.count for figure in row.figures.values()), default=0))
            lines.append([row.label, *cells, seeds, _note(row)])
        text.append(_table(["solver", *(_NETWORK_COLUMNS[name][0] for name in names), "seeds", "note"], lines))
    return "\n".join(text)


def _shared_problem(rows: Sequence[Row]) -> str:
    """What stops every row of a panel, where it is the same for all of them."""
    problems = {row.problem for row in rows if not row.figures}
    return problems.pop() if len(problems) == 1 and not any(row.figures for row in rows) else ""


def _note(row: Row) -> str:
    return " ".join(part for part in (row.problem, row.note) if part)


def _blocks(records: Sequence[Record]) -> str:
    lines = [record for record in records if record["part"] == "block"]
    if not lines:
        return ""
    head = ["device", "solver", "shape", "tokens", "seconds", "ceiling seconds", "share of the ceiling", "note"]
    cells = [
        [
            str((line.get("machine") or {}).get("gpu") or line["device"]),
            line["solver"],
            line["shape"],
            str(line.get("tokens", "")),
            *(_number(line.get(name), 4) for name in ("seconds", "ceiling_seconds", "share")),
            line.get("refused") or line.get("failed") or "",
        ]
        for line in lines
    ]
    return "\n### One decoder block\n\n" + _table(head, cells)


def _samples(samples: object) -> str:
    calibration, held_out = samples if isinstance(samples, tuple) else ("?", "?")
    return f"{calibration} samples, {held_out} held out"


def _figure(figure: Figure | None, factor: float = 1.0) -> str:
    if figure is None:
        return ""
    spread = f" ± {figure.spread * factor:.1g}" if figure.count > 1 else ""
    return f"{figure.mean * factor:.4g}{spread}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in row)} |" for row in rows)
