"""Exact sums against fractions, and the quadratic of a layer against its squared output error over rows."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from toy_solving import raw_quadratic

from distributed_adaround.numerics.moments import ExactSum, Moments, SymmetricSum

CPU = torch.device("cpu")
GROUPS, ROWS, OUT, INPUTS = 2, 50, 3, 4
BOUNDS = [1.0, math.nextafter(1.0, 0.0), math.nextafter(1.0, 2.0), 3.7, 2.0**40, 1e300, 1e-200, 2.0**-938]


def summed(parts: list[Tensor], bound: float) -> ExactSum:
    result = ExactSum(tuple(parts[0].shape), bound, CPU)
    for part in parts:
        result.add(part)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_and_split_of_the_parts_change_no_bit(dtype: torch.dtype) -> None:
    parts = [torch.randn(3, 5, dtype=dtype) * 10.0 ** (k % 7 - 3) for k in range(40)]
    bound = float(torch.stack(parts).abs().sum(dim=0).max())
    whole = summed(parts, bound)
    assert not torch.equal(sum(parts), sum(parts[::-1])), "float sums would do as well"
    for _ in range(5):
        order = torch.randperm(40).tolist()
        mixed = [parts[k] for k in order]
        cut = int(torch.randint(1, 39, ()))
        ranks = [summed(mixed[:cut], bound), summed(mixed[cut:], bound)]
        assert torch.equal(ranks[0].total + ranks[1].total, whole.total)
        assert torch.equal(summed(mixed, bound).mean(7), whole.mean(7))
    assert whole.total.dtype == torch.int64
    torch.testing.assert_close(
        whole.mean(7), torch.stack(parts).double().sum(dim=0) / 7, rtol=1e-14, atol=1e-14 * bound
    )


@pytest.mark.parametrize("bound", BOUNDS)
def test_each_part_is_off_by_the_bound_over_2_to_the_62_at_most(bound: float) -> None:
    # The hardest parts: odd multiples of the largest error that is allowed, near 0; and some of every size.
    hard = [bound * 2.0**-62 * (2 * k + 1) for k in range(-4, 4)]
    rest = (torch.randn(30, dtype=torch.float64) * 10.0 ** -torch.arange(30).double() * (bound / 8)).tolist()
    for values in (*([value] for value in hard), hard, rest, hard + rest):
        exact = sum(map(Fraction, values), Fraction(0))
        total = summed([torch.tensor(value, dtype=torch.float64) for value in values], bound)
        # A total of 0 or 1 leaves no other way to know the unit.
        found = Fraction(int(total.total)) * Fraction(total._unit)
        assert abs(found - exact) <= len(values) * Fraction(bound) / 2**62


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bound", BOUNDS)
def test_twice_the_bound_does_not_overflow(bound: float, sign: int) -> None:
    part = torch.tensor([sign * bound, 0.0, -sign * bound], dtype=torch.float64)
    total = summed([part, part], bound)
    assert (total.mean(1) / bound).tolist() == [2 * sign, 0, -2 * sign]
    assert (total.mean(4) / bound).tolist() == [0.5 * sign, 0, -0.5 * sign]
    total.add(-part)
    total.add(-part)
    assert not total.total.any()


def test_bound_of_zero_and_below_all_bounds() -> None:
    assert not summed([torch.zeros(3)] * 2, 0.0).mean(2).any()
    assert not summed([torch.zeros(3)] * 2, 5e-324).mean(2).any()
    for bound in (math.inf, math.nan):
        with pytest.raises(AssertionError):
            ExactSum((1,), bound, CPU)


def make_rows() -> tuple[Tensor, Tensor]:
    """x and x̂ `(G, N, J)`, neither with mean 0, each with inputs that hang together."""
    mix = torch.randn(GROUPS, INPUTS, INPUTS).double()
    x_hat = torch.randn(GROUPS, ROWS, INPUTS).double() @ mix + torch.randn(GROUPS, 1, INPUTS).double()
    x = x_hat + 0.3 * torch.randn(GROUPS, ROWS, INPUTS).double() + 0.2 * x_hat.flip(2) + 0.1
    return x, x_hat


def moments_of(x: Tensor, x_hat: Tensor) -> Moments:
    """Written out row by row. One stream only where x is x̂."""
    second, cross = torch.zeros(2, GROUPS, INPUTS, INPUTS, dtype=torch.float64)
    mean, cross_mean = torch.zeros(2, GROUPS, INPUTS, dtype=torch.float64)
    for g in range(GROUPS):
        for n in range(ROWS):
            second[g] += torch.outer(x_hat[g, n], x_hat[g, n]) / ROWS
            cross[g] += torch.outer(x[g, n] - x_hat[g, n], x_hat[g, n]) / ROWS
            mean[g] += x_hat[g, n] / ROWS
            cross_mean[g] += (x[g, n] - x_hat[g, n]) / ROWS
    if x is x_hat:
        return Moments(second, mean, None, None, ROWS)
    return Moments(second, mean, cross, cross_mean, ROWS)


@pytest.mark.parametrize("streams", [1, 2])
def test_reordered_are_the_moments_of_reordered_inputs(streams: int) -> None:
    x, x_hat = make_rows()
    if streams == 1:
        x = x_hat
    order = torch.tensor([2, 0, 3, 1])
    found = moments_of(x, x_hat).reordered(order)
    x_hat = x_hat[:, :, order]
    expected = moments_of(x_hat if streams == 1 else x[:, :, order], x_hat)
    assert (found.cross is None) == (streams == 1)
    for name, value in vars(expected).items():
        if isinstance(value, Tensor):
            assert torch.equal(vars(found)[name], value)
        else:
            assert vars(found)[name] == value


def output_errors(x: Tensor, x_hat: Tensor, weight: Tensor, rounded: Tensor, asymmetry: float) -> Tensor:
    """Target `W (x̂ + α (x - x̂))` less output `Ŵ x̂`, `(G, R, N)`."""
    return weight @ (x_hat + asymmetry * (x - x_hat)).transpose(1, 2) - rounded @ x_hat.transpose(1, 2)


@pytest.mark.parametrize("asymmetry", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("streams", [1, 2])
def test_error_sums_are_the_squared_errors_less_their_constant(asymmetry: float, streams: int) -> None:
    x, x_hat = make_rows()
    if streams == 1:
        x = x_hat
    weight, difference = torch.randn(2, GROUPS, OUT, INPUTS).double()
    found = moments_of(x, x_hat).error_sums(difference, weight, asymmetry)
    errors, constant = (
        output_errors(x, x_hat, weight, rounded, asymmetry).square().sum(dim=2)
        for rounded in (weight + difference, weight)
    )
    assert found.dtype == torch.float64
    torch.testing.assert_close(found + constant, errors, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("asymmetry", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("streams", [1, 2])
def test_quadratic_is_the_mean_squared_output_error(centred: bool, asymmetry: float, streams: int) -> None:
    x, x_hat = make_rows()
    if streams == 1:
        x = x_hat
    weight = torch.randn(GROUPS, OUT, INPUTS).double()
    quadratic = raw_quadratic(moments_of(x, x_hat), weight, asymmetry, centred)
    assert (quadratic.linear is None) == (streams == 1 or asymmetry == 0)

    def expected(rounded: Tensor) -> Tensor:
        errors = output_errors(x, x_hat, weight, rounded, asymmetry)
        return errors.var(dim=2, correction=0) if centred else errors.square().mean(dim=2)

    constant = expected(weight)
    assert (constant.max() > 1e-3) == (streams == 2 and asymmetry > 0)
    assert not quadratic.loss(weight).any()
    for size in (0.01, 1.0, 10.0):
        rounded = weight + size * torch.randn_like(weight)
        torch.testing.assert_close(quadratic.loss(rounded) + constant, expected(rounded), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("asymmetry", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("streams", [1, 2])
def test_with_the_mean_in_the_bias_the_plain_quadratic_becomes_the_centred_one(asymmetry: float, streams: int) -> None:
    x, x_hat = make_rows()
    if streams == 1:
        x = x_hat
    weight, difference = torch.randn(2, GROUPS, OUT, INPUTS).double()
    plain, centred = (
        raw_quadratic(moments_of(x, x_hat), weight, asymmetry, centred).loss(weight + difference)
        for centred in (False, True)
    )
    # The constants that the quadratics leave out differ by the mean error of the float weight.
    mean, of_float = (
        output_errors(x, x_hat, weight, rounded, asymmetry).mean(dim=2) for rounded in (weight + difference, weight)
    )
    torch.testing.assert_close(plain + of_float.square() - mean.square(), centred, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("streams", [1, 2])
def test_channels_of_a_quadratic_are_parts_of_it(streams: int) -> None:
    x, x_hat = make_rows()
    weight, rounded = torch.randn(2, GROUPS, OUT, INPUTS).double()
    whole = raw_quadratic(moments_of(x if streams == 2 else x_hat, x_hat), weight, 1.0, False)
    for groups in (slice(0, 1), slice(1, 2), slice(0, 2)):
        for channels in (slice(0, 2), slice(2, 3)):
            place = (groups, channels)
            torch.testing.assert_close(whole.part(place).loss(rounded[place]), whole.loss(rounded)[place])


@pytest.mark.parametrize("streams", [1, 2])
def test_copies_of_the_channels_have_their_losses(streams: int) -> None:
    x, x_hat = make_rows()
    weight, rounded = torch.randn(2, GROUPS, OUT, INPUTS).double()
    whole = raw_quadratic(moments_of(x if streams == 2 else x_hat, x_hat), weight, 1.0, False)
    copies = torch.cat([rounded, 2 * rounded], dim=1)
    expected = torch.cat([whole.loss(rounded), whole.loss(2 * rounded)], dim=1)
    torch.testing.assert_close(whole.repeated(2).loss(copies), expected)


def test_quadratic_has_the_dtype_of_the_weight() -> None:
    quadratic = raw_quadratic(moments_of(*make_rows()), torch.randn(GROUPS, OUT, INPUTS), 1.0, True)
    assert quadratic.linear is not None
    assert quadratic.second.dtype == quadratic.linear.dtype == torch.float32


@pytest.mark.parametrize("constant", [1.0, 6.0, -0.17, 0.0])
def test_inputs_that_never_change_have_no_spread(constant: float) -> None:
    # Sums in float32, as they are taken: what is left of them after the means is rounding error.
    x = torch.randn(2000, 8) + 1
    x_hat = x + 0.1 * torch.randn(2000, 8)
    x_hat[:, 3] = constant
    change = x - x_hat
    sums = ((x_hat.T @ x_hat), x_hat.sum(dim=0), change.T @ x_hat, change.sum(dim=0))
    moments = Moments(*(one.double()[None] / 2000 for one in sums), num_rows=2000)
    weight = torch.randn(1, 5, 8)
    quadratic = raw_quadratic(moments, weight, 1.0, True)
    assert quadratic.linear is not None
    assert not quadratic.second[0, 3].any()
    assert not quadratic.second[0, :, 3].any()
    assert not quadratic.linear[0, :, 3].any()
    others = [j for j in range(8) if j != 3]
    covariance = torch.cov(x_hat.double().T, correction=0)
    found, expected = quadratic.second[0][others][:, others], covariance[others][:, others]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    # Not centred it is an input like others.
    assert bool(raw_quadratic(moments, weight, 1.0, False).second[0, 3].any()) == (constant != 0)


@pytest.mark.parametrize("size", [1, 192, 193, 400])
def test_products_are_summed_in_panels_of_their_upper_triangle(size: int) -> None:
    parts = [torch.randn(2, rows, size) for rows in (30, 1, 7)]
    bound = 1.01 * 3 * max(float(part.square().sum(dim=1).max()) for part in parts)
    first, second = (SymmetricSum(2, size, bound, CPU) for _ in range(2))
    first.add(parts[0])
    for part in parts[1:]:
        second.add(part)
    # As ranks do.
    for ours, theirs in zip(first.totals, second.totals, strict=True):
        ours += theirs
    found = SymmetricSum.mean_of([first], 38)
    exact = sum(part.double().transpose(1, 2) @ part.double() for part in parts) / 38
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    if size == 400:
        assert sum(total.numel() for total in first.totals) < 0.75 * found.numel()
        assert torch.equal(found[:, :192, 192:], found[:, 192:, :192].transpose(1, 2))
