"""Which rows a site is learned from: its own, or those of all experts of its unit where its own are too few.

Fewer rows than inputs say nothing about some directions of the input, and an expert that calibration hardly ever picks
is one of the layers that other data may need. The tokens of its block are then the best guess of what it will see.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from distributed_adaround.capture.sites import Batch, Site, Unit
from distributed_adaround.runtime.comm import Comm


@dataclass(frozen=True)
class ChosenRows:
    """batches: to learn from. source: the same for sites that have the same inputs, or None: as the site says. rows: of
    the site itself, over all ranks. any: whether there are rows at all. note: what the report says of it."""

    batches: list[Batch]
    source: str | None
    rows: int
    any: bool
    note: str = ""

    @classmethod
    def none(cls) -> "ChosenRows":
        return cls([], None, 0, any=False)


def choose_rows(unit: Unit, site: Site, reached: Sequence[Batch], parameter: Tensor, comm: Comm) -> ChosenRows:
    """Rows of one site of a unit. A collective. reached: batches of the unit; parameter: with the site's weight."""
    place = unit.sites.index(site)
    own = [batch.of_site(place) for batch in reached]
    outputs = site.geometry.out_channels
    counts = comm.all_gather_object((_rows(own, outputs), _rows(reached, outputs)))
    rows, pooled = (sum(each) for each in zip(*counts, strict=True))
    if len(unit.sites) == 1 or rows >= site.geometry.inputs_per_output or pooled == rows:
        return ChosenRows(own, None, rows, rows > 0)
    weight = site.weight_of(parameter)

    def of_all(batch: Batch) -> Batch:
        return replace(batch, y=F.linear(batch.x, weight.to(batch.x)), ends=None)

    note = f"{rows} rows of its own: learned from those of all experts of {unit.name}"
    return ChosenRows([of_all(batch) for batch in reached], f"{unit.name}: all rows", rows, True, note)


def _rows(batches: Sequence[Batch], outputs: int) -> int:
    return sum(batch.y.numel() // outputs for batch in batches)
