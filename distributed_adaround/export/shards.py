"""Safetensors files of a limited size, written one after the other: no more than one is in memory.

What is written so far stands in <stem>.partial.json, so that a writer that starts again goes on after the last whole
file. It is removed at the end; the index, or whatever readers look for first, comes after it.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from distributed_adaround.errors import InputError, redact
from distributed_adaround.files import jsontext, storage, uris

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WrittenFile:
    """A file of tensors. size, tensor_bytes: of all of it, and without its header. sha256: in hex."""

    size: int
    sha256: str
    tensor_bytes: int


def plan_shards(stem: str, sizes: Iterable[tuple[str, int]], limit: int) -> dict[str, list[str]]:
    """Names of tensors by the file that they go into: "model.safetensors", or "model-00001-of-00003.safetensors" and so
    on, of at most `limit` bytes or of one tensor that is larger; limit 0: one file."""
    runs: list[list[str]] = [[]]
    held = 0
    for name, size in sizes:
        if runs[-1] and limit and held + size > limit:
            runs.append([])
            held = 0
        runs[-1].append(name)
        held += size
    if len(runs) == 1:
        return {f"{stem}.safetensors": runs[0]}
    return {f"{stem}-{place:05d}-of-{len(runs):05d}.safetensors": run for place, run in enumerate(runs, start=1)}


def write_shards(
    uri: str,
    stem: str,
    shards: Mapping[str, Sequence[str]],
    tensors: Callable[[Sequence[str]], Mapping[str, Tensor]],
    metadata: dict[str, str],
    source: str,
) -> dict[str, WrittenFile]:
    """Write files into the folder `uri`. A writer that was killed goes on where it was.

    Args:
        stem: of the name under which the progress is kept.
        shards: names of tensors by the file that they go into.
        tensors: the tensors of these names.
        source: digest of what the files are made from; files of another source are written anew.

    Raises: InputError when safetensors cannot hold a tensor, OutputError.
    """
    storage.remove_leftovers(uri)
    place = uris.join(uri, f"{stem}.partial.json")
    done = _progress(place, source)
    for file, names in shards.items():
        target = uris.join(uri, file)
        if file in done and storage.exists(target):
            continue
        done[file] = write_safetensors(target, tensors(names), metadata)
        if len(shards) > 1:
            kept = {name: asdict(written) for name, written in done.items()}
            storage.write_bytes(place, jsontext.dumps({"source": source, "files": kept}).encode())
    storage.remove_tree(place)
    return {file: done[file] for file in shards}


def _progress(place: str, source: str) -> dict[str, WrittenFile]:
    if not storage.exists(place):
        return {}
    try:
        kept = jsontext.parse_object(storage.read_bytes(place), redact(place))
        if kept["source"] != source:
            return {}
        return {name: WrittenFile(**entry) for name, entry in kept["files"].items()}
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        logger.warning("%s is damaged; its files are written anew", redact(place))
        return {}


def write_safetensors(uri: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> WrittenFile:
    """A file whose bytes depend on names and values only, never on the order of a dict or on shared memory.

    Raises InputError when safetensors cannot hold a tensor, OutputError.
    """
    plain = _plain(tensors)
    found: list[WrittenFile] = []

    def write(path: Path) -> None:
        path.touch()
        mode = path.stat().st_mode
        try:
            safetensors.torch.save_file(plain, path, metadata=metadata)
        except KeyError as error:
            raise InputError(f"a tensor of the model has dtype {error}, which safetensors cannot hold") from error
        if len(metadata) > 1:
            _sort_metadata(path)
        # safetensors replaces the file by one that only its owner may read.
        path.chmod(mode)
        size = sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
        found.append(WrittenFile(path.stat().st_size, storage.sha256_file(path), size))

    storage.write_file(uri, write)
    return found[-1]


def _sort_metadata(path: Path) -> None:
    """safetensors writes the entries of the metadata in another order each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        assert len(data) == size
        file.seek(8)
        file.write(data)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the host, contiguous, none sharing memory with another, in the order of their names."""
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
