"""The plan of a job: numbers worked out by hand, nothing solved, nothing written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sample_jobs import write_job
from torch import Tensor

from distributed_adaround import plan
from distributed_adaround.files.job_file import load_spec
from distributed_adaround.job import PreparedJob, prepare
from distributed_adaround.plan import JobPlan, plan_job
from distributed_adaround.solve.setup import make_solver
from distributed_adaround.spec.rounding import RoundingSpec


def plan_of(path: Path, world_size: int = 1) -> JobPlan:
    return plan_job(load_spec(str(path)), path.parent, world_size)


def test_layers_in_order_with_their_numbers(tmp_path: Path) -> None:
    found = plan_of(write_job(tmp_path / "job", quantize={"ignore": ["up"]}))
    per_sample = {"conv": 36, "depthwise": 9, "up": 36, "head": 1}
    assert {layer.name: layer.rows for layer in found.layers} == {n: 11 * rows for n, rows in per_sample.items()}
    assert [(layer.kind, layer.shape) for layer in found.layers] == [
        ("Conv2d", (6, 2, 3, 3)),
        ("Conv2d", (6, 1, 3, 3)),
        ("ConvTranspose2d", (6, 4, 2, 2)),
        ("Linear", (5, 4)),
    ]
    assert [layer.format for layer in found.layers] == [
        "int3 per_channel_symmetric", "int3 per_channel_symmetric", None, "int3 per_channel_symmetric"
    ]  # fmt: skip
    # x̂ and y of 11 samples, float32.
    inputs_and_targets = {"conv": (2 + 6) * 36, "depthwise": 6 * 36 + 6 * 9, "head": 4 + 5}
    for layer in found.layers:
        assert layer.cache_bytes == 4 * 11 * inputs_and_targets.get(layer.name, 0)
        assert (layer.seconds > 0) == (layer.format is not None)
    assert found.activation_bytes > max(layer.cache_bytes for layer in found.layers)
    assert found.seconds > sum(layer.seconds for layer in found.layers)
    reasons = {parameter.name: parameter.reason for parameter in found.float_parameters}
    assert reasons["up.weight"] == "ignored by quantize.ignore"
    assert reasons["head.bias"] == "bias"
    assert set(reasons) == {
        "norm.weight", "norm.bias", "depthwise.bias", "up.bias", "up.weight", "head.bias"
    }  # fmt: skip
    assert found.notes == ()
    assert not (tmp_path / "job" / "out").exists()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_samples_of_all_ranks_are_all_samples(world_size: int, tmp_path: Path) -> None:
    found = plan_of(write_job(tmp_path / "job", "mlp"), world_size)
    assert len(found.samples_per_rank) == world_size
    assert sum(found.samples_per_rank) == 11
    # Four virtual shards: the fifth rank has none.
    assert found.samples_per_rank[4:] == (0,) * (world_size - 4)
    largest = max(found.samples_per_rank)
    assert found.layers[0].cache_bytes == 4 * largest * (8 + 8)
    assert found.layers[0].rows == 11


@pytest.mark.parametrize("network", ["cnn", "attention", "mlp"])
def test_weights_stay_as_they_are(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[dict[str, Tensor]] = []

    @contextmanager
    def watched(*args: Any) -> Iterator[PreparedJob]:
        with prepare(*args) as job:
            states.append({name: tensor.clone() for name, tensor in job.opened.weights.items()})
            yield job
            states.append(job.opened.weights)

    monkeypatch.setattr(plan, "prepare", watched)
    found = plan_of(write_job(tmp_path / "job", network))
    assert len(found.layers) >= 2
    before, after = states
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def slow_solvers(now: list[float], work: Callable[[RoundingSpec, Any], float]) -> Callable[[str, RoundingSpec], Any]:
    """Solvers of a job that only move a clock. work: seconds, from the settings and the problem."""

    def make(name: str, rounding: RoundingSpec) -> Any:
        solver = make_solver(name, rounding)

        def solve(problem: Any, *_: Any) -> None:
            now[0] += work(rounding, problem)

        return SimpleNamespace(needs_moments=solver.needs_moments, num_steps=solver.num_steps, solve=solve)

    return make


@pytest.mark.parametrize(("solver", "learning"), [("minibatch", 250), ("nearest", 0)])
def test_seconds_are_those_of_the_steps_and_the_comparisons(
    solver: str, learning: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only work moves: 2 s a comparison, 5 s to set up a solver, a quarter of a second a step."""
    now = [0.0]
    compare = plan.output_errors

    def compare_slowly(*args: Any) -> Any:
        now[0] += 2
        return compare(*args)

    def work(rounding: RoundingSpec, _: Any) -> float:
        return 5 + rounding.max_iter / 4

    monkeypatch.setattr(plan, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(plan, "output_errors", compare_slowly)
    monkeypatch.setattr(plan, "make_solver", slow_solvers(now, work))
    rounding = {"solver": solver, "max_iter": 1000, "polish": False}
    found = plan_of(write_job(tmp_path / "job", "mlp", rounding=rounding), world_size=2)
    share = max(found.samples_per_rank) / 2
    for layer in found.layers:
        assert math.isclose(layer.seconds, 3 * 2 * share + learning)
    # Reaching and committing layers takes no time by this clock.
    assert math.isclose(found.seconds, sum(layer.seconds for layer in found.layers))
    # Of gram 5 s are set up once, and each of its 100 sweeps takes the quarter of a second too.
    assert math.isclose(found.gram_seconds, sum(3 * 2 * share + 5 + 100 / 4 for _ in found.layers))


@pytest.mark.parametrize(
    ("network", "rounding"),
    [
        ("attention", {"solver": "gram"}),
        ("cnn", {"solver": "gptq"}),
        ("cnn", {"solver": "gram", "activation_in_loss": True}),
        pytest.param("attention", {"solver": "nearest", "polish": True}, marks=pytest.mark.slow),
        ("cnn", {"solver": "minibatch", "polish": True, "correct_bias": True}),
    ],
    ids=str,
)
def test_solvers_on_moments_are_planned(network: str, rounding: dict[str, Any], tmp_path: Path) -> None:
    quantize = {"dtype": "int3", "observer": "output_mse"}
    path = write_job(tmp_path / "job", network, rounding={"sweeps": 5} | rounding, quantize=quantize)
    found = plan_of(path, world_size=2)
    assert all(0 < layer.seconds < math.inf for layer in found.layers)
    assert sum(layer.seconds for layer in found.layers) < found.seconds < math.inf
    assert not (tmp_path / "job" / "out").exists()


def test_steps_are_those_of_the_solver_that_each_layer_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only a solver moves: a second a sweep of gram, a quarter of a second a step of minibatch."""
    now = [0.0]

    def work(rounding: RoundingSpec, problem: Any) -> float:
        return rounding.sweeps if problem.transform.is_affine else rounding.max_iter / 4

    monkeypatch.setattr(plan, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(plan, "make_solver", slow_solvers(now, work))
    rounding = {"solver": "gram", "activation_in_loss": True, "sweeps": 50, "max_iter": 1000}
    found = plan_of(write_job(tmp_path / "job", "cnn", rounding=rounding))
    assert [layer.seconds for layer in found.layers] == pytest.approx([250, 250, 250, 50])


def test_a_model_that_is_replayed_says_so(tmp_path: Path) -> None:
    path = write_job(tmp_path / "job", "mlp", model={"factory": "branching:build"})
    (tmp_path / "job" / "branching.py").write_text(
        "from torch import nn\n"
        "class Branching(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(8, 3)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x) if x.sum() > 0 else self.layer(-x)\n"
        "def build():\n"
        "    import torch\n"
        "    torch.manual_seed(0)\n"
        "    return Branching().eval()\n"
    )
    found = plan_of(path)
    (note,) = found.notes
    assert note.startswith("could not be exported: GuardOnDataDependentSymNode")
    assert [layer.name for layer in found.layers] == ["layer"]
