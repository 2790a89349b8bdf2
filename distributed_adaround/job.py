"""A job from its file to its results, as one straight line.

spec ─► ranks ─► data (manifest, shards) ─► model ─► capture ─► rounding, unit by unit ─► export ─► report
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from distributed_adaround import __version__
from distributed_adaround.capture.open import CapturedModel, capture_model
from distributed_adaround.checkpoint.commits import JobCommits
from distributed_adaround.data.encoder import Encoder, EncoderContext, make_encoder
from distributed_adaround.data.listing import build_manifest
from distributed_adaround.data.loader import SampleLoader
from distributed_adaround.data.manifest import Manifest, prove_coverage
from distributed_adaround.data.microbatches import Microbatches, ModelInputs, bind_inputs, call_transform
from distributed_adaround.errors import InputError, redact
from distributed_adaround.export.result import Exporter, ExportResult, exporters, result_files
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.model.huggingface import model_directory
from distributed_adaround.model.source import OpenedModel, open_model
from distributed_adaround.report.console import Progress
from distributed_adaround.report.coverage import tell_coverage
from distributed_adaround.report.job_log import EventLog, JobLog
from distributed_adaround.report.status import JobStatus
from distributed_adaround.report.table import LayerTable
from distributed_adaround.report.time_left import layer_costs
from distributed_adaround.rounding import NetworkResult, NetworkRounder
from distributed_adaround.runtime.comm import Comm, phase
from distributed_adaround.runtime.context import RankContext, process_group
from distributed_adaround.runtime.imports import load_callable
from distributed_adaround.runtime.signals import StopRequest
from distributed_adaround.spec.data import DataSpec
from distributed_adaround.spec.job import JobSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedJob:
    """Everything that stands before the first layer is solved, on one rank."""

    spec: JobSpec
    context: RankContext
    comm: Comm
    manifest: Manifest
    opened: OpenedModel
    microbatches: Microbatches
    captured: CapturedModel
    exporters: list[Exporter]


@contextmanager
def prepare(spec: JobSpec, folder: Path | None) -> Iterator[PreparedJob]:
    """Start the ranks, deal the data, capture the model and plan the layers.

    folder: of the job file; modules named in it are also searched there.

    Raises:
        SpecError, InputError: what the job names does not exist or does not fit.
        PeerError: another rank failed.
    """
    context = RankContext.from_environment(spec.runtime.device, spec.runtime.backend)
    with ExitStack() as stack:
        # Gradients of settled soft values decay into denormal numbers, on which CPUs are slow.
        if torch.set_flush_denormal(True):
            stack.callback(torch.set_flush_denormal, False)
        if spec.runtime.threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(spec.runtime.threads)
        comm = stack.enter_context(process_group(context, spec.runtime.timeout_minutes))
        files = stack.enter_context(_shared_files(context, comm))
        logger.info("listing the calibration data")
        with phase(comm, "list the calibration data"):
            encoder = make_encoder(EncoderContext(spec.data, files, _processor(spec, spec.data, files)))
        manifest = _deal_data(spec.data, encoder, files, comm)
        logger.info("loading the model")
        with phase(comm, "load the model"):
            opened = open_model(spec.model, folder, files)
            _check_batch_size(opened, manifest)
        with phase(comm, "read the calibration data"):
            loader = SampleLoader(
                manifest,
                manifest.owned(comm.rank, comm.world_size),
                encoder,
                files,
                pad_value=spec.data.pad_value,
                mask_field=spec.data.mask_field,
                prefetch=spec.data.prefetch,
            )
            stack.enter_context(loader)
            microbatches = Microbatches.of_files(
                loader, _converter(spec.data, opened, folder), transformed=spec.data.transform is not None
            )
        captured = capture_model(opened, microbatches, spec.quantize, spec.runtime, context, comm)
        tell_coverage(captured, comm)
        chosen = exporters(spec.output.formats)
        for exporter in chosen:
            exporter.check(captured.planned)
        yield PreparedJob(spec, context, comm, manifest, opened, microbatches, captured, chosen)


def run_job(spec: JobSpec, folder: Path | None = None, stop: StopRequest | None = None) -> LayerTable:
    """Run a job on this rank. stop: signals that ask for its end. Returns the table of all layers.

    Raises:
        SpecError, InputError, OutputError: exit codes 64, 65 and 73 of the command line.
        PeerError, StoppedError: another rank failed first, or a signal came (75).
    """
    started = time.monotonic()
    stop = StopRequest() if stop is None else stop
    with prepare(spec, folder) as job:
        fingerprint = {"model": job.captured.digest, "data": job.manifest.digest(), "spec": spec.result_digest()}
        with stop.deferred():
            commits = JobCommits(spec.output.uri, fingerprint, spec.output.overwrite, result_files(), job.comm)
            with phase(job.comm, "write to the output"):
                log = _open_log(job, len(commits.names), started)
            with log:
                result = NetworkRounder(spec, job.comm, log, commits, stop).run(job.captured, job.microbatches)
            with phase(job.comm, "write the results"):
                seconds = time.monotonic() - started
                if job.comm.rank == 0:
                    _export(job, result, seconds)
                log.job_done(seconds, result.output_error)
    return result.table


@contextmanager
def _shared_files(context: RankContext, comm: Comm) -> Iterator[LocalFiles]:
    """What the ranks of one machine share: the first of them makes the folder, and removes it. A collective."""
    with ExitStack() as stack:
        own = stack.enter_context(LocalFiles.temporary()) if context.local_rank == 0 else None
        folders = comm.all_gather_object(None if own is None else str(own.folder))
        first = folders[max(0, comm.rank - context.local_rank)]
        if own is None:
            # Ranks of one machine may be in containers, each with files of its own.
            seen = first is not None and Path(first).is_dir()
            own = LocalFiles(Path(str(first))) if seen else stack.enter_context(LocalFiles.temporary())
        yield own


def _processor(spec: JobSpec, data: DataSpec, files: LocalFiles) -> Path | None:
    """Local directory with the tokenizer or processor of the data; None: the job names none."""
    uri = data.processor or spec.model.hf
    return None if uri is None else model_directory(uri, files)


def _deal_data(data: DataSpec, encoder: Encoder, files: LocalFiles, comm: Comm) -> Manifest:
    """The coordinator lists, checks and cuts the data; all ranks get its manifest and prove that they cover it."""
    text = ""
    with phase(comm, "list the calibration data"):
        if comm.rank == 0:
            text = build_manifest(
                data.uri,
                encoder,
                files,
                num_samples=data.num_samples,
                microbatch_size=data.microbatch_size,
                virtual_shards=data.virtual_shards,
                checksums=data.checksums,
            ).to_json()
    manifest = Manifest.from_json(comm.broadcast_object(text))
    owned = comm.all_gather_object(manifest.owned(comm.rank, comm.world_size))
    with phase(comm, "share the calibration data"):
        prove_coverage(len(manifest.microbatches), owned)
    for uri in manifest.skipped if comm.rank == 0 else ():
        logger.warning("not a sample file, left out: %s", redact(uri))
    cut = f"{len(manifest.microbatches)} microbatches; microbatches per rank: {', '.join(str(len(m)) for m in owned)}"
    logger.info("%d of %d samples in %s", manifest.num_samples, manifest.num_available, cut)
    return manifest


def _converter(
    data: DataSpec, opened: OpenedModel, folder: Path | None
) -> Callable[[Mapping[str, Tensor]], ModelInputs]:
    """From a microbatch's fields to the model's arguments."""
    name, parameters, dtype = data.transform, opened.parameters, opened.dtype
    transform = None if name is None else load_callable(name, folder)

    def convert(batch: Mapping[str, Tensor]) -> ModelInputs:
        if transform is not None and name is not None:
            batch = call_transform(transform, name, batch)
        return bind_inputs(batch, parameters, data.mask_field).narrowed(dtype)

    return convert


def _check_batch_size(opened: OpenedModel, manifest: Manifest) -> None:
    size, sizes = opened.batch_size, {len(microbatch.samples) for microbatch in manifest.microbatches}
    if size is not None and sizes != {size}:
        remedy = f"set data.microbatch_size={size} and data.num_samples to a multiple of it"
        what = f"model.program takes batches of exactly {size} samples, the data is cut into {sorted(sizes)}"
        raise InputError(f"{what}: {remedy}, or export with a dynamic batch")


def _open_log(job: PreparedJob, layers_done: int, started: float) -> JobLog:
    """The job's listener; rank 0 shows progress and keeps the status."""
    spec, captured, rank = job.spec, job.captured, job.comm.rank
    progress = None
    if rank == 0:
        progress = Progress(captured.num_layers, costs=layer_costs(captured))
    if layers_done:
        logger.info("%d finished layers found in the output; the job goes on after them", layers_done)
    status = JobStatus(spec.output.uri, spec.job_digest(), captured.num_layers, rank)
    log = JobLog(progress, EventLog(spec.output.uri, rank), status, started)
    log.job_started(
        captured.num_layers,
        layers_done,
        version=__version__,
        torch=torch.__version__,
        world_size=job.comm.world_size,
        device=str(job.context.device),
        threads=torch.get_num_threads(),
        owned=list(job.microbatches.owned),
    )
    return log


