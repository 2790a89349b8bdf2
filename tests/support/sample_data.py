"""Manifests and loaders of files in tests, as a job makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from distributed_adaround.data.encoder import Encoder, EncoderContext, make_encoder
from distributed_adaround.data.listing import build_manifest
from distributed_adaround.data.loader import SampleLoader
from distributed_adaround.data.manifest import Manifest
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.spec.data import DataSpec


def local_files() -> LocalFiles:
    """In a new folder among the temporary files of the test."""
    return LocalFiles(Path(mkdtemp(prefix="files-")))


def encoder_of(files: LocalFiles, processor: Path | None = None, labels: bool = False, **fields: Any) -> Encoder:
    """fields: of the section data."""
    return make_encoder(EncoderContext(DataSpec(uri="unused", **fields), files, processor, labels))


def manifest_of(uri: str | Sequence[str], encoder: Encoder, files: LocalFiles, **changes: Any) -> Manifest:
    """In microbatches of 2, dealt to 4 shards, unless it is said otherwise."""
    options: dict[str, Any] = {"num_samples": None, "microbatch_size": 2, "virtual_shards": 4}
    return build_manifest(uri, encoder, files, **(options | changes))


def build(uri: str | Sequence[str], files: LocalFiles | None = None, **changes: Any) -> Manifest:
    """Of files with arrays. changes: of the cut, or fields of the section data."""
    files = files or local_files()
    section = {name: changes.pop(name) for name in ("fields", "one_sample_per_file") if name in changes}
    return manifest_of(uri, encoder_of(files, **section), files, **changes)


def loader(
    manifest: Manifest, owned: Any = None, files: LocalFiles | None = None, *, section: Any = (), **changes: Any
) -> SampleLoader:
    """Of all microbatches unless some are given. section: fields of the section data."""
    owned = manifest.owned(0, 1) if owned is None else owned
    files = files or local_files()
    options = {"mask_field": "attention_mask"} | changes
    return SampleLoader(manifest, owned, encoder_of(files, **dict(section)), files, **options)
