"""Which weights of tiny random transformers are quantized: all of two and more dimensions but what
support/architectures.py lists, each with its reason."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture

from distributed_adaround import quantize
from distributed_adaround.capture.open import CapturedModel, capture_model
from distributed_adaround.data.microbatches import Microbatches
from distributed_adaround.model.source import OpenedModel
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.runtime.context import RankContext
from distributed_adaround.spec.job import MethodSpec

# What the libraries warn about is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def captured(architecture: Architecture, model: torch.nn.Module) -> CapturedModel:
    spec, comm = MethodSpec(), SoloComm()
    microbatches = Microbatches.of_list([architecture.inputs()], comm, sharded=False)
    context = RankContext.from_environment("cpu", "auto")
    return capture_model(OpenedModel(model), microbatches, spec.quantize, spec.runtime, context, comm)


# A few of each kind of storage; the others take a minute: `pytest -m slow tests/test_architectures.py` runs them too.
QUICK = ("Llama", "GPT-2", "gpt-oss", "T5", "SegFormer")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_all_matrices_but_those_that_are_listed_are_quantized(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    found = captured(architecture, model)
    assert not [note for note in found.walker.notes if not note.startswith("computed weights were folded")]
    left = {each.name: each.reason for each in found.float_parameters if len(each.shape) > 1}
    for parameter, reason in left.items():
        expected = [why for pattern, why in architecture.left.items() if re.fullmatch(pattern, parameter)]
        assert expected, f"{parameter} stays in float: {reason}"
        assert expected[0] in reason, parameter
    for pattern in architecture.left:
        assert any(re.fullmatch(pattern, parameter) for parameter in left), f"{pattern} does not stay in float"
    # Nothing is lost between the two lists.
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    sites = [site for planned in found.planned if planned.format for site in planned.sites]
    quantized = sum(math.prod(site.geometry.weight_shape) for site in sites)
    float_shapes = [each.shape for each in found.float_parameters if len(each.shape) > 1]
    assert quantized + sum(math.prod(shape) for shape in float_shapes) == matrices


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral"])
def test_a_network_runs_with_rounded_weights(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, batches = architecture.build(), [architecture.inputs() for _ in range(2)]
    fields: dict[str, Any] = {"dtype": "int8", "solver": "nearest", "progress": False}
    rounded, table = quantize(model, batches, **fields)
    assert 0 < table.output_error < 1e-2
    before, after = dict(model.named_parameters()), dict(rounded.named_parameters())
    same = {name for name, weight in before.items() if weight.dim() > 1 and torch.equal(weight, after[name])}
    assert all(any(re.fullmatch(pattern, each) for pattern in architecture.left) for each in same), same
