"""One layer at a time behind a float prefix: every solver gets the same samples and the same grid.

Error: squared output error over squared output on held-out samples, before batch norm and activation. The bias is in
both outputs and cancels.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.open import activation_store
from distributed_adaround.capture.sites import Batch, Site, Walker
from distributed_adaround.capture.walkers import make_walker
from distributed_adaround.data.microbatches import Microbatches
from distributed_adaround.errors import SpecError
from distributed_adaround.formats import LayerFormat
from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.runtime.comm import Comm, SoloComm
from distributed_adaround.runtime.context import RankContext
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.layer import LayerResult, round_layer
from distributed_adaround.solve.measure import measure
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solution, Solver
from distributed_adaround.solve.setup import make_problem, make_solver, make_trial_solver, with_moments
from distributed_adaround.spec.job import MethodSpec
from tests.benchmarks import records
from tests.benchmarks.cases import batches, load_case
from tests.benchmarks.configurations import Case, is_random, method_spec, quantize_fields
from tests.benchmarks.measure import Stopwatch

COMM: Comm = SoloComm()


@dataclass(frozen=True)
class LayerOptions:
    """What the command line says. every: take each n-th layer only. samples: (calibration, held out) or the case's."""

    folder: Path
    out: Path
    formats: Sequence[str]
    solvers: Sequence[str]
    seeds: Sequence[int]
    settings: Sequence[str] = ()
    samples: tuple[int, int] | None = None
    vary_samples: bool = False
    every: int = 1
    device: str = "cpu"
    again: bool = False


@dataclass(frozen=True)
class Run:
    """One configuration of one case; its figures of a layer are one line of the results."""

    spec: MethodSpec
    head: dict[str, Any] = field(default_factory=dict)


@dataclass
class TimedSolver:
    """A solver that remembers how long it took; `round_layer` adds evaluations to it. moments_seconds: what its moments
    took, which count as its own."""

    solver: Solver
    device: torch.device
    moments_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def needs_moments(self) -> bool:
        return self.solver.needs_moments

    @property
    def num_steps(self) -> int:
        return self.solver.num_steps

    def solve(self, problem: LayerProblem, comm: Comm, monitor: Monitor) -> Solution:
        watch = Stopwatch(self.device)
        solution = self.solver.solve(problem, comm, monitor)
        self.seconds = watch.seconds + self.moments_seconds
        return solution


def timed_solver(spec: MethodSpec, device: torch.device) -> TimedSolver:
    """The solver of a spec. No activation is in the loss here, so it is the one that the spec names."""
    return TimedSolver(make_solver(spec.rounding.solver, spec.rounding), device)


def round_as_job(
    spec: MethodSpec, problem: LayerProblem, layer_format: LayerFormat, solver: TimedSolver, monitor: Monitor
) -> LayerResult:
    """One layer as a job does it: moments where anything needs them, then the solver and what follows it."""
    polishes, moments = spec.rounding.polishes, None
    if solver.needs_moments or polishes or layer_format.observer == "output_mse":
        watch = Stopwatch(solver.device)
        moments = measure(problem, COMM)
        problem = with_moments(problem, moments, layer_format, COMM)
        solver.moments_seconds = watch.seconds if solver.needs_moments else 0.0
    trial_solver = make_trial_solver(spec.rounding.solver, spec.rounding)
    return round_layer(problem, solver, COMM, monitor, moments=moments, polishes=polishes, trial_solver=trial_solver)


def warm_up(spec: MethodSpec, problem: LayerProblem, layer_format: LayerFormat) -> None:
    """A few steps whose result is dropped: first calls load code and build kernels."""
    spec = spec.model_copy(update={"rounding": spec.rounding.with_steps(2)})
    round_as_job(spec, problem, layer_format, timed_solver(spec, problem.device), Monitor())


def run_case(case: Case, options: LayerOptions) -> None:
    """Solve the layers of a case with every configuration that has no line yet. One walk serves them all, and one
    per seed where each seed has samples of its own."""
    draws = options.seeds if options.vary_samples else options.seeds[:1]
    for draw in draws:
        seeds = (draw,) if options.vary_samples else options.seeds
        _run_draw(case, options, 0 if not options.vary_samples else draw, seeds)


def _run_draw(case: Case, options: LayerOptions, draw: int, seeds: Sequence[int]) -> None:
    module = load_case(case, options.folder)
    # Before the data: the first load of a case may convert what its tokenizer needs.
    model = module.load_model()
    device = torch.device(options.device)
    calibration, held_out = batches(module, case, options.samples or (case.num_calibration, case.num_held_out), draw)
    data = Microbatches.of_list([*calibration, *held_out], COMM, sharded=False)
    store = activation_store(MethodSpec().runtime, RankContext.from_environment(str(device)))
    walker = make_walker(model, data, store, COMM)
    for note in walker.notes:
        print(f"{case.name}: {note}")
    sites = [unit.site for unit in walker.units]
    runs = list(_runs(case, options, seeds, sites))
    done = set() if options.again else records.finished(records.read(options.out))
    chosen = {run.head["format"]: _sites(sites, run, options.every) for run in runs}
    pending: dict[str, list[Run]] = {site.name: [] for site in sites}
    for run in runs:
        for name in chosen[run.head["format"]]:
            if records.key({**run.head, "layer": name}) not in done:
                pending[name].append(run)
    last = max((index for index, site in enumerate(sites) if pending[site.name]), default=None)
    if last is None:
        return
    warm: set[str] = set()
    walker.start(data)
    for unit in walker.units[: last + 1]:
        site = unit.site
        if pending[site.name]:
            parts = split(walker.reach(unit), len(calibration))
            for run in pending[site.name]:
                line = _solve(run, walker, site, parts, store, warm)
                records.append(options.out, line)
                _print_line(line)
        walker.commit(unit, {})


