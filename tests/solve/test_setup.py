"""The solvers of a job: what each needs, and how many steps it takes."""

import pytest

from distributed_adaround.solve.setup import make_solver
from distributed_adaround.spec.rounding import SOLVERS, RoundingSpec

# (num_steps by default, with 7 steps or sweeps, needs_moments)
SOLVER_FACTS = {"minibatch": (2000, 7, False), "gram": (100, 7, True), "gptq": (0, 0, True), "nearest": (0, 0, False)}


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_and_moments_of_a_solver(name: str) -> None:
    steps, trial_steps, needs_moments = SOLVER_FACTS[name]
    solver = make_solver(name, RoundingSpec(solver=name))
    assert (solver.num_steps, solver.needs_moments) == (steps, needs_moments)
    trial = RoundingSpec(solver=name, lr=0.5).with_steps(7)
    assert (make_solver(name, trial).num_steps, trial.lr, trial.solver) == (trial_steps, 0.5, name)
