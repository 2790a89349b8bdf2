"""A set of data, listed and dealt to the ranks, and what the model gets of each of its microbatches."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed_adaround.data.encoder import Encoder, EncoderContext, make_encoder
from distributed_adaround.data.listing import build_manifest
from distributed_adaround.data.loader import SampleLoader
from distributed_adaround.data.manifest import Manifest, prove_coverage
from distributed_adaround.data.microbatches import ModelInputs, bind_inputs, call_transform
from distributed_adaround.errors import InputError, redact
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.runtime.comm import Comm, phase
from distributed_adaround.runtime.imports import load_callable
from distributed_adaround.spec.data import DataSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DealtData:
    """Data of a section, and who reads which microbatch."""

    spec: DataSpec
    files: LocalFiles
    encoder: Encoder
    manifest: Manifest

    def loader(self, comm: Comm) -> SampleLoader:
        """Of this rank's microbatches; to be closed. Raises InputError."""
        return SampleLoader(
            self.manifest,
            self.manifest.owned(comm.rank, comm.world_size),
            self.encoder,
            self.files,
            pad_value=self.spec.pad_value,
            mask_field=self.spec.mask_field,
            prefetch=self.spec.prefetch,
        )


def deal_data(
    spec: DataSpec,
    files: LocalFiles,
    comm: Comm,
    directories: Callable[[], tuple[Path | None, Path | None]],
    what: str,
    labels: bool = False,
) -> DealtData:
    """The coordinator lists, checks and cuts the data; all ranks get its manifest and prove that they cover it. A
    collective.

    directories: finds those of the processor and of the model, local (see EncoderContext). what: these data, for
    messages. labels: samples must have their class.

    Raises:
        InputError: the data or the processor cannot be used, or ranks have different ones.
        PeerError: another rank failed.
    """
    logger.info("listing %s", what)
    text = ""
    with phase(comm, f"list {what}"):
        processor, model = directories()
        encoder = make_encoder(EncoderContext(spec, files, processor, labels, model))
        if comm.rank == 0:
            text = build_manifest(
                spec.uri,
                encoder,
                files,
                num_samples=spec.num_samples,
                max_samples=spec.max_samples,
                microbatch_size=spec.microbatch_size,
                virtual_shards=spec.virtual_shards,
                checksums=spec.checksums,
            ).to_json()
    manifest = Manifest.from_json(comm.broadcast_object(text))
    owned = comm.all_gather_object(manifest.owned(comm.rank, comm.world_size))
    with phase(comm, f"share {what}"):
        prove_coverage(len(manifest.microbatches), owned)
        if encoder.digest != manifest.encoding:
            remedy = "give all machines the same directory, and the same versions of transformers and torchvision"
            raise InputError(f"the tokenizer or processor of {what} is not that of rank 0; {remedy}")
    for uri in manifest.skipped if comm.rank == 0 else ():
        logger.warning("not a sample file, left out: %s", redact(uri))
    cut = f"{len(manifest.microbatches)} microbatches; microbatches per rank: {', '.join(str(len(m)) for m in owned)}"
    logger.info("%d of %d samples in %s", manifest.num_samples, manifest.num_available, cut)
    return DealtData(spec, files, encoder, manifest)


@dataclass(frozen=True)
class InputBinding:
    """From a microbatch's fields to the model's arguments. parameters, dtype: of the model (see `bind_inputs` and
    `ModelInputs.narrowed`). transform: spec.transform, imported."""

    spec: DataSpec
    parameters: Sequence[str] | None
    dtype: torch.dtype | None
    transform: Callable[..., Any] | None

    @classmethod
    def of(
        cls, spec: DataSpec, parameters: Sequence[str] | None, dtype: torch.dtype | None, folder: Path | None
    ) -> "InputBinding":
        """folder: of the job file. Raises InputError when the transform does not exist."""
        transform = None if spec.transform is None else load_callable(spec.transform, folder)
        return cls(spec, parameters, dtype, transform)

    def transformed(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The fields after the transform. Raises InputError."""
        if self.transform is None or self.spec.transform is None:
            return batch
        return call_transform(self.transform, self.spec.transform, batch)

    def bind(self, fields: Mapping[str, Tensor]) -> ModelInputs:
        """Raises InputError when fields and parameters differ."""
        return bind_inputs(fields, self.parameters, self.spec.mask_field).narrowed(self.dtype)

    def __call__(self, batch: Mapping[str, Tensor]) -> ModelInputs:
        return self.bind(self.transformed(batch))
