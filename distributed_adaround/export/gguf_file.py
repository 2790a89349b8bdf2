"""Exporter `gguf`: a GGUF file for llama.cpp, Ollama and LM Studio, made from a float GGUF file of the same model.

    <output>/gguf/model.gguf

Tokenizer, metadata and tensors that stayed in float are those of `output.base_gguf`, byte by byte. Quantized weights
take the places of the float ones as Q4_0 (codes of up to 4 bits), Q5_0, Q8_0 or MXFP4; biases beside them, which bias
correction may have changed, are the job's. K-quants are not offered: their scales are themselves quantized, to 6 bits
in super-blocks of 256 weights, and no solver here works on such a grid.
"""

import copy
import struct
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_adaround.capture.exported import quiet_torch
from distributed_adaround.errors import InputError, SpecError, first_line
from distributed_adaround.export.exporter import Exporter, ExportPlan, ExportTask, Loaded
from distributed_adaround.export.gguf_base import BaseGguf, Piece, gguf_library
from distributed_adaround.export.gguf_blocks import BLOCK, block_type, pack
from distributed_adaround.export.stored import QuantizedLayer, StoredResult
from distributed_adaround.export.verify import outputs_of
from distributed_adaround.files import storage, uris
from distributed_adaround.runtime.transformers_library import offline_transformers

FOLDER = "gguf"
_FILE = "model.gguf"
_FILE_TYPES = {"Q4_0": "MOSTLY_Q4_0", "Q5_0": "MOSTLY_Q5_0", "Q8_0": "MOSTLY_Q8_0", "MXFP4": "MOSTLY_MXFP4_MOE"}
_EMBEDDING = "token_embd.weight"


class GgufExporter(Exporter):
    files = (FOLDER,)
    published = (f"{FOLDER}/{_FILE}",)

    def scale_dtype(self, plan: ExportPlan) -> str | None:
        return "float16"

    def check(self, plan: ExportPlan) -> None:
        gguf_library()
        for layer in plan.layers:
            if (problem := _problem(layer)) is not None:
                raise SpecError(f"output.formats gguf cannot hold layer {layer.name!r} ({layer.scheme}): {problem}")
        _base(plan).pieces(plan.layers)

    def write(self, task: ExportTask, uri: str) -> None:
        place = uris.join(uri, FOLDER, _FILE)
        storage.remove_tree(place)
        contents = _Contents.of(task.result, _base(task))
        storage.write_file(place, contents.write)

    def load(self, task: ExportTask, uri: str) -> Loaded:
        path = task.files.path(uris.join(uri, FOLDER, _FILE))
        written = BaseGguf(gguf_library().GGUFReader(path), _FILE)
        rest = {tensor.tensor_type.name for tensor in written.tensors.values()} - set(_FILE_TYPES)
        # Floats of the file are rounded to its types; of a model in bfloat16 the order of sums shows.
        exact = rest == {"F32"} and task.dtype == torch.float32
        run, note = _runner(task, path)
        return Loaded(_weights(task.result, written), run, 1e-5 if exact else 2e-2, note)


def _base(plan: ExportPlan) -> BaseGguf:
    uri = plan.output.base_gguf
    assert uri is not None  # a rule of the section output
    return BaseGguf.open(plan.files.path(uri), uri)


def _problem(layer: QuantizedLayer) -> str | None:
    """Why no block of GGUF holds a layer's numbers, and a setting that does; None: one does."""
    ways = "int4 (Q4_0), int5 (Q5_0), int8 (Q8_0) or mxfp4"
    if layer.number.element is not None and block_type(layer) is None:
        return f"GGUF has no blocks of {layer.number.name} with such scales; set quantize.dtype to {ways}"
    if layer.strategy != "group" or layer.group_size != BLOCK or not layer.symmetric:
        rule = "blocks are of 32 weights with a scale and no zero point"
        return f"{rule}; set quantize.qscheme to per_group_symmetric and quantize.group_size to {BLOCK}"
    if block_type(layer) is None:
        return f"its codes do not fit into 8 bits; set quantize.dtype to {ways}"
    if layer.number.element is None and layer.format["scale_format"] != "float16":
        scales = layer.format["scale_format"]
        return f"scales are stored in float16, not {scales}; remove quantize.scale_dtype or set it to float16"
    return None