def _runs(case: Case, options: LayerOptions, seeds: Sequence[int], sites: Sequence[Site]) -> Iterator[Run]:
    """All configurations; those that the spec refuses become a line that says so."""
    inputs = {site.name: site.geometry.inputs_per_output for site in sites}
    samples = options.samples or (case.num_calibration, case.num_held_out)
    for format_name in options.formats:
        for solver in options.solvers:
            for seed in seeds if is_random(solver) else seeds[:1]:
                head: dict[str, Any] = {
                    "part": "layers", "case": case.name, "format": format_name, "solver": solver, "seed": seed,
                    "samples": list(samples), "settings": list(options.settings),
                    "vary_samples": options.vary_samples, "device": options.device,
                }  # fmt: skip
                # No activation inside: the moments of the layer are all there is to know. Both streams are the same,
                # so the asymmetry changes nothing; 1 is what costs nothing.
                settings = ["rounding.activation_in_loss=false", "rounding.asymmetry=1", *options.settings]
                try:
                    fields = quantize_fields(format_name, inputs, case.ignore)
                    spec = method_spec(solver, fields, seed=seed, device=head["device"], settings=settings)
                    make_solver(spec.rounding.solver, spec.rounding)
                except SpecError as error:
                    records.append(options.out, {**head, "layer": None, "refused": str(error)})
                    print(f"{case.name} {format_name} {solver}: refused: {error}")
                    continue
                yield Run(spec, head)


def _sites(sites: Sequence[Site], run: Run, every: int) -> list[str]:
    """Layers that a format is measured on. Those that groups do not divide are not: they would be measured twice."""
    wants_groups = run.spec.quantize.group_size is not None
    formats = {site.name: run.spec.quantize.for_layer(site.name, site.module_class) for site in sites}
    fitting = [name for name, found in formats.items() if found and (found.group_size is not None) >= wants_groups]
    return fitting[::every]


def split(given: Sequence[Batch], count: int) -> tuple[list[Batch], list[Batch]]:
    """The first `count` microbatches and the others, each numbered from 0."""
    assert [batch.index for batch in given] == list(range(len(given))), "one rank holds all microbatches"
    return list(given[:count]), [replace(batch, index=batch.index - count) for batch in given[count:]]


def _solve(
    run: Run,
    walker: Walker,
    site: Site,
    parts: tuple[list[Batch], list[Batch]],
    store: ActivationStore,
    warm: set[str],
) -> records.Record:
    """One line of the results. warm: solvers that have run in this process."""
    line = {**run.head, "layer": site.name, "shape_of_weight": list(site.geometry.weight_shape)}
    layer_format = run.spec.quantize.for_layer(site.name, site.module_class)
    assert layer_format is not None, "ignored layers are not chosen"
    calibration, held_out = parts
    try:
        problem = make_problem(run.spec, walker, site, layer_format, calibration, len(calibration), store)
        if (base := run.head["solver"].partition("@")[0]) not in warm:
            warm_up(run.spec, problem, layer_format)
            warm.add(base)
        solver = timed_solver(run.spec, store.device)
        watch = Stopwatch(store.device)
        result = round_as_job(run.spec, problem, layer_format, solver, Monitor())
        seconds = watch.seconds
        weight = result.grid.dequantize(result.codes)
    except Exception as error:
        # One configuration that fails must not end the others; the table shows it.
        traceback.print_exc()
        return {**line, "failed": f"{type(error).__name__}: {error}"}
    fresh = replace(problem, batches=held_out, total_microbatches=len(held_out), transform=OutputTransform())
    return {
        **line,
        "error": output_errors(fresh, [weight], COMM, result.shift).relative(0),
        "calibration_error": result.hard_error,
        "nearest_calibration_error": result.nearest_error,
        "seconds": seconds,
        "solver_seconds": solver.seconds,
        "unsettled": result.unsettled,
        "kept_nearest": result.kept_nearest,
        "load": os.getloadavg()[0],
    }


def _print_line(line: records.Record) -> None:
    what = f"{line['case']} {line['format']} {line['solver']} seed {line['seed']} {line['layer']}"
    figures = line.get("failed") or f"held-out error {line['error']:.3e}, {line['seconds']:.2f} s"
    print(f"{what}: {figures}", flush=True)
