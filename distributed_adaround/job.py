"""A job from its file to its results, as one straight line.

spec ─► ranks ─► data (manifest, shards) ─► model ─► capture ─► rounding, unit by unit ─► export ─► report
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from distributed_adaround import __version__
from distributed_adaround.capture.graph_walk import GraphWalker
from distributed_adaround.capture.open import CapturedModel, capture_model
from distributed_adaround.checkpoint.commits import JobCommits
from distributed_adaround.data.deal import DealtData, InputBinding, deal_data
from distributed_adaround.data.manifest import Manifest
from distributed_adaround.data.microbatches import Microbatches
from distributed_adaround.errors import InputError, redact
from distributed_adaround.export.codes import SolvedModel, planned_layer, write_codes
from distributed_adaround.export.exporter import (
    Exporter,
    ExportPlan,
    ExportTask,
    exporters,
    result_files,
    scale_dtype,
    write_formats,
)
from distributed_adaround.export.stored import QuantizedLayer, StoredResult
from distributed_adaround.export.verify import refuse_different, verify
from distributed_adaround.files import jsontext, storage, uris
from distributed_adaround.files.job_file import yaml_text
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.metrics.data import EvaluationData
from distributed_adaround.metrics.evaluation import Evaluation, naming_evaluation
from distributed_adaround.metrics.judges import make_judge, needs_labels
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
from distributed_adaround.runtime.context import RankContext, alone, process_group
from distributed_adaround.runtime.signals import StopRequest
from distributed_adaround.spec.data import DataSpec
from distributed_adaround.spec.evaluate import EvaluateSpec
from distributed_adaround.spec.job import JobSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedJob:
    """Everything that stands before the first layer is solved, on one rank. spec: with the precision of scales that the
    formats of the output store."""

    spec: JobSpec
    context: RankContext
    comm: Comm
    manifest: Manifest
    opened: OpenedModel
    microbatches: Microbatches
    captured: CapturedModel
    exporters: list[Exporter]
    plan: ExportPlan
    evaluation: Evaluation | None


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
        dealt = deal_data(spec.data, files, comm, find_directories(spec, spec.data, files), "the calibration data")
        logger.info("loading the model")
        with phase(comm, "load the model"):
            opened = open_model(spec.model, folder, files)
            _check_batch_size(opened, dealt.manifest)
        with phase(comm, "read the calibration data"):
            loader = stack.enter_context(dealt.loader(comm))
            binding = InputBinding.of(spec.data, opened.parameters, opened.dtype, folder)
            microbatches = Microbatches.of_files(loader, binding, transformed=spec.data.transform is not None)
        evaluation = None
        if spec.evaluate is not None:
            data = stack.enter_context(_evaluation_data(spec, spec.evaluate, opened, dealt, folder, comm))
            with phase(comm, "prepare the evaluation"), naming_evaluation():
                judge = make_judge(spec.evaluate, data, folder)
            evaluation = Evaluation(judge, data, context.device, comm)
        chosen = exporters(spec.output.formats)
        directory = None if spec.model.hf is None else model_directory(spec.model.hf, files)
        plan = ExportPlan((), spec.output, spec.model, opened.widest_dtype, directory, files)
        spec = spec.model_copy(update={"quantize": spec.quantize.with_scales(scale_dtype(chosen, plan))})
        captured = capture_model(opened, microbatches, spec.quantize, spec.runtime, context, comm)
        tell_coverage(captured, comm)
        plan = replace(plan, layers=_layers(captured), exported=isinstance(captured.walker, GraphWalker))
        with phase(comm, "check the formats"):
            for exporter in chosen if comm.rank == 0 else ():
                exporter.check(plan)
                for note in exporter.notes(plan):
                    logger.warning("%s", note)
        yield PreparedJob(spec, context, comm, dealt.manifest, opened, microbatches, captured, chosen, plan, evaluation)


def run_job(spec: JobSpec, folder: Path | None = None, stop: StopRequest | None = None) -> LayerTable:
    """Run a job on this rank. stop: signals that ask for its end. Returns the table of all layers.

    Raises:
        SpecError, InputError, OutputError: exit codes 64, 65 and 73 of the command line.
        PeerError, StoppedError: another rank failed first, or a signal came (75).
    """
    started = time.monotonic()
    stop = StopRequest() if stop is None else stop
    with prepare(spec, folder) as job:
        if job.evaluation is not None:
            # Before the first layer: what is wrong with the metric is found before the work, not after it.
            job.evaluation.measure_float(job.opened.model)
        fingerprint = {"model": job.captured.digest, "data": job.manifest.digest(), "spec": job.spec.result_digest()}
        with stop.deferred():
            commits = JobCommits(spec.output.uri, fingerprint, spec.output.overwrite, result_files(), job.comm)
            with phase(job.comm, "write to the output"):
                log = _open_log(job, spec, len(commits.names), started)
            with log:
                result = NetworkRounder(job.spec, job.comm, log, commits, stop).run(job.captured, job.microbatches)
            with phase(job.comm, "write the results"):
                if job.comm.rank == 0:
                    source = hashlib.sha256(jsontext.dumps(fingerprint).encode()).hexdigest()
                    with alone():
                        task = _export(job, result, source)
                        result = replace(result, exports=verify(task, job.exporters) if spec.output.verify else ())
            if job.evaluation is not None:
                # The checkpoints are there also when the metric fails on the quantized model.
                result = replace(result, metrics=job.evaluation.figures(job.opened.model))
                log.evaluated(result.metrics)
            with phase(job.comm, "write the report"):
                seconds = time.monotonic() - started
                if job.comm.rank == 0:
                    _write_report(job, result, seconds)
                    refuse_different(result.exports)
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


def find_directories(spec: JobSpec, data: DataSpec, files: LocalFiles) -> Callable[[], tuple[Path | None, Path | None]]:
    """Finds the directories with the tokenizer or processor of the data, and of the model; None: the job names none."""

    def found(uri: str | None) -> Path | None:
        return None if uri is None else model_directory(uri, files)

    return lambda: (found(data.processor or spec.model.hf), found(spec.model.hf))


@contextmanager
def _evaluation_data(
    spec: JobSpec, section: EvaluateSpec, opened: OpenedModel, calibration: DealtData, folder: Path | None, comm: Comm
) -> Iterator[EvaluationData]:
    """The data that the model is judged on, read as the calibration data are. A collective."""
    files = calibration.files
    with naming_evaluation():
        directories = find_directories(spec, section.data, files)
        dealt = deal_data(section.data, files, comm, directories, "the evaluation data", needs_labels(section))
        with phase(comm, "read the evaluation data"):
            _check_batch_size(opened, dealt.manifest)
            binding = InputBinding.of(section.data, opened.parameters, opened.dtype, folder)
            loader = dealt.loader(comm)
    common = dealt.manifest.common_files(calibration.manifest)
    if common and comm.rank == 0:
        logger.warning("calibration uses %d of the files of evaluate.data too: %s", len(common), redact(common[0]))
    with loader:
        yield EvaluationData(dealt.manifest, loader, binding, calibrated=bool(common))


def _check_batch_size(opened: OpenedModel, manifest: Manifest) -> None:
    size, sizes = opened.batch_size, {len(microbatch.samples) for microbatch in manifest.microbatches}
    if size is not None and sizes != {size}:
        remedy = f"set data.microbatch_size={size} and data.num_samples to a multiple of it"
        what = f"model.program takes batches of exactly {size} samples, the data is cut into {sorted(sizes)}"
        raise InputError(f"{what}: {remedy}, or export with a dynamic batch")


def _open_log(job: PreparedJob, spec: JobSpec, layers_done: int, started: float) -> JobLog:
    """The job's listener; rank 0 shows progress and keeps the status. spec: as it was given."""
    captured, rank = job.captured, job.comm.rank
    progress = None
    if rank == 0:
        progress = Progress(captured.num_layers, costs=layer_costs(captured))
    if layers_done:
        logger.info("%d finished layers found in the output; the job goes on after them", layers_done)
    if rank == 0:
        _write_job_file(spec)
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


