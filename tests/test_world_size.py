"""World size changes the speed, never the result: the same jobs on 1 and 3 ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from sample_jobs import job, write_job

from distributed_adaround.checkpoint.commits import Commits
from distributed_adaround.job import PreparedJob, prepare
from distributed_adaround.numerics.soft_rounding import RoundingSchedule
from distributed_adaround.report.job_log import JobLog
from distributed_adaround.rounding import NetworkRounder
from distributed_adaround.solve.record import LayerRecord
from distributed_adaround.solve.rows import BatchPlan
from distributed_adaround.spec.job import JobSpec

WORLD_SIZES = (1, 3)
STEPS = 20
ROUNDING = {"max_iter": STEPS, "batch_size": 16, "lr": 0.05}
# Microbatches of 2 give 6 of them in 4 shards: uneven. Of 8: 2 of them, and the third rank has none.
JOBS = {"cnn": {"microbatch_size": 2}, "attention": {"microbatch_size": 8}}

VARIANTS: dict[str, dict[str, Any]] = {
    "float64": {"compute_dtype": "float64"},
    "float32": {},
    "reproducible": {"reproducible": True},
}
Result = dict[str, Any]
Runs = dict[str, dict[int, list[Result]]]


class Recorded(Commits):
    """Keeps the records for the test."""

    def __init__(self) -> None:
        self.records: list[LayerRecord] = []

    def commit(self, record: LayerRecord) -> None:
        self.records.append(record)


def round_network(content: dict[str, Any], folder: str) -> dict[str, Result]:
    """Round a job's network on this rank in all variants, after one capture."""
    spec = JobSpec(**content)
    with prepare(spec, Path(folder)) as ready:
        weights = {name: tensor.clone() for name, tensor in ready.opened.weights.items()}
        results = {}
        for variant, changes in VARIANTS.items():
            for name, tensor in ready.opened.weights.items():
                tensor.copy_(weights[name])
            rounding = spec.rounding.model_copy(update=changes)
            results[variant] = _round(ready, spec.model_copy(update={"rounding": rounding}))
        return results


def _round(ready: PreparedJob, spec: JobSpec) -> Result:
    """What this rank itself found, saw and used."""
    betas: list[tuple[int, float, float]] = []
    batches: list[tuple[int, int]] = []
    commits = Recorded()
    beta, batch = RoundingSchedule.beta, BatchPlan.batch

    def seen_beta(schedule: RoundingSchedule, step: int) -> float:
        betas.append((step, beta(schedule, step), schedule.weight(step)))
        return betas[-1][1]

    def seen_batch(plan: BatchPlan, step: int) -> tuple[torch.Tensor, int]:
        rows, total = batch(plan, step)
        batches.append((rows.numel(), total))
        return rows, total

    RoundingSchedule.beta, BatchPlan.batch = seen_beta, seen_batch  # type: ignore[method-assign]
    try:
        rounder = NetworkRounder(spec, ready.comm, JobLog(), commits)
        result = rounder.run(ready.captured, ready.microbatches)
    finally:
        RoundingSchedule.beta, BatchPlan.batch = beta, batch  # type: ignore[method-assign]
    return {
        "owned": list(ready.microbatches.owned),
        "codes": {record.name: record.codes for record in commits.records},
        "weights": {name: tensor.clone() for name, tensor in ready.opened.weights.items()},
        "reports": [(r.name, r.nearest_error, r.soft_error, r.hard_error, r.kept_nearest) for r in result.table],
        "output_error": result.output_error,
        "betas": betas,
        "batches": batches,
    }


