"""The least that a job file says, as a mapping, for tests of single fields."""

import copy
from typing import Any

JOB: dict[str, Any] = {
    "model": {"factory": "my_models:resnet50"},
    "data": {"uri": "data/*.npz"},
    "output": {"uri": "out"},
}


def job_with(path: str, value: object) -> dict[str, Any]:
    """JOB with one value set, for instance at "quantize.dtype"."""
    job = copy.deepcopy(JOB)
    *sections, name = path.split(".")
    node = job
    for section in sections:
        node = node.setdefault(section, {})
    node[name] = value
    return job
