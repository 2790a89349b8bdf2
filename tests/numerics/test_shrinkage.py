"""Shrinkage of second moments against definitions written out, and against what fresh rows show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distributed_adaround.numerics import shrinkage


def correlated(rows: int, inputs: int, seed: int = 0) -> Tensor:
    """Rows `(rows, inputs)`, float64, whose inputs depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 2, inputs, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    common = torch.randn(rows, inputs // 2, generator=generator, dtype=torch.float64) @ mixing
    return common + torch.randn(rows, inputs, generator=generator, dtype=torch.float64)


def second(rows: Tensor) -> Tensor:
    return (rows.T @ rows / len(rows))[None]


@pytest.mark.parametrize("seed", range(5))
def test_isotonic_is_the_nearest_ascending_sequence(seed: int) -> None:
    """Pool adjacent violators, written out."""
    values = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, found in zip(values, shrinkage.isotonic(values), strict=True):
        blocks: list[list[float]] = []
        for value in row.tolist():
            blocks.append([value])
            while len(blocks) > 1 and sum(blocks[-2]) / len(blocks[-2]) > sum(blocks[-1]) / len(blocks[-1]):
                blocks[-2:] = [blocks[-2] + blocks[-1]]
        expected = [sum(block) / len(block) for block in blocks for _ in block]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_correlations_have_a_diagonal_of_ones_and_silent_inputs_none() -> None:
    rows = correlated(50, 6)
    rows[:, 2] = 0
    whole = second(rows)
    scale = shrinkage.correlation_scale(whole)
    found = shrinkage.scaled(whole, scale)[0]
    expected = torch.corrcoef(torch.cat([rows, -rows]).T)  # around 0, as the moments are
    speaking = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found[speaking][:, speaking], expected[speaking][:, speaking])
    assert not found[2].any()
    assert not found[:, 2].any()


def test_what_is_left_out_is_given_back_and_silent_inputs_stand_alone() -> None:
    rows = correlated(50, 6)
    rows[:, 2] = 0
    whole = second(rows)
    scale = shrinkage.correlation_scale(whole)
    found = shrinkage.unscaled(shrinkage.scaled(whole, scale), whole.diagonal(dim1=1, dim2=2))[0]
    speaking = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found[speaking][:, speaking], whole[0][speaking][:, speaking])
    assert found[2, 2] == whole[0].diagonal()[speaking].median()
    assert torch.count_nonzero(found[2]) == 1
    nothing = shrinkage.unscaled(torch.zeros(1, 6, 6).double(), torch.zeros(1, 6).double())[0]
    assert torch.equal(nothing, torch.eye(6).double())


def test_a_spectrum_of_its_own_gives_a_correlation_back() -> None:
    whole = second(correlated(50, 8))
    correlation = shrinkage.scaled(whole, shrinkage.correlation_scale(whole))
    vectors, values = shrinkage.eigenvectors(correlation), torch.linalg.eigvalsh(correlation)
    torch.testing.assert_close(shrinkage.energy_along(vectors, correlation), values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shrinkage.from_spectrum(vectors, values), correlation, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("repeats", [1, 8])
def test_rows_that_repeat_count_once(repeats: int) -> None:
    """Of independent normal rows the effective number is their number; copies of them add nothing."""
    number, folds = 4000, 8
    parts = [torch.randn(number // folds, 12, dtype=torch.float64).repeat(repeats, 1) for _ in range(folds)]
    whole = second(torch.cat(parts))
    share, rows = shrinkage.share_of_noise(whole, ((second(part), 1 / folds) for part in parts))
    assert 0.75 * number < float(rows) < 1.35 * number
    assert float(share) > 0.7  # there is nothing but noise beside the diagonal


def test_share_of_noise_is_the_mean_squared_error_over_the_energy() -> None:
    """Against draws of the whole: Ledoit and Wolf's ratio needs the truth, which is known here."""
    inputs, rows, folds = 10, 160, 4
    truth = second(correlated(400_000, inputs, seed=1))
    scale = shrinkage.correlation_scale(truth)
    truth = shrinkage.scaled(truth, scale)
    off = 1 - torch.eye(inputs).double()
    found, expected = [], []
    for seed in range(40):
        drawn = correlated(rows, inputs, seed=seed + 10)
        parts = [shrinkage.scaled(second(part), scale) for part in drawn.chunk(folds)]
        whole = shrinkage.scaled(second(drawn), scale)
        found.append(float(shrinkage.share_of_noise(whole, ((part, 1 / folds) for part in parts))[0]))
        expected.append(float(((whole - truth) * off).square().sum() / (whole * off).square().sum()))
    assert sum(found) / sum(expected) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("first", "later"), [(0.0, 0.3), (0.3, 1.0)])
def test_toward_the_diagonal(first: float, later: float) -> None:
    correlation = second(correlated(30, 5))
    less, more = (shrinkage.toward_diagonal(correlation, torch.tensor([s]).double())[0] for s in (first, later))
    off = 1 - torch.eye(5).double()
    torch.testing.assert_close(less.diagonal(), correlation[0].diagonal())
    torch.testing.assert_close(less * off, (1 - first) * correlation[0] * off)
    assert (more * off).norm() < (less * off).norm()


@pytest.mark.parametrize("silent", [False, True])
def test_energies_that_differ_by_chance_become_alike_and_others_stay(silent: bool) -> None:
    alike = torch.randn(24, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sizes = torch.logspace(-3, 3, 300, dtype=torch.float64)
    for rows, low, high in ((alike, 0.0, 0.35), (alike * sizes, 0.95, 1.0)):
        if silent:
            rows[:, 7] = 0
        parts = [part.square().mean(dim=0)[None] for part in rows.chunk(4)]
        measured = rows.square().mean(dim=0)[None]
        found = shrinkage.expected_energies(measured, ((part, 0.25) for part in parts))
        speaks = measured > 0
        assert torch.equal(found > 0, speaks)
        assert low <= float(found[speaks].log().std() / measured[speaks].log().std()) <= high
        torch.testing.assert_close(found[speaks].log().mean(), measured[speaks].log().mean())
