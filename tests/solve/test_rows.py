"""Calibration rows against unfold and torch's layers; batches are the same set of rows on any number of ranks."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_solving import with_outputs

from distributed_adaround.numerics.layers import LayerGeometry
from distributed_adaround.numerics.patches import to_patch_layout
from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve import rows as solve_rows
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.rows import BatchPlan, CalibrationRows


def flat_rows(y: Tensor) -> Tensor:
    """`(N, O, *L)` to `(rows, O)`."""
    return y.movedim(1, -1).reshape(-1, y.shape[1])


def apply_to_rows(layer: nn.Module, geometry: LayerGeometry, rows: Tensor) -> Tensor:
    """Layer outputs `(R, O)` of gathered rows `(G, R, J)`."""
    weight = to_patch_layout(geometry.to_channels(layer.weight.detach()), geometry)
    product = torch.einsum("grj,goj->rgo", rows, weight).flatten(1)
    return product if layer.bias is None else product + layer.bias.detach()


@pytest.mark.parametrize("activation", ["relu6", "identity"])
@pytest.mark.parametrize("host_budget", [10**9, 0])
def test_rows_and_targets_of_every_layer(case: Any, host_budget: int, activation: Any, make_problem: Any) -> None:
    layer, inputs = case
    floats = [x + torch.randn_like(x) for x in inputs]
    scale, shift = torch.randn(2, layer(inputs[0]).shape[1], dtype=torch.float64)
    transform = OutputTransform(scale, shift, activation)
    problem = make_problem(layer, inputs, float_inputs=floats, transform=transform, host_budget=host_budget)
    rows = CalibrationRows(problem)
    with torch.no_grad():
        outputs = torch.cat([flat_rows(layer(x)) for x in inputs])
        expected = torch.cat([flat_rows(layer(x)) for x in floats]) * scale + shift
    expected = F.relu6(expected) if activation == "relu6" else expected - (outputs * scale + shift)
    assert rows.num_rows == outputs.shape[0]
    drawn = torch.randint(rows.num_rows, (40,))
    gathered, base, targets = rows.gather(drawn)
    torch.testing.assert_close(apply_to_rows(layer, problem.geometry, gathered), outputs[drawn], rtol=1e-11, atol=1e-11)
    if activation == "identity":
        assert base is None
    else:
        torch.testing.assert_close(base, outputs[drawn], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(targets, expected[drawn], rtol=1e-12, atol=1e-12)
    per_sample = [[rows_of(layer, x)] * x.shape[0] for x in inputs]
    assert rows.sample_rows == per_sample
    # All big tensors are counted: on the host, or on disk when nothing fits there.
    tier = "host" if host_budget else "disk"
    outputs_kept = 1 if base is None else 2
    assert problem.store._used[tier] >= rows.num_rows * (outputs_kept * problem.geometry.out_channels + 1) * 8


def rows_of(layer: nn.Module, x: Tensor) -> int:
    return layer(x)[0, 0].numel()


def test_rows_equal_unfold(make_problem: Any) -> None:
    layer = nn.Conv2d(4, 3, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1)).double()
    inputs = [torch.randn(2, 4, 6, 7).double(), torch.randn(3, 4, 5, 9).double()]
    rows = CalibrationRows(make_problem(layer, inputs))
    columns = [F.unfold(x, (2, 3), (2, 1), (1, 0), (1, 2)).transpose(1, 2).reshape(-1, 4, 6) for x in inputs]
    expected = torch.cat(columns).transpose(1, 2).reshape(1, -1, 24)  # (row, kernel, channel)
    gathered, _, _ = rows.gather(torch.arange(rows.num_rows))
    assert torch.equal(gathered, expected)


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("kind", ["linear", "linear-flat", "conv1d"])
def test_masked_rows_are_not_there(kind: str, activation: Any, make_problem: Any) -> None:
    masks = [torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]), torch.tensor([[0, 0, 0], [1, 0, 1]]), None]
    shapes = [(2, 4), (2, 3), (1, 2)]
    if kind == "conv1d":
        layer: nn.Module = nn.Conv1d(5, 3, 3, padding=1).double()
        inputs = [torch.randn(n, 5, t).double() for n, t in shapes]
    else:
        layer = nn.Linear(5, 3).double()
        inputs = [torch.randn(n, t, 5).double() for n, t in shapes]
        inputs = [x.reshape(-1, 5) if kind == "linear-flat" else x for x in inputs]
    floats = [x + torch.randn_like(x) for x in inputs]
    transform = OutputTransform(activation=activation)
    problem = make_problem(layer, inputs, float_inputs=floats, masks=masks, batch_sizes=[2, 2, 1], transform=transform)
    rows = CalibrationRows(problem)
    assert rows.sample_rows == [[2, 3], [0, 2], [2]]
    keep = torch.cat(
        [(torch.ones(n, t) if m is None else m).flatten() for (n, t), m in zip(shapes, masks, strict=True)]
    )

    def kept_rows(x: list[Tensor]) -> Tensor:
        outputs = [layer(part).detach() for part in x]
        outputs = [y.movedim(1, -1) if kind == "conv1d" else y for y in outputs]
        return torch.cat([y.reshape(-1, 3) for y in outputs])[keep.bool()]

    quantized, exact = kept_rows(inputs), kept_rows(floats)
    gathered, base, targets = rows.gather(torch.arange(rows.num_rows))
    torch.testing.assert_close(apply_to_rows(layer, problem.geometry, gathered), quantized, rtol=1e-12, atol=1e-12)
    if activation == "identity":
        assert base is None
        torch.testing.assert_close(targets, exact - quantized, rtol=1e-12, atol=1e-12)
    else:
        torch.testing.assert_close(base, quantized, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(targets, F.relu(exact), rtol=1e-12, atol=1e-12)


def test_pooled_rows_ignore_the_mask(make_problem: Any) -> None:
    problem = make_problem(nn.Linear(5, 3), [torch.randn(2, 5)], masks=[torch.tensor([[1, 0, 0], [0, 0, 0]])])
    rows = CalibrationRows(problem)
    assert rows.sample_rows == [[1, 1]]
    assert rows.num_rows == 2


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_rows_do_not_share_memory_with_activations(activation: Any, make_problem: Any) -> None:
    transform = OutputTransform(activation=activation)
    problem = make_problem(nn.Linear(5, 3), [torch.randn(2, 5)], transform=transform)
    rows = CalibrationRows(problem)
    inputs, base, targets = (None if t is None else t.clone() for t in rows.gather(torch.arange(2)))
    problem.batches[0].x_hat.fill_(9)
    problem.batches[0].y.fill_(9)
    again = rows.gather(torch.arange(2))
    assert torch.equal(again[0], inputs)
    assert torch.equal(again[2], targets)
    assert again[1] is None if activation == "identity" else torch.equal(again[1], base)


@pytest.mark.parametrize("same_streams", [False, True])
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_other_dtypes_become_the_compute_dtype(activation: Any, same_streams: bool, make_problem: Any) -> None:
    x = torch.randn(3, 5).bfloat16()
    transform = OutputTransform(activation=activation)
    problem = make_problem(nn.Linear(5, 2), [x], float_inputs=[x if same_streams else x.clone()], transform=transform)
    # The float layer's outputs have the model's dtype.
    (batch,) = problem.batches
    problem = with_outputs(problem, [batch.y.bfloat16()])
    y = problem.batches[0].y.float()
    inputs, base, targets = CalibrationRows(problem).gather(torch.arange(3))
    assert inputs.dtype == targets.dtype == torch.float32
    assert torch.equal(inputs[0], x.float())
    # Where both streams are the same their outputs are too, to the bit.
    expected = y if same_streams else F.linear(x.float(), problem.weight[0], problem.bias)
    if activation == "identity":
        assert base is None
        assert torch.equal(targets, y - expected)
    else:
        assert torch.equal(base, expected)
        assert torch.equal(targets, F.relu(y))


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_a_rank_without_microbatches(case: Any, activation: Any, make_problem: Any, share: Any) -> None:
    layer, inputs = case
    problem = share(make_problem(layer, inputs, transform=OutputTransform(activation=activation)), 3, 4)
    assert problem.batches == []
    rows = CalibrationRows(problem)
    gathered, base, targets = rows.gather(torch.empty(0, dtype=torch.int64))
    geometry = problem.geometry
    assert rows.sample_rows == []
    assert gathered.shape == (geometry.groups, 0, geometry.inputs_per_output)
    assert targets.shape == (0, geometry.out_channels)
    assert base is None if activation == "identity" else base.shape == (0, geometry.out_channels)


@pytest.mark.parametrize("streams", ["same", "others"])
@pytest.mark.parametrize("asymmetry", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("activation", ["relu6", "identity"])
def test_errors_are_those_of_output_errors(
    case: Any, activation: Any, asymmetry: float, streams: str, make_problem: Any, share: Any, run_ranks: Any
) -> None:
    layer, inputs = case
    floats = inputs if streams == "same" else [x + 0.3 * torch.randn_like(x) for x in inputs]
    scale, shift = torch.randn(2, layer(inputs[0]).shape[1], dtype=torch.float64)
    transform = OutputTransform(scale, shift, activation)
    problem = make_problem(layer, inputs, float_inputs=floats, transform=transform)
    problem = replace(problem, asymmetry=asymmetry)
    candidates = [problem.weight + size * torch.randn_like(problem.weight) for size in (0.0, 0.01, 1.0)]
    expected = output_errors(problem, candidates, SoloComm())

    def work(comm: Any) -> Any:
        local = share(problem, comm.rank, comm.world_size)
        rows = CalibrationRows(local)
        return torch.stack([rows.errors(weight, comm) for weight in candidates])

    for found in run_ranks(2, work):
        torch.testing.assert_close(found, expected.error / expected.num_rows, rtol=1e-10, atol=1e-20)


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_errors_without_padding(activation: Any, make_problem: Any) -> None:
    masks = [torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]), torch.tensor([[0, 0, 0], [1, 0, 1]]), None]
    inputs = [torch.randn(n, t, 5).double() for n, t in ((2, 4), (2, 3), (1, 2))]
    floats = [x + torch.randn_like(x) for x in inputs]
    transform = OutputTransform(activation=activation)
    problem = make_problem(nn.Linear(5, 3).double(), inputs, float_inputs=floats, masks=masks, transform=transform)
    problem = replace(problem, asymmetry=0.5)
    candidates = [problem.weight * 0.9, problem.weight * 1.2]
    found = torch.stack([CalibrationRows(problem).errors(weight, SoloComm()) for weight in candidates])
    expected = output_errors(problem, candidates, SoloComm())
    torch.testing.assert_close(found, expected.error / expected.num_rows, rtol=1e-12, atol=0)
    assert expected.num_rows == 9


# ---- batches


@pytest.fixture(params=[20, 1 << 14], ids=["blocks of few steps", "one block"])
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps whose rows are drawn together."""
    monkeypatch.setattr(solve_rows, "_ROWS_AT_ONCE", request.param)


