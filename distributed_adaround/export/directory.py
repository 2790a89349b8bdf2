"""The directory of model.hf written again, file by file: what exporters `huggingface` and `compressed_tensors` share.

<output>/<folder>/model.safetensors     or the same shards as those of the input, with an index
<output>/<folder>/config.json ...       and all files that lay beside the weights; config.json comes last
"""

import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm

from distributed_adaround.capture.exported import quiet_torch
from distributed_adaround.errors import redact
from distributed_adaround.export.exporter import ExportPlan, ExportTask, Loaded
from distributed_adaround.export.names import Source, checkpoint_sources, names_in
from distributed_adaround.export.shards import write_shards
from distributed_adaround.export.stored import StoredResult
from distributed_adaround.export.verify import outputs_of
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.model.huggingface import CONFIG, INDEX, SINGLE, files_beside, load_again, shape_of_model

# Largest difference of outputs: kernels of one kind give the same numbers, but layouts in memory may differ.
_EXACT, _HALF = 1e-6, 1e-2
# Tensors of experts lie in few parameters, which are asked for in turns.
_KEPT = 4


class ModelTensors:
    """Tensors of a checkpoint made of those of a result, one at a time."""

    def __init__(self, model: nn.Module, result: StoredResult) -> None:
        """model: on the meta device, with the names that transformers knows; the result's may be folded ones."""
        self._result = result
        self._kept = lru_cache(_KEPT)(self._read)
        known = {*result.names, *result.tied}
        self._made: dict[str, Callable[[], Tensor]] = {}
        for path, module in model.named_modules():
            for name, steps in getattr(module, "parametrizations", {}).items():
                folded, prefix = f"{path}.{name}", f"{path}.parametrizations.{name}"
                if folded in known and isinstance(steps[0], _WeightNorm):
                    # Magnitude and direction of a weight that the class computes of these: put together again they
                    # are the same weight.
                    norm = partial(_norm, result, folded, steps[0].dim)
                    self._made |= {f"{prefix}.original0": norm, f"{prefix}.original1": partial(result.tensor, folded)}

    def __call__(self, source: Source) -> Tensor:
        if source.rows is None:
            return self._read(source.name).reshape(source.shape)
        tensor = self._kept(source.name)
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor
        return rows[source.rows].reshape(source.shape)

    def _read(self, name: str) -> Tensor:
        made = self._made.get(name)
        return self._result.tensor(name) if made is None else made()


def _norm(result: StoredResult, name: str, dim: int) -> Tensor:
    return torch.norm_except_dim(result.tensor(name), 2, dim)


def loaded_directory(
    task: ExportTask, folder: str, prepare: Callable[[nn.Module], None] = lambda model: None, **changed: Any
) -> Loaded:
    """A directory that was written, as transformers loads it. prepare: done to the model before its weights are looked
    at. changed: arguments of from_pretrained."""
    local = task.files.directory(folder, lambda name: True)
    with quiet_torch():
        model = load_again(local, task.source, redact(folder), **changed)
        prepare(model)
    exact = task.dtype == torch.float32
    known = {*task.result.names, *task.result.tied}
    return Loaded(_weights(model, known), partial(outputs_of, model), _EXACT if exact else _HALF)


def _weights(model: nn.Module, known: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Under the names of the job's model, whose computed weights are folded: the direction of a weight norm is the
    weight. Scales of a compressed model are left out."""
    for name, tensor in model.state_dict().items():
        own = name.replace("parametrizations.", "").removesuffix(".original1")
        if own in known:
            yield own, tensor.cpu()


class Encoding(Protocol):
    """How the tensors of a checkpoint are stored."""

    def keys(self, name: str) -> Sequence[str]:
        """Names of what is stored for a tensor, by its own name in the checkpoint."""

    def encode(self, name: str, tensors: ModelTensors) -> Mapping[str, Tensor]:
        """What is stored for it, by these names."""


class Directory:
    """A model directory that is to be written again."""

    def __init__(self, plan: ExportPlan) -> None:
        """Raises InputError when transformers cannot build the model, or convert its names."""
        assert plan.directory is not None
        assert plan.source.hf is not None
        self._plan, self._directory = plan, plan.directory
        shown = f"model.hf {redact(plan.source.hf)!r}"
        self.model = shape_of_model(plan.directory, plan.source, shown)
        self.sources = checkpoint_sources(self.model)

    def write(
        self, task: ExportTask, folder: str, encoding: Encoding, config: Mapping[str, Any], metadata: str
    ) -> None:
        """Write the weights in the shards of the input, one in memory at a time, and what lay beside them.

        Args:
            folder: URI.
            config: fields of config.json that differ.
            metadata: of what the weights are made from, besides the result: files made with another one are replaced.
        """
        if storage.exists(uris.join(folder, CONFIG)):
            storage.remove_tree(folder)
        shards = self._shards(task.result)
        tensors = ModelTensors(self.model, task.result)

        def encoded(names: Sequence[str]) -> dict[str, Tensor]:
            return {key: tensor for name in names for key, tensor in encoding.encode(name, tensors).items()}

        source = f"{task.result.digest} {metadata}"
        written = write_shards(folder, "model", shards, encoded, {"format": "pt"}, source)
        if len(shards) > 1 or SINGLE not in shards:
            places = {key: file for file, names in shards.items() for name in names for key in encoding.keys(name)}
            size = sum(file.tensor_bytes for file in written.values())
            index = {"metadata": {"total_size": size}, "weight_map": places}
            storage.write_bytes(uris.join(folder, INDEX), (jsontext.dumps(index, indent=2) + "\n").encode())
        for name, path in files_beside(self._directory).items():
            if name != CONFIG:
                storage.write_file(uris.join(folder, name), partial(shutil.copyfile, path))
        storage.write_bytes(uris.join(folder, CONFIG), self._config(config))

    def _config(self, changed: Mapping[str, Any]) -> bytes:
        """The input's, as it is where nothing has changed."""
        path, dtype = self._directory / CONFIG, self._plan.source.dtype
        if not changed and dtype is None:
            return path.read_bytes()
        config = jsontext.read_object(path, CONFIG)
        if dtype is not None:
            config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = dtype
        return (jsontext.dumps(config | dict(changed), indent=2) + "\n").encode()

    def _shards(self, result: StoredResult) -> dict[str, list[str]]:
        """Names of tensors by file, as in the input; what it has not goes into the last file, and tied tensors are
        stored once."""
        prefix = getattr(self.model, "base_model_prefix", "")
        named = names_in(result.checkpoint, self.sources, prefix)
        files = sorted(set(result.checkpoint.values())) or [SINGLE]
        shards: dict[str, list[str]] = {file: [] for file in files}
        for name in self.sources:
            if name in named:
                shards[result.checkpoint[named[name]]].append(name)
        stored = {self._tensor_of(name, result) for name in named}
        for name in _untied_first(self.model, self.sources.keys() - named.keys()):
            if self._tensor_of(name, result) not in stored:
                shards[files[-1]].append(name)
                # A part of a tensor stands for itself.
                stored |= {self._tensor_of(name, result)}
        return {file: names for file, names in shards.items() if names}

    def _tensor_of(self, name: str, result: StoredResult) -> object:
        """What tied tensors have in common."""
        source = self.sources[name]
        owner = result.tied.get(source.name, source.name)
        return owner if source.rows is None else (owner, name)


def _untied_first(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Sorted, those that transformers makes of others last."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return sorted(names, key=lambda name: (name in tied, name))
