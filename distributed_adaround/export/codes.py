"""Exporter `safetensors`: codes, scales and zero points with a description.

    <output>/quantized.safetensors     per quantized weight W: codes under W, W_scale, W_zero_point; the rest unchanged
    <output>/quantized.json            the format of every quantized weight, and what stayed in float and why

Codes take a whole number of bytes each; packing them is the business of the formats of particular runtimes.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distributed_adaround import __version__
from distributed_adaround.errors import AdaRoundError, InputError, redact
from distributed_adaround.export.result import Exporter, ExportResult, write_safetensors
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.solve.record import FORMAT_KEYS, LayerRecord

FORMAT_VERSION = 2
# One key only: safetensors writes several in random order.
_METADATA_KEY = "distributed_adaround"
_DEQUANTIZE = (
    "weight = (codes - zero_point) * scale, computed in float32, then cast to weight_dtype. Output channel o lies on "
    "output_axis of the codes; in a grouped transposed convolution o = g * codes.shape[1] + j, where j is the index "
    "on axis 1 and g counts the `groups` equal runs of axis 0. A scale of shape () serves all codes, (O,) one output "
    "channel each, (O, n) n equal runs of the inputs of each output channel, flattened as (in channels, *kernel). "
    "In a layer with element_format, weight = value(code) * scale. Codes of e4m3 are float8_e4m3fn numbers. Codes of "
    "e2m1 are bit patterns (sign, 2 exponent bits, 1 mantissa bit), one in each uint8: 0 to 7 are 0, 0.5, 1, 1.5, 2, "
    "3, 4, 6, and 8 more is the negative. Scales are float32 tensors, with scale_format float16 and bfloat16 of these. "
    "With e8m0 each scale is a power of two; with e4m3 it is a float8_e4m3fn number times tensor_scale: scale / "
    "tensor_scale, rounded to float8_e4m3fn."
)


class CodesExporter(Exporter):
    """The value of a quantized weight in the model gives only its dtype and which other names are tied to it."""

    files = ("quantized.safetensors", "quantized.json")

    def write(self, result: ExportResult, uri: str) -> None:
        quantized, weights = {name for name, _ in result.records}, result.weights
        tensors: dict[str, Tensor] = dict(weights)
        layers: dict[str, object] = {}
        tied: dict[str, str] = {}
        for name, record in result.records:
            weight = weights.get(name)
            if weight is None or weight.shape != record.codes.shape or name in layers:
                raise AdaRoundError(f"{name}: its record fits no weight of the model; this is a defect of this program")
            parts = {name: record.codes, f"{name}_scale": record.scale, f"{name}_zero_point": record.zero_point}
            taken = [part for part in parts if part != name and part in weights]
            if taken:
                raise InputError(f"{taken[0]} is a tensor of the model, but holds part of {name} here; rename it")
            tensors |= parts
            axis, dtype = 1 if record.format["transposed"] else 0, str(weight.dtype).removeprefix("torch.")
            layers[name] = {**record.format, "layer": record.name, "output_axis": axis, "weight_dtype": dtype}
            for alias in weights.keys() - quantized:
                if _are_tied(weights[alias], weight):
                    tied[alias] = name
                    tensors.pop(alias, None)
        text = {
            "float_parameters": list(result.float_parameters),
            "format": "distributed_adaround",
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "dequantize": _DEQUANTIZE,
            "layers": layers,
            "tied": tied,
        }
        metadata = {_METADATA_KEY: jsontext.dumps(text)}
        write_safetensors(uris.join(uri, "quantized.safetensors"), tensors, metadata)
        storage.write_bytes(uris.join(uri, "quantized.json"), (jsontext.dumps(text, indent=1) + "\n").encode())


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


def _dequantized(tensors: dict[str, Tensor], text: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    for name, layer in text["layers"].items():
        record = LayerRecord(
            name=name,
            codes=tensors[name],
            scale=tensors.pop(f"{name}_scale"),
            zero_point=tensors.pop(f"{name}_zero_point"),
            format={key: layer[key] for key in FORMAT_KEYS},
        )
        tensors[name] = record.dequantize(getattr(torch, layer["weight_dtype"]))
    for alias, name in text["tied"].items():
        tensors[alias] = tensors[name]
    return tensors


def _are_tied(a: Tensor, b: Tensor) -> bool:
    if not isinstance(a, Tensor) or a.numel() == 0 or a.device != b.device or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
