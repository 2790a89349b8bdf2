"""From lines of results to rows: means over layers, then mean and spread over seeds. Knows no torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]

# What one row is about: lines that agree in these differ in seed (and layer) only.
GROUP = ("part", "case", "format", "solver", "samples", "settings", "ranks", "device", "vary_samples", "partial")
BASELINES = ("gptq", "minibatch", "minibatch@10000")


@dataclass(frozen=True)
class Figure:
    """Mean over seeds, and the sample standard deviation (0 for one seed)."""

    mean: float
    spread: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        mean = sum(values) / len(values)
        squares = sum((value - mean) ** 2 for value in values)
        return cls(mean, math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0, len(values))


@dataclass(frozen=True)
class Row:
    """One configuration. layers: which layers its means are over. problem: why it has no figures, or why not all.
    note: what the runs say about themselves."""

    group: Mapping[str, Any]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    layers: frozenset[str] = frozenset()
    problem: str = ""
    note: str = ""

    @property
    def label(self) -> str:
        """The solver, and what sets this row apart from others of the same solver."""
        ranks = self.group.get("ranks") or 1
        parts = [self.group["solver"], *(self.group.get("settings") or ())]
        return " ".join(parts if ranks == 1 else [*parts, f"({ranks} ranks)"])

    @property
    def panel(self) -> tuple[Any, ...]:
        """Rows that may be compared: same part, case, format, samples and device."""
        return tuple(_hashable(self.group.get(name)) for name in ("part", "case", "format", "samples", "device"))


def rows_of(records: Iterable[Record], part: str) -> list[Row]:
    """One row for each configuration of a part, in the order of the first line of each."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        if record["part"] == part:
            groups[tuple(_hashable(record.get(name)) for name in GROUP)].append(record)
    return [_row({name: members[0].get(name) for name in GROUP}, members) for members in groups.values()]


def _row(group: Mapping[str, Any], members: Sequence[Record]) -> Row:
    good = [record for record in members if "refused" not in record and "failed" not in record]
    failed = [record for record in members if "failed" in record]
    refused = [record for record in members if "refused" in record]
    problem = ""
    if failed:
        problem = f"{len(failed)} of {len(members)} failed: {failed[0]['failed']}"
    elif refused and not good:
        problem = f"refused: {refused[0]['refused']}"
    by_seed: dict[int, list[Record]] = defaultdict(list)
    for record in good:
        by_seed[record["seed"]].append(record)
    complete = set().union(*({record.get("layer") for record in lines} for lines in by_seed.values()))
    # A seed that was cut has other layers than the rest, and its mean would not compare.
    whole = [lines for lines in by_seed.values() if {record.get("layer") for record in lines} == complete]
    if len(whole) < len(by_seed):
        problem = f"{len(by_seed) - len(whole)} of {len(by_seed)} seeds lack layers and are left out. {problem}".strip()
    seeds = [_mean_over_layers(lines) for lines in whole]
    note = next((record["note"] for record in good if record.get("note")), "")
    names = {name: None for seed in seeds for name in seed}
    figures = {name: Figure.of([seed[name] for seed in seeds if name in seed]) for name in names}
    return Row(group, figures, frozenset(layer for layer in complete if layer is not None), problem, note)


def _mean_over_layers(lines: Sequence[Record]) -> dict[str, float]:
    """Means of all numbers over the lines of one seed; metrics of a network come under their own names."""
    sums: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        for name, value in {**line, **line.get("metrics", {})}.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name not in (*GROUP, "seed"):
                sums[name].append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def ratio(row: Row, baseline: str, rows: Iterable[Row], figure: str) -> float | None:
    """A row's figure over that of the baseline in the same panel; None where there is none over the same layers.

    A baseline with the row's own settings comes first, then the one without any.
    """
    settings = tuple(row.group.get("settings") or ())
    candidates = [
        other
        for other in rows
        if other.panel == row.panel
        and other.group["solver"] == baseline
        and (other.group.get("ranks") or 1) == 1
        and other.layers == row.layers
        and tuple(other.group.get("settings") or ()) in (settings, ())
    ]
    other = max(candidates, key=lambda candidate: len(candidate.group.get("settings") or ()), default=None)
    ours, theirs = row.figures.get(figure), None if other is None else other.figures.get(figure)
    return ours.mean / theirs.mean if ours and theirs and theirs.mean else None


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
