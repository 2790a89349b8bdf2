"""Each export, read again by the library that users read it with, beside the quantized model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from distributed_adaround.capture.forward import real_tensors, run_once
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError
from distributed_adaround.export.exporter import Exporter, ExportTask, Loaded
from distributed_adaround.metrics.on_device import on_device

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Verified:
    """What came of one format. weights: compared. different: how many of them differ, or are missing. output_error:
    largest difference of an output over the largest output; None: the format's library runs nothing. ok: all weights
    are equal, and the error is within the tolerance. note: in a few words."""

    format: str
    weights: int
    different: int
    output_error: float | None
    tolerance: float
    note: str
    ok: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """format, weights, different, outputs, allowed, note."""
        error = self.output_error
        outputs = ("-", "-") if error is None else (f"{error:.1e}", f"{self.tolerance:.0e}")
        return (self.format, str(self.weights), str(self.different), *outputs, self.note)


def verify(task: ExportTask, exporters: Sequence[Exporter]) -> list[Verified]:
    """Compare all formats of an output. Raises InputError when one of them cannot be read."""
    model = task.model()
    reference = model.state_dict if isinstance(model, ExportedProgram) else model.state_dict()
    expected: list[tuple[ModelInputs, list[Tensor]]] = []
    found = []
    for name, exporter in zip(task.output.formats, exporters, strict=True):
        loaded = exporter.load(task, task.output.uri)
        if loaded.run is not None and not expected:
            expected = [(inputs, outputs_of(model, inputs)) for inputs in task.inputs()]
        found.append(_compared(name, loaded, reference, {layer.owner for layer in task.layers}, expected))
    return found


def refuse_different(found: Sequence[Verified]) -> None:
    """Raises InputError unless all exports are what they should be."""
    wrong = [one for one in found if not one.ok]
    if wrong:
        error = wrong[0].output_error
        outputs = "" if error is None else f", and outputs differ by {error:.1e} ({wrong[0].tolerance:.0e} is allowed)"
        what = f"{wrong[0].different} of {wrong[0].weights} weights differ from the quantized model{outputs}"
        names = ", ".join(one.format for one in wrong)
        raise InputError(
            f"output.formats: {names} cannot be trusted: read again, {what}; do not use it, and report this"
        )


def outputs_of(model: nn.Module | ExportedProgram, inputs: ModelInputs) -> list[Tensor]:
    """Outputs of real numbers, computed on the host: there all formats run, with the same kernels."""
    with on_device(model, _HOST) as module:
        return real_tensors(run_once(module, inputs, _HOST, seed=0))


def _compared(
    name: str,
    loaded: Loaded,
    reference: dict[str, Tensor],
    quantized: set[str],
    expected: Sequence[tuple[ModelInputs, list[Tensor]]],
) -> Verified:
    weights = different = 0
    missing = set(quantized)
    for key, tensor in loaded.weights:
        weights += 1
        missing.discard(key)
        own = reference[key].cpu()
        different += not (tensor.shape == own.shape and torch.equal(tensor.to(own.dtype), own))
    error = None if loaded.run is None or not expected else _output_error(loaded.run, expected)
    different += len(missing)
    ok = not different and (error is None or error <= loaded.tolerance)
    return Verified(name, weights, different, error, loaded.tolerance, loaded.note, ok)


def _output_error(
    run: Callable[[ModelInputs], Sequence[Tensor]], expected: Sequence[tuple[ModelInputs, list[Tensor]]]
) -> float:
    """NaN where outputs cannot be compared, which is within no tolerance."""
    worst = 0.0
    for inputs, outputs in expected:
        found = run(inputs)
        if [output.shape for output in outputs] != [output.shape for output in found]:
            return math.nan
        for ours, theirs in zip(outputs, found, strict=True):
            difference = (ours.double() - theirs.double()).abs().max() / ours.double().abs().max().clamp_min(1e-30)
            if math.isnan(difference):
                return math.nan
            worst = max(worst, float(difference))
    return worst
