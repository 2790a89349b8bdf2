"""`minibatch` with reproducible: the same bytes on any number of ranks, what samples teach, and a saved state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_adaround.errors import StoppedError
from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve import channel_learner
from distributed_adaround.solve.adaround import MinibatchSolver
from distributed_adaround.solve.problem import Monitor, Solution
from distributed_adaround.spec.rounding import RoundingSpec

WORLD_SIZES = (2, 5, 8)  # one of eight ranks has no microbatch, and six have no channels


def settings(num_steps: int = 60, **changes: Any) -> RoundingSpec:
    fields: dict[str, Any] = {"batch_size": 16, "lr": 0.05, "normalization": "nearest", "reproducible": True}
    return RoundingSpec(max_iter=num_steps, **(fields | changes))


class SavingMonitor(Monitor):
    """Keeps states in memory, and asks to stop or to save at one look."""

    def __init__(self, stop_at: int = 0, save_at: int = 0) -> None:
        super().__init__()
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.looks, self._stop_at, self._save_at = 0, stop_at, save_at

    def step(self, step: int, loss: float) -> None:
        self.looks += 1

    @property
    def stop_requested(self) -> bool:
        return self.looks + 1 == self._stop_at

    @property
    def save_due(self) -> bool:
        return self.looks + 1 == self._save_at

    def save(self, key: str, state: Mapping[str, Tensor]) -> None:
        self.kept[key] = {name: tensor.clone() for name, tensor in state.items()}

    def load(self, key: str) -> dict[str, Tensor] | None:
        return self.kept.get(key)


def problem_of(kind: str, make_problem: Any) -> Any:
    """Seven microbatches with outputs of fifty channels and more: two blocks of out channels at least."""
    if kind == "linear":
        inputs = [torch.randn(5, 12) for _ in range(7)]
        return make_problem(nn.Linear(12, 50), inputs)
    if kind == "masked":
        masks = [(torch.rand(3, 4) > 0.4).long() for _ in range(7)]
        return make_problem(nn.Linear(12, 50), [torch.randn(3, 4, 12) for _ in range(7)], masks=masks)
    groups = 4 if kind == "grouped" else 1
    problem = make_problem(nn.Conv2d(8, 64, 3, groups=groups), [torch.randn(2, 8, 6, 6) for _ in range(7)])
    if kind == "relu":
        transform = OutputTransform(torch.rand(64) + 0.5, torch.randn(64), "relu")
        return replace(problem, transform=transform)
    return problem


KINDS = ("linear", "masked", "conv", "grouped", "relu")


def solve(problem: Any, comm: Any, config: RoundingSpec, monitor: Monitor | None = None) -> Solution:
    return MinibatchSolver(config).solve(problem, comm, monitor or Monitor())


def same(a: Solution, b: Solution) -> bool:
    assert a.soft_weight is not None
    assert b.soft_weight is not None
    bits = [solution.soft_weight.view(torch.int32) for solution in (a, b)]  # type: ignore[union-attr]
    return torch.equal(a.codes, b.codes) and torch.equal(*bits) and a.unsettled == b.unsettled


@pytest.mark.parametrize("unit", ["rows", "samples"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_on_any_number_of_ranks(
    kind: str, unit: str, make_problem: Any, share: Any, run_ranks: Any
) -> None:
    problem = problem_of(kind, make_problem)
    config = settings(batch_unit=unit, batch_size=16 if unit == "rows" else 3)
    alone = solve(problem, SoloComm(), config)
    assert bool((alone.codes != problem.grid.quantize(problem.weight)).any()), "nothing was learned"
    for world_size in WORLD_SIZES:
        found = run_ranks(world_size, lambda comm: solve(share(problem, comm.rank, comm.world_size), comm, config))
        assert all(same(alone, solution) for solution in found)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_learning_by_samples_does(kind: str, make_problem: Any) -> None:
    problem = problem_of(kind, make_problem)
    problem = replace(problem, weight=problem.weight.double(), grid=problem.grid.to(torch.float64))
    if problem.bias is not None:
        problem = replace(problem, bias=problem.bias.double())
    ours, theirs = (solve(problem, SoloComm(), settings(reproducible=way)) for way in (True, False))
    assert torch.equal(ours.codes, theirs.codes)
    torch.testing.assert_close(ours.soft_weight, theirs.soft_weight, rtol=1e-7, atol=1e-9)
    assert ours.unsettled == theirs.unsettled


def test_how_many_steps_travel_together_changes_nothing(make_problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of("conv", make_problem)
    usual = solve(problem, SoloComm(), settings())
    for limit in (1, 100_000):
        monkeypatch.setattr(channel_learner, "_EXCHANGE", limit)
        assert same(usual, solve(problem, SoloComm(), settings()))


@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_a_layer_goes_on_where_it_stopped(
    before: int, after: int, reproducible: bool, make_problem: Any, share: Any, run_ranks: Any
) -> None:
    problem = problem_of("linear", make_problem)
    config = settings(350, reproducible=reproducible)

    def work(monitors: list[SavingMonitor]) -> Any:
        return lambda comm: solve(share(problem, comm.rank, comm.world_size), comm, config, monitors[comm.rank])

    def stopped(comm: Any) -> bool:
        try:
            work(first)(comm)
        except StoppedError:
            return True
        return False

    # The last rank only is asked to stop, at the second look; all of them do, and rank 0 has kept the state.
    first = [SavingMonitor(stop_at=2 if rank == before - 1 else 0) for rank in range(before)]
    assert run_ranks(before, stopped) == [True] * before
    assert [len(monitor.kept) for monitor in first] == [1] + [0] * (before - 1)
    assert int(first[0].kept["minibatch"]["step"]) == 200
    second = [SavingMonitor() for _ in range(after)]
    second[0].kept = first[0].kept
    found = run_ranks(after, work(second))
    assert [monitor.looks for monitor in second] == [2] * after, "it began anew"
    undisturbed = solve(problem, SoloComm(), config)
    if reproducible or before == after == 1:
        assert all(same(undisturbed, solution) for solution in found)
    else:
        assert torch.equal(found[0].codes, undisturbed.codes)


@pytest.mark.parametrize("reproducible", [True, False])
def test_states_are_saved_when_rank_0_says_so(
    reproducible: bool, make_problem: Any, share: Any, run_ranks: Any
) -> None:
    problem = problem_of("linear", make_problem)
    config = settings(350, reproducible=reproducible)
    monitors = [SavingMonitor(save_at=3), SavingMonitor(save_at=1)]
    run_ranks(2, lambda comm: solve(share(problem, comm.rank, 2), comm, config, monitors[comm.rank]))
    assert int(monitors[0].kept["minibatch"]["step"]) == 300
    assert not monitors[1].kept


def test_a_stop_behind_the_last_step_loses_nothing(make_problem: Any) -> None:
    problem = problem_of("linear", make_problem)
    monitor = SavingMonitor(stop_at=1)
    assert same(solve(problem, SoloComm(), settings(), monitor), solve(problem, SoloComm(), settings()))
    assert not monitor.kept
