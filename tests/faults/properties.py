"""Properties of numbers and of the deal of data, for inputs that nobody would write down."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from distributed_adaround.data.manifest import cut, owner, prove_coverage, take
from distributed_adaround.formats import E2M1, E4M3, SCALE_FORMATS, FloatFormat
from distributed_adaround.numerics.grid import Grid, decode, encode, nearest_values
from distributed_adaround.numerics.moments import ExactSum

CPU = torch.device("cpu")


def _finite(bound: float, width: int = 32) -> st.SearchStrategy[float]:
    return st.floats(-bound, bound, width=width, allow_subnormal=False)  # type: ignore[arg-type]


@st.composite
def integer_grids(draw: st.DrawFn) -> tuple[Grid, Tensor]:
    """A grid of any width and zero point, and weights inside and outside of it."""
    bits = draw(st.integers(1, 8))
    low = draw(st.sampled_from([0, -(2 ** (bits - 1))]))
    high = low + 2**bits - 1
    outputs, groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    entries = outputs * groups
    scale = draw(st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=entries, max_size=entries))
    zero = draw(st.lists(st.integers(low, high), min_size=entries, max_size=entries))
    shape = (1, outputs, groups)
    scales, zeros = torch.tensor(scale).reshape(shape), torch.tensor(zero).float().reshape(shape)
    grid = Grid(scales, zeros, low, high, SCALE_FORMATS["float32"])
    steps = draw(st.lists(_finite(2.0**10), min_size=entries * size, max_size=entries * size))
    return grid, torch.tensor(steps).reshape(1, outputs, -1) * grid.scale.repeat_interleave(size, dim=2)


def check_integer_grid(case: tuple[Grid, Tensor]) -> None:
    grid, weight = case
    codes = grid.quantize(weight)
    values = grid.dequantize(codes)
    assert bool(((codes >= grid.qmin) & (codes <= grid.qmax) & (codes == codes.round())).all())
    # Values of the grid stay where they are.
    assert torch.equal(grid.quantize(values), codes)
    below, above = grid.neighbours(weight)
    low, high = grid.dequantize(below), grid.dequantize(above)
    assert bool((((above - below) == 1) | (above == below)).all())
    assert bool(((codes == below) | (codes == above)).all())
    inside = above > below
    step = grid.scale.repeat_interleave(weight.shape[2] // grid.scale.shape[2], dim=2)
    # A little room for the rounding of float32: the weight itself is steps times the scale.
    room = 1e-6 * (weight.abs() + step)
    assert bool((low <= weight + room)[inside].all())
    assert bool((weight <= high + room)[inside].all())
    # Nearest: no other grid value is nearer than the one chosen.
    for other in (low, high):
        assert bool(((weight - values).abs() <= (weight - other).abs() + room).all())


@st.composite
def float_weights(draw: st.DrawFn) -> tuple[FloatFormat, Tensor]:
    element = draw(st.sampled_from([E4M3, E2M1]))
    values = list(element.values)
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    numbers = st.sampled_from(values + middles) | _finite(500.0) | _finite(2.0**-6)
    return element, torch.tensor(draw(st.lists(numbers, min_size=1, max_size=8)))


def check_float_grid(case: tuple[FloatFormat, Tensor]) -> None:
    element, weight = case
    values = torch.tensor(element.values)
    one = torch.ones(1, 1, 1)
    grid = Grid(one, 0 * one, 0, len(values) - 1, SCALE_FORMATS["float32"], values)
    codes = grid.quantize(weight[None, None])
    assert torch.equal(decode(encode(codes, element), element), codes)
    found = grid.dequantize(codes)[0, 0]
    assert torch.equal(nearest_values(weight, element), found)
    for number, chosen in zip(weight.tolist(), found.tolist(), strict=True):
        distances = [abs(Fraction(number) - Fraction(value)) for value in values.tolist()]
        assert abs(Fraction(number) - Fraction(chosen)) == min(distances)
    if element is E4M3:
        # torch's own cast, of what it does not clamp.
        assert torch.equal(weight.clamp(-448, 448).to(torch.float8_e4m3fn).float(), found)


@st.composite
def summands(draw: st.DrawFn) -> tuple[float, list[float], list[int]]:
    """A bound, numbers whose sum stays below it in absolute value, and an order of them."""
    bound = draw(st.floats(2.0**-200, 2.0**200))
    shares = draw(st.lists(_finite(1.0, 64), min_size=1, max_size=30))
    parts = [bound * share / len(shares) for share in shares]
    return bound, parts, draw(st.permutations(range(len(parts))))


def check_exact_sum(case: tuple[float, list[float], list[int]]) -> None:
    bound, parts, order = case
    totals = []
    # As they come, in another order, and as sums of several ranks.
    for groups in ([range(len(parts))], [order], [order[::2], order[1::2]], [order[:1], order[1:]]):
        total = ExactSum((1,), bound, CPU)
        for group in groups:
            partial = ExactSum((1,), bound, CPU)
            for index in group:
                partial.add(torch.tensor([parts[index]], dtype=torch.float64))
            total.total += partial.total
        totals.append(total)
    assert len({int(total.total) for total in totals}) == 1
    exact = sum(map(Fraction, parts))
    found = Fraction(float(totals[0].mean(1)))
    # The bound that ExactSum promises, and the last step of a float64.
    allowed = len(parts) * Fraction(bound) / 2**62 + abs(exact) / 2**52
    assert abs(found - exact) <= allowed


def check_sum_bound(case: tuple[float, int]) -> None:
    """Totals up to twice the bound fit into an int64."""
    bound, sign = case
    total = ExactSum((1,), bound, CPU)
    for _ in range(2):
        total.add(torch.tensor([sign * bound], dtype=torch.float64))
    assert math.isclose(float(total.mean(2)), sign * bound, rel_tol=2.0**-50)


@st.composite
def deals(draw: st.DrawFn) -> tuple[int, int | None, int, int, int]:
    """(samples in the files, samples asked for, microbatch size, virtual shards, ranks)"""
    available = draw(st.integers(1, 300))
    wanted = draw(st.none() | st.integers(1, available))
    return available, wanted, draw(st.integers(1, 50)), draw(st.integers(1, 80)), draw(st.integers(1, 64))


def check_deal(case: tuple[int, int | None, int, int, int]) -> None:
    available, wanted, size, shards, ranks = case
    chosen = take(available, wanted)
    assert len(chosen) == (available if wanted is None else wanted)
    assert chosen == sorted(set(chosen))
    assert 0 <= chosen[0] <= chosen[-1] < available
    microbatches = cut(chosen, size, shards)
    assert [sample for microbatch in microbatches for sample in microbatch.samples] == chosen
    assert all(1 <= len(microbatch.samples) <= size for microbatch in microbatches)
    assert all(len(microbatch.samples) == size for microbatch in microbatches[:-1])
    owned = [[m.index for m in microbatches if owner(m.shard, ranks) == rank] for rank in range(ranks)]
    prove_coverage(len(microbatches), owned)
    assert sorted(index for mine in owned for index in mine) == list(range(len(microbatches)))
    # A shard is never split, and no rank has a shard more than it must.
    held = [{microbatches[index].shard for index in mine} for mine in owned]
    assert sum(map(len, held)) == len(set().union(*held))
    used = min(shards, len(microbatches))
    assert max(map(len, held)) <= -(-used // min(ranks, used))


PROPERTIES: dict[str, tuple[Callable[[], st.SearchStrategy[Any]], Callable[[Any], None]]] = {
    "integer grids": (integer_grids, check_integer_grid),
    "float grids": (float_weights, check_float_grid),
    "exact sums": (summands, check_exact_sum),
    "bounds of sums": (lambda: st.tuples(st.floats(2.0**-900, 2.0**900), st.sampled_from([-1, 1])), check_sum_bound),
    "deals of data": (deals, check_deal),
}
