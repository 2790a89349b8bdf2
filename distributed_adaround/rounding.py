"""Rounding of a whole network: walk from unit to unit, solve each, commit the result, walk on through it.

    for every unit:  reach ─► problem ─► moments ─► solve ─► record ─► commit ─► walk on

Job files (`job.py`) and Python callers (`api.py`) meet here.
"""

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distributed_adaround.capture.open import CapturedModel
from distributed_adaround.capture.sites import Batch, FloatParameter, Site, Unit, Walker
from distributed_adaround.checkpoint.commits import Commits
from distributed_adaround.data.microbatches import Microbatches
from distributed_adaround.errors import StoppedError, naming_layer
from distributed_adaround.export.verify import Verified
from distributed_adaround.formats import LayerFormat
from distributed_adaround.metrics.figures import MetricFigures
from distributed_adaround.report.job_log import JobLog
from distributed_adaround.report.table import LayerTable
from distributed_adaround.runtime.comm import Comm, agreed, phase, same_everywhere
from distributed_adaround.runtime.signals import StopRequest
from distributed_adaround.solve.experts import ChosenRows, choose_rows
from distributed_adaround.solve.layer import LayerResult, round_layer, without_rows
from distributed_adaround.solve.measure import SharedMoments
from distributed_adaround.solve.problem import Monitor, Solver
from distributed_adaround.solve.record import LayerFigures, LayerRecord
from distributed_adaround.solve.setup import make_problem, make_solver, make_trial_solver, solver_name, with_moments
from distributed_adaround.spec.job import MethodSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NetworkResult:
    """Records of all quantized layers in the order of the walk. output_error: squared error of the model's outputs over
    their squared values, on the calibration data; NaN where the walk does not see the outputs. float_parameters: what
    stayed in float, and why. exports: what came of the formats, read again."""

    records: tuple[tuple[Site, LayerRecord], ...]
    output_error: float
    float_parameters: tuple[FloatParameter, ...] = ()
    metrics: tuple[MetricFigures, ...] = ()
    exports: Sequence[Verified] = ()

    @property
    def table(self) -> LayerTable:
        rows = (record.figures for _, record in self.records if record.figures is not None)
        return LayerTable(rows, self.float_parameters, self.output_error, metrics=self.metrics, exports=self.exports)