def _write_job_file(spec: JobSpec) -> None:
    """The job as it runs, with what `--set` and a preset changed. Credentials stay out of the results."""
    text = yaml_text(spec.model_dump(mode="json", exclude_unset=True))
    lines = "".join(f"{redact(line)}\n" for line in text.splitlines())
    storage.write_bytes(uris.join(spec.output.uri, "job.yaml"), lines.encode())


def _layers(captured: CapturedModel) -> list[QuantizedLayer]:
    """All that will be quantized."""
    return [
        planned_layer(site, planned.format, captured.walker.tensor(site.weight_name))
        for planned in captured.planned
        if planned.format is not None
        for site in planned.sites
    ]


def _export(job: PreparedJob, result: NetworkResult, source: str) -> ExportTask:
    """Write the result and the checkpoints the job asks for. source: digest of what the result depends on."""
    described = [asdict(parameter) for parameter in job.captured.float_parameters]
    layers = {layer.stored_name: layer for layer in job.plan.layers}
    solved = [(layers[site.stored_name], record) for site, record in result.records]
    uri, opened, batches = job.spec.output.uri, job.opened, job.microbatches
    write_codes(
        SolvedModel(opened.weights, solved, opened.widest_dtype, described, opened.checkpoint, opened.shard_bytes),
        uri,
        source,
    )
    task = ExportTask(
        **vars(job.plan),
        result=StoredResult.open(uri, job.plan.files),
        model=lambda: opened.model,
        inputs=lambda: [batches.load(index) for index in batches.owned[:1]],
    )
    write_formats(task, job.exporters, uri)
    return task


def _write_report(job: PreparedJob, result: NetworkResult, seconds: float) -> None:
    spec = job.spec
    report = {
        "version": __version__,
        "spec": spec.model_dump(mode="json", include={"quantize", "preset"}) | {"rounding": spec.rounding.resolved()},
        "layers": result.table.to_dicts(),
        "totals": result.table.totals.to_dict(),
        "output_error": result.output_error,
        "coverage": result.table.coverage.share,
        "metrics": [figures.to_dict() for figures in result.metrics],
        "float_parameters": [asdict(parameter) for parameter in job.captured.float_parameters],
        "exports": [asdict(one) for one in result.exports],
        "notes": list(job.captured.walker.notes),
        "world_size": job.comm.world_size,
        "peak_activation_bytes": job.captured.store.peak,
        "seconds": seconds,
    }
    storage.write_bytes(uris.join(spec.output.uri, "report.json"), f"{jsontext.dumps(report, indent=1)}\n".encode())
