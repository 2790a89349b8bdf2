"""Job files with their data and models in a folder, as a user would write them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_HERE = Path(__file__).parent
TOKENS = 7


def images(path: Path, num_samples: int = 11, seed: int = 0) -> Path:
    """float32 `(num_samples, 2, 6, 6)` under the name x."""
    np.savez(path, x=np.random.default_rng(seed).normal(size=(num_samples, 2, 6, 6)).astype(np.float32))
    return path


def vectors(path: Path, num_samples: int = 11, seed: int = 0) -> Path:
    """float32 `(num_samples, 8)` under the name x."""
    np.savez(path, x=np.random.default_rng(seed).normal(size=(num_samples, 8)).astype(np.float32))
    return path


def texts(path: Path, num_samples: int = 11, seed: int = 0) -> Path:
    """Token ids with a mask, both int64 `(num_samples, TOKENS)`; each text has 2 to TOKENS tokens, then padding."""
    draw = np.random.default_rng(seed)
    mask = (np.arange(TOKENS) < draw.integers(2, TOKENS + 1, size=(num_samples, 1))).astype(np.int64)
    np.savez(path, input_ids=draw.integers(0, 20, size=(num_samples, TOKENS)) * mask, attention_mask=mask)
    return path


_DATA = {"cnn": images, "attention": texts, "mlp": vectors, "wide": vectors, "mixture": vectors}


def write_job(folder: Path, network: str = "cnn", **changes: Mapping[str, Any]) -> Path:
    """A job in a folder of its own: job.yaml, data.npz, and nets.py, a copy of toy_models.py.

    changes: fields of sections, over those of a small job: section={field: value}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_HERE / "toy_models.py", folder / "nets.py")
    if network in _DATA:
        _DATA[network](folder / "data.npz")
    path = folder / "job.yaml"
    # JSON is YAML too.
    path.write_text(json.dumps(job(folder, network, **changes)), encoding="utf-8")
    return path


def job(folder: Path, network: str = "cnn", **changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a job file: 11 samples in microbatches of 2 and 4 virtual shards, 30 steps at 3 bits."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"factory": f"nets:{network}"},
        "data": {"uri": str(folder / "data.npz"), "microbatch_size": 2, "virtual_shards": 4},
        "quantize": {"dtype": "int3", "observer": "minmax"},
        "rounding": {"max_iter": 30, "batch_size": 24, "lr": 0.02},
        "output": {"uri": str(folder / "out")},
        "runtime": {"device": "cpu"},
    }
    for section, fields in changes.items():
        sections[section] = sections[section] | dict(fields)
    return sections
