"""Directories of tiny transformers through whole jobs, into every format that fits them, each read by its library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from architectures import ARCHITECTURES

from distributed_adaround.convert import verify_output
from distributed_adaround.job import run_job
from distributed_adaround.spec.job import JobSpec

# What the libraries warn about is not ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PLAIN = ["dequantized", "huggingface", "program"]
ALL = [*PLAIN, "compressed_tensors", "onnx", "torchao"]
# torch.onnx does not know the operation of experts, and torchao's file names no part of a tensor.
EXPERTS = [*PLAIN, "compressed_tensors"]
FITTING = {
    "Llama": ALL, "Qwen3": ALL, "Mixtral": EXPERTS, "Qwen3-MoE": EXPERTS, "BERT": ALL, "T5": ALL, "Whisper": ALL,
    "ViT": ALL, "ResNet": ALL, "ConvNeXt": ALL,
}  # fmt: skip


@pytest.mark.parametrize("name", FITTING)
def test_a_directory_in_every_format(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    architecture.build().save_pretrained(tmp_path / "model", max_shard_size="30KB")
    np.savez(tmp_path / "data.npz", **{key: tensor.numpy() for key, tensor in architecture.inputs().items()})
    job = JobSpec(
        model={"hf": str(tmp_path / "model")},
        data={"uri": str(tmp_path / "data.npz"), "microbatch_size": 2},
        # compressed-tensors holds linear layers.
        quantize={"dtype": "int4", "ignore": ["Conv1d", "Conv2d"]},
        rounding={"solver": "gram", "sweeps": 2, "starts": 1},
        output={"uri": str(tmp_path / "out"), "formats": FITTING[name]},
        runtime={"device": "cpu"},
    )
    table = run_job(job)
    assert [one.format for one in table.exports] == FITTING[name]
    for one in (*table.exports, *verify_output(str(tmp_path / "out"))):
        assert one.ok, one
        assert one.different == 0, one
        # Equal outputs, but for the order of sums.
        assert (one.output_error or 0.0) < 2e-5, one
