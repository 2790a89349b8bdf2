"""What a job finds, written down: codes, scales and zero points. All other formats are made from it.

    <output>/quantized.safetensors     of each quantized weight W: W.codes, W.scale, W.zero_point; the rest unchanged
    <output>/quantized.json            the format of every quantized weight, what lies where, what stayed in float and
                                       why; written last

A model that came in several files leaves in several, quantized-00001-of-00003.safetensors and so on. Codes of integers
of less than 8 bits and of fp4 are packed. No weight is stored under its own name, so nothing loads codes as weights.

A weight that is stored transposed, or beside others in one tensor of the model (packed attention projections, experts),
has codes `(out, in)` of its own, under the tensor's name and its part of it ("attn.in_proj_weight[0:16].codes"). Its
entry `part_of` says where it belongs. The whole tensor is in the file too where some of it is no quantized weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from distributed_adaround import __version__
from distributed_adaround.capture.sites import Site
from distributed_adaround.errors import AdaRoundError, InputError
from distributed_adaround.export.shards import plan_shards, write_shards
from distributed_adaround.export.stored import DESCRIPTION, FORMAT_VERSION, QuantizedLayer, StoredResult
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.formats import LayerFormat
from distributed_adaround.numerics.packing import pack_bits, packed_size
from distributed_adaround.numerics.weight_view import dtype_name
from distributed_adaround.solve.record import LayerRecord, format_entries

STEM = "quantized"
_DEQUANTIZE = (
    "weight = (codes - zero_point) * scale, computed in float32, then cast to weight_dtype. Packed codes are one "
    "little-endian stream of bits: code i, in the order of the flattened weight of `shape`, takes the `packed` bits "
    "from bit i * packed on, as two's complement where the dtype is signed; codes that are not packed have the "
    "weight's shape. Output channel o lies on output_axis of the codes; in a grouped transposed convolution o = g * "
    "shape[1] + j, where j is the index on axis 1 and g counts the `groups` equal runs of axis 0. A scale of shape () "
    "serves all codes, (O,) one output channel each, (O, n) n equal runs of the inputs of each output channel, "
    "flattened as (in channels, *kernel). A zero_point that is a number serves all codes; null: W.zero_point holds "
    "one for each scale. In a layer with element_format, weight = value(code) * scale. Codes of e4m3 are "
    "float8_e4m3fn numbers. Codes of e2m1 are bit patterns (sign, 2 exponent bits, 1 mantissa bit): 0 to 7 are 0, "
    "0.5, 1, 1.5, 2, 3, 4, 6, and 8 more is the negative. Scales are float32 tensors, with scale_format float16 and "
    "bfloat16 of these. With e8m0 each scale is a power of two; with e4m3 it is a float8_e4m3fn number times "
    "tensor_scale: scale / tensor_scale, rounded to float8_e4m3fn. A layer with part_of is a part of the tensor of "
    "that name: number (i, j, ...) of the weight is number offset + i * strides[0] + j * strides[1] + ... of the "
    "flattened tensor."
)


@dataclass(frozen=True)
class SolvedModel:
    """A quantized model in memory. weights: the model's tensors under its own names, dequantized. layers: each with its
    record, in the order of the walk. dtype: of most of the model's numbers. float_parameters: JSON values, each
    parameter left in float with its reason. checkpoint, shard_bytes: as OpenedModel has them."""

    weights: Mapping[str, Tensor]
    layers: Sequence[tuple[QuantizedLayer, LayerRecord]]
    dtype: torch.dtype = torch.float32
    float_parameters: Sequence[Mapping[str, object]] = ()
    checkpoint: Mapping[str, str] = field(default_factory=dict)
    shard_bytes: int = 0


def planned_layer(site: Site, layer_format: LayerFormat, tensor: Tensor) -> QuantizedLayer:
    """A layer before it is solved. tensor: the model's, that its weight is, or lies in."""
    view = site.view
    return QuantizedLayer(
        name=site.name,
        stored_name=site.stored_name,
        owner=site.weight_name,
        view=view,
        kind=site.module_class,
        shape=site.geometry.weight_shape,
        dtype=dtype_name(tensor.dtype) if view is None or view.dtype is None else view.dtype,
        format=format_entries(layer_format, site.geometry),
    )


def write_codes(solved: SolvedModel, uri: str, source: str) -> None:
    """Write the files into the folder `uri`. source: digest of what the result depends on.

    Raises InputError when safetensors cannot hold a tensor of the model, or one of them has a name that is needed here;
    OutputError.
    """
    description = uris.join(uri, DESCRIPTION)
    storage.remove_tree(description)  # what counts, until it comes last
    writer = _Writer(solved)
    named = plan_shards(STEM, writer.sizes.items(), solved.shard_bytes)
    metadata = {"format": "distributed_adaround"}
    written = write_shards(uri, STEM, named, writer.tensors, metadata, source)
    text = {
        "checkpoint": dict(solved.checkpoint),
        "float_parameters": list(solved.float_parameters),
        "files": {file: asdict(written[file]) | {"tensors": sorted(named[file])} for file in named},
        "format": "distributed_adaround",
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "dequantize": _DEQUANTIZE,
        "dtype": dtype_name(solved.dtype),
        "layers": writer.descriptions,
        "shard_bytes": solved.shard_bytes,
        "tensors": {
            name: [dtype_name(tensor.dtype), list(tensor.shape)]
            for name, tensor in solved.weights.items()
            if name not in writer.tied
        },
        "tied": writer.tied,
    }
    storage.write_bytes(description, (jsontext.dumps(text, indent=1) + "\n").encode())


