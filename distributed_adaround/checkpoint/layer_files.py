"""Commits of finished layers, and their way back into a job that starts again.

    <output>/commits/manifest.json                        what counts; written last, with a checksum of itself
    <output>/commits/layers/00003-layer1.conv2.safetensors    codes, scale, zero_point (and shift) of one layer

A layer file exists for a reader only when the manifest names it, so a crash at any moment leaves the state of the last
whole commit. Layer files hold nothing but the result: no times, hosts or world size, so equal results are equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

from distributed_adaround.errors import AdaRoundError, InputError, redact
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.numerics.floats import decode, float_values
from distributed_adaround.numerics.grid import Grid, round_scale
from distributed_adaround.numerics.layers import LayerGeometry

logger = logging.getLogger(__name__)

VERSION = 1
FORMAT_KEYS = frozenset({"dtype", "qscheme", "group_size", "quant_min", "quant_max", "groups", "transposed"})
# What a float format has besides.
FLOAT_KEYS = frozenset({"element_format", "scale_format", "tensor_scale"})

_PARTS = {
    "model": "model weights",
    "data": "calibration data",
    "spec": "job file",
    "format": "number format",
}


@dataclass(frozen=True)
class LayerRecord:
    """The result of one layer.

    codes: int8 or uint8, of float formats the bit patterns (float8_e4m3fn, or e2m1 in a uint8), in the shape the weight
    has in torch. scale: float32, shape `()` per tensor, `(O,)` per
    channel, `(O, n_groups)` per group. zero_point: int32, same shape as scale. format: dtype, qscheme, group_size,
    quant_min, quant_max, and groups and transposed of a convolution (1 and False for any other layer), without which
    a scale cannot be laid over the codes. A float format has no quant_min and quant_max (None), but element_format
    ("e4m3", "e2m1"), scale_format ("float32", "e8m0", "e4m3") and tensor_scale, the float32 number times which e4m3
    scales make up `scale` (None with other scales). metrics: what the report shows; JSON values only. shift: float32
    `(O,)`, what is added to the layer's outputs by its bias (or the batch norm behind it), or None.

    Raises AdaRoundError when these do not fit together: that is a defect of this program.
    """

    name: str
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    format: dict[str, Any]
    metrics: dict[str, object]
    shift: Tensor | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise AdaRoundError(f"layer {self.name}: {problem}; this is a defect of distributed_adaround, report it")

    def _problem(self) -> str | None:
        needed = FORMAT_KEYS | FLOAT_KEYS if self._is_float else FORMAT_KEYS
        if self.format.keys() != needed:
            return f"format has the keys {sorted(self.format)}, needed are {sorted(needed)}"
        names = ["groups"] if self._is_float else ["quant_min", "quant_max", "groups"]
        numbers = [self.format[name] for name in names]
        if not all(isinstance(number, int) for number in numbers) or not isinstance(self.format["transposed"], bool):
            return f"format {self.format} has a value of the wrong type"
        return (
            self._scale_problem()
            or self._shift_problem()
            or (self._float_problem() if self._is_float else self._integer_problem())
        )

    def _scale_problem(self) -> str | None:
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int32:
            return f"scale is {self.scale.dtype} and zero point {self.zero_point.dtype}, not float32 and int32"
        if self.scale.shape != self.zero_point.shape:
            return f"scale has shape {tuple(self.scale.shape)}, zero point {tuple(self.zero_point.shape)}"
        if not bool(torch.isfinite(self.scale).all()):
            return "a scale is not finite"
        num_outputs, num_inputs = self.geometry.out_channels, self.geometry.inputs_per_output
        shape = tuple(self.scale.shape)
        per_group = len(shape) == 2 and shape[0] == num_outputs and shape[1] > 0 and num_inputs % shape[1] == 0
        if shape not in ((), (num_outputs,)) and not per_group:
            return f"scale of shape {shape} does not fit {num_outputs} outputs of {num_inputs} inputs"
        return None

    def _shift_problem(self) -> str | None:
        shift = self.shift
        if shift is not None and (shift.dtype != torch.float32 or shift.shape != (self.geometry.out_channels,)):
            return f"shift is {shift.dtype} of shape {tuple(shift.shape)}, not one float32 for each output"
        return None

    def _integer_problem(self) -> str | None:
        if self.codes.dtype not in (torch.int8, torch.uint8):
            return f"codes are {self.codes.dtype}, not int8 or uint8"
        low, high = (int(code) for code in self.codes.aminmax())
        if low < self._quant_min or high > self._quant_max:
            return f"codes reach from {low} to {high}, allowed are {self._quant_min} to {self._quant_max}"
        return None

    def _float_problem(self) -> str | None:
        element, scales, factor = (self.format[key] for key in ("element_format", "scale_format", "tensor_scale"))
        if element not in ("e4m3", "e2m1") or scales not in ("float32", "e8m0", "e4m3"):
            return f"element_format {element} or scale_format {scales} is not known"
        if isinstance(factor, float) != (scales == "e4m3"):
            return f"tensor_scale is {factor}, with scale_format {scales}"
        if bool(self.zero_point.any()):
            return "a float format has a zero point"
        grid = self._grid
        if not torch.equal(round_scale(grid.scale, grid.scale_format, grid.tensor_scale), grid.scale):
            return f"a scale is not of the format {scales}"
        try:
            decode(self.codes, element)
        except ValueError as error:
            return str(error)
        return None

    @property
    def _is_float(self) -> bool:
        return "element_format" in self.format

    @property
    def _quant_min(self) -> int:
        return cast(int, self.format["quant_min"])

    @property
    def _quant_max(self) -> int:
        return cast(int, self.format["quant_max"])

    @property
    def geometry(self) -> LayerGeometry:
        """Enough of the layer's geometry to see the codes as a matrix `(O, I)`; strides and padding are not kept."""
        groups, transposed = cast(int, self.format["groups"]), cast(bool, self.format["transposed"])
        return LayerGeometry(tuple(self.codes.shape), groups=groups, transposed=transposed)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight in torch's shape: `(codes - zero_point) * scale` in float32, of float formats the value of each
        code times the scale, then cast to dtype.

        The one definition of what a committed layer weighs; on the device of the scale.
        """
        codes = decode(self.codes, self.format["element_format"]) if self._is_float else self.codes
        return self.geometry.from_matrix(self._grid.dequantize(self.geometry.to_matrix(codes))).to(dtype)

    @property
    def _grid(self) -> Grid:
        num_outputs = self.scale.shape[0] if self.scale.dim() else 1
        scale, zero_point = (part.reshape(num_outputs, -1) for part in (self.scale, self.zero_point.to(torch.float32)))
        if not self._is_float:
            return Grid(scale, zero_point, self._quant_min, self._quant_max)
        values = float_values(self.format["element_format"]).to(scale.device)
        factor = self.format["tensor_scale"]
        tensor_scale = None if factor is None else torch.full((1, 1), factor, device=scale.device)
        return Grid(scale, zero_point, 0, len(values) - 1, values, self.format["scale_format"], tensor_scale)


@dataclass(frozen=True)
class _Entry:
    """One layer as the manifest names it."""

    name: str
    file: str
    sha256: str
    size: int
    format: dict[str, Any]
    metrics: dict[str, object]


class _UnusableError(InputError):
    """Commits that do not fit this job or are damaged, as opposed to a store that cannot be read right now."""


class Checkpoint:
    """The commits of one job. Written by rank 0 only."""

    def __init__(self, folder: str, fingerprint: Mapping[str, str], entries: tuple[_Entry, ...]) -> None:
        """Use `Checkpoint.open`."""
        self._folder = folder
        self._fingerprint = dict(fingerprint)
        self._entries = entries

    @classmethod
    def open(cls, uri: str, fingerprint: Mapping[str, str], overwrite: bool = False) -> Checkpoint:
        """The commits under `<uri>/commits`, empty when there are none.

        fingerprint: digests of what the result depends on ("model", "data", "spec", "format"); the world size is not
        part of it. overwrite: commits that do not fit or are damaged are removed; those that fit are still used, so
        that a job which overwrites can be restarted.

        Raises InputError naming what differs, or the damaged file; OutputError when old commits cannot be removed.
        """
        folder = uris.join(uri, "commits")
        try:
            entries = _read_manifest(folder, fingerprint)
        except _UnusableError as error:
            if not overwrite:
                raise InputError(str(error)) from error
            logger.warning("removing earlier commits, as output.overwrite asks: %s", error)
            storage.remove_tree(folder)
            entries = ()
        return cls(folder, fingerprint, entries)

    @property
    def committed(self) -> tuple[str, ...]:
        """Names of the finished layers, in the order in which they were committed."""
        return tuple(entry.name for entry in self._entries)

    def load(self, name: str) -> LayerRecord:
        """The record of a finished layer. Raises InputError when its file changed, KeyError for any other name."""
        entry = next((entry for entry in self._entries if entry.name == name), None)
        if entry is None:
            raise KeyError(name)
        tensors = safetensors.torch.load(_read_layer(self._folder, entry))
        return LayerRecord(
            name=name,
            codes=tensors["codes"],
            scale=tensors["scale"],
            zero_point=tensors["zero_point"],
            format=dict(entry.format),
            metrics=dict(entry.metrics),
            shift=tensors.get("shift"),
        )

    def commit(self, record: LayerRecord) -> None:
        """Make a layer's result permanent: its file first, then the manifest. Raises OutputError."""
        if record.name in self.committed:
            raise AdaRoundError(f"layer {record.name} was committed before; this is a defect of distributed_adaround")
        parts = {"codes": record.codes, "scale": record.scale, "zero_point": record.zero_point}
        if record.shift is not None:
            parts["shift"] = record.shift
        data = safetensors.torch.save({key: t.detach().cpu().contiguous() for key, t in parts.items()})
        entry = _Entry(
            name=record.name,
            file=_layer_file(len(self._entries), record.name),
            sha256=hashlib.sha256(data).hexdigest(),
            size=len(data),
            format=dict(record.format),
            metrics=dict(record.metrics),
        )
        entries = (*self._entries, entry)
        manifest = _encode(self._fingerprint, entries)
        storage.write_bytes(uris.join(self._folder, *entry.file.split("/")), data)
        storage.write_bytes(uris.join(self._folder, "manifest.json"), manifest)
        self._entries = entries


