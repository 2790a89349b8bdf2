"""What is said of exports that are not what they should be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
import toy_models
from export_tasks import finished
from torch import Tensor

from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError
from distributed_adaround.export.dequantized import DequantizedExporter
from distributed_adaround.export.exporter import ExportTask, Loaded
from distributed_adaround.export.verify import Verified, outputs_of, refuse_different, verify


class Read(DequantizedExporter):
    """Reads weights with some of them changed, and outputs with something added."""

    def __init__(self, changed: Iterable[str] = (), left_out: str = "", added: object = 0.0) -> None:
        self.changed, self.left_out, self.added = set(changed), left_out, added

    def load(self, task: ExportTask, uri: str) -> Loaded:
        weights = (
            (name, tensor + (name in self.changed))
            for name, tensor in super().load(task, uri).weights
            if name != self.left_out
        )

        def run(inputs: ModelInputs) -> Sequence[Tensor]:
            outputs = outputs_of(task.model(), inputs)
            if isinstance(self.added, float):
                return [output + self.added for output in outputs]
            return [*outputs, torch.zeros(1)]

        return Loaded(weights, run, tolerance=1e-3)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ExportTask:
    batches = [torch.randn(3, 8)]
    folder: Path = tmp_path_factory.mktemp("verify")
    task = finished(
        folder, toy_models.mlp(), batches, DequantizedExporter(), {"dtype": "int4"}, {"formats": ["dequantized"]}
    )
    DequantizedExporter().write(task, task.output.uri)
    return task


def found(task: ExportTask, read: Read) -> Verified:
    (one,) = verify(task, [read])
    return one


def test_equal_weights_and_outputs_are_fine(task: ExportTask) -> None:
    one = found(task, Read())
    # Three layers with biases, of which two share a weight.
    assert (one.weights, one.different, one.output_error, one.ok) == (6, 0, 0.0, True)
    refuse_different([one])


def test_a_changed_and_a_missing_weight_are_counted(task: ExportTask) -> None:
    one = found(task, Read(changed=["first.weight", "third.bias"]))
    assert (one.different, one.ok) == (2, False)
    one = found(task, Read(left_out="first.weight"))
    assert (one.weights, one.different, one.ok) == (5, 1, False)
    with pytest.raises(InputError, match="dequantized cannot be trusted: read again, 1 of 5 weights differ"):
        refuse_different([one])


@pytest.mark.parametrize(("added", "ok"), [(1e-6, True), (1.0, False), (math.nan, False), ("one more output", False)])
def test_outputs_are_compared_with_the_tolerance(added: object, ok: bool, task: ExportTask) -> None:
    one = found(task, Read(added=added))
    assert (one.different, one.ok) == (0, ok)
    if not ok:
        with pytest.raises(InputError, match="outputs differ by"):
            refuse_different([one])
