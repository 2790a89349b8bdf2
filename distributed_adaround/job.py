"""A job from its file to its results: the composition root, and the last place that sees the whole spec.

spec ─► ranks ─► data (manifest, shards) ─► model (capture) ─► plan ─► rounding, layer by layer ─► export ─► report
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from distributed_adaround import __version__
from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.graph import fixed_batch_size, placeholder_names
from distributed_adaround.capture.sites import ModelInputs, Walker
from distributed_adaround.checkpoint.commits import JobCommits
from distributed_adaround.data.loader import SampleLoader
from distributed_adaround.data.manifest import Manifest, build_manifest, prove_coverage
from distributed_adaround.errors import InputError, redact
from distributed_adaround.export.state_dict import write_codes, write_dequantized
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.model.load import (
    bind_inputs,
    call_transform,
    forward_parameters,
    load_callable,
    load_factory,
    load_program,
)
from distributed_adaround.report.console import Progress, SilentProgress
from distributed_adaround.report.events import EventLog
from distributed_adaround.report.status import JobStatus
from distributed_adaround.report.table import LayerTable
from distributed_adaround.rounding import (
    NetworkResult,
    NetworkRounder,
    PlannedLayer,
    activation_store,
    agree_on_weights,
    make_walker,
    plan_layers,
)
from distributed_adaround.runtime.comm import Comm, phase
from distributed_adaround.runtime.context import RankContext, process_group
from distributed_adaround.runtime.signals import StopRequest
from distributed_adaround.spec.data import DataSpec
from distributed_adaround.spec.job import JobSpec
from distributed_adaround.spec.model import ModelSpec

logger = logging.getLogger(__name__)


class FileMicrobatches:
    """Microbatches of a manifest as the model takes them."""

    def __init__(self, loader: SampleLoader, convert: Callable[[Mapping[str, Tensor]], ModelInputs]) -> None:
        self._loader = loader
        self._convert = convert
        self.total = loader.total
        self.owned: Sequence[int] = loader.owned

    def load(self, index: int) -> ModelInputs:
        return self._convert(self._loader.load(index))

    def __iter__(self) -> Iterator[tuple[int, ModelInputs]]:
        for index, batch in self._loader:
            yield index, self._convert(batch)


@dataclass(frozen=True)
class PreparedJob:
    """Everything that stands before the first layer is solved, on one rank."""

    spec: JobSpec
    context: RankContext
    comm: Comm
    manifest: Manifest
    microbatches: FileMicrobatches
    store: ActivationStore
    model: nn.Module | ExportedProgram
    model_digest: str
    walker: Walker
    planned: list[PlannedLayer]

    def state_dict(self) -> dict[str, Tensor]:
        """The model's tensors under its own names."""
        return _state_dict(self.model)


def _state_dict(model: nn.Module | ExportedProgram) -> dict[str, Tensor]:
    return dict(model.state_dict if isinstance(model, ExportedProgram) else model.state_dict())


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
        manifest = _deal_data(spec.data, comm)
        with phase(comm, "load the model"):
            model = _load_model(spec.model, folder)
        digest = agree_on_weights(_state_dict(model), comm)
        with phase(comm, "read the calibration data"):
            loader = stack.enter_context(_loader(spec.data, manifest, comm))
            microbatches = FileMicrobatches(loader, _converter(spec.data, model, folder))
            example, other = microbatches.load(0), microbatches.load(microbatches.total - 1)
        store = activation_store(spec.runtime, context)
        with phase(comm, "capture the model"):
            if isinstance(model, ExportedProgram):
                _check_fixed_batch(model, manifest)
            varying = any(None in field.shape for field in manifest.fields)
            walker = make_walker(model, example, other=other, varying=varying, device=context.device, store=store)
            planned = plan_layers(walker, spec.quantize)
        yield PreparedJob(spec, context, comm, manifest, microbatches, store, model, digest, walker, planned)


def run_job(spec: JobSpec, folder: Path | None = None, stop: StopRequest | None = None) -> LayerTable:
    """Run a job on this rank. stop: signals that ask for its end. Returns the table of all layers.

    Raises:
        SpecError, InputError, OutputError: exit codes 64, 65 and 73 of the command line.
        PeerError, StoppedError: another rank failed first, or a signal came (75).
    """
    started = time.monotonic()
    stop = StopRequest() if stop is None else stop
    with prepare(spec, folder) as job:
        fingerprint = {
            "model": job.model_digest,
            "data": job.manifest.digest(),
            "spec": spec.result_digest(),
        }
        with stop.deferred():
            commits = JobCommits(spec.output.uri, fingerprint, spec.output.overwrite, job.comm)
            with phase(job.comm, "write to the output"):
                events = EventLog(spec.output.uri, job.comm.rank)
                _log_start(job, events, commits)
                layers = sum(layer.format is not None for layer in job.planned)
                status = JobStatus(spec.output.uri, spec.job_digest(), layers, job.comm.rank)
                status.running(len(commits.names))
            with _progress(job) as progress:
                where = (job.comm, job.context.device, job.store)
                rounder = NetworkRounder(spec, *where, progress, events, commits, stop, layer_done=status.running)
                result = rounder.run(job.walker, job.planned, job.microbatches)
            with phase(job.comm, "write the results"):
                if job.comm.rank == 0:
                    _export(job, result, time.monotonic() - started)
                events.write("done", seconds=time.monotonic() - started, output_error=result.output_error)
                events.flush()
                status.done()
    return result.table