@pytest.fixture(scope="module", params=JOBS)
def runs(request: pytest.FixtureRequest, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Results of all ranks, by variant and world size."""
    folder = tmp_path_factory.mktemp(request.param)
    write_job(folder, request.param)
    content = job(folder, request.param, data=JOBS[request.param], rounding=ROUNDING)
    results = {size: pool.run(round_network, size, content, str(folder)) for size in WORLD_SIZES}
    return {
        variant: {size: [rank[variant] for rank in ranks] for size, ranks in results.items()} for variant in VARIANTS
    }


@pytest.fixture
def exact(runs: Runs) -> dict[int, list[Result]]:
    return runs["float64"]


@pytest.fixture
def single(runs: Runs) -> dict[int, list[Result]]:
    return runs["float32"]


def test_the_jobs_are_what_they_are_meant_to_be(exact: dict[int, list[Result]]) -> None:
    """Uneven shards, ranks without any sample, layers of each kind, and something learned."""
    num_microbatches = len(exact[1][0]["owned"])
    for size, results in exact.items():
        owned = [result["owned"] for result in results]
        assert sorted(index for mine in owned for index in mine) == list(range(num_microbatches))
        assert sum(not mine for mine in owned) == max(0, size - min(4, num_microbatches))
    assert [len(result["owned"]) for result in exact[3]] == ([3, 2, 1] if num_microbatches == 6 else [1, 1, 0])
    assert all(nearest > hard for _, nearest, _, hard, kept in exact[1][0]["reports"] if not kept)
    assert not all(kept for *_, kept in exact[1][0]["reports"])


def test_codes_are_equal_in_float64_on_any_number_of_ranks(exact: dict[int, list[Result]]) -> None:
    alone = exact[1][0]
    assert len(alone["codes"]) == 4
    for results in exact.values():
        for result in results:
            assert result["codes"].keys() == alone["codes"].keys()
            for name, codes in result["codes"].items():
                assert torch.equal(codes, alone["codes"][name]), name
            for name, tensor in result["weights"].items():
                assert torch.equal(tensor, alone["weights"][name]), name


def test_errors_are_equal_in_float64_on_any_number_of_ranks(exact: dict[int, list[Result]]) -> None:
    alone = exact[1][0]
    for results in exact.values():
        for result in results:
            for ours, theirs in zip(result["reports"], alone["reports"], strict=True):
                # Nearest and hard errors have the same bits; the soft weights come out of sums in another order.
                assert (ours[0], ours[1], ours[3:]) == (theirs[0], theirs[1], theirs[3:])
                assert ours[2] == pytest.approx(theirs[2], rel=1e-9)
            assert result["output_error"] == alone["output_error"]


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_steps_are_the_same_whatever_the_world_size(exact: dict[int, list[Result]], size: int) -> None:
    """As many steps as asked for, the whole anneal from 20 to 2, the warm-up of 20 %, and one global batch."""
    for result in exact[size]:
        layers = [result["betas"][start : start + STEPS] for start in range(0, len(result["betas"]), STEPS)]
        assert len(layers) == len(result["codes"])
        assert all(layer == layers[0] for layer in layers)
        steps, betas, weights = zip(*layers[0], strict=True)
        assert list(steps) == list(range(STEPS))
        assert betas[0] == 20
        assert betas[-1] == 2
        assert [weight > 0 for weight in weights] == [False] * 4 + [True] * 16
        assert result["betas"] == exact[1][0]["betas"]
    for parts in zip(*(result["batches"] for result in exact[size]), strict=True):
        assert len({total for _, total in parts}) == 1
        assert sum(local for local, _ in parts) == parts[0][1]
    assert [total for _, total in exact[size][0]["batches"]] == [total for _, total in exact[1][0]["batches"]]


def test_float32_agrees_within_a_run_and_closely_between_runs(
    single: dict[int, list[Result]],
) -> None:
    alone = single[1][0]
    for results in single.values():
        for result in results:
            for name, codes in result["codes"].items():
                assert torch.equal(codes, results[0]["codes"][name]), name
            assert result["reports"] == results[0]["reports"]
            for ours, theirs in zip(result["reports"], alone["reports"], strict=True):
                assert ours[1:4] == pytest.approx(theirs[1:4], rel=1e-4), ours[0]
            assert result["output_error"] == pytest.approx(alone["output_error"], rel=1e-4)


def test_reproducible_gives_the_same_bits_in_float32_on_any_number_of_ranks(runs: Runs) -> None:
    alone = runs["reproducible"][1][0]
    assert alone["weights"].keys()
    for results in runs["reproducible"].values():
        for result in results:
            for name, codes in result["codes"].items():
                assert torch.equal(codes, alone["codes"][name]), name
            for name, tensor in result["weights"].items():
                assert torch.equal(tensor, alone["weights"][name]), name
            assert result["reports"] == alone["reports"]
            assert result["output_error"] == alone["output_error"]
