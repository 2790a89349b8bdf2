"""Exporter `torchao`: weights as tensors of torchao, in safetensors, for `load_state_dict(assign=True)`.

    <output>/torchao/model.safetensors     or shards with an index, no larger than the input's

Of a quantized weight a.weight the file holds a._weight_qdata (int8, a byte for each code whatever its bits),
a._weight_scale and a._weight_zero_point, as torchao's flatten_tensor_state_dict names them; all else as it is. Its
metadata say how the tensors are put together again. Unsigned codes are shifted to signed ones.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distributed_adaround.capture.exported import quiet_torch
from distributed_adaround.capture.forward import real_tensors, run_once
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError, SpecError, first_line
from distributed_adaround.export.exporter import Exporter, ExportPlan, ExportTask, Loaded
from distributed_adaround.export.shards import plan_shards, write_shards
from distributed_adaround.export.stored import QuantizedLayer, StoredResult
from distributed_adaround.files import jsontext, storage, uris

FOLDER = "torchao"
_STEM = "model"
_INDEX = f"{_STEM}.safetensors.index.json"
_RECURRENT = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")


class TorchaoExporter(Exporter):
    files = (FOLDER,)
    published = (f"{FOLDER}/{_STEM}.safetensors", f"{FOLDER}/{_INDEX}")

    def check(self, plan: ExportPlan) -> None:
        _library()
        for layer in plan.layers:
            if (problem := _problem(layer, plan.layers)) is not None:
                raise SpecError(f"output.formats torchao cannot hold layer {layer.name!r} ({layer.scheme}): {problem}")

    def write(self, task: ExportTask, uri: str) -> None:
        result, library = task.result, _library()
        folder = uris.join(uri, FOLDER)
        shards = _shards(result)
        index = uris.join(folder, _INDEX)
        for place in (index, *(uris.join(folder, file) for file in shards if len(shards) == 1)):
            storage.remove_tree(place)
        named = [name for names in shards.values() for name in names if _is_named(name)]
        # All files have the metadata of all tensors: torchao takes what a file holds and leaves out the rest.
        metadata = library.flatten({name: _tensor(library, result, name, empty=True) for name in named})[1]

        def tensors(names: Sequence[str]) -> dict[str, Tensor]:
            own = {name: _tensor(library, result, name) for name in names}
            found: dict[str, Tensor] = library.flatten({name: own[name] for name in names if _is_named(name)})[0]
            return found | {name: own[name] for name in names if not _is_named(name)}

        write_shards(folder, _STEM, shards, tensors, metadata, result.digest)
        if len(shards) > 1:
            places = {key: file for file, names in shards.items() for name in names for key in _keys(result, name)}
            storage.write_bytes(index, (jsontext.dumps({"weight_map": places}, indent=1) + "\n").encode())

    def load(self, task: ExportTask, uri: str) -> Loaded:
        paths = [task.files.path(uris.join(uri, FOLDER, file)) for file in _shards(task.result)]
        note = "a byte for each code"
        model = task.model()
        if not isinstance(model, nn.Module):
            return Loaded(_weights(paths), None, note=f"{note}; a program takes no state dict")
        ready = _with_state(model, paths)

        def run(inputs: ModelInputs) -> list[Tensor]:
            try:
                return real_tensors(run_once(ready, inputs, torch.device("cpu"), seed=0))
            except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
                raise InputError(f"output.formats torchao: the model does not run: {first_line(error)}") from error

        return Loaded(_weights(paths), run, 1e-5 if task.dtype == torch.float32 else 2e-2, note)


class _Library:
    """What this needs of torchao."""

    def __init__(self) -> None:
        # torchao logs that its compiled parts do not load, which nothing here needs.
        with quiet_torch():
            from torchao.prototype.safetensors import safetensors_support
            from torchao.quantization import IntxUnpackedToInt8Tensor

        self.flatten: Any = safetensors_support.flatten_tensor_state_dict
        self.unflatten: Any = safetensors_support.unflatten_tensor_state_dict
        self.tensor: Any = IntxUnpackedToInt8Tensor


def _library() -> _Library:
    try:
        return _Library()
    except ImportError as error:
        remedy = f"pip install 'distributed_adaround[torchao]' ({first_line(error)})"
        raise SpecError(f"output.formats torchao needs the package torchao: {remedy}") from error


def _problem(layer: QuantizedLayer, layers: Sequence[QuantizedLayer]) -> str | None:
    """Why torchao's tensor cannot be a layer's weight, and what to do; None: it can."""
    ignore = f"add {layer.name!r} to quantize.ignore"
    if layer.number.element is not None:
        return "its tensors for weights hold integers; set quantize.dtype to int2 to int8 or uint2 to uint8"
    if layer.view is not None:
        return f"it is stored transposed, cast, or as a part of {layer.owner}; {ignore}"
    if layer.kind in _RECURRENT:
        return f"a recurrent layer takes plain weights only; {ignore}"
    if layer.format["transposed"] or len(layer.shape) not in (2, 4):
        return f"its operations are linear, conv2d and embedding; {ignore}"
    if "." not in layer.owner:
        return f"{layer.owner} is a parameter of no submodule, which its file format cannot name; {ignore}"
    if other := next((o for o in layers if o.owner.startswith(f"{layer.owner}_")), None):
        return f"its file format would mix it up with {other.owner}; {ignore}"
    if _block(layer) is None:
        kernel = layer.shape[-1] * layer.shape[-2]
        return (
            f"groups of {layer.group_size} are no box of the kernel; set quantize.group_size to a multiple of {kernel}"
        )
    return None


def _block(layer: QuantizedLayer) -> list[int] | None:
    """How many weights along each dimension share a scale; None: they make no box."""
    if layer.strategy == "tensor":
        return list(layer.shape)
    if layer.group_size is None:
        return [1, *layer.shape[1:]]
    block, left = [1] * len(layer.shape), layer.group_size
    for dim in range(len(layer.shape) - 1, 0, -1):
        size = layer.shape[dim]
        if left % size and size % left:
            return None
        block[dim] = min(left, size)
        left //= block[dim]
    return block


def _owners(result: StoredResult) -> list[str]:
    """Names of the model's tensors, tied ones too."""
    return [*result.names, *result.tied]


