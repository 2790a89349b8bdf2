"""From a model to sums and counts of a rank's samples: by a metric of the table, or by a function of the user."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distributed_adaround.capture.calls import forward_failed
from distributed_adaround.capture.forward import run_once, undisturbed
from distributed_adaround.data.encoder import LABELS, ROW_MASK
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import AdaRoundError, InputError, first_line, shorten
from distributed_adaround.metrics.data import EvaluationData
from distributed_adaround.metrics.metric import Metric, Seen
from distributed_adaround.runtime.imports import implementation, load_callable
from distributed_adaround.spec.evaluate import METRICS, EvaluateSpec


class Judge(Protocol):
    """unit, value: as those of Metric, for all its figures."""

    unit: str

    def sums(self, model: nn.Module, data: EvaluationData, device: torch.device) -> dict[str, Tensor]:
        """By name, `(samples of this rank, 2)`, float64 on the host, in the order of the data. Raises InputError."""

    def value(self, mean: float) -> tuple[float, float]: ...


def needs_labels(spec: EvaluateSpec) -> bool:
    """Whether the data must have the class of each sample."""
    return spec.metric is not None and bool(implementation(METRICS, spec.metric).needs_labels)


def make_judge(spec: EvaluateSpec, data: EvaluationData, folder: Path | None) -> Judge:
    """folder: of the job file. Raises InputError when the function does not exist, or labels are missing."""
    if spec.function is not None:
        return FunctionJudge(spec.function, load_callable(spec.function, folder))
    assert spec.metric is not None
    metric: Metric = implementation(METRICS, spec.metric)()
    names = [info.name for info in data.manifest.fields]
    if metric.needs_labels and LABELS not in names:
        what = f"{spec.metric} needs the field {LABELS!r}, the data have {', '.join(names)}"
        raise InputError(f"{what}; name it by evaluate.data.fields, or choose another metric")
    return MetricJudge(spec.metric, metric)


class MetricJudge(Judge):
    """By a metric of the table: one forward for each microbatch."""

    def __init__(self, name: str, metric: Metric) -> None:
        self._name, self._metric = name, metric
        self.unit = metric.unit

    def sums(self, model: nn.Module, data: EvaluationData, device: torch.device) -> dict[str, Tensor]:
        found = [torch.empty(0, 2, dtype=torch.float64)]
        for index, fields, inputs in data:
            try:
                output = run_once(model, inputs, device, seed=index)
            except Exception as error:
                raise forward_failed(index, error, inputs.hint) from error
            sums = self._metric.sums(Seen(index, fields, inputs, output)).cpu()
            if len(sums) != data.samples(index):
                what = f"microbatch {index} became {len(sums)} samples, not {data.samples(index)}"
                raise InputError(f"{what}; data.transform must keep their number")
            found.append(sums)
        return {self._name: torch.cat(found)}

    def value(self, mean: float) -> tuple[float, float]:
        return self._metric.value(mean)


class FunctionJudge(Judge):
    """By a function of the user, which gives numbers of samples by name."""

    unit = ""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function

    def sums(self, model: nn.Module, data: EvaluationData, device: torch.device) -> dict[str, Tensor]:
        samples = len(data.rows)
        if not samples:
            return {}
        named = f"function {self._name!r}"
        with undisturbed(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                returned = self._function(model, _batches(data, device))
            except AdaRoundError:
                raise
            except Exception as error:
                raise InputError(f"{named} failed: {first_line(error)}") from error
        if not isinstance(returned, Mapping) or not returned:
            what = "an empty dict" if isinstance(returned, Mapping) else f"a {type(returned).__name__}"
            raise InputError(f"{named} returned {what}; it must return {{name: one number for each sample}}")
        found = {}
        for name, given in returned.items():
            if not isinstance(name, str) or not name.isprintable() or not name:
                raise InputError(f"{named} returned the name {shorten(repr(name), 80)}; names must be plain text")
            numbers = _numbers(given, f"{named}: {shorten(name, 80)!r}", samples)
            found[name] = torch.stack([numbers, torch.ones_like(numbers)], dim=1)
        return found

    def value(self, mean: float) -> tuple[float, float]:
        return mean, 1.0


def _batches(data: EvaluationData, device: torch.device) -> Iterator[dict[str, Any]]:
    """Fields and labels, on the device. Random numbers of a microbatch depend on its index alone."""
    for index, fields, _ in data:
        shown: dict[str, object] = {name: value for name, value in fields.items() if name != ROW_MASK}
        inputs = ModelInputs((), shown).narrowed(data.binding.dtype).to(device)
        torch.manual_seed(index)
        yield inputs.kwargs


def _numbers(given: Any, named: str, samples: int) -> Tensor:
    """`(samples,)`, float64 on the host. Raises InputError."""
    try:
        numbers = torch.as_tensor(given).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{named} is a {type(given).__name__} that is not of numbers: {first_line(error)}") from None
    if numbers.shape != (samples,):
        what = f"has shape {tuple(numbers.shape)}, but there are {samples} samples on this rank"
        raise InputError(f"{named} {what}; return one number for each, in order")
    return numbers
