"""Exporter `huggingface`: the model's own directory again, with float weights on the grid, for `from_pretrained`."""

from collections.abc import Mapping

from torch import Tensor

from distributed_adaround.export.directory import Directory, ModelTensors, loaded_directory
from distributed_adaround.export.exporter import Exporter, ExportTask, Loaded
from distributed_adaround.files import uris
from distributed_adaround.model.huggingface import CONFIG

FOLDER = "huggingface"


class HuggingFaceExporter(Exporter):
    files = (FOLDER,)
    published = (f"{FOLDER}/{CONFIG}",)

    def write(self, task: ExportTask, uri: str) -> None:
        directory = Directory(task)
        directory.write(task, uris.join(uri, FOLDER), _Plain(directory), {}, FOLDER)

    def load(self, task: ExportTask, uri: str) -> Loaded:
        return loaded_directory(task, uris.join(uri, FOLDER))


class _Plain:
    """Every tensor as it is."""

    def __init__(self, directory: Directory) -> None:
        self._sources = directory.sources

    def keys(self, name: str) -> tuple[str]:
        return (name,)

    def encode(self, name: str, tensors: ModelTensors) -> Mapping[str, Tensor]:
        return {name: tensors(self._sources[name])}