def read_codes(uri: str) -> dict[str, Tensor]:
    """The state dict of an output with plain weights, equal to `dequantized.safetensors` bit by bit.

    Raises InputError when a file is missing, damaged or of another version.
    """
    with LocalFiles.temporary() as files:
        return {name: tensor.clone() for name, tensor in StoredResult.open(uri, files).state_dict().items()}


class _Writer:
    """Tensors by the keys that they are stored under, made when they are asked for. sizes: of all, in bytes."""

    def __init__(self, solved: SolvedModel) -> None:
        self._weights = solved.weights
        self._layers = {layer.stored_name: (layer, record) for layer, record in solved.layers}
        owners = {layer.owner for layer, _ in solved.layers}
        if len(self._layers) < len(solved.layers) or not owners <= self._weights.keys():
            raise AdaRoundError("a record fits no weight of the model; this is a defect of this program")
        self.tied = _tied(self._weights, owners)
        self.descriptions = {name: self._description(name) for name in self._layers}
        whole = self._weights.keys() - self.tied.keys() - (owners - _partly_quantized(solved))
        self._keys: dict[str, tuple[str, str]] = {}
        self.sizes: dict[str, int] = {}
        for name in sorted(whole | self._layers.keys()):
            if name in whole:
                self.sizes[name] = self._bytes_of(name)
            for part in self._parts(name) if name in self._layers else ():
                key = f"{name}.{part}"
                if key in self._weights:
                    raise InputError(f"{key} is a tensor of the model, but holds {part} of {name} here; rename it")
                self._keys[key] = (name, part)
                self.sizes[key] = self._size_of(name, part)

    def tensors(self, keys: Sequence[str]) -> dict[str, Tensor]:
        return {key: self._part(*self._keys[key]) if key in self._keys else self._weights[key] for key in keys}

    def _bytes_of(self, name: str) -> int:
        tensor = self._weights[name]
        return tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0

    def _parts(self, name: str) -> list[str]:
        return ["codes", "scale", *(["zero_point"] if self.descriptions[name]["zero_point"] is None else [])]

    def _size_of(self, name: str, part: str) -> int:
        record, bits = self._layers[name][1], self.descriptions[name]["packed"]
        if part == "codes" and isinstance(bits, int):
            return packed_size(record.codes.numel(), bits)
        tensor: Tensor = getattr(record, part)
        return tensor.numel() * (record.codes.element_size() if part == "zero_point" else tensor.element_size())

    def _part(self, name: str, part: str) -> Tensor:
        record, bits = self._layers[name][1], self.descriptions[name]["packed"]
        if part == "codes" and isinstance(bits, int):
            return pack_bits(record.codes, bits)
        tensor: Tensor = getattr(record, part)
        return tensor.to(record.codes.dtype) if part == "zero_point" else tensor

    def _description(self, name: str) -> dict[str, object]:
        """JSON values of a layer."""
        layer, record = self._layers[name]
        part = None
        if layer.view is not None:
            part = {"name": layer.owner, "strides": list(layer.view.strides), "offset": layer.view.offset}
        expected = self._weights[layer.owner].shape if layer.view is None else layer.view.shape
        if tuple(expected) != tuple(record.codes.shape):
            raise AdaRoundError(f"{name}: its record fits no weight of the model; this is a defect of this program")
        low, high = (int(number) for number in record.zero_point.aminmax())
        bits = layer.number.bits
        return {
            **record.format,
            "layer": layer.name,
            "kind": layer.kind,
            "shape": list(record.codes.shape),
            "packed": bits if bits < 8 else None,
            "zero_point": low if layer.symmetric and low == high else None,
            "output_axis": 1 if record.format["transposed"] else 0,
            "weight_dtype": layer.dtype,
            "part_of": part,
        }


def _partly_quantized(solved: SolvedModel) -> set[str]:
    """Tensors of the model of which some is in no record."""
    covered: dict[str, int] = {}
    for layer, record in solved.layers:
        covered[layer.owner] = covered.get(layer.owner, 0) + record.codes.numel()
    return {owner for owner, numbers in covered.items() if numbers < solved.weights[owner].numel()}


def _tied(weights: Mapping[str, Tensor], owners: set[str]) -> dict[str, str]:
    """Other names of tensors: those that hold quantized weights, and of the rest the first, have the name."""
    first: dict[object, str] = {}
    tied = {}
    for name in sorted(weights, key=lambda each: (each not in owners, each)):
        tensor = weights[name]
        # Tensors without elements share nothing.
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.numel():
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            owner = first.setdefault(key, name)
            if owner != name and name not in owners:
                tied[name] = owner
    return tied
