"""A finished job's output in other formats, and all of its formats read again: nothing is solved.

job.yaml ─► result (files of codes) ─► exporters ─► verify
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from distributed_adaround.data.deal import InputBinding, deal_data
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError, redact
from distributed_adaround.export.exporter import Exporter, ExportTask, exporters, write_formats
from distributed_adaround.export.stored import StoredResult
from distributed_adaround.export.verify import Verified, refuse_different, verify
from distributed_adaround.files import storage, uris
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.job import find_directories
from distributed_adaround.model.huggingface import model_directory
from distributed_adaround.model.parametrizations import fold_parametrizations
from distributed_adaround.model.source import OpenedModel, open_model
from distributed_adaround.model.weights import counted
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.spec.job import EXPORTERS, FIELDS_OF_FORMATS, JobSpec
from distributed_adaround.spec.load import parse_job

logger = logging.getLogger(__name__)


def export_output(
    uri: str, formats: Sequence[str], overrides: Sequence[str] = (), check: bool = False
) -> list[Verified]:
    """Write more formats into the output of a finished job.

    Args:
        uri: of the output, on any store.
        formats: names of exporters.
        overrides: "section.field=value", as where the model lies now.
        check: read the formats again, and compare them with the quantized model, which needs memory for both.

    Raises: SpecError when a format cannot hold the result; InputError when the output is not that of a finished job, or
    the model that it names is not there; OutputError.
    """
    with _finished(uri, formats, overrides) as (task, chosen):
        for exporter in chosen:
            exporter.check(task)
        write_formats(task, chosen, uri)
        found = verify(task, chosen) if check else []
    refuse_different(found)
    return found


def verify_output(uri: str, overrides: Sequence[str] = ()) -> list[Verified]:
    """Read all formats that lie in an output by their own libraries, and compare them with the quantized model.

    Raises InputError when the output is not that of a finished job, or what it names is not there.
    """
    # Without the codes there is no finished job, as their reader says.
    found = ["safetensors"]
    for name in [name for name in EXPORTERS if name != "safetensors"]:
        (exporter,) = exporters([name])
        if _is_there(exporter.published, uri):
            found.append(name)
        elif _is_there(exporter.files, uri):
            logger.warning("%s is not whole: its export was cut short; run export --format %s", name, name)
    with _finished(uri, found, overrides) as (task, chosen):
        return verify(task, chosen)


def _is_there(names: Sequence[str], uri: str) -> bool:
    return any(storage.exists(uris.join(uri, *name.split("/"))) for name in names)


@contextmanager
def _finished(
    uri: str, formats: Sequence[str], overrides: Sequence[str]
) -> Iterator[tuple[ExportTask, list[Exporter]]]:
    """What exporters need, read and loaded when they ask for it."""
    spec = _job_of(uri, formats, overrides)
    with LocalFiles.temporary() as files:
        result = StoredResult.open(uri, files)

        @cache
        def opened() -> OpenedModel:
            return _quantized_model(spec, result, files)

        @cache
        def inputs() -> list[ModelInputs]:
            return [_first_microbatch(spec, opened(), files)]

        def model() -> nn.Module | ExportedProgram:
            return opened().model

        directory = None if spec.model.hf is None else model_directory(spec.model.hf, files)
        layers = list(result.layers.values())
        task = ExportTask(layers, spec.output, spec.model, result.dtype, directory, files, result, model, inputs)
        yield task, exporters(formats)


def _job_of(uri: str, formats: Sequence[str], overrides: Sequence[str]) -> JobSpec:
    """The job that made an output, with other formats. Raises SpecError, InputError."""
    place = uris.join(uri, "job.yaml")
    if not storage.exists(place):
        raise InputError(f"{redact(uri)} holds no job.yaml: it is no output of a job; give the folder of output.uri")
    given = parse_job(place, storage.read_bytes(place), overrides)
    # Fields of other formats would contradict these.
    kept = (None, *formats)
    output = {key: value for key, value in given.get("output", {}).items() if FIELDS_OF_FORMATS.get(key) in kept}
    return JobSpec(**given | {"output": output | {"uri": uri, "formats": list(dict.fromkeys(formats))}})


@torch.no_grad()
def _quantized_model(spec: JobSpec, result: StoredResult, files: LocalFiles) -> OpenedModel:
    """The job's model with the weights of its result. Raises InputError when it is another model."""
    opened = open_model(spec.model, Path.cwd(), files)
    if not isinstance(opened.model, ExportedProgram):
        fold_parametrizations(opened.model)
    own = (
        opened.model.state_dict
        if isinstance(opened.model, ExportedProgram)
        else opened.model.state_dict(keep_vars=True)
    )
    names = {*result.names, *result.tied}
    odd = sorted(names ^ own.keys()) or [name for name in result.names if result.shapes[name] != tuple(own[name].shape)]
    if odd:
        what = f"the model is not the one that was quantized: {counted('other tensors', odd)}"
        raise InputError(f"{what}; name that one by --set, for instance model.hf=PATH")
    for name in result.names:
        own[name].data = result.tensor(name).to(own[name].device)
    return opened


def _first_microbatch(spec: JobSpec, opened: OpenedModel, files: LocalFiles) -> ModelInputs:
    comm, directories = SoloComm(), find_directories(spec, spec.data, files)
    dealt = deal_data(spec.data, files, comm, directories, "the calibration data")
    binding = InputBinding.of(spec.data, opened.parameters, opened.dtype, Path.cwd())
    with dealt.loader(comm) as loader:
        return binding(loader.load(0))