class _Contents:
    """What goes into the file: the base's, with some tensors replaced. kinds: type of blocks of each that is quantized.
    orders: which of a layer's rows lie in a tensor, one after the other; None: as they are. floats: other tensors."""

    def __init__(self, base: BaseGguf, result: StoredResult, pieces: dict[str, list[Piece]]) -> None:
        self._base, self._result, self._pieces = base, result, pieces
        self._kinds = {target: str(block_type(found[0].layer)) for target, found in pieces.items()}
        self._orders: dict[str, Tensor | None] = {}
        self._floats: dict[str, Tensor] = {}

    @classmethod
    def of(cls, result: StoredResult, base: BaseGguf) -> "_Contents":
        """Raises InputError when the base is of another model."""
        layers = list(result.layers.values())
        pieces = base.pieces(layers)
        for alias, owner in result.tied.items():
            other = base.name(alias)
            if other is not None and result.layers_of(owner) and other not in pieces:
                pieces[other] = [Piece(layer, other) for layer in result.layers_of(owner)]
        contents = cls(base, result, pieces)
        for name in (*result.names, *result.tied):
            if base.name(name) == _EMBEDDING and _EMBEDDING not in pieces:
                base.check_same(_EMBEDDING, result.tensor(name))
        for target, found in pieces.items():
            for piece in found:
                contents._orders[target] = base.order(piece, piece.of(result.weight(piece.layer.stored_name)).float())
            contents._add_bias(target, found[0])
        return contents

    def _add_bias(self, target: str, piece: Piece) -> None:
        name = f"{piece.layer.owner.removesuffix('.weight')}.bias"
        if piece.expert is not None or name not in self._result.names:
            return
        bias, order = self._result.tensor(name), self._orders[target]
        place = f"{target.removesuffix('.weight')}.bias"
        if place in self._base.tensors and self._base.shape(place) == tuple(bias.shape):
            self._floats[place] = bias if order is None else bias[order]
        elif bool(bias.any()):
            raise InputError(
                f"output.base_gguf has no tensor {place} for {name}; give a GGUF made from this very model"
            )

    def write(self, path: Path) -> None:
        base, gguf = self._base, gguf_library()
        common = Counter(self._kinds.values()).most_common(1)
        changed = {"general.quantization_version": int(gguf.GGML_QUANT_VERSION)}
        if common:
            changed["general.file_type"] = int(gguf.LlamaFileType[_FILE_TYPES[common[0][0]]])
        writer = _writer(gguf, path, base, changed)
        try:
            for tensor in base.reader.tensors:
                kind, shape, dtype, size = tensor.tensor_type, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes
                if tensor.name in self._kinds:
                    kind = gguf.GGMLQuantizationType[self._kinds[tensor.name]]
                    dtype, shape = (
                        np.dtype(np.uint8),
                        gguf.quants.quant_shape_to_byte_shape(base.shape(tensor.name), kind),
                    )
                    size = int(np.prod(shape))
                writer.add_tensor_info(tensor.name, shape, dtype, size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in base.reader.tensors:
                writer.write_tensor_data(self._data(tensor))
        finally:
            writer.close()

    def _data(self, tensor: Any) -> Any:
        """Of one tensor, as it lies in the file."""
        name, quants = tensor.name, gguf_library().quants
        if name in self._kinds:
            order, kind = self._orders[name], self._kinds[name]
            found = sorted(self._pieces[name], key=lambda piece: piece.expert or 0)
            parts = []
            for piece in found:
                packed = torch.from_numpy(pack(self._result.record(piece.layer.stored_name), kind))
                rows = piece.of(packed)
                parts.append(rows if order is None else rows[order])
            return (parts[0] if found[0].expert is None else torch.stack(parts)).contiguous().numpy()
        if name in self._floats:
            return quants.quantize(self._floats[name].float().numpy(), tensor.tensor_type)
        return tensor.data


def _writer(gguf: Any, path: Path, base: BaseGguf, changed: dict[str, int]) -> Any:
    """A writer that copies metadata as they lie in the base: text there need not be UTF-8, arrays may be empty."""
    packed = {}
    for name, value in base.entries(changed):
        if isinstance(value, int):
            key = name.encode()
            value = struct.pack(f"<Q{len(key)}sII", len(key), key, gguf.GGUFValueType.UINT32, value)
        packed[name] = value

    class Writer(gguf.GGUFWriter):  # type: ignore[misc]
        def write_kv_data_to_file(self) -> None:
            for value in packed.values():
                self.fout[0].write(value)
            self.state = gguf.gguf_writer.WriterState.KV_DATA

    writer = Writer(path, base.architecture)
    writer.data_alignment = int(base.reader.alignment)
    writer.kv_data = [dict(packed)]  # so many
    return writer


def _weights(result: StoredResult, written: BaseGguf) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors, made of what the file holds."""
    pieces: dict[str, list[Piece]] = {}
    for found in written.pieces(list(result.layers.values())).values():
        for piece in found:
            pieces.setdefault(piece.layer.stored_name, []).append(piece)
    for name in result.owners:
        tensor = torch.zeros(result.shapes[name], dtype=getattr(torch, result.dtypes[name]))
        for layer in result.layers_of(name):
            weight = torch.empty(layer.shape)
            expected = result.weight(layer.stored_name).float()
            for piece in pieces[layer.stored_name]:
                values = written.floats(piece.target, piece.expert)
                order = written.order(piece, piece.of(expected))
                rows = torch.arange(len(weight))
                rows = piece.of(rows) if order is None else piece.of(rows)[order]
                weight[rows] = values
            place = tensor if layer.view is None else layer.view.of(tensor)
            place.copy_(weight.to(getattr(torch, layer.dtype)))
        yield name, tensor


def _runner(task: ExportTask, path: Path) -> tuple[Any, str]:
    """The model as transformers reads it from the file, where it is one of its models and it knows the architecture."""
    model: Any = task.model()
    if not (hasattr(model, "config") and hasattr(type(model), "from_pretrained")):
        return None, "no model of transformers, which reads GGUF files here"
    try:
        with offline_transformers("output.formats gguf"), quiet_torch():
            # The metadata are the base's, of which transformers does not read all; the tensors are what is tested.
            config = copy.deepcopy(model.config)
            read = type(model).from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=task.dtype).eval()
    except Exception as error:  # transformers knows some architectures; which, it says in many ways
        return None, f"transformers does not read it ({first_line(error)})"
    return partial(outputs_of, read), "run by transformers, which dequantizes it"
