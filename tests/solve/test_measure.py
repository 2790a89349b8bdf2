"""Moments of a layer's inputs against sums over rows written out, and the same bits on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_solving import with_quadratic

from distributed_adaround.errors import InputError
from distributed_adaround.numerics.moments import Moments
from distributed_adaround.runtime.comm import Comm, SoloComm
from distributed_adaround.solve import measure as measure_file
from distributed_adaround.solve.measure import SharedMoments
from distributed_adaround.solve.measure import measure as measure_folds
from distributed_adaround.solve.problem import LayerProblem


def measure(problem: LayerProblem, comm: Comm) -> Moments:
    """Of all folds together."""
    return measure_folds(problem, comm).whole


def rows_of(problem: LayerProblem, x: Tensor) -> Tensor:
    """What each output sees, `(G, rows, J)`: the layer itself with weights that pick one input after the other."""
    geometry = problem.geometry
    seen = []
    for j in range(geometry.inputs_per_output):
        picking = torch.zeros_like(problem.weight)
        picking[:, :, j] = 1
        y = geometry.apply(x, geometry.from_channels(picking))
        seen.append(y.movedim(1, -1).flatten(0, -2) if geometry.num_spatial_dims else y.flatten(0, -2))
    # All outputs of a group see the same.
    return torch.stack(seen, dim=-1)[:, :: geometry.out_channels // geometry.groups].transpose(0, 1)


def all_rows(problem: LayerProblem, keep: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """x̂ and x - x̂ of all microbatches, `(G, rows, J)`; keep: which rows of each count."""
    near = [rows_of(problem, batch.x_hat) for batch in problem.batches]
    change = [rows_of(problem, batch.x) - x_hat for batch, x_hat in zip(problem.batches, near, strict=True)]
    if keep is not None:
        near, change = (
            [part[:, mask.flatten() != 0] for part, mask in zip(p, keep, strict=True)] for p in (near, change)
        )
    return torch.cat(near, dim=1), torch.cat(change, dim=1)


def check(found: Moments, near: Tensor, change: Tensor) -> None:
    """Row by row, as the definition says."""
    groups, rows, inputs = near.shape
    second, cross = torch.zeros(2, groups, inputs, inputs, dtype=torch.float64)
    for g in range(groups):
        for a, b in zip(near[g], change[g], strict=True):
            second[g] += torch.outer(a, a)
            cross[g] += torch.outer(b, a)
    assert found.num_rows == rows
    pairs = [
        (found.second, second / rows),
        (found.cross, cross / rows),
        (found.mean, near.mean(dim=1)),
        (found.cross_mean, change.mean(dim=1)),
    ]
    for ours, theirs in pairs:
        assert ours is not None
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_moments_of_every_kind_of_layer(case: Any, make_problem: Any) -> None:
    layer, inputs = case
    problem = make_problem(layer, inputs, float_inputs=[x + 0.3 * torch.randn_like(x) + 0.1 for x in inputs])
    check(measure(problem, SoloComm()), *all_rows(problem))


def test_moments_in_pieces_are_the_same(case: Any, make_problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = case
    problem = make_problem(layer, inputs, float_inputs=[x + 0.3 * torch.randn_like(x) for x in inputs])
    monkeypatch.setattr("distributed_adaround.numerics.patches._PIECE", 7)
    check(measure(problem, SoloComm()), *all_rows(problem))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_rows_that_are_padding_leave_no_trace(flat: bool, dtype: torch.dtype, make_problem: Any) -> None:
    masks = [torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).to(dtype), torch.tensor([[0] * 4, [1, 0, 0, 0], [1, 1, 1, 0]])]
    shapes = [(8, 5), (12, 5)] if flat else [(2, 4, 5), (3, 4, 5)]
    inputs, floats = ([torch.randn(shape).double() for shape in shapes] for _ in range(2))
    problem = make_problem(nn.Linear(5, 3).double(), inputs, float_inputs=floats, masks=masks)
    expected = all_rows(problem, masks)
    # Attention over nothing but padding is NaN, and finite garbage may be of any size.
    for streams, garbage in ((inputs, torch.nan), (floats, 1e30)):
        for x, mask in zip(streams, masks, strict=True):
            x.reshape(-1, 5)[mask.reshape(-1) == 0] = garbage
    found = measure(problem, SoloComm())
    assert found.num_rows == 10
    check(found, *expected)


def test_masks_of_a_convolution_over_tokens(make_problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = [torch.tensor([[1, 1, 0, 0, 0], [1] * 5]), torch.tensor([[1, 1, 1, 1, 0]])]
    inputs = [torch.randn(2, 4, 5).double(), torch.randn(1, 4, 5).double()]
    floats = [x + torch.randn_like(x) for x in inputs]
    problem = make_problem(nn.Conv1d(4, 6, 3, padding=1, groups=2).double(), inputs, float_inputs=floats, masks=masks)
    monkeypatch.setattr("distributed_adaround.numerics.patches._PIECE", 3 * 12)
    check(measure(problem, SoloComm()), *all_rows(problem, masks))


def test_a_mask_that_fits_no_row_leaves_all_of_them(make_problem: Any) -> None:
    inputs = [torch.randn(2, 5).double()]
    problem = make_problem(nn.Linear(5, 3).double(), inputs, masks=[torch.tensor([[1, 1, 0], [0, 0, 0]])])
    assert measure(problem, SoloComm()).num_rows == 2


def rows_taken(problem: LayerProblem) -> list[slice]:
    """Which rows of each microbatch are taken, by the rule: near one of `step`, a step that meets all positions."""
    geometry = problem.geometry
    assert problem.rows_per_input is not None
    total = sum(batch.y.numel() // geometry.out_channels for batch in problem.batches)
    step = max(1, total // (problem.rows_per_input * geometry.inputs_per_output))
    taken = []
    for batch in problem.batches:
        positions = batch.y[:, 0].numel() // batch.y.shape[0] if geometry.num_spatial_dims else 1
        own = max(n for n in range(1, step + 1) if math.gcd(n, positions) == 1)
        taken.append(slice(int(batch.index * (5**0.5 - 1) / 2 % 1 * own), None, own))
    return taken


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed1d"])
def test_moments_of_some_rows(name: str, make_problem: Any) -> None:
    layer, size = {
        "linear": (nn.Linear(4, 3), ()),
        "conv2d": (nn.Conv2d(2, 4, 3, stride=2, groups=2), (13, 9)),
        "transposed1d": (nn.ConvTranspose1d(2, 3, 2, stride=2), (20,)),
    }[name]
    inputs = [torch.randn(n, 4 if name == "linear" else 2, *size).double() for n in (40, 3, 17)]
    problem = make_problem(layer.double(), inputs, float_inputs=[x + torch.randn_like(x) for x in inputs])
    problem = replace(problem, rows_per_input=4)
    taken = rows_taken(problem)
    near, change = all_rows(problem)
    ends = [batch.y.numel() // problem.geometry.out_channels for batch in problem.batches]
    parts = [
        torch.cat([part[:, own] for part, own in zip(rows.split(ends, dim=1), taken, strict=True)], dim=1)
        for rows in (near, change)
    ]
    found = measure(problem, SoloComm())
    assert found.num_rows < sum(ends) / 2
    assert len({own.start for own in taken}) > 1
    check(found, *parts)


def test_rows_taken_meet_every_position_of_an_image(make_problem: Any) -> None:
    # One row of 6 would meet the same 4 of 24 pixels in every image.
    problem = make_problem(nn.Conv2d(1, 1, 1), [torch.randn(24, 1, 4, 6)])
    x = problem.batches[0].x_hat
    x.copy_(torch.arange(24).view(4, 6).expand_as(x))
    found = measure(replace(problem, rows_per_input=24 * 24 // 6), SoloComm())
    assert found.num_rows == pytest.approx(24 * 24 / 5, abs=1)
    assert float(found.mean) == pytest.approx(11.5, abs=0.2)


def test_rows_that_are_padding_do_not_count_when_some_are_taken(make_problem: Any) -> None:
    mask = torch.tensor([[1, 1, 0, 1]] * 30)
    inputs = torch.randn(30, 4, 2)
    inputs[mask == 0] = torch.nan
    problem = make_problem(nn.Linear(2, 3), [inputs.nan_to_num()], masks=[mask])
    problem.batches[0].x_hat.copy_(inputs)
    found = measure(replace(problem, rows_per_input=15), SoloComm())
    # 90 rows count, one of 3 is taken.
    rows = inputs.reshape(-1, 2)[::3][mask.reshape(-1)[::3] != 0].double()
    assert found.num_rows == len(rows)
    torch.testing.assert_close(found.second[0], rows.T @ rows / len(rows), rtol=1e-6, atol=1e-6)


def of_many_sizes(make_problem: Any, layer: nn.Module, *shape: int) -> Any:
    """float32, over many orders of magnitude: sums in another order would show."""
    inputs = [torch.randn(3, *shape) * 10.0**k for k in (-4, 0, 3, -2, 1, 2, -3)]
    return make_problem(layer, inputs, float_inputs=[x + 0.1 * torch.randn_like(x) for x in inputs])


def tensors(found: Moments) -> list[Tensor | int]:
    assert found.cross is not None
    assert found.cross_mean is not None
    return [found.second, found.mean, found.cross, found.cross_mean, found.num_rows]


def same_bits(found: Moments, expected: Moments) -> bool:
    pairs = zip(tensors(found), tensors(expected), strict=True)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(5, 4), (7, 5)),
    (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 6)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 6)),
]


@pytest.mark.parametrize("rows_per_input", [None, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=["linear", "conv", "transposed"])
def test_same_bits_on_any_number_of_ranks(
    layer: nn.Module,
    shape: tuple[int, ...],
    world_size: int,
    rows_per_input: int | None,
    make_problem: Any,
    share: Any,
    run_ranks: Any,
) -> None:
    problem = replace(of_many_sizes(make_problem, layer, *shape), rows_per_input=rows_per_input)
    alone = measure(problem, SoloComm())
    assert same_bits(alone, alone)

    def work(comm: Any) -> Moments:
        mine = share(problem, comm.rank, world_size)
        assert len(mine.batches) == len(range(comm.rank, 7, world_size))
        return measure(mine, comm)

    assert all(same_bits(found, alone) for found in run_ranks(world_size, work))


def test_same_bits_when_one_rank_holds_everything(make_problem: Any, share: Any, run_ranks: Any) -> None:
    """Also whether the streams differ is known to that rank alone."""
    problem = of_many_sizes(make_problem, *LAYERS[0][:1], *LAYERS[0][1])
    alone = measure(problem, SoloComm())

    def work(comm: Any) -> Moments:
        mine = problem if comm.rank == 1 else share(problem, 7, 8)
        assert len(mine.batches) == (7 if comm.rank == 1 else 0)
        return measure(mine, comm)

    assert all(same_bits(found, alone) for found in run_ranks(3, work))


def test_sums_that_reach_their_bounds_do_not_overflow(make_problem: Any) -> None:
    """Rows all alike: by Cauchy and Schwarz no sum can be larger."""
    inputs = [torch.full((6, 4), 3.0) for _ in range(5)]
    problem = make_problem(nn.Linear(4, 2), inputs, float_inputs=[torch.full_like(x, 5.0) for x in inputs])
    found = measure(problem, SoloComm())
    assert torch.equal(found.second, torch.full((1, 4, 4), 9.0).double())
    assert torch.equal(found.mean, torch.full((1, 4), 3.0).double())
    assert torch.equal(found.cross, torch.full((1, 4, 4), 6.0).double())
    assert torch.equal(found.cross_mean, torch.full((1, 4), 2.0).double())


def test_inputs_that_are_always_zero(make_problem: Any) -> None:
    found = measure(make_problem(nn.Linear(4, 2), [torch.zeros(6, 4)]), SoloComm())
    assert not found.second.any()
    assert not found.mean.any()


def test_half_precision_activations_are_squared_in_the_compute_dtype(make_problem: Any) -> None:
    """300 squared is no float16, nor is a square of 1e-5."""
    inputs = [torch.tensor([[300.0, -200.0], [500.0, 1e-5]]).half()]
    problem = make_problem(nn.Linear(2, 2), inputs, float_inputs=[inputs[0] + torch.tensor([[300.0, 0.0]]).half()])
    found = measure(problem, SoloComm())
    near = inputs[0].double()
    torch.testing.assert_close(found.second[0], near.T @ near / 2, rtol=1e-6, atol=0)
    assert found.cross is not None
    change = torch.tensor([[300.0, 0.0], [300.0, 0.0]]).double()
    torch.testing.assert_close(found.cross[0], change.T @ near / 2, rtol=1e-6, atol=0)


def test_no_cross_moments_where_both_streams_are_the_same(make_problem: Any) -> None:
    inputs = [torch.randn(4, 5), torch.randn(3, 5)]
    layer = nn.Linear(5, 3)
    found = measure(make_problem(layer, inputs), SoloComm())
    assert (found.cross, found.cross_mean) == (None, None)
    twins = measure(make_problem(layer, inputs, float_inputs=[x.clone() for x in inputs]), SoloComm())
    assert (twins.cross, twins.cross_mean) == (None, None)
    assert torch.equal(twins.second, found.second)
    one = measure(make_problem(layer, inputs, float_inputs=[inputs[0], inputs[1] + 1]), SoloComm())
    assert one.cross is not None
    assert one.cross.any()


@pytest.mark.parametrize("correct_bias", [False, True])
@pytest.mark.parametrize("asymmetry", [1.0, 0.5, 0.0])
def test_the_quadratic_is_the_output_error(asymmetry: float, correct_bias: bool, case: Any, make_problem: Any) -> None:
    layer, inputs = case
    floats = [x + 0.3 * torch.randn_like(x) + 0.1 for x in inputs]
    problem = make_problem(layer, inputs, float_inputs=floats)
    problem = replace(problem, asymmetry=asymmetry, correct_bias=correct_bias)
    near, change = all_rows(problem)
    weight = problem.weight

    def error(rounded: Tensor) -> Tensor:
        """Mean squared error of each output, `(G, R)`; its variance where the bias takes the mean."""
        outputs = asymmetry * change @ weight.mT - near @ (rounded - weight).mT
        return outputs.var(dim=1, correction=0) if correct_bias else outputs.square().mean(dim=1)

    quadratic = with_quadratic(problem).quadratic
    assert quadratic is not None
    rounded = weight + 0.2 * torch.randn_like(weight)
    torch.testing.assert_close(quadratic.loss(rounded), error(rounded) - error(weight), rtol=1e-9, atol=1e-11)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers whose moments were taken, and not shared."""
    names: list[str] = []

    def watched(problem: LayerProblem, comm: Any) -> Moments:
        names.append(problem.name)
        return measure(problem, comm)

    monkeypatch.setattr(measure_file, "measure", watched)
    return names


