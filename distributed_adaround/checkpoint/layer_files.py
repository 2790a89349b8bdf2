"""Files of finished layers and unfinished solvers, for a job that starts again.

    <output>/commits/manifest.json                        what counts; written last, with a checksum of itself
    <output>/commits/layers/00003-layer1.conv2.safetensors    codes, scale, zero_point (and shift) of one layer
    <output>/commits/state/<layer>/<key>                  SHA-256 of the rest (32 bytes), then a safetensors file

A layer file exists for a reader only when the manifest names it, so a crash at any moment leaves the state of the last
whole commit. Layer files hold nothing but the result: no times, hosts or world size, so equal results are equal bytes.
States of solvers only save time: one that is damaged, or of another job, is left out, and the layer starts anew.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import safetensors.torch
from torch import Tensor

from distributed_adaround.errors import AdaRoundError, InputError, redact
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.solve.record import LayerFigures, LayerRecord

logger = logging.getLogger(__name__)

VERSION = 2
_DIGEST_BYTES = 32
_START_ANEW = "choose another output.uri, or set output.overwrite=true to start anew"
_PARTS = {"model": "model weights", "data": "calibration data", "spec": "job file", "format": "number format"}


@dataclass(frozen=True)
class _Entry:
    name: str
    file: str
    sha256: str
    size: int
    format: dict[str, Any]
    metrics: dict[str, object]


class _UnusableError(InputError):
    """Commits do not fit this job or are damaged, as opposed to a store that cannot be read right now."""


class Checkpoint:
    """The commits of one job, from `Checkpoint.open`. Written by rank 0 only."""

    def __init__(self, folder: str, fingerprint: Mapping[str, str], entries: tuple[_Entry, ...]) -> None:
        self._folder, self._fingerprint, self._entries = folder, dict(fingerprint), entries

    @classmethod
    def open(cls, uri: str, fingerprint: Mapping[str, str], overwrite: bool = False) -> Self:
        """The commits under `<uri>/commits`, empty when there are none.

        fingerprint: digests of what the result depends on ("model", "data", "spec", "format"), not of the world size.
        overwrite: remove commits that do not fit or are damaged; a restart still uses those that fit.

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
        entry = {entry.name: entry for entry in self._entries}[name]
        figures = LayerFigures.from_dict(entry.metrics) if entry.metrics else None
        tensors = safetensors.torch.load(_read_layer(self._folder, entry))
        return LayerRecord(name=name, format=dict(entry.format), figures=figures, **tensors)

    def commit(self, record: LayerRecord) -> None:
        """Make a layer's result permanent: its file first, then the manifest. Raises OutputError."""
        if record.name in self.committed:
            raise AdaRoundError(f"layer {record.name} was committed before; this is a defect of distributed_adaround")
        parts = {"codes": record.codes, "scale": record.scale, "zero_point": record.zero_point}
        data = _tensor_bytes(parts if record.shift is None else parts | {"shift": record.shift})
        entry = _Entry(
            name=record.name,
            file=_layer_file(len(self._entries), record.name),
            sha256=hashlib.sha256(data).hexdigest(),
            size=len(data),
            format=dict(record.format),
            metrics={} if record.figures is None else record.figures.to_dict(),
        )
        entries = (*self._entries, entry)
        manifest = _encode(self._fingerprint, entries)
        storage.write_bytes(uris.join(self._folder, *entry.file.split("/")), data)
        storage.write_bytes(uris.join(self._folder, "manifest.json"), manifest)
        self._entries = entries


class SolverStates:
    """States of one job's solvers. Each rank may save under keys of its own; rank 0 removes them."""

    def __init__(self, uri: str, fingerprint: Mapping[str, str]) -> None:
        """uri: the job's output. fingerprint: as for Checkpoint.open. Raises InputError when it cannot be listed."""
        self._folder = uris.join(uri, "commits", "state")
        self._found = frozenset(storage.list_files(self._folder))
        self._job = hashlib.sha256(jsontext.dumps(dict(fingerprint)).encode()).digest()

    def save(self, layer: str, key: str, state: Mapping[str, Tensor]) -> None:
        """Raises OutputError."""
        data = _tensor_bytes(state)
        storage.write_bytes(self._uri(layer, key), self._digest(layer, key, data) + data)

    def load(self, layer: str, key: str) -> dict[str, Tensor] | None:
        """What an earlier run of this job saved, None where it did not. Raises InputError when it cannot be read."""
        uri = self._uri(layer, key)
        if uri not in self._found:
            return None
        content = storage.read_bytes(uri)
        digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest != self._digest(layer, key, data):
            logger.warning("%s is damaged or of another job; layer %s starts anew", redact(uri), layer)
            return None
        return safetensors.torch.load(data)

    def clear(self) -> None:
        """Remove all states: the layer is committed. Raises OutputError."""
        storage.remove_tree(self._folder)

    def _uri(self, layer: str, key: str) -> str:
        """Whatever the layer's name, it cannot leave the folder or hit another layer's file."""
        safe = re.sub(r"[^A-Za-z0-9_-]", "_", layer)[-100:]
        return uris.join(self._folder, f"{safe}-{hashlib.sha256(layer.encode()).hexdigest()[:16]}", key)

    def _digest(self, layer: str, key: str, data: bytes) -> bytes:
        """Of what the state belongs to, too."""
        return hashlib.sha256(self._job + jsontext.dumps([layer, key]).encode() + b"\n" + data).digest()


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _layer_file(index: int, name: str) -> str:
    """Path below the commits' folder. Whatever the name, it cannot leave the folder or hit another layer's file."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
    return f"layers/{index:05d}-{safe}.safetensors"


def _encode(fingerprint: Mapping[str, str], entries: tuple[_Entry, ...]) -> bytes:
    body = {"version": VERSION, "fingerprint": dict(fingerprint), "layers": [vars(entry) for entry in entries]}
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
        rule = "choose another output.uri, or set output.overwrite=true to replace them"
        what = f"the commits there were made with another {parts} than this job has"
        raise _UnusableError(f"{redact(folder)}: {what}; {rule}")
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
        rule = f"its version is {body['version']!r}, this program reads {VERSION}; use the program that wrote it"
        raise _UnusableError(f"{redact(uri)}: {rule}, {_START_ANEW}")
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
    return _UnusableError(f"{redact(uri)} is damaged: {what}; restore the file, {_START_ANEW}")
