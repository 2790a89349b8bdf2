"""Moments that hold on other data: nearer to those of fresh rows than what was measured, and the same on any rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_solving import SOLO, rounded, solver_of

from distributed_adaround.formats import LayerFormat
from distributed_adaround.numerics import shrinkage
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.layer import round_layer
from distributed_adaround.solve.measure import measure
from distributed_adaround.solve.problem import LayerProblem, Monitor
from distributed_adaround.solve.regularize import Expected, expected
from distributed_adaround.solve.setup import with_moments
from distributed_adaround.spec.quantize import QuantizeSpec

INT4 = QuantizeSpec(dtype="int4").for_layer("layer", "Linear")
assert INT4 is not None


def text(samples: int, tokens: int, inputs: int, seed: int) -> list[Tensor]:
    """Samples `(1, tokens, inputs)` whose tokens depend on each other, and inputs likewise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 3, inputs, generator=torch.Generator().manual_seed(5))
    topic = torch.randn(samples, 1, inputs // 3, generator=generator)
    word = torch.randn(samples, tokens, inputs // 3, generator=generator)
    own = 0.3 * torch.randn(samples, tokens, inputs, generator=generator)
    return list(((topic + word) @ mixing + own).split(1))


def expected_of(problem: LayerProblem, comm: Comm = SOLO, centred: bool = False) -> Expected:
    return expected(measure(problem, comm), centred, problem.dtype, comm)


@pytest.mark.parametrize("samples", [3, 12, 40])
@pytest.mark.parametrize("spectral", [True, False])
def test_they_are_nearer_to_those_of_fresh_rows(
    samples: int, spectral: bool, make_problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not spectral:
        monkeypatch.setattr(shrinkage, "SPECTRAL_INPUTS", 8)
    problem = make_problem(nn.Linear(24, 8), text(samples, 6, 24, seed=1))
    fresh = torch.cat(text(4000, 6, 24, seed=2)).flatten(0, 1).double()
    truth = fresh.T @ fresh / len(fresh)
    measured, found = measure(problem, SOLO).whole.second[0], expected_of(problem).second[0]
    scale = truth.diagonal().rsqrt()
    away, before = (((one - truth) * scale * scale[:, None]).norm() for one in (found, measured))
    assert away < (1.0 if spectral else 1.05) * before
    assert float(torch.linalg.eigvalsh(found).min()) > 0


def test_tokens_of_one_text_are_worth_less_than_independent_rows(make_problem: Any) -> None:
    together = make_problem(nn.Linear(24, 8), text(16, 32, 24, seed=1))
    rows = torch.cat(text(16 * 32, 1, 24, seed=1))
    apart = make_problem(nn.Linear(24, 8), list(rows.split(32)))
    few, many = expected_of(together).effective_rows, expected_of(apart).effective_rows
    assert few < 0.6 * many
    assert many <= 512


def test_one_sample_of_one_row_tells_nothing_but_energies(make_problem: Any) -> None:
    found = expected_of(make_problem(nn.Linear(6, 3), [torch.randn(1, 6)]))
    assert found.held_out is None
    assert torch.count_nonzero(found.second) == 6


@pytest.mark.parametrize("batches", [[20], [3, 9], [2] * 9, [1, 1, 1]])
def test_each_sample_is_in_one_fold(batches: list[int], make_problem: Any) -> None:
    """However the samples are cut into microbatches, some are in fold 0 and none of these in the trial. Each sample
    excites an input of its own, so the energies tell where it is."""
    total = sum(batches)
    moments = measure(make_problem(nn.Linear(total, 3), list(torch.eye(total).split(batches))), SOLO)
    assert sum(moments.rows) == total
    out, others = moments.fold(0), moments.without(0)
    left_out, kept = (part.num_rows * part.second[0].diagonal() for part in (out, others))
    assert 0 < int(left_out.sum()) < total
    torch.testing.assert_close(left_out + kept, torch.ones(total).double())
    assert set(left_out.round(decimals=6).tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("spectral", [True, False])
def test_the_same_bits_on_any_number_of_ranks(
    spectral: bool, make_problem: Any, run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not spectral:
        monkeypatch.setattr(shrinkage, "SPECTRAL_INPUTS", 4)
    inputs = text(10, 5, 12, seed=3)
    floats = [x + 0.1 * torch.randn_like(x) for x in inputs]
    problem = make_problem(nn.Linear(12, 4), inputs, float_inputs=floats)
    alone = expected_of(problem, centred=True)

    def work(comm: Comm) -> Expected:
        mine = [batch for batch in problem.batches if batch.index % comm.world_size == comm.rank]
        return expected_of(replace(problem, batches=mine), comm, centred=True)

    for found in run_ranks(3, work):
        for name, value in vars(alone).items():
            if isinstance(value, Tensor):
                assert torch.equal(vars(found)[name], value), name
        assert found.effective_rows == alone.effective_rows


def test_a_cross_term_that_is_noise_is_let_go(make_problem: Any) -> None:
    inputs = text(16, 4, 24, seed=4)
    noise = [0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(k)) for k, x in enumerate(inputs)]
    layer = nn.Linear(24, 8)
    of_noise = make_problem(layer, inputs, float_inputs=[x + e for x, e in zip(inputs, noise, strict=True)])
    of_inputs = make_problem(layer, inputs, float_inputs=[1.1 * x for x in inputs])
    for problem, low, high in ((of_noise, 0.0, 0.5), (of_inputs, 0.7, 1.0)):
        raw, found = measure(problem, SOLO).whole.cross, expected_of(problem).cross
        assert raw is not None
        assert found is not None
        assert low * raw.norm() <= found.norm() <= high * raw.norm()


def solved(problem: LayerProblem, solver: str, layer_format: LayerFormat = INT4) -> Any:
    moments = measure(problem, SOLO)
    problem = with_moments(problem, moments, layer_format, SOLO)
    one = solver_of(solver)
    return round_layer(problem, one, SOLO, Monitor(), moments=moments, polishes=True, trial_solver=one)


@pytest.mark.parametrize("solver", ["gram", "gptq"])
@pytest.mark.parametrize("samples", [1, 4, 16, 64])
def test_with_few_samples_other_data_are_no_worse_off_than_under_nearest(
    solver: str, samples: int, make_problem: Any
) -> None:
    layer = nn.Linear(32, 64)
    problem = make_problem(layer, [torch.randn(samples, 32)])
    result = solved(problem, solver)
    fresh = make_problem(layer, [torch.randn(2000, 32)])
    weights = [result.grid.dequantize(result.codes), problem.grid.dequantize(problem.grid.quantize(problem.weight))]
    errors = output_errors(fresh, weights, SOLO, result.shift)
    assert errors.relative(0) < 1.03 * errors.relative(1)


def test_weights_that_nobody_can_judge_stay_near_nearest_rounding(make_problem: Any) -> None:
    x = torch.zeros(256, 32)
    x[:, :4] = torch.randn(256, 4)
    layer = nn.Linear(32, 64)
    problem = make_problem(layer, [x])
    result = solved(problem, "gram")
    weight, found = problem.weight[0, :, 4:], result.grid.dequantize(result.codes)[0, :, 4:]
    nearest = problem.grid.dequantize(problem.grid.quantize(problem.weight))[0, :, 4:]
    assert (found - weight).square().mean() < 1.1 * (nearest - weight).square().mean()


def test_held_out_error_is_what_other_data_show(make_problem: Any) -> None:
    """The trial's estimate against fresh samples, and the warning where calibration promises too much."""
    layer = nn.Linear(24, 96)
    problem = make_problem(layer, text(8, 3, 24, seed=1))
    result = solved(problem, "gram")
    fresh = make_problem(layer, text(2000, 3, 24, seed=7))
    real = output_errors(fresh, [result.grid.dequantize(result.codes)], SOLO, result.shift).relative(0)
    assert 0.5 * real < result.held_out_error < 2.5 * real
    assert result.held_out_error > result.hard_error
    assert "24 rows" in result.warning or "times as large" in result.warning


def test_solvers_without_moments_know_no_held_out_error(make_problem: Any) -> None:
    result = rounded(make_problem(nn.Linear(6, 3), [torch.randn(40, 6)]), solver_of("nearest"))
    assert result.held_out_error != result.held_out_error
    assert result.warning == ""