def _layer_file(index: int, name: str) -> str:
    """Path below the commits' folder. Whatever the name, it cannot leave the folder or hit another layer's file."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
    return f"layers/{index:05d}-{safe}.safetensors"


def _encode(fingerprint: Mapping[str, str], entries: tuple[_Entry, ...]) -> bytes:
    body = {
        "version": VERSION,
        "fingerprint": dict(fingerprint),
        "layers": [vars(entry) for entry in entries],
    }
    body["checksum"] = hashlib.sha256(jsontext.dumps(body).encode()).hexdigest()
    return (jsontext.dumps(body, indent=1) + "\n").encode()


def _read_manifest(folder: str, fingerprint: Mapping[str, str]) -> tuple[_Entry, ...]:
    """The layers of the manifest, each file compared with its checksum."""
    uri = uris.join(folder, "manifest.json")
    if not storage.exists(uri):
        return ()
    data = storage.read_bytes(uri)
    found, entries = _parse(data, uri)
    # Equal text, not only equal values: no changed bit anywhere in the file goes unnoticed.
    if _encode(found, entries) != data:
        raise _damaged(uri, "its content does not match its own checksum")
    if found != dict(fingerprint):
        keys = sorted(key for key in found.keys() | fingerprint.keys() if found.get(key) != fingerprint.get(key))
        parts = ", ".join(_PARTS.get(key, key) for key in keys)
        raise _UnusableError(
            f"{redact(folder)}: the commits there were made with another {parts} than this job has; "
            "choose another output.uri, or set output.overwrite=true to replace them"
        )
    for index, entry in enumerate(entries):
        if entry.file != _layer_file(index, entry.name):
            raise _damaged(uri, f"layer {entry.name} names the file {entry.file}, which no commit writes")
        _read_layer(folder, entry)
    return entries


def _parse(data: bytes, uri: str) -> tuple[dict[str, str], tuple[_Entry, ...]]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(uri, "it is not JSON") from error
    if not isinstance(body, dict) or "version" not in body:
        raise _damaged(uri, "the field version is missing")
    if body["version"] != VERSION:
        raise _UnusableError(
            f"{redact(uri)}: its version is {body['version']!r}, this program reads {VERSION}; use the "
            "program that wrote it, choose another output.uri, or set output.overwrite=true to start anew"
        )
    try:
        entries = tuple(_Entry(**layer) for layer in body["layers"])
        fingerprint = dict(body["fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(uri, "a field is missing or not known") from error
    names = [text for entry in entries for text in (entry.name, entry.file)] + [*fingerprint]
    if not all(isinstance(name, str) for name in names):
        raise _damaged(uri, "a name is not text")
    return fingerprint, entries


def _read_layer(folder: str, entry: _Entry) -> bytes:
    """The bytes of a layer file, proven to be those that were committed."""
    uri = uris.join(folder, *entry.file.split("/"))
    if not storage.exists(uri):
        raise _damaged(uri, f"the manifest names it for layer {entry.name}, but it is missing")
    data = storage.read_bytes(uri)
    if len(data) != entry.size:
        raise _damaged(uri, f"it has {len(data)} bytes, the manifest says {entry.size}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise _damaged(uri, "its SHA-256 differs from the manifest's")
    return data


def _damaged(uri: str, what: str) -> _UnusableError:
    return _UnusableError(
        f"{redact(uri)} is damaged: {what}; restore the file, choose another output.uri, or set "
        "output.overwrite=true to start anew"
    )
