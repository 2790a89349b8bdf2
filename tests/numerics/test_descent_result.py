"""What a whole descent ends with: on the lattice, near the best of all codes, each row and conv group by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from distributed_adaround.numerics.lattice import Lattice
from torch import Tensor
from toy_quadratics import make_lattice, make_quadratic

from distributed_adaround.numerics.descent import Descent
from distributed_adaround.numerics.floats import ElementFormat
from distributed_adaround.numerics.grid import ScaleFormat
from distributed_adaround.numerics.moments import Moments, Quadratic
from distributed_adaround.numerics.ranges import Strategy
from distributed_adaround.solve.gram import regularizer_weight


def annealed(quadratic: Quadratic, lattice: Lattice, sweeps: int = 60, block: int = 1, steps: int = 1) -> Descent:
    descent = Descent(quadratic, lattice, block=block, steps=steps)
    for sweep in range(sweeps):
        descent.sweep(regularizer_weight(sweep, sweeps))
    descent.settle()
    return descent


def nearest_weights(quadratic: Quadratic, lattice: Lattice) -> Tensor:
    """Every weight at the nearest value of the lattice."""
    scale = lattice.scale.expand(quadratic.second.shape[0], -1, quadratic.weight.shape[1])
    scale = scale.repeat_interleave(quadratic.weight.shape[2] // scale.shape[1], dim=1).transpose(1, 2)
    candidates = torch.stack([lattice.dequantize(torch.full_like(scale, c)) for c in range(lattice.qmax + 1)])
    place = (candidates - quadratic.weight).abs().argmin(dim=0, keepdim=True)
    return candidates.gather(0, place)[0]


def all_levels(lattice: Lattice, inputs: int, row: int) -> Tensor:
    """Every choice of levels of one row, `(codes^J, J)`."""
    ends = range(lattice.qmin, lattice.qmax + 1)
    zero = lattice.zero_point.expand(1, 1, 3)[0, 0, row]
    return torch.tensor(list(itertools.product(ends, repeat=inputs))).double() - zero


@pytest.mark.parametrize(("block", "steps"), [(1, 1), (3, 4)])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_close_to_the_best_of_all_codes(strategy: Strategy, block: int, steps: int) -> None:
    gaps, improvements = [], []
    for seed in range(10):
        torch.manual_seed(seed)
        quadratic = make_quadratic(1, 3, 6, pull=True)
        lattice = make_lattice(quadratic, strategy)
        found = annealed(quadratic, lattice, block=block, steps=steps).losses()[0]
        nearest = quadratic.loss(nearest_weights(quadratic, lattice))[0]
        assert quadratic.pull is not None
        aim = quadratic.weight[0] @ quadratic.second[0] + quadratic.pull[0]
        constant = ((aim + quadratic.pull[0]) * quadratic.weight[0]).sum(dim=1)
        for row in range(3):
            levels = all_levels(lattice, 6, row)
            linear, square = levels @ aim[row], ((levels @ quadratic.second[0]) * levels).sum(dim=1)
            scale = lattice.scale.expand(1, 1, 3)[0, 0, row]
            if strategy == "channel":
                # Each choice with its own best scale, where that is positive.
                scale = torch.where(linear > 0, linear / square, 0.0).nan_to_num(0.0)
            best = (scale**2 * square - 2 * scale * linear).min() + constant[row]
            assert found[row] >= best - 1e-6
            # In units of the output that is to be matched: losses less their constant can be near 0.
            size = aim[row] @ torch.linalg.solve(quadratic.second[0], aim[row])
            gaps.append(float((found[row] - best) / size))
            improvements.append(float((nearest[row] - found[row]) / size))
    # Of what nearest rounding loses, all but a few percent; a single row can end worse than nearest.
    assert sum(gaps) < 0.1 * sum(improvements)
    assert sum(improvement < -1e-9 for improvement in improvements) <= 2


FORMATS: dict[str, tuple[ElementFormat | None, ScaleFormat]] = {
    "integers": (None, "float32"),
    "fp8": ("e4m3", "float32"),
    "mxfp4": ("e2m1", "e8m0"),
    "nvfp4": ("e2m1", "e4m3"),
}
every_format = pytest.mark.parametrize("fmt", FORMATS)
every_strategy = pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])


@every_format
@every_strategy
def test_ends_on_the_lattice_and_better_than_nearest(strategy: Strategy, fmt: str) -> None:
    quadratic = make_quadratic(2, 8, 24, pull=True)
    lattice = make_lattice(quadratic, strategy, runs=3, element_format=FORMATS[fmt][0], scale_format=FORMATS[fmt][1])
    descent = Descent(quadratic, lattice, block=8, steps=4)
    for sweep in range(80):
        descent.sweep(regularizer_weight(sweep, 80))
    assert descent.unsettled(0.05) <= 0.03 * descent.levels.numel()
    descent.settle()
    assert not descent.unsettled(0.0)
    codes = descent.codes()
    assert ((codes >= lattice.qmin) & (codes <= lattice.qmax) & (codes == codes.round())).all()
    torch.testing.assert_close(descent.lattice.dequantize(codes), descent.weights(), rtol=1e-15, atol=0)
    assert descent.losses().sum() < quadratic.loss(nearest_weights(quadratic, lattice)).sum()
    assert torch.equal(descent.lattice.scale, lattice.representable(descent.lattice.scale))


@every_format
@every_strategy
def test_starts_from_the_levels_it_is_given_and_gives_them_back(strategy: Strategy, fmt: str) -> None:
    quadratic = make_quadratic(2, 5, 24, pull=True)
    lattice = make_lattice(quadratic, strategy, runs=3, element_format=FORMATS[fmt][0], scale_format=FORMATS[fmt][1])
    codes = torch.randint(lattice.qmin, lattice.qmax + 1, (2, 5, 24)).double()
    weights = lattice.dequantize(codes)
    scale = lattice.scale.expand(2, -1, 5).repeat_interleave(24 // lattice.scale.shape[1], dim=1).transpose(1, 2)
    for block in (1, 7):
        descent = Descent(quadratic, lattice, (weights / scale).round(decimals=9), block=block, steps=2)
        assert torch.equal(descent.codes(), codes)
        torch.testing.assert_close(descent.weights(), weights)
        assert not descent.unsettled(0.0)
        torch.testing.assert_close(descent.losses(), quadratic.loss(weights))


@every_strategy
def test_starts_from_the_float_weights_inside_the_range(strategy: Strategy) -> None:
    quadratic = make_quadratic(2, 5, 12)
    lattice = make_lattice(quadratic, strategy, runs=3)
    descent = Descent(quadratic, lattice, block=1, steps=1)
    ends = [lattice.dequantize(torch.full((2, 5, 12), float(code)).double()) for code in (0, 3)]
    clipped = torch.minimum(torch.maximum(quadratic.weight, ends[0]), ends[1])
    assert not torch.equal(clipped, quadratic.weight)
    torch.testing.assert_close(descent.weights(), clipped)
    # So far only those on an end have settled.
    inside = (clipped == quadratic.weight).sum()
    assert descent.unsettled(0.0) == inside
    assert descent.unsettled(0.5) == 0
    assert 0 < descent.unsettled(0.25) < inside


@every_strategy
def test_conv_groups_and_rows_are_solved_as_if_alone(strategy: Strategy) -> None:
    quadratic = make_quadratic(2, 3, 12, pull=True)
    lattice = make_lattice(quadratic, strategy, runs=2)
    whole = annealed(quadratic, lattice, sweeps=25)
    for g in range(2):
        group = slice(g, g + 1)
        for rows in (slice(0, 3), *(slice(r, r + 1) for r in range(3))):
            part = annealed(quadratic.rows(group, rows), lattice.rows(group, rows), sweeps=25)
            assert torch.equal(part.codes(), whole.codes()[group, rows])
            torch.testing.assert_close(part.losses(), whole.losses()[group, rows])


def test_conv_groups_of_one_moment_are_alone_in_blocks_too() -> None:
    # Blocks share one L over the groups: with the same inputs in all of them it is that of each.
    one = make_quadratic(1, 6, 20, pull=True)
    assert one.pull is not None
    three = Quadratic(one.second.expand(3, -1, -1), one.weight.view(3, 2, 20), one.pull.view(3, 2, 20))
    codes = [annealed(case, make_lattice(case), block=8, steps=3).codes() for case in (one, three)]
    assert torch.equal(codes[0].view(3, 2, 20), codes[1])


@pytest.mark.parametrize(("block", "steps"), [(1, 1), (5, 4)])
def test_inputs_that_are_always_0_end_at_their_nearest_code(block: int, steps: int) -> None:
    quadratic = make_quadratic(2, 4, 15, pull=True, dead=4)
    lattice = make_lattice(quadratic, "tensor")
    found = annealed(quadratic, lattice, block=block, steps=steps).weights()
    nearest = nearest_weights(quadratic, lattice)
    torch.testing.assert_close(found[:, :, :4], nearest[:, :, :4])
    assert quadratic.pull is not None
    part = Quadratic(quadratic.second[:, 4:, 4:], quadratic.weight[:, :, 4:], quadratic.pull[:, :, 4:])
    if block == 1:
        assert torch.equal(annealed(part, lattice).weights(), found[:, :, 4:])


def test_no_inputs_at_all() -> None:
    for strategy in ("tensor", "channel"):
        quadratic = make_quadratic(1, 4, 6, dead=6)
        lattice = make_lattice(quadratic, strategy)
        descent = annealed(quadratic, lattice, block=2, steps=2)
        torch.testing.assert_close(descent.weights(), nearest_weights(quadratic, lattice))
        assert torch.equal(descent.lattice.scale, lattice.scale)


@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-21, 1e-22, 1e-30])
def test_inputs_near_the_end_of_float32(size: float) -> None:
    # Their squares have no reciprocal, or are denormal, or 0.
    exact = make_quadratic(1, 4, 12)
    factor = torch.ones(12).double()
    factor[[2, 5]] = size
    second = (exact.second * factor[:, None] * factor).float()
    quadratic = Quadratic(second, exact.weight.float(), None)
    descent = annealed(quadratic, make_lattice(quadratic), block=4, steps=4)
    assert torch.isfinite(descent.levels).all()
    assert torch.isfinite(descent.losses()).all()


def test_an_input_that_never_changes_does_not_hold_up_its_block() -> None:
    x = torch.randn(2000, 16) @ torch.randn(16, 16) / 4 + 1
    x[:, 3] = 1.0
    moments = Moments((x.T @ x).double()[None] / 2000, x.sum(dim=0).double()[None] / 2000, None, None, 2000)
    quadratic = moments.quadratic(torch.randn(1, 8, 16), 1.0, True)
    lattice = make_lattice(quadratic)
    in_blocks, one_by_one = (annealed(quadratic, lattice, block=b, steps=4).losses().sum() for b in (16, 1))
    nearest = quadratic.loss(nearest_weights(quadratic, lattice)).sum()
    assert in_blocks < 0.6 * nearest
    assert in_blocks < 1.2 * one_by_one


def test_rounding_errors_beside_a_diagonal_of_0_do_not_hold_up_a_block() -> None:
    clean = make_quadratic(1, 6, 12, dead=1)
    noisy = clean.second.clone()
    noisy[:, 0, 1:] = noisy[:, 1:, 0] = 1e-9
    for diagonal in (0.0, -1e-9):
        noisy[:, 0, 0] = diagonal
        lattice = make_lattice(clean)
        cases = (clean, Quadratic(noisy, clean.weight, None))
        codes = [annealed(case, lattice, block=12, steps=4).codes() for case in cases]
        assert torch.equal(codes[0], codes[1])
