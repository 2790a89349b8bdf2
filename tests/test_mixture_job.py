"""A job whose weights are parts of tensors: commits, checkpoints and a restart, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rank_pool import RankPool
from sample_jobs import write_job

from distributed_adaround.export.codes import read_codes
from distributed_adaround.files.job_file import load_spec
from distributed_adaround.job import run_job


def run(path: str) -> list[tuple[str, bool]]:
    spec = load_spec(path)
    return [(row.name, row.resumed) for row in run_job(spec, Path(path).parent)]


def job_in(folder: Path) -> Path:
    changes: dict[str, Any] = {"rounding": {"solver": "gram", "sweeps": 4}, "quantize": {"dtype": "int4"}}
    return write_job(folder, "mixture", **changes)


NAMES = ["first", "experts[0]", "experts[1]", "experts[2]", "last"]


def test_a_job_with_experts_writes_what_it_says(tmp_path: Path) -> None:
    path = job_in(tmp_path / "job")
    assert run(str(path)) == [(name, False) for name in NAMES]
    out = path.parent / "out"
    codes = read_codes(str(out))
    plain = safetensors.torch.load_file(out / "dequantized.safetensors")
    assert codes.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(codes[name], tensor), name
    assert all(channel.unique().numel() <= 16 for matrix in plain["experts"] for channel in matrix)
    assert all(channel.unique().numel() <= 16 for channel in plain["last"].T)
    text = json.loads((out / "quantized.json").read_text())
    assert text["layers"]["experts[1]"]["part_of"]["offset"] == 48
    reasons = {entry["name"]: entry["reason"] for entry in text["float_parameters"]}
    assert reasons["gate.weight"].startswith("a router")
    # A restart takes every layer from its commit.
    before = (out / "quantized.safetensors").read_bytes()
    assert run(str(path)) == [(name, True) for name in NAMES]
    assert (out / "quantized.safetensors").read_bytes() == before


def test_the_same_files_on_two_ranks(tmp_path: Path, pool: RankPool) -> None:
    alone, together = job_in(tmp_path / "alone"), job_in(tmp_path / "together")
    run(str(alone))
    pool.run(run, 2, str(together))
    for name in ("quantized.safetensors", "dequantized.safetensors"):
        assert (alone.parent / "out" / name).read_bytes() == (together.parent / "out" / name).read_bytes(), name
