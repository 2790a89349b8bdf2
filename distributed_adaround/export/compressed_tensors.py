"""Exporter `compressed_tensors`: the model's directory with packed weights, for transformers, vLLM and SGLang.

    X.weight_packed, X.weight_scale, X.weight_shape     instead of X.weight, of integers
    X.weight, X.weight_scale                            of fp8 and mxfp8
    config.json: quantization_config                    which layers are stored how

The library packs. It takes weights and rounds them again, so it gets weights that lie on the grid, and what it has
packed is unpacked and compared. Only fields that compressed-tensors 0.17 knows are written, which vLLM 0.33 pins.
"""

import bisect
import importlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distributed_adaround.errors import AdaRoundError, InputError, SpecError, shorten
from distributed_adaround.export.compressed_schemes import Scheme, refused, scheme_of
from distributed_adaround.export.directory import Directory, ModelTensors, loaded_directory
from distributed_adaround.export.exporter import Exporter, ExportPlan, ExportTask, Loaded
from distributed_adaround.export.names import Source
from distributed_adaround.export.stored import QuantizedLayer, StoredResult
from distributed_adaround.files import uris
from distributed_adaround.model.huggingface import CONFIG
from distributed_adaround.numerics.weight_view import dtype_name
from distributed_adaround.solve.record import LayerRecord

FOLDER = "compressed_tensors"
_FIELDS = (
    "config_groups", "quant_method", "kv_cache_scheme", "format", "quantization_status", "global_compression_ratio",
    "ignore",
)  # fmt: skip
_WEIGHT = ".weight"
# Of outputs where activations are fp8 too: three bits after the leading one are off by 1/16 each, and layers add it up.
_DYNAMIC_TOLERANCE = 0.25


@dataclass(frozen=True)
class Place:
    """Where a quantized tensor of the checkpoint lies: rows of a layer's weight, int64; None: all of them."""

    layer: QuantizedLayer
    rows: Tensor | None


class CompressedTensorsExporter(Exporter):
    files = (FOLDER,)
    published = (f"{FOLDER}/{CONFIG}",)

    def scale_dtype(self, plan: ExportPlan) -> str:
        return dtype_name(plan.dtype)

    def notes(self, plan: ExportPlan) -> list[str]:
        schemes = {scheme_of(layer, plan) for layer in plan.layers}
        loaded = "quantization_config=CompressedTensorsConfig(dequantize=True)"
        notes = []
        if not all(scheme.symmetric for scheme in schemes):
            notes.append(f"transformers loads zero points only by {loaded}; vLLM loads them as they are")
        if len(schemes) > 1:
            notes.append(f"load several formats without {loaded}: transformers 5.24 takes one for all layers then")
        return [f"compressed_tensors: {note}" for note in notes]

    def check(self, plan: ExportPlan) -> None:
        _library()
        for layer in plan.layers:
            scheme_of(layer, plan)
        _Packed(plan)

    def write(self, task: ExportTask, uri: str) -> None:
        packed = _Packed(task, task.result)
        config = {"quantization_config": packed.config}
        packed.directory.write(
            task, uris.join(uri, FOLDER), packed, config, f"{FOLDER} {task.output.dynamic_activations}"
        )

    def load(self, task: ExportTask, uri: str) -> Loaded:
        """Outputs of the compressed model where transformers runs it, else of what it dequantizes."""
        schemes = {scheme_of(layer, task) for layer in task.layers}
        folder = uris.join(uri, FOLDER)
        reason = next((text for scheme in schemes if (text := _only_dequantized(scheme, task.dtype))), "")
        if not reason:
            try:
                loaded = loaded_directory(task, folder, _decompressed)
            except InputError as error:
                reason = str(error).rpartition(": ")[2]
            else:
                dynamic = any(scheme.dynamic for scheme in schemes)
                noted = replace(loaded, tolerance=_DYNAMIC_TOLERANCE, note="activations are fp8 too")
                return noted if dynamic else loaded
        if len(schemes) > 1:
            weights = _Packed(task).unpacked(task.files.directory(folder, lambda name: True))
            return Loaded(weights, note=f"transformers does not load several formats of which one is such: {reason}")
        transformers: Any = importlib.import_module("transformers")
        config = transformers.CompressedTensorsConfig(dequantize=True)
        loaded = loaded_directory(task, folder, quantization_config=config)
        return replace(loaded, note=f"transformers needs CompressedTensorsConfig(dequantize=True): {reason}")


def _decompressed(model: nn.Module) -> None:
    """What transformers does at the first forward: weights are there under their own names afterwards."""
    quantizer: Any = model.hf_quantizer
    quantizer.compressor.decompress_model(model)


def _library() -> Any:
    try:
        importlib.import_module("transformers")
        return importlib.import_module("compressed_tensors")
    except ImportError as error:
        text = "output.formats: compressed_tensors needs pip install 'distributed_adaround[compressed-tensors]'"
        raise SpecError(f"{text} ({error})") from error