def _is_named(name: str) -> bool:
    """Whether torchao can name a tensor; parameters of the model itself lie beside its own, as in any file."""
    return "." in name


def _keys(result: StoredResult, name: str) -> list[str]:
    """What a file holds of a tensor of the model."""
    owner, _, weight = name.rpartition(".")
    parts = ("qdata", "scale", "zero_point")
    return [f"{owner}._{weight}_{part}" for part in parts] if result.layers_of(name) else [name]


def _shards(result: StoredResult) -> dict[str, list[str]]:
    """Names of the model's tensors by file."""
    sizes = []
    for name in sorted(_owners(result)):
        own = result.tied.get(name, name)
        sizes.append((name, math.prod(result.shapes[own]) if result.layers_of(name) else result.bytes_of(own)))
    return plan_shards(_STEM, sizes, result.shard_bytes)


def _tensor(library: _Library, result: StoredResult, name: str, empty: bool = False) -> Tensor:
    """A tensor of the model, as torchao's where it is quantized. empty: without its values, for the metadata."""
    layers = result.layers_of(name)
    if not layers:
        return torch.empty(0) if empty else result.tensor(name)
    (layer,) = layers
    block = _block(layer)
    assert block is not None
    counts = [size // part for size, part in zip(layer.shape, block, strict=True)]
    dtype, bits = getattr(torch, layer.dtype), layer.number.bits
    if empty:
        codes = torch.empty(layer.shape, dtype=torch.int8, device="meta")
        scale, zero_point = (torch.empty(counts, dtype=kind, device="meta") for kind in (dtype, torch.int8))
    else:
        record = result.record(layer.stored_name)
        shift = 0 if layer.number.signed else 1 << (bits - 1)
        codes = (record.codes.short() - shift).to(torch.int8)
        scale = record.scale.reshape(counts)
        zero_point = (record.zero_point - shift).reshape(counts)
        if not -128 <= int(zero_point.min()) <= int(zero_point.max()) <= 127:
            raise InputError(f"output.formats torchao: a zero point of layer {layer.name!r} is not within 8 bits")
        zero_point = zero_point.to(torch.int8)
    target = getattr(torch, f"int{bits}")
    tensor: Tensor = library.tensor(codes, scale, zero_point, target, block, dtype, None)
    return tensor


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, as torchao puts them together."""
    with safe_open(path, framework="pt") as file:
        flat, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)
    with quiet_torch():
        state, left = _library().unflatten(flat, metadata)
    return {**state, **left}


def _weights(paths: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        for name, tensor in _read(path).items():
            yield name, tensor.dequantize() if hasattr(tensor, "qdata") else tensor


def _with_state(model: nn.Module, paths: Sequence[Path]) -> nn.Module:
    """A copy of the model with the tensors of the files, on the host; its own weights are not copied first."""
    tensors = [*model.parameters(), *model.buffers()]
    stored = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    memo: dict[int, Any] = {}
    for tensor in tensors:
        if id(tensor) not in stored:
            memo[id(tensor)] = tensor.detach().cpu()
        elif isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
        else:
            memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    ready = copy.deepcopy(model, memo)
    ready.load_state_dict({name: tensor for path in paths for name, tensor in _read(path).items()}, assign=True)
    return ready