def _export(job: PreparedJob, result: NetworkResult, seconds: float) -> None:
    """Write the checkpoints the job asks for, then report.json."""
    spec, uri = job.spec, job.spec.output.uri
    described = [asdict(parameter) for parameter in job.captured.float_parameters]
    records = [(site.stored_name, record) for site, record in result.records]
    parts = {site.stored_name: (site.weight_name, site.view) for site, _ in result.records if site.view is not None}
    for exporter in job.exporters:
        exporter.write(
            ExportResult(
                job.opened.weights,
                records,
                described,
                job.opened.files,
                parts,
                job.opened.model,
                job.opened.shard_bytes,
            ),
            uri,
        )
    report = {
        "version": __version__,
        "spec": spec.model_dump(mode="json", include={"quantize", "preset"}) | {"rounding": spec.rounding.resolved()},
        "layers": result.table.to_dicts(),
        "totals": result.table.totals.to_dict(),
        "output_error": result.output_error,
        "coverage": result.table.coverage.share,
        "float_parameters": described,
        "notes": list(job.captured.walker.notes),
        "world_size": job.comm.world_size,
        "peak_activation_bytes": job.captured.store.peak,
        "seconds": seconds,
    }
    storage.write_bytes(uris.join(uri, "report.json"), f"{jsontext.dumps(report, indent=1)}\n".encode())