class NumberedRows:
    """A token layer whose one input feature is the row's number over the whole set; 7 uneven microbatches."""

    SHAPES = ((2, 3), (1, 5), (3, 2), (2, 1), (1, 1), (2, 4), (1, 3))

    def __init__(self, make_problem: Any, *, masked: bool = False) -> None:
        masks: list[Tensor | None] = [None] * len(self.SHAPES)
        if masked:
            masks = [torch.ones(shape) for shape in self.SHAPES]
            masks[1] = torch.tensor([[0, 0, 1, 1, 0]])
            masks[2] = torch.tensor([[0, 0], [1, 1], [0, 0]])
            masks[4] = torch.zeros(1, 1)
        keep = [torch.ones(s) if m is None else m for s, m in zip(self.SHAPES, masks, strict=True)]
        number, inputs, self.samples = 0, [], []
        for kept in keep:
            x = torch.full((*kept.shape, 1), -1.0)
            for sample in range(kept.shape[0]):
                ids = []
                for token in range(kept.shape[1]):
                    if kept[sample, token]:
                        x[sample, token] = number
                        ids.append(number)
                        number += 1
                self.samples.append(ids)
            inputs.append(x)
        self.num_rows = number
        self.problem = make_problem(nn.Linear(1, 1), inputs, masks=masks)


