"""From the moments of a layer's calibration rows to those that hold on other data. The numbers are in
numerics/shrinkage.py; here they are taken, each decomposition by one of the ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_adaround.numerics import shrinkage
from distributed_adaround.numerics.moments import Moments
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.measure import FoldedMoments

# Where less of A than this is noise, its eigenvalues are what they seem.
_LITTLE_NOISE = 0.003
# Of a correlation: what no row of the samples shows, a row to come may.
_LEAST_EIGENVALUE = 1e-6


@dataclass(frozen=True)
class Expected:
    """What rows that were not seen are expected to show, float64.

    second: A `(G, J, J)`. cross: C likewise, or None. The two of a trial are without the samples of fold 0, and None
    where there is but one fold; held_out: what fold 0 shows. effective_rows: how many independent rows the samples are
    worth, the least of all groups; at most num_rows, as many as there are.
    """

    second: Tensor
    cross: Tensor | None
    trial_second: Tensor | None
    trial_cross: Tensor | None
    held_out: Moments | None
    effective_rows: float
    num_rows: int

    @property
    def held_out_share(self) -> float:
        """Of the rows."""
        return 0.0 if self.held_out is None else self.held_out.num_rows / self.num_rows


def expected(moments: FoldedMoments, centred: bool, dtype: torch.dtype, comm: Comm) -> Expected:
    """A collective, unless it was asked for before. centred: around the means, which a corrected bias leaves. dtype: of
    the products in the sums."""
    found = moments.derived.get(centred)
    if not isinstance(found, Expected):
        found = moments.derived[centred] = _expected(moments, centred, dtype, comm)
    return found


def _expected(moments: FoldedMoments, centred: bool, dtype: torch.dtype, comm: Comm) -> Expected:
    whole = moments.whole

    def around(part: Moments, of: Moments = whole) -> Moments:
        """Around the means of some rows: of those that are looked at no mean may tell."""
        return part.centred(of.mean, of.cross_mean, dtype) if centred else part

    number, every = len(moments.rows), around(whole)
    scale = shrinkage.correlation_scale(every.second)
    if number < 2:
        # Nothing tells how far the samples can be trusted: all inputs that speak count the same, each for itself.
        same = (_diagonal(every) > 0).to(scale.dtype)
        return Expected(shrinkage.unscaled(torch.diag_embed(same), same), None, None, None, None, 1.0, whole.num_rows)

    # Of each fold; its matrices are large, and made again where they are needed.
    diagonals = [_diagonal(around(moments.fold(k))).clone() for k in range(number)]

    def energies(of: Moments, folds: Sequence[int]) -> Tensor:
        parts = ((diagonals[k], moments.rows[k] / of.num_rows) for k in folds)
        return shrinkage.expected_energies(_diagonal(of), parts) if len(folds) > 1 else _diagonal(of)

    folds = ((around(moments.fold(k)), moments.rows[k] / whole.num_rows) for k in range(number))
    correlation = shrinkage.scaled(every.second, scale)
    noise, rows = shrinkage.share_of_noise(correlation, ((shrinkage.scaled(f.second, scale), w) for f, w in folds))
    known = moments.without(0)
    held_out, others = around(moments.fold(0), known), around(known, known)
    trial = shrinkage.scaled(others.second, shrinkage.correlation_scale(others.second))
    if correlation.shape[1] > shrinkage.SPECTRAL_INPUTS or float(noise.max()) < _LITTLE_NOISE:
        more = (noise * whole.num_rows / others.num_rows).clamp(max=1.0)
        correlation, trial = shrinkage.toward_diagonal(correlation, noise), shrinkage.toward_diagonal(trial, more)
    else:
        correlation, trial = _by_spectrum(moments, around, scale, correlation, trial, comm)
    trust = _trust_in_cross(moments, around, every, scale)
    return Expected(
        second=shrinkage.unscaled(correlation, energies(every, range(number))),
        cross=None if every.cross is None else trust * every.cross,
        trial_second=shrinkage.unscaled(trial, energies(others, range(1, number))),
        trial_cross=None if others.cross is None else trust * others.cross,
        held_out=held_out,
        effective_rows=min(float(rows.min()), float(whole.num_rows)),
        num_rows=whole.num_rows,
    )


def _diagonal(moments: Moments) -> Tensor:
    """Mean squares of the inputs, `(G, J)`."""
    return moments.second.diagonal(dim1=1, dim2=2)


def _by_spectrum(
    moments: FoldedMoments,
    around: Callable[[Moments, Moments], Moments],
    scale: Tensor,
    correlation: Tensor,
    trial: Tensor,
    comm: Comm,
) -> tuple[Tensor, Tensor]:
    """The correlations `(G, J, J)` of all folds and of all but fold 0, with eigenvalues that other rows would show.

    Bartz 2016, "Cross-validation based nonlinear shrinkage", after Abadir et al. 2014 and Lam 2016: along the
    eigenvectors of all folds but one the energy of the one left out is not fitted to it; the mean over folds, made
    ascending, takes the place of the eigenvalues. What one rank finds, the others get by a sum with zeros.
    """
    number = len(moments.rows)
    energies = scale.new_zeros(number, *scale.shape)
    vectors = torch.empty(0)
    for fold in range(comm.rank, number, comm.world_size):
        others = moments.without(fold)
        found = shrinkage.eigenvectors(shrinkage.scaled(around(others, others).second, scale))
        left_out = around(moments.fold(fold), others).second
        energies[fold] = shrinkage.energy_along(found, shrinkage.scaled(left_out, scale))
        vectors = found if fold == 0 else vectors
    energies = comm.all_reduce(energies)
    shares = torch.tensor(moments.rows, dtype=scale.dtype, device=scale.device) / sum(moments.rows)
    values = shrinkage.isotonic((shares[:, None, None] * energies).sum(dim=0)).clamp(min=_LEAST_EIGENVALUE)
    found, other = torch.zeros_like(correlation), torch.zeros_like(trial)
    if comm.rank == number % comm.world_size:
        found = shrinkage.from_spectrum(shrinkage.eigenvectors(correlation), values)
    if comm.rank == 0:
        other = shrinkage.from_spectrum(vectors, values)
    return comm.all_reduce(found), comm.all_reduce(other)


def _trust_in_cross(
    moments: FoldedMoments, around: Callable[[Moments], Moments], every: Moments, scale: Tensor
) -> float:
    """Share of C that is more than the spread of its folds, 0 to 1.

    James and Stein 1961, "Estimation with quadratic loss", the positive part.
    """
    if every.cross is None:
        return 0.0
    whole = every.cross

    def away(fold: int) -> Tensor:
        cross = around(moments.fold(fold)).cross
        assert cross is not None, "all folds have what all rows have"
        return ((cross - whole) * scale[:, None, :]).square().sum()

    spread = shrinkage.variance_of_mean((away(k), rows / every.num_rows) for k, rows in enumerate(moments.rows))
    energy = float((whole * scale[:, None, :]).square().sum())
    return max(0.0, 1 - float(spread) / energy) if energy > 0 else 0.0
