"""Exporter `safetensors`: codes, scales and zero points with a description.

    <output>/quantized.safetensors     per quantized weight W: codes under W, W_scale, W_zero_point; the rest unchanged
    <output>/quantized.json            the format of every quantized weight, and what stayed in float and why

Codes take a whole number of bytes each; packing them is the business of the formats of particular runtimes.

A weight that is stored transposed, or beside others in one tensor of the model (packed attention projections, experts),
has codes `(out, in)` of its own, under the tensor's name and its part of it ("attn.in_proj_weight[0:16]"). Its entry
`part_of` says where it belongs. The whole tensor is in the file too where some of it is no quantized weight.
"""

import json
from collections.abc import Container, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distributed_adaround import __version__
from distributed_adaround.errors import AdaRoundError, InputError, redact
from distributed_adaround.export.result import Exporter, ExportResult, write_safetensors
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.numerics.weight_view import WeightView
from distributed_adaround.solve.record import FORMAT_KEYS, LayerRecord

FORMAT_VERSION = 3
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
    "tensor_scale, rounded to float8_e4m3fn. A layer with part_of is a part of the tensor of that name, shape and "
    "dtype: number (i, j, ...) of the weight is number offset + i * strides[0] + j * strides[1] + ... of the "
    "flattened tensor."
)


class CodesExporter(Exporter):
    """The value of a quantized weight in the model gives only its dtype and which other names are tied to it."""

    files = ("quantized.safetensors", "quantized.json")

    def write(self, result: ExportResult, uri: str) -> None:
        weights = result.weights
        tensors: dict[str, Tensor] = dict(weights)
        layers: dict[str, object] = {}
        places = {name: result.parts.get(name, (name, None)) for name, _ in result.records}
        for owner in {name for name, _ in places.values()} - _partly_quantized(result):
            tensors.pop(owner, None)
        for name, record in result.records:
            owner, view = places[name]
            weight = weights.get(owner)
            shape = None if weight is None else tuple(weight.shape) if view is None else view.shape
            if weight is None or shape != tuple(record.codes.shape) or name in layers:
                raise AdaRoundError(f"{name}: its record fits no weight of the model; this is a defect of this program")
            parts = {name: record.codes, f"{name}_scale": record.scale, f"{name}_zero_point": record.zero_point}
            taken = [part for part in parts if part != owner and part in weights]
            if taken:
                raise InputError(f"{taken[0]} is a tensor of the model, but holds part of {name} here; rename it")
            tensors |= parts
            layers[name] = _description(record, weight, owner, view)
        owners = {owner for owner, _ in places.values()}
        tied = _tied(weights, owners)
        for alias in tied:
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


def _description(record: LayerRecord, weight: Tensor, owner: str, view: WeightView | None) -> dict[str, object]:
    """JSON values of a layer. weight: the tensor `owner` of the model, which the layer's weight is or lies in."""
    dtype = _dtype_name(weight)
    part = None
    if view is not None:
        lies = {key: value for key, value in view.to_dict().items() if key in ("strides", "offset")}
        part = {"name": owner, "shape": list(weight.shape), "dtype": dtype, **lies}
    return {
        **record.format,
        "layer": record.name,
        "output_axis": 1 if record.format["transposed"] else 0,
        "weight_dtype": dtype if view is None or view.dtype is None else view.dtype,
        "part_of": part,
    }


def _partly_quantized(result: ExportResult) -> set[str]:
    """Tensors of the model of which some is in no record."""
    covered: dict[str, int] = {}
    for name, record in result.records:
        if name in result.parts:
            owner = result.parts[name][0]
            covered[owner] = covered.get(owner, 0) + record.codes.numel()
    return {owner for owner, numbers in covered.items() if numbers < result.weights[owner].numel()}


def _tied(weights: Mapping[str, Tensor], owners: Container[str]) -> dict[str, str]:
    """Other names of the tensors that hold quantized weights."""
    return {
        alias: owner
        for alias, tensor in weights.items()
        if alias not in owners
        for owner in weights
        if owner in owners and _are_tied(tensor, weights[owner])
    }


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
            codes=tensors.pop(name),
            scale=tensors.pop(f"{name}_scale"),
            zero_point=tensors.pop(f"{name}_zero_point"),
            format={key: layer[key] for key in FORMAT_KEYS},
        )
        weight = record.dequantize(getattr(torch, layer["weight_dtype"]))
        part = layer["part_of"]
        if part is None:
            tensors[name] = weight
            continue
        owner, shape = part["name"], part["shape"]
        if owner not in tensors:
            tensors[owner] = torch.zeros(shape, dtype=getattr(torch, part["dtype"]))
        view = WeightView.from_dict({**part, "shape": weight.shape, "dtype": None}, tensors[owner].numel())
        view.of(tensors[owner]).copy_(weight)
    for alias, name in text["tied"].items():
        tensors[alias] = tensors[name]
    return tensors


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _are_tied(a: Tensor, b: Tensor) -> bool:
    if not isinstance(a, Tensor) or a.numel() == 0 or a.device != b.device or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