def batches(
    problem: Any, comm: Any, steps: range, batch_size: int, unit: Any, share: Any = None
) -> list[tuple[list[int], int]]:
    """Numbers of the rows this rank gathers at every step, and the size of the global batch."""
    local = problem if share is None else share(problem, comm.rank, comm.world_size)
    rows = CalibrationRows(local)
    plan = BatchPlan(local, rows.sample_rows, comm, batch_size, unit)
    drawn = []
    for step in steps:
        ids, total = plan.batch(step)
        drawn.append((rows.gather(ids)[0].flatten().int().tolist(), total))
    return drawn


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("unit", ["rows", "samples"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 9])
def test_ranks_together_hold_the_global_batch(
    world_size: int, unit: str, masked: bool, make_problem: Any, share: Any, run_ranks: Any
) -> None:
    problem = NumberedRows(make_problem, masked=masked).problem
    steps = range(25)
    alone = batches(problem, SoloComm(), steps, 6, unit)
    parts = run_ranks(world_size, lambda comm: batches(problem, comm, steps, 6, unit, share))
    for step in steps:
        together = Counter(row for part in parts for row in part[step][0])
        assert together == Counter(alone[step][0])
        assert {part[step][1] for part in parts} == {alone[step][1]} == {together.total()}


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("unit", ["rows", "samples"])
def test_batches_are_a_function_of_seed_name_and_step(unit: str, make_problem: Any) -> None:
    problem = NumberedRows(make_problem).problem
    torch.manual_seed(123)
    first = batches(problem, SoloComm(), range(10), 4, unit)
    torch.manual_seed(321)
    state = torch.get_rng_state()
    # Another order, another state of the global generator.
    again = batches(problem, SoloComm(), range(9, -1, -1), 4, unit)[::-1]
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(rows) for rows, _ in first}) > 5
    assert batches(replace(problem, seed=1), SoloComm(), range(10), 4, unit) != first
    assert batches(replace(problem, name="other"), SoloComm(), range(10), 4, unit) != first


