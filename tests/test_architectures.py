"""Directories of tiny random transformers, through whole jobs: which weights are quantized (all of two and more
dimensions but what support/architectures.py lists, each with its reason), and what comes out loads as it is."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from architectures import ARCHITECTURES, Architecture

from distributed_adaround.job import run_job
from distributed_adaround.spec.job import JobSpec

# What the libraries warn about is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

# A few of each kind of storage; the others take minutes: `pytest -m slow tests/test_architectures.py` runs them too.
QUICK = ("gpt-oss", "T5", "Wav2Vec2")


def run(architecture: Architecture, model: Any, folder: Path) -> dict[str, Any]:
    """Round the model to the nearest of 8 bits, from its directory; returns the report."""
    model.save_pretrained(folder / "model")
    np.savez(folder / "data.npz", **{name: tensor.numpy() for name, tensor in architecture.inputs().items()})
    spec = JobSpec(
        model={"hf": str(folder / "model")},
        data={"uri": str(folder / "data.npz"), "microbatch_size": 2},
        quantize={"dtype": "int8"},
        rounding={"solver": "nearest"},
        output={"uri": str(folder / "out"), "formats": ["dequantized", "huggingface"]},
        runtime={"device": "cpu"},
    )
    run_job(spec)
    report: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    return report


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_a_directory_goes_in_and_comes_out_whole(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    report = run(architecture, model, tmp_path)
    assert not [note for note in report["notes"] if not note.startswith("computed weights were folded")]
    assert 0 < report["output_error"] < 1e-2
    # All matrices but those that are listed are quantized, and nothing is lost between the two.
    left = {each["name"]: each for each in report["float_parameters"] if len(each["shape"]) > 1}
    for parameter, found in left.items():
        expected = [why for pattern, why in architecture.left.items() if re.fullmatch(pattern, parameter)]
        assert expected, f"{parameter} stays in float: {found['reason']}"
        assert expected[0] in found["reason"], parameter
    for pattern in architecture.left:
        assert any(re.fullmatch(pattern, parameter) for parameter in left), f"{pattern} does not stay in float"
    # A weight norm has its magnitudes beside the matrix.
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith("original0"))
    quantized = sum(math.prod(layer["shape"]) for layer in report["layers"])
    assert quantized + sum(math.prod(each["shape"]) for each in left.values()) == matrices
    # The directory holds the rounded weights under the names that the class expects, and runs.
    found, info = type(model).from_pretrained(tmp_path / "out" / "huggingface", output_loading_info=True)
    assert not any(info.values()), info
    stored = safetensors.torch.load_file(tmp_path / "out" / "dequantized.safetensors")
    loaded = found.state_dict()
    for key, tensor in stored.items():
        if key in loaded:
            assert torch.equal(loaded[key], tensor), key
        else:
            # Put together from magnitudes and directions, it may differ in the last bit.
            torch.testing.assert_close(found.get_submodule(key.removesuffix(".weight")).weight, tensor)
    inputs = architecture.inputs()
    with torch.no_grad():
        before, after = (each.eval()(**inputs)[0] for each in (model, found))
    assert 0 < float((after - before).square().sum() / before.square().sum()) < 1e-2
