"""Exporter `huggingface`: the model's own directory again, with weights on the grid, for `from_pretrained`.

    <output>/huggingface/model.safetensors     or shards with an index, no larger than those of the input
    <output>/huggingface/config.json ...       and all files that lay beside the weights

transformers writes the weights: it knows under which names a checkpoint holds them (experts one by one, say).
"""

import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm

from distributed_adaround.capture.open import PlannedUnit
from distributed_adaround.errors import InputError, first_line
from distributed_adaround.export.result import Exporter, ExportResult
from distributed_adaround.files import storage, uris
from distributed_adaround.runtime.transformers_library import offline_transformers

FOLDER = "huggingface"
_CONFIG = "config.json"


class HuggingFaceExporter(Exporter):
    files = (FOLDER,)

    def check(self, planned: Sequence[PlannedUnit]) -> None:
        """It holds whatever the model does."""

    def write(self, result: ExportResult, uri: str) -> None:
        with tempfile.TemporaryDirectory(prefix="adaround-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            with offline_transformers("output.formats huggingface"):
                _save(result.model, result.shard_bytes, folder)
            written = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
            # What lay beside the weights stays as it was. The configuration comes last: readers look for it first.
            sources = written | dict(result.files)
            for relative in sorted(sources, key=lambda each: (each == _CONFIG, each)):
                storage.write_file(uris.join(uri, FOLDER, relative), partial(shutil.copyfile, sources[relative]))


def _save(model: Any, shard_bytes: int, folder: Path) -> None:
    state = dict(model.state_dict())
    state |= _weight_norms(model, state)
    try:
        model.save_pretrained(folder, state_dict=state, max_shard_size=shard_bytes)
    except Exception as error:
        raise InputError(f"transformers cannot save this model: {first_line(error)}") from error


def _weight_norms(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Magnitude and direction of weights that the model's class computes of these, taken out of the state, where they
    were folded. Put together again they are the same weights."""
    found: dict[str, Tensor] = {}
    with torch.device("meta"):
        anew: nn.Module = type(model)(model.config)
    for path, module in anew.named_modules():
        for name, steps in getattr(module, "parametrizations", {}).items():
            if f"{path}.{name}" in state and isinstance(steps[0], _WeightNorm):
                weight = state.pop(f"{path}.{name}")
                prefix = f"{path}.parametrizations.{name}"
                found[f"{prefix}.original0"] = torch.norm_except_dim(weight, 2, steps[0].dim)
                found[f"{prefix}.original1"] = weight
    return found
