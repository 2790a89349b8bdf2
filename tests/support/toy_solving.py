"""Layers solved as a job does it, in one call: moments where the solver needs them, then the solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from distributed_adaround.numerics.moments import Moments, Quadratic, quadratic_of
from distributed_adaround.runtime.comm import Comm, SoloComm
from distributed_adaround.runtime.imports import implementation
from distributed_adaround.solve.layer import LayerResult, round_layer
from distributed_adaround.solve.measure import measure
from distributed_adaround.solve.problem import LayerProblem, Monitor, Solution, Solver
from distributed_adaround.spec.rounding import SOLVERS, RoundingSpec

NO_PROGRESS = Monitor()
SOLO: Comm = SoloComm()


class Fixed:
    """A solver that has the same answer to everything."""

    needs_moments, num_steps = False, 0

    def __init__(self, solution: Solution) -> None:
        self._solution = solution

    def solve(self, problem: LayerProblem, comm: Comm, monitor: Monitor) -> Solution:
        return self._solution


def solver_of(name: str, **settings: Any) -> Solver:
    """A solver of the program by its name. settings: fields of RoundingSpec."""
    solver: type[Solver] = implementation(SOLVERS, name)
    return solver(RoundingSpec(solver=name, **settings))


def raw_quadratic(moments: Moments, weight: Tensor, asymmetry: float, centred: bool) -> Quadratic:
    """The quadratic of the moments as they were measured, on calibration data. weight: `(G, R, J)`."""
    if centred:
        moments = moments.centred(moments.mean, moments.cross_mean, weight.dtype)
    return quadratic_of(weight, moments.second, moments.cross, asymmetry)


def with_quadratic(problem: LayerProblem, comm: Comm = SOLO) -> LayerProblem:
    """The problem with the quadratic of its moments. A collective."""
    whole = measure(problem, comm).whole
    return replace(problem, quadratic=raw_quadratic(whole, problem.weight, problem.asymmetry, problem.correct_bias))


def solve(solver: Solver, problem: LayerProblem, comm: Comm = SOLO, monitor: Monitor = NO_PROGRESS) -> Solution:
    """The solver's own result."""
    return solver.solve(with_quadratic(problem, comm) if solver.needs_moments else problem, comm, monitor)


def rounded(
    problem: LayerProblem,
    solver: Solver,
    comm: Comm = SOLO,
    monitor: Monitor = NO_PROGRESS,
    *,
    polishes: bool = False,
) -> LayerResult:
    """The layer's result."""
    if not (solver.needs_moments or polishes):
        return round_layer(problem, solver, comm, monitor)
    moments = measure(problem, comm)
    if problem.transform.is_affine:
        quadratic = raw_quadratic(moments.whole, problem.weight, problem.asymmetry, problem.correct_bias)
        problem = replace(problem, quadratic=quadratic)
    return round_layer(problem, solver, comm, monitor, moments=moments, polishes=polishes)


def with_outputs(problem: LayerProblem, outputs: Sequence[Tensor]) -> LayerProblem:
    """The same problem with other outputs of the float layer."""
    batches = [replace(batch, y=y) for batch, y in zip(problem.batches, outputs, strict=True)]
    return replace(problem, batches=batches)
