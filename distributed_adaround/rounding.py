"""Rounding of a whole network: capture the model, walk from layer to layer, commit each result.

    capture ─► plan_layers ─► for every layer: reach ─► grid ─► solve ─► compare ─► commit ─► finish

Job files (`job.py`) and Python callers (`api.py`) meet here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.graph import capture, export_model, straight_line, without_cache
from distributed_adaround.capture.graph_walk import GraphWalker
from distributed_adaround.capture.replay_walk import ReplayWalker
from distributed_adaround.capture.sites import FloatParameter, Microbatches, ModelInputs, Site, Walker
from distributed_adaround.checkpoint.commits import Commits
from distributed_adaround.checkpoint.layer_files import LayerRecord
from distributed_adaround.errors import InputError, StoppedError, naming_layer
from distributed_adaround.model.load import model_digest
from distributed_adaround.monitor import LayerMonitor
from distributed_adaround.report.console import SilentProgress
from distributed_adaround.report.events import EventLog
from distributed_adaround.report.table import LayerReport, LayerTable
from distributed_adaround.runtime.comm import Comm, agreed, phase, same_everywhere
from distributed_adaround.runtime.context import RankContext
from distributed_adaround.runtime.memory import free_bytes
from distributed_adaround.runtime.signals import StopRequest
from distributed_adaround.solve.layer import round_layer
from distributed_adaround.solve.problem import MomentCache
from distributed_adaround.solve.setup import (
    describe_format,
    make_problem,
    make_record,
    make_solver,
    solver_of,
    weighted_grid,
)
from distributed_adaround.spec.job import MethodSpec
from distributed_adaround.spec.number_format import LayerFormat
from distributed_adaround.spec.quantize import QuantizeSpec
from distributed_adaround.spec.runtime import RuntimeSpec, parse_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedLayer:
    """A layer and the format of its weight; None: it stays in float because the job says so."""

    site: Site
    format: LayerFormat | None


@dataclass(frozen=True)
class NetworkResult:
    """Records of all quantized layers in the order of the walk, the table, and the model's own output error.

    output_error: squared error of the model's outputs over their squared values, on the calibration data; NaN where
    the walk does not see the outputs.
    """

    records: tuple[tuple[Site, LayerRecord], ...]
    table: LayerTable
    float_parameters: tuple[FloatParameter, ...]
    output_error: float


def activation_store(runtime: RuntimeSpec, context: RankContext) -> ActivationStore:
    """Budgets of this rank: as the spec says, else half of what is free now, shared by the ranks of this machine."""
    host = free_bytes() // (2 * context.local_world_size)
    device = torch.cuda.mem_get_info(context.device)[0] // 2 if context.device.type == "cuda" else 0
    return ActivationStore(
        context.device,
        host_budget=host if runtime.activation_memory is None else parse_bytes(runtime.activation_memory),
        device_budget=device if runtime.device_memory is None else parse_bytes(runtime.device_memory),
        spill_dir=runtime.spill_dir,
    )


def agree_on_weights(state: Mapping[str, Any], comm: Comm) -> str:
    """Digest of a model's state dict, which all ranks must share: other weights would spoil the result in silence.

    Raises:
        InputError: ranks hold other weights than rank 0, from a factory that draws at random, say.
    """
    with phase(comm, "hash the model"):
        digest = model_digest((name, tensor) for name, tensor in state.items() if isinstance(tensor, Tensor))
    digests = comm.all_gather_object(digest)
    odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if odd:
        raise agreed(
            InputError(
                f"the model on ranks {odd} has other weights than on rank 0; load the same weights on all ranks, with "
                "model.weights in a job file, or seed the factory"
            )
        )
    return digest


def make_walker(
    model: nn.Module | ExportedProgram,
    example: ModelInputs,
    *,
    other: ModelInputs | None = None,
    varying: bool,
    device: torch.device,
    store: ActivationStore,
) -> Walker:
    """Walk through the exported graph; by hooks and replay where the model cannot be exported, with a note.

    example, other: microbatches, of different shapes where the data has them; the graph must do for both.
    varying: shapes differ between microbatches in more than the number of samples.

    Raises:
        InputError: an exported program that cannot be walked; a model whose forward fails.
    """
    if isinstance(model, ExportedProgram):
        return GraphWalker(capture(straight_line(model)), device, store)
    try:
        # Only what torch and the model do is tried here: an error of our own in reading the graph is not to be hidden.
        graph = straight_line(export_model(model, _beside(model, example), varying))
        for inputs in (example,) if other is None else (example, other):
            _check_same_output(model, graph, _beside(model, inputs))
    except Exception as error:
        # torch.export documents no closed set of errors; whatever stops it, hooks still work.
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        logger.debug("torch.export failed", exc_info=True)
        return ReplayWalker(model, example, reason=reason[:200], device=device, keep=store.keep)
    return GraphWalker(capture(graph), device, store)


def _beside(model: nn.Module, inputs: ModelInputs) -> ModelInputs:
    """The inputs on the model's device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (inputs.args, inputs.kwargs))
    return replace(inputs, args=args, kwargs=kwargs)


