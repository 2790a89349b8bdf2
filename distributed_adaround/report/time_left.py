"""How long the layers to come will take, from what those before them took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distributed_adaround.capture.open import CapturedModel

_SAME_DIRECTION = 1e-3


@dataclass(frozen=True)
class LayerCost:
    """What a layer's seconds grow with, in any units. data: rows times weights, for passes over the data. products:
    inputs squared times outputs, for sweeps over second moments."""

    data: float
    products: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of cost."""

    data: float
    products: float

    def seconds(self, cost: LayerCost) -> float:
        return self.data * cost.data + self.products * cost.products


def fit(measured: Iterable[tuple[LayerCost, float]]) -> Rates | None:
    """The rates that explain the seconds of these layers best, none below 0; None where there is nothing to go by.

    Layers that differ in size alone cannot tell the two apart: both then have the same rate.
    """
    known = [(cost.data, cost.products, seconds) for cost, seconds in measured]
    dd, dp, pp = (sum(row[i] * row[j] for row in known) for i, j in ((0, 0), (0, 1), (1, 1)))
    dt, pt = (sum(row[i] * row[2] for row in known) for i in (0, 1))
    total = sum(row[0] + row[1] for row in known)
    if not total:
        return None
    determinant = dd * pp - dp * dp
    if determinant <= _SAME_DIRECTION * dd * pp:
        rate = sum(row[2] for row in known) / total
        return Rates(rate, rate)
    data, products = (dt * pp - pt * dp) / determinant, (pt * dd - dt * dp) / determinant
    if data < 0:
        return Rates(0.0, pt / pp)
    return Rates(data, products) if products >= 0 else Rates(dt / dd, 0.0)


def layer_costs(captured: CapturedModel) -> list[LayerCost]:
    """Of the layers that are quantized, in the order of the walk. Those of one unit share its rows."""
    costs = []
    for planned in captured.planned:
        rows = captured.walker.rows.get(planned.unit.name, 1.0) / len(planned.sites)
        for site in planned.sites if planned.format is not None else ():
            inputs, outputs = float(site.geometry.inputs_per_output), float(site.geometry.out_channels)
            costs.append(LayerCost(rows * inputs * outputs, inputs**2 * outputs))
    return costs
