"""State of a layer's solver in the middle of its work, for a restart that loses minutes at most.

    <output>/commits/state/<layer>/<key>    SHA-256 of the rest (32 bytes), then a safetensors file

It only saves time: a file that is damaged, or of another job, is left out, and the layer starts anew.
"""

import hashlib
import logging
import re
from collections.abc import Mapping

import safetensors
import safetensors.torch
from torch import Tensor

from distributed_adaround.errors import redact
from distributed_adaround.files import jsontext, storage, uris

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32


class SolverStates:
    """States of one job's solvers. Each rank may save under keys of its own; rank 0 removes them."""

    def __init__(self, uri: str, fingerprint: Mapping[str, str]) -> None:
        """uri: the job's output. fingerprint: as for Checkpoint.open. Raises InputError when it cannot be listed."""
        self._folder = uris.join(uri, "commits", "state")
        self._found = frozenset(storage.list_files(self._folder))
        self._job = bytes.fromhex(hashlib.sha256(jsontext.dumps(dict(fingerprint)).encode()).hexdigest())

    def save(self, layer: str, key: str, state: Mapping[str, Tensor]) -> None:
        """Replace a state. Raises OutputError."""
        data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
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
