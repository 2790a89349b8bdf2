"""A finished job's result, read tensor by tensor from what exporter `safetensors` wrote (codes.py says how it lies)."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distributed_adaround.errors import AdaRoundError, InputError, redact
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.formats import FORMATS, NumberFormat
from distributed_adaround.numerics.packing import unpack_bits
from distributed_adaround.numerics.weight_view import WeightView
from distributed_adaround.solve.record import FORMAT_KEYS, LayerRecord

FORMAT_VERSION = 4
DESCRIPTION = "quantized.json"


@dataclass(frozen=True)
class QuantizedLayer:
    """One quantized weight. name: of its layer. stored_name: its own, unique. owner: the tensor of the model that it
    is, or lies in where it is a part: then view says how. kind: class of the module ("Linear"). shape: the weight's in
    torch. dtype: name of the one the layer computes with ("bfloat16"). format: as LayerRecord.format; tensor_scale is
    None before the layer is solved."""

    name: str
    stored_name: str
    owner: str
    view: WeightView | None
    kind: str
    shape: tuple[int, ...]
    dtype: str
    format: Mapping[str, Any]

    @property
    def number(self) -> NumberFormat:
        return FORMATS[self.format["dtype"]]

    @property
    def strategy(self) -> str:
        """ "tensor", "channel" or "group"."""
        return str(self.format["qscheme"]).split("_")[1]

    @property
    def symmetric(self) -> bool:
        return str(self.format["qscheme"]).endswith("_symmetric")

    @property
    def group_size(self) -> int | None:
        size: int | None = self.format["group_size"]
        return size

    @property
    def scheme(self) -> str:
        """In words, for messages: "int4 per_group_symmetric 128"."""
        return f"{self.format['dtype']} {self.format['qscheme']}" + (f" {self.group_size}" if self.group_size else "")


class StoredResult:
    """From `StoredResult.open`. A file is opened for each tensor, so that no more is in memory than was asked for.

    layers: by their stored names. tied: other names of tensors. names: of all tensors of the model but the tied ones.
    shapes, dtypes: of these. dtype: of most of the model's numbers. checkpoint: the files of the directory that the
    model came in, by the names of its tensors there. shard_bytes: size of the largest of these files. digest: SHA-256
    of the description, which holds those of the files of codes.
    """

    def __init__(self, uri: str, files: LocalFiles, text: Mapping[str, Any], digest: str) -> None:
        self._uri, self._files, self.digest = uri, files, digest
        self._entries: Mapping[str, Mapping[str, Any]] = text["layers"]
        self._place = {name: file for file, entry in text["files"].items() for name in entry["tensors"]}
        self._checked: set[str] = set()
        self._sizes = {file: int(entry["size"]) for file, entry in text["files"].items()}
        self.sha256 = {file: str(entry["sha256"]) for file, entry in text["files"].items()}
        self.tied: dict[str, str] = dict(text["tied"])
        self.names: tuple[str, ...] = tuple(text["tensors"])
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, (_, shape) in text["tensors"].items()}
        self.layers = {name: _layer(name, entry, self.shapes) for name, entry in self._entries.items()}
        self.dtypes = {name: str(dtype) for name, (dtype, _) in text["tensors"].items()}
        self.checkpoint: dict[str, str] = dict(text["checkpoint"])
        self.dtype: torch.dtype = getattr(torch, text["dtype"])
        self.shard_bytes = int(text["shard_bytes"])

    @classmethod
    def open(cls, uri: str, files: LocalFiles) -> "StoredResult":
        """That of the output `uri`. Raises InputError when there is none, or it is damaged or of another version."""
        place = uris.join(uri, DESCRIPTION)
        if not storage.exists(place):
            raise InputError(f"{redact(uri)} holds no {DESCRIPTION}: no finished job; run the job to its end first")
        data = storage.read_bytes(place)
        text = jsontext.parse_object(data, redact(place))
        version = text.get("format_version")
        if version != FORMAT_VERSION:
            rule = f"has format version {version!r}, this program reads {FORMAT_VERSION}"
            raise InputError(f"{redact(place)} {rule}; run the job again, which takes its finished layers as they are")
        try:
            return cls(uri, files, text, hashlib.sha256(data).hexdigest())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{redact(place)} is damaged: {error!r}; run the job again") from error

    @cached_property
    def _stored_in(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for layer in self.layers.values():
            found.setdefault(layer.owner, []).append(layer.stored_name)
        return found

    def layers_of(self, name: str) -> list[QuantizedLayer]:
        """The quantized weights that lie in a tensor of the model; empty: it stayed in float."""
        return [self.layers[stored] for stored in self._stored_in.get(self.tied.get(name, name), ())]

    @property
    def owners(self) -> list[str]:
        """Names of the tensors that hold quantized weights."""
        return list(self._stored_in)

    def all_names(self, name: str) -> list[str]:
        """A name of `names`, and the tied ones of the same tensor."""
        return [name, *(alias for alias, owner in self.tied.items() if owner == name)]

    def bytes_of(self, name: str) -> int:
        """Of a tensor of the model, one of `names`."""
        return math.prod(self.shapes[name]) * torch.empty(0, dtype=getattr(torch, self.dtypes[name])).element_size()

    def record(self, stored_name: str) -> LayerRecord:
        """Codes, scales and zero points of a layer. Raises InputError when its file is damaged."""
        layer, entry = self.layers[stored_name], self._entries[stored_name]
        codes, scale = self._read(f"{stored_name}.codes"), self._read(f"{stored_name}.scale")
        own = self._read(f"{stored_name}.zero_point") if entry["zero_point"] is None else None
        try:
            if entry["packed"]:
                signed = layer.number.element is None and layer.number.signed
                codes = unpack_bits(codes, layer.number.bits, math.prod(layer.shape), signed).reshape(layer.shape)
            zero_point = torch.full_like(scale, entry["zero_point"], dtype=torch.int32) if own is None else own.int()
            return LayerRecord(layer.name, codes, scale, zero_point, dict(layer.format))
        except (AdaRoundError, RuntimeError, TypeError, ValueError) as error:
            raise self._damaged(f"{stored_name}.codes", "what it holds is no layer") from error

    def weight(self, stored_name: str) -> Tensor:
        """A quantized weight in torch's shape, as its layer computes with it."""
        return self.record(stored_name).dequantize(getattr(torch, self.layers[stored_name].dtype))

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model by its own name, also a tied one: dequantized, in the model's shape and dtype."""
        name = self.tied.get(name, name)
        parts = self.layers_of(name)
        if not parts:
            return self._read(name)
        if parts[0].view is None:
            return self.weight(parts[0].stored_name)
        whole = name in self._place
        shape, dtype = self.shapes[name], getattr(torch, self.dtypes[name])
        tensor = self._read(name).clone() if whole else torch.zeros(shape, dtype=dtype)
        for part in parts:
            assert part.view is not None
            part.view.of(tensor).copy_(self.weight(part.stored_name))
        return tensor

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the model, tied ones as one."""
        state = {name: self.tensor(name) for name in self.names}
        return state | {alias: state[name] for alias, name in self.tied.items()}

    def path(self, file: str) -> Path:
        """A local copy of one of the files. Raises InputError when it has not the size that the description says."""
        path = self._files.path(uris.join(self._uri, file))
        if file not in self._checked:
            if path.stat().st_size != self._sizes[file]:
                what = f"it has {path.stat().st_size} bytes, {DESCRIPTION} says {self._sizes[file]}"
                raise InputError(f"{redact(uris.join(self._uri, file))} is damaged: {what}; run the job again")
            self._checked.add(file)
        return path

    def check(self, file: str) -> None:
        """Raises InputError when the SHA-256 of one of the files is another one than the description says."""
        if self._files.sha256(self.path(file)) != self.sha256[file]:
            what = f"its SHA-256 is not that of {DESCRIPTION}"
            raise InputError(f"{redact(uris.join(self._uri, file))} is damaged: {what}; run the job again")

    def _read(self, key: str) -> Tensor:
        try:
            with safe_open(self.path(self._place[key]), framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor
        except (KeyError, SafetensorError) as error:
            raise self._damaged(key, "it is missing") from error

    def _damaged(self, key: str, what: str) -> InputError:
        where = redact(uris.join(self._uri, self._place.get(key, DESCRIPTION)))
        return InputError(f"{where} is damaged: {key}: {what}; run the job again")


def _layer(name: str, entry: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> QuantizedLayer:
    """Raises ValueError when it does not lie inside its tensor."""
    part = entry["part_of"]
    shape = tuple(entry["shape"])
    view = None
    if part is not None:
        lies = {**part, "shape": shape, "dtype": None}
        view = WeightView.from_dict(lies, math.prod(shapes[part["name"]]))
    return QuantizedLayer(
        name=entry["layer"],
        stored_name=name,
        owner=name if part is None else part["name"],
        view=view,
        kind=entry["kind"],
        shape=shape,
        dtype=entry["weight_dtype"],
        format={key: entry[key] for key in FORMAT_KEYS},
    )