def _only_dequantized(scheme: Scheme, dtype: torch.dtype) -> str:
    """Why transformers does not run the compressed model; empty: it does."""
    if not scheme.symmetric:
        return "it does not load packed zero points otherwise"
    if scheme.scale_dtype is not None and dtype != torch.bfloat16:
        return f"it makes {scheme.format} bfloat16, and the model is {dtype_name(dtype)}"
    return ""


class _Packed:
    """The tensors of a checkpoint, those of quantized layers packed."""

    def __init__(self, plan: ExportPlan, result: StoredResult | None = None) -> None:
        """Raises SpecError for a layer that no linear layer of the checkpoint holds; InputError."""
        self._plan, self._result = plan, result
        self.directory = Directory(plan)
        self._places = placed(self.directory, plan.layers)
        self._schemes = {name: scheme_of(place.layer, plan) for name, place in self._places.items()}
        _check_experts(self._schemes, self._places)

    def keys(self, name: str) -> Sequence[str]:
        if name not in self._schemes:
            return (name,)
        return [f"{name.removesuffix('weight')}{key}" for key in self._schemes[name].keys]

    def encode(self, name: str, tensors: ModelTensors) -> Mapping[str, Tensor]:
        if name not in self._schemes:
            return {name: tensors(self.directory.sources[name])}
        assert self._result is not None
        place, scheme = self._places[name], self._schemes[name]
        packed = pack(self._result.record(place.layer.stored_name), place.rows, scheme, self._plan.dtype)
        return {f"{name.removesuffix('weight')}{key}": tensor for key, tensor in packed.items()}

    def unpacked(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Weights of whole layers by their names in the model, as the library unpacks them from the files there."""
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                held = set(file.keys())
                for name in [name for name in self._places if self.keys(name)[0] in held]:
                    scheme, place = self._schemes[name], self._places[name]
                    parts = {
                        key: file.get_tensor(stored) for key, stored in zip(scheme.keys, self.keys(name), strict=True)
                    }
                    weight = _codec(scheme.format).decompress(parts, scheme.library(["Linear"]))["weight"]
                    if place.rows is None:
                        yield place.layer.owner, weight

    @cached_property
    def config(self) -> dict[str, Any]:
        """quantization_config of config.json."""
        words = importlib.import_module("compressed_tensors.quantization")
        modules: dict[Scheme, list[str]] = {}
        for name, scheme in self._schemes.items():
            modules.setdefault(scheme, []).append(name.removesuffix(_WEIGHT))
        first = self._most_common()
        groups = {}
        for place, scheme in enumerate([first, *(each for each in modules if each != first)]):
            targets = ["Linear"] if scheme == first else sorted({*modules[scheme], *self._own_names(scheme)})
            groups[f"group_{place}"] = scheme.library(targets)
        formats = {scheme.format for scheme in modules}
        config = words.QuantizationConfig(
            config_groups=groups,
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            quantization_status="compressed",
            ignore=self._ignore(),
        )
        whole: dict[str, Any] = config.model_dump(mode="json")
        found = {key: whole[key] for key in _FIELDS}
        return found | {"version": str(_library().__version__)}

    def _most_common(self) -> Scheme:
        """The scheme of all layers that are not named. That of experts, if there are any: vLLM asks for it by class."""
        experts = [scheme for name, scheme in self._schemes.items() if self._places[name].rows is not None]
        return Counter(experts or self._schemes.values()).most_common(1)[0][0]

    def _own_names(self, scheme: Scheme) -> list[str]:
        """Names in the model of layers that have other ones in the checkpoint."""
        return [
            place.layer.name for name, place in self._places.items()
            if self._schemes[name] == scheme and place.rows is None
        ]  # fmt: skip

    def _ignore(self) -> list[str]:
        """Layers left in float, by their names in the model and in the checkpoint: all linear ones, and what else has a
        matrix and may be linear to another runtime, as routers are."""
        sources, quantized = self.directory.sources, {place.layer.owner for place in self._places.values()}
        kinds = {name: type(module) for name, module in self.directory.model.named_modules()}
        found = set()
        for name, source in sources.items():
            module = source.name.removesuffix(_WEIGHT)
            table = issubclass(kinds.get(module, nn.Module), nn.Embedding)
            if source.name.endswith(_WEIGHT) and len(source.shape) == 2 and source.name not in quantized and not table:
                found |= {module, name.removesuffix(_WEIGHT)}
        # A head that is tied to an embedding has no tensor of its own.
        linear = {name for name, kind in kinds.items() if issubclass(kind, nn.Linear)}
        return sorted(found | {name for name in linear if f"{name}{_WEIGHT}" not in quantized})


def placed(directory: Directory, layers: Sequence[QuantizedLayer]) -> dict[str, Place]:
    """Where quantized weights lie in the checkpoint, by the names of their tensors there.

    Raises SpecError for a layer that is not made of whole matrices of linear layers there.
    """
    modules = dict(directory.model.named_modules())
    tied = getattr(directory.model, "all_tied_weights_keys", None) or {}
    by_owner: dict[str, list[tuple[int, str, Source]]] = {}
    for name, source in directory.sources.items():
        start = 0 if source.rows is None else int(source.rows[0])
        by_owner.setdefault(source.name, []).append((start, name, source))
    for sources in by_owner.values():
        sources.sort(key=itemgetter(0))
    found: dict[str, Place] = {}
    for layer in layers:
        covered = 0
        for _, name, source in _within(layer, by_owner.get(layer.owner, [])):
            # One of several tensors that are a parameter of the model together has no module there.
            module = modules.get((name if source.rows is not None else source.name).removesuffix(_WEIGHT))
            is_linear = isinstance(module, nn.Linear) if source.rows is None else module is None
            rows = _rows_of(layer, source) if is_linear and name.endswith(_WEIGHT) and len(source.shape) == 2 else None
            if rows is not None:
                found[name] = Place(layer, None if source.rows is None else rows)
                covered += rows.numel()
        if covered != layer.shape[0]:
            what = f"compressed_tensors holds linear layers, and {shorten(layer.name, 80)!r} is a {layer.kind}"
            inside = "" if layer.view is None else f", a part of {shorten(layer.owner, 80)!r}"
            raise SpecError(f"output.formats: {what}{inside}; add it to quantize.ignore, or remove the format")
        if layer.owner in tied or layer.owner in tied.values():
            what = f"the weight of layer {shorten(layer.name, 80)!r} is tied to another one"
            raise SpecError(f"output.formats: compressed_tensors: {what}; add it to quantize.ignore")
    return found


def _within(layer: QuantizedLayer, sources: list[tuple[int, str, Source]]) -> list[tuple[int, str, Source]]:
    """Those that begin inside a layer; one parameter may hold hundreds of experts. sources: by their first rows."""
    if layer.view is None:
        return sources
    start = layer.view.offset // layer.shape[-1]
    low, high = (bisect.bisect_left(sources, row, key=itemgetter(0)) for row in (start, start + layer.shape[0]))
    return sources[low:high]


def _check_experts(schemes: Mapping[str, Scheme], places: Mapping[str, Place]) -> None:
    """Raises SpecError unless all experts of the model are stored alike, in a format that is loaded for experts:
    transformers 5.24 takes nvfp4 without the factor of the tensor, and does not load zero points."""
    first: dict[Scheme, str] = {}
    for name, scheme in schemes.items():
        if places[name].rows is not None:
            first.setdefault(scheme, places[name].layer.name)
            if not scheme.symmetric:
                remedy = f"qscheme: per_{scheme.strategy}_symmetric"
                raise refused(places[name].layer, "zero points of experts are not loaded by runtimes", remedy)
            if scheme.strategy == "tensor_group":
                rule = "of experts transformers does not read the factor of the tensor"
                raise refused(places[name].layer, rule, "dtype: mxfp4 or int4")
    if len(first) > 1:
        one, other = (shorten(name, 80) for name in [*first.values()][:2])
        what = f"compressed_tensors has one format for all experts, and {one!r} and {other!r} have several"
        raise SpecError(f"output.formats: {what}; give them one by quantize.overrides")


def _rows_of(layer: QuantizedLayer, source: Source) -> Tensor | None:
    """Rows of a layer's weight that make up a tensor of the checkpoint; None: it is not of them."""
    count = layer.shape[0]
    if layer.view is None:
        return torch.arange(count) if source.rows is None else source.rows
    width = layer.shape[-1]
    lies_in_rows = layer.view.strides == (width, 1) and layer.view.offset % width == 0 and source.shape[-1] == width
    if not lies_in_rows or source.rows is None:
        return None
    rows = source.rows - layer.view.offset // width
    return rows if int(rows.min()) >= 0 and int(rows.max()) < count else None


def pack(record: LayerRecord, rows: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is stored for rows of a layer, by names without the module. dtype: of the model, and of the scales."""
    codec = _codec(scheme.format)
    words = scheme.library(["Linear"])
    weight, scale = record.dequantize(torch.float32), record.scale.float()
    zero_point = record.zero_point - (0 if record.codes.dtype == torch.int8 else 1 << (scheme.bits - 1))
    if scheme.type == "float":
        zero_point = torch.zeros_like(zero_point)
    scale, zero_point = (part.reshape(weight.shape[0], -1) for part in (scale, zero_point))
    if rows is not None:
        weight, scale, zero_point = weight[rows], scale[rows], zero_point[rows]
    given = {"weight": weight, "weight_scale": scale if scheme.scale_dtype else scale.to(dtype)}
    if not scheme.symmetric:
        given["weight_zero_point"] = zero_point.to(torch.int8)
    if scheme.strategy == "tensor_group":
        # The library divides by this factor, and ours multiplies.
        factor = torch.tensor([record.format["tensor_scale"]], dtype=torch.float32)
        given |= {"weight_scale": scale / factor, "weight_global_scale": 1 / factor}
    packed: dict[str, Tensor] = codec.compress(given, words)
    again = codec.decompress(dict(packed), words)["weight"]
    if not torch.equal(again.to(dtype), weight.to(dtype)):
        raise AdaRoundError(f"layer {record.name}: compressed-tensors stores other weights; report this")
    return packed


def _codec(name: str) -> Any:
    compressors: Any = importlib.import_module("compressed_tensors.compressors")
    return compressors.BaseCompressor.get_value_from_registry(name)
