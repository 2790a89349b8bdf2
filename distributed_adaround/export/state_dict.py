"""The result as safetensors: once as codes with a description, once as plain weights.

    <output>/quantized.safetensors     per quantized weight W: codes under W, W_scale, W_zero_point; the rest unchanged
    <output>/quantized.json            the format of every quantized weight, and what stayed in float and why
    <output>/dequantized.safetensors   weights under the original names, for `load_state_dict(strict=True)`

Codes take one byte each; packing several into one is the business of the formats of particular runtimes.
The bytes depend on names and values only, never on the order of a dict or on which tensors share memory on a device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distributed_adaround import __version__
from distributed_adaround.checkpoint.layer_files import FLOAT_KEYS, FORMAT_KEYS, LayerRecord
from distributed_adaround.errors import AdaRoundError, InputError, redact
from distributed_adaround.files import jsontext, storage, uris

FORMAT_VERSION = 1
# One key only: safetensors writes several in random order.
_METADATA_KEY = "distributed_adaround"
_DEQUANTIZE = (
    "weight = (codes - zero_point) * scale, computed in float32, then cast to weight_dtype. Output channel o lies on "
    "output_axis of the codes; in a grouped transposed convolution o = g * codes.shape[1] + j, where j is the index "
    "on axis 1 and g counts the `groups` equal runs of axis 0. A scale of shape () serves all codes, (O,) one output "
    "channel each, (O, n) n equal runs of the inputs of each output channel, flattened as (in channels, *kernel). "
    "In a layer with element_format, weight = value(code) * scale. Codes of e4m3 are float8_e4m3fn numbers. Codes of "
    "e2m1 are bit patterns (sign, 2 exponent bits, 1 mantissa bit), one in each uint8: 0 to 7 are 0, 0.5, 1, 1.5, 2, "
    "3, 4, 6, and 8 more is the negative. With scale_format e8m0 each scale is a power of two; with e4m3 it is a "
    "float8_e4m3fn number times tensor_scale: scale / tensor_scale, rounded to float8_e4m3fn."
)


def write_codes(
    uri_folder: str,
    state_dict: Mapping[str, Tensor],
    records: Sequence[tuple[str, LayerRecord]],
    description: Mapping[str, object],
) -> None:
    """Write `quantized.safetensors` and then `quantized.json`.

    state_dict: the model's, where the value of a quantized weight gives only its dtype and which other names are tied
    to it. records: (name of the weight in state_dict, its record). description: further top-level fields of the JSON,
    such as the parameters left in float with their reasons; JSON values without credentials.

    Raises InputError when the model holds what safetensors cannot, OutputError when the files cannot be written.
    """
    quantized = {name for name, _ in records}
    layers: dict[str, object] = {}
    tensors: dict[str, Tensor] = dict(state_dict)
    tied: dict[str, str] = {}
    for name, record in records:
        weight = state_dict.get(name)
        if weight is None or weight.shape != record.codes.shape or name in layers:
            raise AdaRoundError(f"{name}: its record fits no weight of the model; this is a defect of this program")
        parts = {name: record.codes, f"{name}_scale": record.scale, f"{name}_zero_point": record.zero_point}
        taken = [part for part in parts if part != name and part in state_dict]
        if taken:
            raise InputError(f"{taken[0]} is a tensor of the model, but holds part of {name} here; rename it")
        tensors |= parts
        layers[name] = _describe(record, weight.dtype)
        for alias in state_dict.keys() - quantized:
            if _same(state_dict[alias], weight):
                tied[alias] = name
                tensors.pop(alias, None)
    own = {
        "format": "distributed_adaround",
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "dequantize": _DEQUANTIZE,
        "layers": layers,
        "tied": tied,
    }
    clash = own.keys() & description.keys()
    if clash:
        raise AdaRoundError(f"description may not hold {sorted(clash)}; this is a defect of this program")
    text = {**description, **own}
    _write(uris.join(uri_folder, "quantized.safetensors"), tensors, {_METADATA_KEY: jsontext.dumps(text)})
    storage.write_bytes(uris.join(uri_folder, "quantized.json"), (jsontext.dumps(text, indent=1) + "\n").encode())


def write_dequantized(uri_folder: str, state_dict: Mapping[str, Tensor]) -> None:
    """Write `dequantized.safetensors`: every tensor under its own name, tied ones as copies.

    Raises InputError when the model holds what safetensors cannot, OutputError when the file cannot be written.
    """
    _write(uris.join(uri_folder, "dequantized.safetensors"), state_dict, {"format": "pt"})


def read_codes(uri_folder: str) -> dict[str, Tensor]:
    """The state dict of `quantized.safetensors` with plain weights, equal to `dequantized.safetensors` bit by bit.

    Raises InputError when the file is missing, damaged or of another version.
    """
    uri = uris.join(uri_folder, "quantized.safetensors")
    shown = redact(uri)
    try:
        with storage.local_file(uri) as path, safe_open(path, framework="pt") as file:
            text = json.loads((file.metadata() or {})[_METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        version = text["format_version"]
        if version == FORMAT_VERSION:
            return _dequantized(tensors, text)
    except InputError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, AdaRoundError) as error:
        raise InputError(f"{shown} is not a whole file written by distributed_adaround; export it again") from error
    raise InputError(f"{shown} has format version {version!r}, this program reads {FORMAT_VERSION}; export it again")


def _describe(record: LayerRecord, dtype: torch.dtype) -> dict[str, object]:
    return {
        **record.format,
        "layer": record.name,
        "output_axis": 1 if record.format["transposed"] else 0,
        "weight_dtype": str(dtype).removeprefix("torch."),
    }


def _dequantized(tensors: dict[str, Tensor], text: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    for name, layer in text["layers"].items():
        record = LayerRecord(
            name=name,
            codes=tensors[name],
            scale=tensors.pop(f"{name}_scale"),
            zero_point=tensors.pop(f"{name}_zero_point"),
            format={key: layer[key] for key in FORMAT_KEYS | (FLOAT_KEYS & layer.keys())},
            metrics={},
        )
        tensors[name] = record.dequantize(getattr(torch, layer["weight_dtype"]))
    for alias, name in text["tied"].items():
        tensors[alias] = tensors[name]
    return tensors


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are one tensor under two names."""
    if not isinstance(a, Tensor) or a.numel() == 0 or a.device != b.device or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the host, contiguous, none sharing memory with another, in the order of their names."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{name} is {kind}, safetensors holds dense tensors only; leave it out of the state dict")
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def _write(uri: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    plain = _plain(tensors)

    def write(path: Path) -> None:
        path.touch()
        mode = path.stat().st_mode
        try:
            safetensors.torch.save_file(plain, path, metadata=metadata)
        except KeyError as error:
            raise InputError(f"a tensor of the model has dtype {error}, which safetensors cannot hold") from error
        # safetensors replaces the file by one that only its owner may read.
        path.chmod(mode)

    storage.write_file(uri, write)
