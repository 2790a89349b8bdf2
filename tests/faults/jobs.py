"""The jobs of the trials, and what an undisturbed run of each publishes.

A CNN (the digits example) and a small transformer, each with both solvers, at 3 bits. Samples, microbatches and shards
do not divide each other, so ranks own unequal parts, and of eight ranks some own nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distributed_adaround.examples.digits.__main__ import prepare as prepare_digits
from tests.faults import networks

PUBLISHED = ("quantized.safetensors", "quantized.json", "dequantized.safetensors")
TOKENS = 9

_CNN = {
    "model": {"factory": "distributed_adaround.examples.digits.model:build", "weights": "digits.safetensors"},
    "data": {"uri": "calibration.npz", "num_samples": 500, "microbatch_size": 24, "virtual_shards": 7},
}
_TRANSFORMER = {
    "model": {"factory": "fault_nets:transformer"},
    "data": {"uri": "texts.npz", "microbatch_size": 6, "virtual_shards": 5},
}
_NETWORKS: dict[str, dict[str, Any]] = {"cnn": _CNN, "transformer": _TRANSFORMER}
_SOLVERS: dict[str, dict[str, Any]] = {
    "gram": {"solver": "gram", "sweeps": 30},
    "minibatch": {"solver": "minibatch", "max_iter": 60, "batch_size": 96, "reproducible": True},
}
NAMES = tuple(f"{network}-{solver}" for network in _NETWORKS for solver in _SOLVERS)


@dataclass(frozen=True)
class Job:
    """A job file in its folder. Every run gets an output folder of its own, by --set."""

    name: str
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "job.json"


def prepare(name: str, root: Path, **changes: dict[str, Any]) -> Job:
    """Write the job NETWORK-SOLVER with its data under root. changes: section={field: value}, over its own fields."""
    network, _, solver = name.partition("-")
    folder = root / f"job-{name}"
    prepare_digits(folder)
    shutil.copyfile(networks.__file__, folder / "fault_nets.py")
    _write_texts(folder / "texts.npz")
    sections = {
        **_NETWORKS[network],
        "quantize": {"dtype": "int3", "observer": "mse"},
        "rounding": _SOLVERS[solver],
        "output": {"uri": "out"},
        # Solvers save every 0.3 s: layers are short here.
        "runtime": {"device": "cpu", "timeout_minutes": 1, "save_minutes": 0.005},
    }
    for section, fields in changes.items():
        sections[section] = sections[section] | fields
    job = Job(name, folder)
    job.path.write_text(json.dumps(sections, indent=1), encoding="utf-8")
    return job


def _write_texts(path: Path, num_samples: int = 50) -> None:
    """Token ids with a mask `(num_samples, TOKENS)`; texts have 2 to TOKENS tokens, then padding."""
    draw = np.random.default_rng(0)
    mask = (np.arange(TOKENS) < draw.integers(2, TOKENS + 1, size=(num_samples, 1))).astype(np.int64)
    ids = draw.integers(0, networks.VOCABULARY, size=(num_samples, TOKENS)) * mask
    np.savez(path, input_ids=ids, attention_mask=mask)


def published(output: Path) -> dict[str, str]:
    """SHA-256 of every published file and committed layer; a missing file is missing here too."""
    layers = sorted((output / "commits" / "layers").glob("*.safetensors"))
    paths = [*(output / name for name in PUBLISHED), *layers]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def committed(output: Path) -> int:
    """Number of layers that the manifest names."""
    path = output / "commits" / "manifest.json"
    return len(json.loads(path.read_bytes())["layers"]) if path.exists() else 0