@pytest.mark.usefixtures("rows_at_once")
def test_unit_rows_draws_each_row_equally_often(make_problem: Any) -> None:
    numbered = NumberedRows(make_problem, masked=True)
    drawn = batches(numbered.problem, SoloComm(), range(2000), 8, "rows")
    counts = Counter(row for rows, _ in drawn for row in rows)
    mean = 2000 * 8 / numbered.num_rows
    assert sorted(counts) == list(range(numbered.num_rows))
    # Five standard deviations of a binomial.
    assert all(abs(count - mean) < 5 * mean**0.5 for count in counts.values())
    assert {total for _, total in drawn} == {8}


def test_unit_samples_draws_whole_samples_once_each(make_problem: Any) -> None:
    numbered = NumberedRows(make_problem, masked=True)
    sample_of = {row: number for number, rows in enumerate(numbered.samples) for row in rows}
    seen: Counter[int] = Counter()
    for rows, total in batches(numbered.problem, SoloComm(), range(300), 5, "samples"):
        assert len(rows) == len(set(rows)) == total
        samples = {sample_of[row] for row in rows}
        assert len(samples) <= 5  # drawn samples may be padding only
        assert sorted(rows) == sorted(row for sample in samples for row in numbered.samples[sample])
        seen.update(samples)
    assert set(seen) == set(sample_of.values())


def test_the_draw_itself(make_problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of 4 rows from each generator, which is seeded by seed, name and the number of the three."""
    monkeypatch.setattr(solve_rows, "_ROWS_AT_ONCE", 12)
    numbered = NumberedRows(make_problem)
    drawn = [rows for rows, _ in batches(numbered.problem, SoloComm(), range(9), 4, "rows")]
    for block in range(3):
        digest = hashlib.sha256(f"0/block.layer/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        expected = torch.randint(numbered.num_rows, (3, 4), generator=generator)
        assert drawn[3 * block : 3 * block + 3] == expected.tolist()


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize(("unit", "batch_size"), [("rows", 1000), ("samples", 12), ("samples", 500)])
def test_a_batch_of_everything(unit: str, batch_size: int, make_problem: Any) -> None:
    numbered = NumberedRows(make_problem)
    for rows, total in batches(numbered.problem, SoloComm(), range(3), batch_size, unit):
        assert sorted(rows) == list(range(numbered.num_rows))
        assert total == numbered.num_rows


def test_rows_that_belong_to_no_sample_are_samples_of_their_own(make_problem: Any) -> None:
    # 6 rows, a microbatch of 4 samples: the model mixes samples before this layer.
    problem = make_problem(nn.Linear(1, 1), [torch.arange(6.0)[:, None]], batch_sizes=[4])
    assert CalibrationRows(problem).sample_rows == [[1] * 6]
    assert all(len(rows) == 2 for rows, _ in batches(problem, SoloComm(), range(5), 2, "samples"))
