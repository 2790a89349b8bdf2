"""The metrics of a model before its layers are rounded, and after. The same bytes on any number of ranks."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from distributed_adaround.errors import InputError
from distributed_adaround.metrics.data import EvaluationData
from distributed_adaround.metrics.figures import MetricFigures, compare, estimate
from distributed_adaround.metrics.judges import Judge
from distributed_adaround.metrics.on_device import on_device
from distributed_adaround.runtime.comm import Comm, agreed, phase

logger = logging.getLogger(__name__)


class Evaluation:
    """First `measure_float`, then, when all layers of the same model are rounded, `figures`."""

    def __init__(self, judge: Judge, data: EvaluationData, device: torch.device, comm: Comm) -> None:
        self._judge, self._data, self._device, self._comm = judge, data, device, comm
        self._before: dict[str, Tensor] = {}

    def measure_float(self, model: nn.Module | ExportedProgram) -> None:
        """A collective. Raises InputError when the metric cannot be had, or is not finite."""
        self._before = self._measure(model)
        for name, sums in self._before.items():
            broken = (~sums.isfinite().all(dim=1)).nonzero().flatten().tolist()
            value = estimate(sums, self._judge.value).value
            if broken or not math.isfinite(value):
                where = f"on {len(broken)} samples, the first of them {broken[0]}" if broken else "over all samples"
                what = f"evaluate: {name} of the float model is not finite {where}"
                raise agreed(InputError(f"{what}; look at these data, or choose another metric"))
            logger.info("%s of the float model: %.4g", name, value)

    def figures(self, model: nn.Module | ExportedProgram) -> tuple[MetricFigures, ...]:
        """A collective. Raises InputError when the metric cannot be had."""
        after = self._measure(model)
        if after.keys() != self._before.keys():
            what = f"{', '.join(after)} of the quantized model and {', '.join(self._before)} of the float model"
            raise agreed(InputError(f"evaluate: the function returned {what}; it must return the same names"))
        return tuple(
            compare(name, self._judge.unit, before, after[name], self._judge.value, self._data.calibrated)
            for name, before in self._before.items()
        )

    def _measure(self, model: nn.Module | ExportedProgram) -> dict[str, Tensor]:
        """Sums and counts of all samples, `(samples, 2)` by name, alike on all ranks."""
        with phase(self._comm, "evaluate the model"), naming_evaluation(), on_device(model, self._device) as module:
            own = self._judge.sums(module, self._data, self._device)
        return _of_all_ranks(own, self._data.rows, self._data.manifest.num_samples, self._comm)


@contextmanager
def naming_evaluation() -> Iterator[None]:
    """What is wrong with its data or metric is told as such."""
    try:
        yield
    except InputError as error:
        error.args = (f"evaluate: {error}",)
        raise


def _of_all_ranks(own: dict[str, Tensor], rows: Sequence[int], samples: int, comm: Comm) -> dict[str, Tensor]:
    """Each rank's values in the places of its samples: adding zeros to them is exact."""
    named = [names for names in comm.all_gather_object(list(own)) if names]
    odd = next((names for names in named if names != named[0]), None)
    if odd is not None:
        what = f"the function returned {', '.join(named[0])} on one rank and {', '.join(odd)} on another"
        raise agreed(InputError(f"evaluate: {what}; it must return the same names"))
    sums = torch.zeros(samples, len(named[0]), 2, dtype=torch.float64)
    if own:
        sums[list(rows)] += torch.stack([own[name] for name in named[0]], dim=1)
    return dict(zip(named[0], comm.all_reduce(sums).unbind(dim=1), strict=True))
