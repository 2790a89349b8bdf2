"""Second moments that hold on other data: estimated from few rows, brought to what rows not seen would show.

Shape legend: G conv groups, J inputs of one output, K folds of the calibration samples.

The largest eigenvalues of a second moment are too large and the smallest too small, the more so the fewer independent
rows it was taken from; rounding that trusts the small ones fits noise. Folds tell by how much, also where rows depend
on each other (tokens of one text): the eigenvectors of all folds but one, and what the fold left out shows along them.

Everything works on correlations, A scaled to a diagonal of ones: inputs of large energy would otherwise decide alone.
The energies, its diagonal, move towards their mean by what of their differences is noise.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Inputs of one output up to which eigenvectors are taken; beyond, one share for all of A, which costs no decomposition.
SPECTRAL_INPUTS = 2048


def correlation_scale(second: Tensor) -> Tensor:
    """What each input is multiplied by, `(G, J)`, so that A `(G, J, J)` has a diagonal of ones; 0 for silent inputs."""
    diagonal = second.diagonal(dim1=1, dim2=2)
    return torch.where(diagonal > 0, diagonal.clamp(min=torch.finfo(diagonal.dtype).tiny).rsqrt(), 0.0)


def scaled(second: Tensor, scale: Tensor) -> Tensor:
    """A `(G, J, J)` with its rows and columns multiplied by scale `(G, J)`."""
    return second * scale[:, :, None] * scale[:, None, :]


def eigenvectors(correlation: Tensor) -> Tensor:
    """Eigenvectors `(G, J, J)` in columns, by ascending eigenvalue, the same on any number of threads.

    In float32, less than half the time of float64: what becomes of them needs directions, no exact eigenvalues.
    """
    with _one_thread():
        vectors: Tensor = torch.linalg.eigh(correlation.float())[1]
        return vectors.to(correlation.dtype)


def energy_along(vectors: Tensor, correlation: Tensor) -> Tensor:
    """Second moment `(G, J)` of the rows of `correlation` along each vector `(G, J, J)`, in columns."""
    return (torch.bmm(correlation, vectors) * vectors).sum(dim=1)


def from_spectrum(vectors: Tensor, values: Tensor) -> Tensor:
    """The correlation `(G, J, J)` with these eigenvectors, and with eigenvalues `(G, J)` but for what brings its
    diagonal back to ones."""
    whole = torch.bmm(vectors * values[:, None, :], vectors.transpose(1, 2))
    return scaled(whole, correlation_scale(whole))


def isotonic(values: Tensor) -> Tensor:
    """The ascending numbers nearest to values `(G, J)` by least squares.

    Robertson, Wright and Dykstra 1988, "Order Restricted Statistical Inference", theorem 1.4.4: the largest over all
    starts at or before a place of the smallest over all ends at or after it of the mean in between.
    """
    size = values.shape[1]
    sums = torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))
    places = torch.arange(size, device=values.device)
    lengths = places[None, :] - places[:, None] + 1
    # means[a, b] of the values a .. b.
    means = (sums[:, None, 1:] - sums[:, :-1, None]) / lengths.clamp(min=1)
    means = torch.where(lengths > 0, means, torch.inf)
    smallest = means.flip(2).cummin(dim=2).values.flip(2)
    return torch.where(lengths > 0, smallest, -torch.inf).amax(dim=1)


def share_of_noise(whole: Tensor, folds: Iterable[tuple[Tensor, float]]) -> tuple[Tensor, Tensor]:
    """How much of the off-diagonal part of each group's correlation is noise, `(G,)`, from 0 to 1, and how many
    independent rows would be as noisy, `(G,)`.

    Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", and Schäfer and
    Strimmer 2005 for correlations, with folds in the place of rows: their spread is that of rows that depend on each
    other as these do. whole: the correlation `(G, J, J)` of all rows; folds: of at least 2, each with its share of the
    rows, on the same scale.
    """
    size, signal = whole.shape[1], _off_diagonal_energy(whole)
    noise = variance_of_mean((_off_diagonal_energy(fold - whole), share) for fold, share in folds)
    # Of independent normal rows an entry varies by (1 + r²) / rows.
    rows = torch.where(noise > 0, (size * (size - 1) + signal) / noise, torch.inf)
    return torch.where(signal > 0, noise / signal, 1.0).clamp(max=1.0), rows


def variance_of_mean(deviations: Iterable[tuple[Tensor, float]]) -> Tensor:
    """How much the mean over all rows varies, of any shape. deviations: of at least 2 folds, the squared distance from
    that mean and the share of the rows; of folds of one size exactly unbiased."""
    parts = [share**2 * squares for squares, share in deviations]
    return torch.stack(parts).sum(dim=0) * len(parts) / (len(parts) - 1)


def _off_diagonal_energy(matrix: Tensor) -> Tensor:
    """`(G,)` of `(G, J, J)`."""
    return matrix.square().sum(dim=(1, 2)) - matrix.diagonal(dim1=1, dim2=2).square().sum(dim=1)


def toward_diagonal(correlation: Tensor, share: Tensor) -> Tensor:
    """The off-diagonal part of a correlation `(G, J, J)` less a share `(G,)` of it."""
    diagonal = torch.diag_embed(correlation.diagonal(dim1=1, dim2=2))
    return torch.lerp(correlation, diagonal, share.view(-1, 1, 1))


def expected_energies(measured: Tensor, folds: Iterable[tuple[Tensor, float]]) -> Tensor:
    """Mean squares `(G, J)` of the inputs as other rows would show them: drawn towards their geometric mean, on a
    logarithmic axis, by the share of their spread that is noise (James and Stein 1961). Silent inputs stay silent.

    measured: of all rows. folds: of at least 2, each with its share of the rows.
    """
    speaks = measured > 0
    each = torch.where(speaks, measured, 1.0)
    count = speaks.sum(dim=1, keepdim=True).clamp(min=1)
    noise = variance_of_mean(((fold / each - 1).square(), share) for fold, share in folds)
    noise = torch.where(speaks, noise, 0.0).sum(dim=1, keepdim=True) / count
    logs = each.log()
    mean = torch.where(speaks, logs, 0.0).sum(dim=1, keepdim=True) / count
    spread = torch.where(speaks, logs - mean, 0.0).square().sum(dim=1, keepdim=True) / count
    kept = torch.where(noise < spread, 1 - noise / spread, 0.0)
    return torch.where(speaks, (mean + kept * (logs - mean)).exp(), 0.0)


def unscaled(correlation: Tensor, energies: Tensor) -> Tensor:
    """A correlation `(G, J, J)` with energies `(G, J)` on its diagonal. Silent inputs, which nobody can judge, go with
    no other one and have the median energy of those that do speak: their weights stay near nearest rounding, and hold
    the scale."""
    speaks = energies > 0
    median = torch.where(speaks, energies, torch.nan).nanmedian(dim=1, keepdim=True).values
    # Of a group that is silent altogether every weight counts the same.
    filling = torch.where(speaks, 0.0, torch.where(median.isnan(), 1.0, median))
    return scaled(correlation, torch.where(speaks, energies.sqrt(), 0.0)) + torch.diag_embed(filling)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