def _check_same_output(model: nn.Module, graph: nn.Module, example: ModelInputs) -> None:
    with torch.no_grad(), without_cache(model):
        ours, theirs = (_real_tensors(module(*example.args, **example.kwargs)) for module in (graph, model))
    # The tolerance covers another order of sums. Rows that are all padding may be NaN.
    if len(ours) != len(theirs) or not all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    ):
        raise InputError("its exported graph does not compute what the model computes")


def _real_tensors(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def plan_layers(walker: Walker, quantize: QuantizeSpec) -> list[PlannedLayer]:
    """Format of every layer, checked before anything is solved.

    Raises:
        SpecError: a group size does not divide, or overrides contradict each other.
        InputError: the model has no layer to quantize, or one whose weight is not finite.
    """
    planned = [PlannedLayer(site, quantize.for_layer(site.name, site.module_class)) for site in walker.sites]
    for layer in planned:
        if layer.format is not None:
            layer.format.check(layer.site.name, layer.site.geometry.inputs_per_output)
            if not bool(torch.isfinite(walker.tensor(layer.site.weight_name)).all()):
                raise InputError(
                    f"layer {layer.site.name}: its weight {layer.site.weight_name!r} is not finite; load other "
                    "weights, or leave the layer in float by quantize.ignore"
                )
    for pattern in quantize.unmatched([(site.name, site.module_class) for site in walker.sites]):
        logger.warning("quantize: the pattern %r matches no layer of this model", pattern)
    if not any(layer.format for layer in planned):
        raise InputError(
            f"none of the model's {len(planned)} linear and convolution layers is to be quantized; see quantize.ignore"
        )
    return planned


def float_parameters(walker: Walker, planned: Sequence[PlannedLayer]) -> tuple[FloatParameter, ...]:
    """Every parameter left in float, with its reason."""
    ignored = tuple(
        FloatParameter(layer.site.weight_name, layer.site.geometry.weight_shape, "ignored by quantize.ignore")
        for layer in planned
        if layer.format is None
    )
    return (*walker.float_parameters, *ignored)


@dataclass(frozen=True)
class NetworkRounder:
    """What the loop over layers needs, apart from the model and the data."""

    spec: MethodSpec
    comm: Comm
    device: torch.device
    store: ActivationStore
    progress: SilentProgress
    events: EventLog
    commits: Commits = field(default_factory=Commits)
    stop: StopRequest = field(default_factory=StopRequest)
    # Called with the number of layers done when one more was committed.
    layer_done: Callable[[int], None] = lambda done: None
    moments: MomentCache = field(default_factory=MomentCache)

    def run(self, walker: Walker, planned: Sequence[PlannedLayer], microbatches: Microbatches) -> NetworkResult:
        """Round all layers, apart from those that are committed already.

        Raises:
            StoppedError: a signal asked one of the ranks to stop; finished layers are committed.
        """
        with phase(self.comm, "read the calibration data"):
            walker.start(microbatches)
        records: list[tuple[Site, LayerRecord]] = []
        reports: list[LayerReport] = []
        todo = sum(layer.format is not None for layer in planned)
        for layer in planned:
            if layer.format is None:
                walker.commit(layer.site, None)
                continue
            self.progress.layer(len(reports), layer.site.name, self.spec.rounding.num_steps)
            with naming_layer(layer.site.name):
                record, report = self._finish(walker, layer.site, layer.format, microbatches.total)
            records.append((layer.site, record))
            reports.append(report)
            self.progress.done(report)
            self.events.write("layer", index=len(reports), of=todo, **report.to_dict())
            self.events.flush()
            if not report.resumed:
                self.layer_done(len(reports))
        return NetworkResult(
            records=tuple(records),
            table=LayerTable(reports),
            float_parameters=float_parameters(walker, planned),
            output_error=self._output_error(walker, microbatches.total),
        )

    def _finish(
        self, walker: Walker, site: Site, layer_format: LayerFormat, total: int
    ) -> tuple[LayerRecord, LayerReport]:
        """Round one layer or take it from a commit, and walk on through the result."""
        if any(self.comm.all_gather_object(self.stop.requested)):
            raise agreed(StoppedError())
        record = self.commits.load(site.name)
        resumed = record is not None
        if record is None:
            record = self._round(walker, site, layer_format, total)
            self.commits.commit(record)
        weight = record.dequantize(walker.tensor(site.weight_name).dtype)
        walker.commit(site, weight, record.shift)
        return record, LayerReport.from_dict({**record.metrics, "resumed": resumed})

    def _round(self, walker: Walker, site: Site, layer_format: LayerFormat, total: int) -> LayerRecord:
        """Learn one layer and check that all ranks found the same."""
        started = time.monotonic()
        activations = walker.reach(site)
        problem = make_problem(
            self.spec, walker, site, layer_format, activations, total, self.device, self.store, self.moments
        )
        problem = weighted_grid(problem, layer_format, self.comm)
        rounding = self.spec.rounding
        self.progress.expect(rounding.with_solver(solver_of(rounding, problem)).num_steps)
        save_seconds = 60 * self.spec.runtime.save_minutes
        monitor = LayerMonitor(site.name, self.progress, self.stop, self.commits, save_seconds)
        result = round_layer(problem, make_solver(rounding), self.comm, monitor)
        found = [result.codes, result.grid.scale, *(() if result.shift is None else (result.shift,))]
        same_everywhere(self.comm, found, f"layer {site.name}: the rounding")
        report = LayerReport(
            name=site.name,
            kind=site.module_class,
            shape=site.geometry.weight_shape,
            format=describe_format(layer_format),
            solver=result.solver or rounding.solver,
            nearest_error=result.nearest_error,
            soft_error=result.soft_error,
            hard_error=result.hard_error,
            flipped=result.flipped,
            unsettled=result.unsettled,
            kept_nearest=result.kept_nearest,
            seconds=time.monotonic() - started,
            note=f"runs {site.num_calls} times, learned at the first" if site.num_calls > 1 else "",
        )
        return make_record(site, layer_format, result, report)

    def _output_error(self, walker: Walker, total: int) -> float:
        sums = torch.zeros(total, 2, dtype=torch.float64)
        for index, before, after in walker.finish():
            # Row by row, since logits are large: other ways to sum squares make copies or take ten times as long.
            wide = torch.promote_types(before.dtype, torch.float32)
            norms = [torch.linalg.vector_norm(values, dim=-1, dtype=wide) for values in (after - before, before)]
            sums[index] += torch.stack([norm.double().square().sum() for norm in norms]).cpu()
        error, energy = self.comm.all_reduce(sums).sum(dim=0).tolist()
        return float(error / energy) if energy else float("nan")
