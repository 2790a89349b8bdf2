"""What a job would do: layers, data per rank, memory and time, with nothing solved.

One microbatch runs through the model to see real shapes, and a few solver steps are timed on each kind of layer.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.open import PlannedUnit
from distributed_adaround.capture.sites import Batch, FloatParameter, Site
from distributed_adaround.formats import LayerFormat
from distributed_adaround.job import PreparedJob, prepare
from distributed_adaround.report.coverage import Coverage
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.experts import ChosenRows, choose_rows
from distributed_adaround.solve.measure import measure
from distributed_adaround.solve.problem import LayerProblem, Monitor
from distributed_adaround.solve.setup import make_problem, make_solver, solver_name, with_moments
from distributed_adaround.spec.job import JobSpec
from distributed_adaround.spec.rounding import RoundingSpec

# Of minibatch; a sweep of gram costs as much as many of them.
_TRIAL_STEPS = {"minibatch": 10}
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class LayerPlan:
    """One layer: format None stays in float. rows: of the whole calibration set. cache_bytes: of one rank's solver.
    gram_seconds: with the solver gram instead."""

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str | None
    rows: int
    cache_bytes: int
    seconds: float
    gram_seconds: float


@dataclass(frozen=True)
class JobPlan:
    """Estimates of a job on this machine. samples_per_rank: for the world size the plan was made with. num_steps: of
    the solver in each layer, 0 where it has none. gram_seconds: with the solver gram instead."""

    layers: tuple[LayerPlan, ...]
    float_parameters: tuple[FloatParameter, ...]
    coverage: Coverage
    notes: tuple[str, ...]
    samples_per_rank: tuple[int, ...]
    activation_bytes: int
    num_steps: int
    seconds: float
    gram_seconds: float


def plan_job(spec: JobSpec, folder: Path | None, world_size: int) -> JobPlan:
    """Try a job without solving it; runs on one process and plans for `world_size` ranks."""
    with prepare(spec, folder) as job:
        owned = [job.manifest.owned(rank, world_size) for rank in range(world_size)]
        sizes = {m.index: len(m.samples) for m in job.manifest.microbatches}
        samples = tuple(sum(sizes[index] for index in mine) for mine in owned)
        trial = _Trial(job, scale=job.manifest.num_samples / sizes[0], rank_share=max(samples) / sizes[0])
        layers = tuple(trial.layers())
        forward = trial.forward_seconds * trial.rank_share
        return JobPlan(
            layers=layers,
            float_parameters=job.captured.float_parameters,
            coverage=Coverage.of_model(job.captured),
            notes=tuple(job.captured.walker.notes),
            samples_per_rank=samples,
            activation_bytes=int(trial.frontier_bytes * trial.rank_share) + max(layer.cache_bytes for layer in layers),
            num_steps=make_solver(spec.rounding.solver, spec.rounding).num_steps,
            seconds=sum(layer.seconds for layer in layers) + forward,
            gram_seconds=sum(layer.gram_seconds for layer in layers) + forward,
        )


class _Trial:
    """A walk with one microbatch that measures and leaves the weights as they are. scale: samples of the job for each
    one here; rank_share: samples of one rank likewise."""

    def __init__(self, job: PreparedJob, scale: float, rank_share: float) -> None:
        self._job, self._walker = job, job.captured.walker
        self._store = ActivationStore(job.context.device, device_budget=_UNLIMITED, host_budget=_UNLIMITED)
        self._scale, self.rank_share = scale, rank_share
        self.frontier_bytes, self.forward_seconds = 0, 0.0
        self._seconds_of_kind: dict[object, float] = {}

    def layers(self) -> Iterator[LayerPlan]:
        self._walker.start(self._job.microbatches.first())
        for planned in self._job.captured.planned:
            started = time.monotonic()
            batches = self._walker.reach(planned.unit)
            reached = time.monotonic()
            for site in planned.sites:
                rows = ChosenRows.none()
                if not site.is_table:
                    parameter = self._walker.tensor(site.weight_name)
                    rows = choose_rows(planned.unit, site, batches, parameter, SoloComm())
                yield self._layer(planned, site, rows)
            solved = time.monotonic()
            self._walker.commit(planned.unit, {})
            self.forward_seconds += reached - started + time.monotonic() - solved
        self.frontier_bytes = sum(self._job.captured.store.peak.values())

    def _layer(self, planned: PlannedUnit, site: Site, rows: ChosenRows) -> LayerPlan:
        rounding, kept = self._job.spec.rounding, planned.format is not None
        cached = sum(batch.x_hat.nbytes + batch.y.nbytes for batch in rows.batches) if kept else 0
        return LayerPlan(
            name=site.name,
            kind=site.module_class,
            shape=site.geometry.weight_shape,
            format=None if planned.format is None else str(planned.format),
            rows=round(rows.rows * self._scale),
            cache_bytes=round(cached * self.rank_share),
            seconds=self._seconds(planned, site, rows, rounding),
            gram_seconds=self._seconds(planned, site, rows, rounding.with_solver("gram")),
        )

    def _seconds(self, planned: PlannedUnit, site: Site, rows: ChosenRows, rounding: RoundingSpec) -> float:
        """Seconds to solve a layer, measured once for each kind of layer and solver."""
        if planned.format is None or not rows.any:
            return 0.0
        key = (site.geometry, planned.format, site.activation, rounding.solver)
        if key not in self._seconds_of_kind:
            self._seconds_of_kind[key] = self._measure(site, planned.format, rows.batches, rounding)
        return self._seconds_of_kind[key]

    def _measure(self, site: Site, layer_format: LayerFormat, batches: list[Batch], rounding: RoundingSpec) -> float:
        """Steps of the job times the time of one, plus what is done once, plus three passes over the data."""
        comm = SoloComm()
        spec = self._job.spec.model_copy(update={"rounding": rounding})
        problem = make_problem(spec, self._walker, site, layer_format, batches, site.num_calls, self._store)
        nearest = [problem.grid.dequantize(problem.grid.quantize(problem.weight))]
        total = 3 * self._timed(lambda: output_errors(problem, nearest, comm)) * self.rank_share
        name = solver_name(rounding, site)
        needs_moments = make_solver(name, rounding).needs_moments or rounding.polishes
        if needs_moments or layer_format.observer == "output_mse":
            total += self._timed(lambda: measure(problem, comm)) * self.rank_share
            problem = with_moments(problem, measure(problem, comm), layer_format, comm)
        num_steps = make_solver(name, rounding).num_steps
        if not num_steps:
            return total + (self._solve(problem, name, rounding, 1) if needs_moments else 0.0)
        # The difference of two runs: the first steps pay for what is set up once.
        trial = _TRIAL_STEPS.get(name, 1)
        few, more = (self._solve(problem, name, rounding, steps) for steps in (trial, 3 * trial))
        per_step = max(0.0, more - few) / (2 * trial)
        once = max(0.0, few - trial * per_step) if needs_moments else 0.0
        return total + once + per_step * num_steps

    def _solve(self, problem: LayerProblem, name: str, rounding: RoundingSpec, num_steps: int) -> float:
        solver = make_solver(name, rounding.with_steps(num_steps))
        return self._timed(lambda: solver.solve(problem, SoloComm(), Monitor()))

    def _timed(self, work: Callable[[], object]) -> float:
        started = time.monotonic()
        work()
        if self._store.device.type == "cuda":
            torch.cuda.synchronize(self._store.device)
        return time.monotonic() - started