@dataclass(frozen=True)
class NetworkRounder:
    """What the loop over units needs, apart from the model and the data."""

    spec: MethodSpec
    comm: Comm
    log: JobLog = field(default_factory=JobLog)
    commits: Commits = field(default_factory=Commits)
    stop: StopRequest = field(default_factory=StopRequest)
    moments: SharedMoments = field(default_factory=SharedMoments)

    def run(self, captured: CapturedModel, microbatches: Microbatches) -> NetworkResult:
        """Round all layers, apart from those that are committed already. A collective. Raises StoppedError when a
        signal asked one of the ranks to stop; finished layers are committed."""
        walker = captured.walker
        logger.info("reading the calibration data")
        with phase(self.comm, "read the calibration data"):
            walker.start(microbatches)
        records: list[tuple[Site, LayerRecord]] = []
        for planned in captured.planned:
            if planned.format is None:
                self._pass(walker, planned.unit, {})
                continue
            records += self._finish_unit(captured, planned.unit, planned.format, microbatches.total)
        error = self._output_error(walker, microbatches.total)
        return NetworkResult(tuple(records), error, captured.float_parameters)

    def _finish_unit(
        self, captured: CapturedModel, unit: Unit, layer_format: LayerFormat, total: int
    ) -> list[tuple[Site, LayerRecord]]:
        """Round all sites of a unit, and walk on through the result."""
        walker = captured.walker
        records: list[tuple[Site, LayerRecord]] = []
        tensors: dict[str, Tensor] = {}

        @functools.cache
        def reach() -> list[Batch]:
            with phase(self.comm, f"reach layer {unit.name}"):
                return walker.reach(unit)

        for site in unit.sites:
            with naming_layer(site.name):
                record = self._finish(captured, unit, site, layer_format, reach, total)
            records.append((site, record))
            parameter = walker.tensor(site.weight_name)
            weight = record.dequantize(site.weight_of(parameter).dtype)
            # Experts lie in one tensor, which is copied once for all of them.
            tensors[site.weight_name] = site.stored(parameter, weight, tensors.get(site.weight_name))
            if record.shift is not None:
                assert site.shift_name is not None
                tensors[site.shift_name] = site.shifted(walker.tensor(site.shift_name), record.shift)
        self._pass(walker, unit, tensors)
        return records

    def _pass(self, walker: Walker, unit: Unit, tensors: Mapping[str, Tensor]) -> None:
        """Ranks have data of their own, so a forward may fail on one of them alone."""
        with phase(self.comm, f"pass layer {unit.name}"):
            walker.commit(unit, tensors)

    def _finish(
        self,
        captured: CapturedModel,
        unit: Unit,
        site: Site,
        layer_format: LayerFormat,
        reach: Callable[[], list[Batch]],
        total: int,
    ) -> LayerRecord:
        """Round one layer or take it from a commit. reach: batches of its unit."""
        if any(self.comm.all_gather_object(self.stop.requested)):
            raise agreed(StoppedError())
        name = solver_name(self.spec.rounding, site)
        solver = make_solver(name, self.spec.rounding)
        self.log.layer_started(site.name, solver.num_steps)
        record = self.commits.load(site.name)
        if record is None:
            started = time.monotonic()
            rows = ChosenRows.none()
            if not site.is_table:
                rows = choose_rows(unit, site, reach(), captured.walker.tensor(site.weight_name), self.comm)
            result = self._solve(captured, site, layer_format, solver, rows, total)
            measured = {
                key: value for key, value in vars(result).items() if key not in ("codes", "grid", "shift", "note")
            }
            notes = [f"runs {site.num_calls} times" if site.num_calls > 1 else "", rows.note, result.note]
            figures = LayerFigures(
                name=site.name,
                kind=site.module_class,
                shape=site.geometry.weight_shape,
                format=str(layer_format),
                solver=name,
                seconds=time.monotonic() - started,
                note="; ".join(note for note in notes if note),
                warning=result.warning,
                **measured | {"rows": rows.rows},
            )
            record = LayerRecord.of(figures, site.geometry, layer_format, result.codes, result.grid, result.shift)
            self.commits.commit(record)
        elif record.figures is not None:
            record = replace(record, figures=replace(record.figures, resumed=True))
        assert record.figures is not None
        self.log.layer_done(record.figures)
        return record

    def _solve(
        self,
        captured: CapturedModel,
        site: Site,
        layer_format: LayerFormat,
        solver: Solver,
        rows: ChosenRows,
        total: int,
    ) -> LayerResult:
        """Learn one layer and check that all ranks found the same. total: microbatches of all ranks."""
        rounding = self.spec.rounding
        problem = make_problem(
            self.spec, captured.walker, site, layer_format, rows.batches, total * site.num_calls, captured.store
        )
        if not rows.any:
            return without_rows(problem, "a table" if site.is_table else "no calibration data reach it")
        if rows.source is not None:
            problem = replace(problem, source=rows.source)
        moments = None
        if solver.needs_moments or rounding.polishes or layer_format.observer == "output_mse":
            moments = self.moments.measure(problem, self.comm)
            problem = with_moments(problem, moments, layer_format, self.comm)
        monitor = LayerMonitor(site.name, self.log, self.stop, self.commits, 60 * self.spec.runtime.save_minutes)
        result = round_layer(
            problem,
            solver,
            self.comm,
            monitor,
            moments=moments,
            polishes=rounding.polishes,
            trial_solver=make_trial_solver(solver_name(rounding, site), rounding),
        )
        found = [result.codes, result.grid.scale, *(() if result.shift is None else (result.shift,))]
        same_everywhere(self.comm, found, f"layer {site.name}: the rounding")
        return result

    def _output_error(self, walker: Walker, total: int) -> float:
        sums = torch.zeros(total, 2, dtype=torch.float64)
        with phase(self.comm, "run the end of the model"):
            for index, before, after in walker.finish():
                # Row by row, since logits are large: other ways to sum squares make copies or take ten times as long.
                wide = torch.promote_types(before.dtype, torch.float32)
                norms = [torch.linalg.vector_norm(values, dim=-1, dtype=wide) for values in (after - before, before)]
                sums[index] += torch.stack([norm.double().square().sum() for norm in norms]).cpu()
        error, energy = self.comm.all_reduce(sums).sum(dim=0).tolist()
        return float(error / energy) if energy else float("nan")


@dataclass
class LayerMonitor(Monitor):
    """What the solver of one layer tells and asks: progress, signals, and its state saved every save_seconds."""

    layer: str
    log: JobLog
    stop: StopRequest
    commits: Commits
    save_seconds: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        super().__init__(self.log.step)
        self._saved = self.clock()

    @property
    def stop_requested(self) -> bool:
        return self.stop.requested

    @property
    def save_due(self) -> bool:
        return self.clock() - self._saved >= self.save_seconds

    def save(self, key: str, state: Mapping[str, Tensor]) -> None:
        self.commits.save_state(self.layer, key, state)
        self._saved = self.clock()

    def load(self, key: str) -> dict[str, Tensor] | None:
        return self.commits.load_state(self.layer, key)