def _deal_data(data: DataSpec, comm: Comm) -> Manifest:
    """The coordinator lists, checks and cuts the data; all ranks get its manifest and prove that they cover it."""
    text = ""
    with phase(comm, "list the calibration data"):
        if comm.rank == 0:
            manifest = build_manifest(
                data.uri,
                num_samples=data.num_samples,
                microbatch_size=data.microbatch_size,
                virtual_shards=data.virtual_shards,
                fields=data.fields,
                one_sample_per_file=data.one_sample_per_file,
                checksums=data.checksums,
            )
            text = manifest.to_json()
    manifest = Manifest.from_json(comm.broadcast_object(text))
    owned = comm.all_gather_object(manifest.owned(comm.rank, comm.world_size))
    with phase(comm, "share the calibration data"):
        prove_coverage(len(manifest.microbatches), owned)
    for uri in manifest.skipped if comm.rank == 0 else ():
        logger.warning("not a sample file, left out: %s", redact(uri))
    logger.info(
        "%d of %d samples in %d microbatches; microbatches per rank: %s",
        manifest.num_samples,
        manifest.num_available,
        len(manifest.microbatches),
        ", ".join(str(len(mine)) for mine in owned),
    )
    return manifest


def _load_model(model: ModelSpec, folder: Path | None) -> nn.Module | ExportedProgram:
    with ExitStack() as stack:
        uri = model.weights or model.program
        path = None if uri is None else stack.enter_context(storage.local_file(uri))
        if path is not None and model.sha256 is not None and storage.sha256_file(path) != model.sha256.lower():
            raise InputError(
                f"{redact(uri or '')}: its SHA-256 is not model.sha256: it is damaged or another file; get it "
                "again, or correct the field"
            )
        if model.program is not None:
            assert path is not None
            return load_program(path)
        assert model.factory is not None
        return load_factory(model.factory, model.factory_args, path, folder)


def _loader(data: DataSpec, manifest: Manifest, comm: Comm) -> SampleLoader:
    return SampleLoader(
        manifest,
        manifest.owned(comm.rank, comm.world_size),
        pad_value=data.pad_value,
        mask_field=data.mask_field,
        prefetch=data.prefetch,
    )


def _converter(
    data: DataSpec, model: nn.Module | ExportedProgram, folder: Path | None
) -> Callable[[Mapping[str, Tensor]], ModelInputs]:
    """From a microbatch's fields to the model's arguments."""
    transform = None if data.transform is None else load_callable(data.transform, folder)
    parameters = placeholder_names(model) if isinstance(model, ExportedProgram) else forward_parameters(model)

    def convert(batch: Mapping[str, Tensor]) -> ModelInputs:
        if transform is not None:
            assert data.transform is not None
            batch = call_transform(transform, data.transform, batch)
        return bind_inputs(batch, parameters, data.mask_field)

    return convert


def _check_fixed_batch(program: ExportedProgram, manifest: Manifest) -> None:
    size = fixed_batch_size(program)
    sizes = {len(microbatch.samples) for microbatch in manifest.microbatches}
    if size is not None and sizes != {size}:
        raise InputError(
            f"model.program takes batches of exactly {size} samples, the data is cut into {sorted(sizes)}: set "
            f"data.microbatch_size={size} and data.num_samples to a multiple of it, or export with a dynamic batch"
        )


def _progress(job: PreparedJob) -> SilentProgress:
    if job.comm.rank != 0:
        return SilentProgress()
    shapes = [layer.site.geometry for layer in job.planned if layer.format is not None]
    return Progress(len(shapes), costs=[float(shape.out_channels * shape.inputs_per_output) for shape in shapes])


def _log_start(job: PreparedJob, events: EventLog, commits: JobCommits) -> None:
    for note in job.walker.notes if job.comm.rank == 0 else ():
        logger.warning("%s", note)
    if commits.names:
        logger.info("%d finished layers found in the output; the job goes on behind them", len(commits.names))
    events.write(
        "start",
        version=__version__,
        torch=torch.__version__,
        world_size=job.comm.world_size,
        device=str(job.context.device),
        threads=torch.get_num_threads(),
        owned=list(job.microbatches.owned),
        finished=len(commits.names),
    )
    events.flush()


def _export(job: PreparedJob, result: NetworkResult, seconds: float) -> None:
    """Write the checkpoints the job asks for, then report.json."""
    uri, state = job.spec.output.uri, job.state_dict()
    described = [asdict(parameter) for parameter in result.float_parameters]
    if "safetensors" in job.spec.output.formats:
        records = [(site.weight_name, record) for site, record in result.records]
        write_codes(uri, state, records, {"float_parameters": described})
    if "dequantized" in job.spec.output.formats:
        write_dequantized(uri, state)
    report = {
        "version": __version__,
        "spec": job.spec.model_dump(mode="json", include={"quantize", "preset"})
        | {"rounding": job.spec.rounding.resolved()},
        "layers": result.table.to_dicts(),
        "totals": result.table.totals.to_dict(),
        "output_error": result.output_error,
        "float_parameters": described,
        "notes": list(job.walker.notes),
        "world_size": job.comm.world_size,
        "peak_activation_bytes": job.store.peak,
        "seconds": seconds,
    }
    text = jsontext.dumps(report, indent=1) + "\n"
    storage.write_bytes(uris.join(uri, "report.json"), text.encode())
