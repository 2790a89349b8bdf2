"""The plainest exporters: the result as the job has written it, and float weights on the grid."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from distributed_adaround.export.codes import STEM
from distributed_adaround.export.exporter import Exporter, ExportTask, Loaded
from distributed_adaround.export.shards import plan_shards, write_shards
from distributed_adaround.export.stored import DESCRIPTION, StoredResult
from distributed_adaround.files import jsontext, storage, uris

_DEQUANTIZED = "dequantized"


class CodesExporter(Exporter):
    """Codes, scales and zero points: what a job writes in any case, and all else is made from."""

    files = (f"{STEM}.safetensors", DESCRIPTION)
    published = (DESCRIPTION,)

    def write(self, task: ExportTask, uri: str) -> None:
        """It is there already."""

    def load(self, task: ExportTask, uri: str) -> Loaded:
        result = StoredResult.open(uri, task.files)
        for file in result.sha256:
            result.check(file)
        return Loaded((name, result.tensor(name)) for name in (*result.names, *result.tied))


class DequantizedExporter(Exporter):
    """Weights on the grid under the model's own names, tied ones as copies, for `load_state_dict(strict=True)`."""

    files = (f"{_DEQUANTIZED}.safetensors", f"{_DEQUANTIZED}.safetensors.index.json")
    published = files

    def write(self, task: ExportTask, uri: str) -> None:
        result = task.result
        shards = _shards(result)
        index = uris.join(uri, self.files[1])
        for place in (index, *(uris.join(uri, file) for file in shards if len(shards) == 1)):
            storage.remove_tree(place)

        def tensors(names: Sequence[str]) -> dict[str, Tensor]:
            return {name: result.tensor(name) for name in names}

        write_shards(uri, _DEQUANTIZED, shards, tensors, {"format": "pt"}, result.digest)
        if len(shards) > 1:
            places = {name: file for file, names in shards.items() for name in names}
            storage.write_bytes(index, (jsontext.dumps({"weight_map": places}, indent=1) + "\n").encode())

    def load(self, task: ExportTask, uri: str) -> Loaded:
        paths = [task.files.path(uris.join(uri, file)) for file in _shards(task.result)]
        return Loaded(_tensors(paths))


def _shards(result: StoredResult) -> dict[str, list[str]]:
    """Names of tensors by file."""
    sizes = {name: result.bytes_of(name) for name in result.names}
    sizes |= {alias: sizes[name] for alias, name in result.tied.items()}
    return plan_shards(_DEQUANTIZED, sorted(sizes.items()), result.shard_bytes)


def _tensors(paths: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)