def from_source(problem: LayerProblem, name: str, source: str | None) -> LayerProblem:
    return replace(problem, name=name, source=source)


def test_layers_that_read_the_same_in_the_same_way_share_moments(make_problem: Any, measured: list[str]) -> None:
    inputs, shared = [torch.randn(4, 5)], SharedMoments()
    query, key, value = (make_problem(nn.Linear(5, outputs), inputs) for outputs in (3, 3, 7))
    first = shared.measure(from_source(query, "query", "norm"), SoloComm())
    for name, problem in (("key", key), ("value", value), ("query", query)):
        assert shared.measure(from_source(problem, name, "norm"), SoloComm()) is first
    assert measured == ["query"]
    shared.measure(from_source(query, "other", "attention"), SoloComm())
    shared.measure(from_source(query, "query", "norm"), SoloComm())
    assert measured == ["query", "other", "query"]


def test_moments_are_not_shared_by_layers_of_unknown_source(make_problem: Any, measured: list[str]) -> None:
    shared = SharedMoments()
    problem = make_problem(nn.Linear(5, 3), [torch.randn(4, 5)])
    for name in ("a", "a", "b"):
        shared.measure(from_source(problem, name, None), SoloComm())
    assert measured == ["a", "b"]


BASE: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "stride": 2}
OTHER_WAYS: list[dict[str, Any]] = [
    {"stride": 1}, {"padding": 1}, {"dilation": 2}, {"groups": 2}, {"kernel_size": 2}, {"output_padding": 1},
    {"transposed": False},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHER_WAYS, ids=str)
