"""What a job would do: layers, data per rank, memory and time, with nothing solved.

One microbatch runs through the model to see real shapes, and a few solver steps are timed on each distinct kind of
layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.sites import FloatParameter, ModelInputs, SiteActivations
from distributed_adaround.job import PreparedJob, prepare
from distributed_adaround.rounding import PlannedLayer, float_parameters
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.measure import layer_moments
from distributed_adaround.solve.problem import MomentCache, Monitor
from distributed_adaround.solve.setup import describe_format, make_problem, make_solver, solver_of, weighted_grid
from distributed_adaround.spec.job import JobSpec
from distributed_adaround.spec.rounding import RoundingSpec

# Of minibatch; a sweep of gram costs as much as many of them.
_TRIAL_STEPS = {"minibatch": 10, "gram": 1}
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
    """Estimates of a job on this machine. samples_per_rank: for the world size the plan was made with. gram_seconds:
    with the solver gram instead."""

    layers: tuple[LayerPlan, ...]
    float_parameters: tuple[FloatParameter, ...]
    notes: tuple[str, ...]
    samples_per_rank: tuple[int, ...]
    activation_bytes: int
    seconds: float
    gram_seconds: float


def plan_job(spec: JobSpec, folder: Path | None, world_size: int) -> JobPlan:
    """Look at a job without solving it; runs on one process and plans for `world_size` ranks."""
    with prepare(spec, folder) as job:
        owned = [job.manifest.owned(rank, world_size) for rank in range(world_size)]
        sizes = {m.index: len(m.samples) for m in job.manifest.microbatches}
        samples = tuple(sum(sizes[index] for index in mine) for mine in owned)
        store = ActivationStore(job.context.device, device_budget=_UNLIMITED, host_budget=_UNLIMITED)
        trial = _Trial(job, store, scale=job.manifest.num_samples / sizes[0], rank_share=max(samples) / sizes[0])
        layers = tuple(trial.layers())
        return JobPlan(
            layers=layers,
            float_parameters=float_parameters(job.walker, job.planned),
            notes=tuple(job.walker.notes),
            samples_per_rank=samples,
            activation_bytes=int(trial.frontier_bytes * trial.rank_share) + max(layer.cache_bytes for layer in layers),
            seconds=sum(layer.seconds for layer in layers) + trial.forward_seconds * trial.rank_share,
            gram_seconds=sum(layer.gram_seconds for layer in layers) + trial.forward_seconds * trial.rank_share,
        )


class _OneMicrobatch:
    total = 1
    owned: Sequence[int] = (0,)

    def __init__(self, inputs: ModelInputs) -> None:
        self._inputs = inputs

    def load(self, index: int) -> ModelInputs:
        return self._inputs

    def __iter__(self) -> Iterator[tuple[int, ModelInputs]]:
        yield 0, self._inputs


class _Trial:
    """A walk with one microbatch that measures and leaves the weights as they are."""

    def __init__(self, job: PreparedJob, store: ActivationStore, scale: float, rank_share: float) -> None:
        self._job = job
        self._store = store
        self._scale = scale
        self.rank_share = rank_share
        self.frontier_bytes = 0
        self.forward_seconds = 0.0
        self._seconds_of_kind: dict[object, float] = {}

    def layers(self) -> Iterator[LayerPlan]:
        walker = self._job.walker
        walker.start(_OneMicrobatch(self._job.microbatches.load(0)))
        for layer in self._job.planned:
            started = time.monotonic()
            activations = walker.reach(layer.site)
            self.forward_seconds += time.monotonic() - started
            yield self._layer(layer, activations)
            started = time.monotonic()
            walker.commit(layer.site, None)
            self.forward_seconds += time.monotonic() - started
        self.frontier_bytes = sum(self._job.store.peak.values())

    def _layer(self, layer: PlannedLayer, activations: SiteActivations) -> LayerPlan:
        site = layer.site
        target = activations.float_outputs[0]
        rows = target.numel() // site.geometry.out_channels
        cached = _bytes(activations.inputs) + _bytes(activations.float_outputs) if layer.format is not None else 0
        return LayerPlan(
            name=site.name,
            kind=site.module_class,
            shape=site.geometry.weight_shape,
            format=None if layer.format is None else describe_format(layer.format),
            rows=round(rows * self._scale),
            cache_bytes=round(cached * self.rank_share),
            seconds=self._seconds(layer, activations, self._job.spec.rounding),
            gram_seconds=self._seconds(layer, activations, self._job.spec.rounding.with_solver("gram")),
        )

    def _seconds(self, layer: PlannedLayer, activations: SiteActivations, rounding: RoundingSpec) -> float:
        """Seconds to solve a layer, measured once for each kind of layer and solver."""
        if layer.format is None:
            return 0.0
        key = (layer.site.geometry, layer.format, layer.site.activation, rounding.solver)
        if key not in self._seconds_of_kind:
            self._seconds_of_kind[key] = self._measure(layer, activations, rounding)
        return self._seconds_of_kind[key]

    def _measure(self, layer: PlannedLayer, activations: SiteActivations, rounding: RoundingSpec) -> float:
        """Steps of the job times the time of one, plus what is done once, plus three passes over the data."""
        assert layer.format is not None
        job, comm = self._job, SoloComm()
        problem = make_problem(
            job.spec.model_copy(update={"rounding": rounding}),
            job.walker,
            layer.site,
            layer.format,
            activations,
            1,
            job.context.device,
            self._store,
            MomentCache(),
        )
        candidates = [problem.grid.dequantize(problem.grid.quantize(problem.weight))]
        nearest = output_errors(problem, candidates, comm)

        def seconds(work: Callable[[], object]) -> float:
            started = time.monotonic()
            work()
            if job.context.device.type == "cuda":
                torch.cuda.synchronize(job.context.device)
            return time.monotonic() - started

        def solve(steps: int) -> object:
            return make_solver(rounding.with_steps(steps))(problem, nearest, comm, Monitor())

        total = 3 * seconds(lambda: output_errors(problem, candidates, comm)) * self.rank_share
        if rounding.needs_moments or layer.format.observer == "output_mse":
            total += seconds(lambda: layer_moments(problem, comm)) * self.rank_share
            problem = weighted_grid(problem, layer.format, comm)
        solver = solver_of(rounding, problem)
        num_steps = rounding.with_solver(solver).num_steps
        if not num_steps:
            return total + (seconds(partial(solve, 1)) if rounding.needs_moments else 0.0)
        # The difference of two runs: the first steps pay for what is set up once.
        trial = _TRIAL_STEPS[solver]
        few, more = (seconds(partial(solve, steps)) for steps in (trial, 3 * trial))
        per_step = max(0.0, more - few) / (2 * trial)
        once = max(0.0, few - trial * per_step) if rounding.needs_moments else 0.0
        return total + once + per_step * num_steps


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