def test_moments_are_not_shared_by_layers_that_read_in_other_ways(
    other: dict[str, Any], make_problem: Any, measured: list[str]
) -> None:
    """Pairs that differ in one thing."""
    x, shared = [torch.randn(2, 4, 8)], SharedMoments()
    second = nn.Conv1d(**BASE) if "transposed" in other else nn.ConvTranspose1d(**BASE | other)
    found = []
    for number, layer in enumerate((nn.ConvTranspose1d(**BASE), second)):
        problem = from_source(make_problem(layer, x), str(number), "x")
        found.append(shared.measure(problem, SoloComm()))
        near, _ = all_rows(problem)
        torch.testing.assert_close(found[-1].second, (near.mT @ near / near.shape[1]).double(), rtol=1e-4, atol=1e-5)
    assert measured == ["0", "1"]


def test_moments_are_not_shared_by_layers_of_other_precision(make_problem: Any, measured: list[str]) -> None:
    x, shared = [torch.randn(4, 5)], SharedMoments()
    for layer in (nn.Linear(5, 3), nn.Linear(5, 3).double()):
        shared.measure(from_source(make_problem(layer, x), str(layer.weight.dtype), "x"), SoloComm())
    assert measured == ["torch.float32", "torch.float64"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("stream", ["x_hat", "x"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_inputs_that_are_not_finite_are_reported_by_rank_0(
    world_size: int, stream: str, value: float, make_problem: Any, share: Any, run_ranks: Any
) -> None:
    inputs = [torch.randn(4, 5) for _ in range(3)]
    problem = make_problem(nn.Linear(5, 3), inputs, float_inputs=[x.clone() for x in inputs])
    getattr(problem.batches[2], stream)[1, 3] = value

    def work(comm: Any) -> tuple[str, int | None]:
        with pytest.raises(InputError) as caught:
            measure(share(problem, comm.rank, world_size), comm)
        return str(caught.value), caught.value.reported_by

    what = "quantized input" if stream == "x_hat" else "float input"
    message = (
        f"layer block.layer: its activations are not finite: {value} in its {what}, sample 1 of microbatch 2; check "
        "the weights and the calibration data"
    )
    assert run_ranks(world_size, work) == [(message, 0)] * world_size
