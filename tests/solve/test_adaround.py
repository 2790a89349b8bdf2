"""The solver against a plain single-process reference: torch's layers, autograd and torch's own Adam, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_formats import FLOAT32
from toy_solving import rounded, solve, with_outputs

from distributed_adaround.errors import InputError
from distributed_adaround.numerics import soft_rounding as rounding
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.patches import from_patch_layout, to_patch_layout
from distributed_adaround.numerics.soft_rounding import OutputTransform, SoftRounding
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve.adaround import MinibatchSolver, channel_weights
from distributed_adaround.solve.evaluate import output_errors
from distributed_adaround.solve.learner import add_regularizer, fill_bucket
from distributed_adaround.solve.problem import Monitor
from distributed_adaround.solve.rows import BatchPlan, CalibrationRows
from distributed_adaround.spec.rounding import RoundingSpec

ACTIVATIONS = {"identity": lambda z: z, "relu": F.relu, "relu6": F.relu6}


def minibatch(num_steps: int, **changes: Any) -> MinibatchSolver:
    defaults: dict[str, Any] = {"batch_size": 32, "lr": 1e-2, "normalization": "sum", "reg_param": 0.01}
    return MinibatchSolver(RoundingSpec(max_iter=num_steps, **(defaults | changes)))


class Reference:
    """The loss of one layer as a function of alpha in the weight's own shape, written with torch alone."""

    def __init__(self, layer: nn.Module, problem: Any) -> None:
        self.layer, self.transform = layer, problem.transform
        weight, scale = layer.weight.detach(), problem.grid.scale.flatten()
        if problem.geometry.transposed:
            # weight (C_in, O/G, ...): input channel c belongs to group c // (C_in/G).
            groups, per_group = layer.groups, weight.shape[1]
            group = torch.arange(weight.shape[0]) // (weight.shape[0] // groups)
            scale = scale[group[:, None] * per_group + torch.arange(per_group)]
        scale = scale.reshape(*scale.shape, *(1,) * (weight.dim() - scale.dim()))
        below = torch.floor(weight / scale)
        qmin, qmax = problem.grid.qmin, problem.grid.qmax
        self.lo, self.hi = below.clamp(qmin, qmax) * scale, (below + 1).clamp(qmin, qmax) * scale
        self.inputs = [batch.x_hat for batch in problem.batches]
        with torch.no_grad():
            self.targets = self._through([layer(batch.x) for batch in problem.batches])

    def _through(self, outputs: list[Tensor]) -> Tensor:
        """f(y), all rows of all microbatches, `(R, O)`."""
        rows = torch.cat([y.movedim(1, -1).reshape(-1, y.shape[1]) for y in outputs])
        if self.transform.scale is not None:
            rows = rows * self.transform.scale + self.transform.shift
        return ACTIVATIONS[self.transform.activation](rows)

    def initial_alpha(self) -> Tensor:
        width = torch.where(self.hi > self.lo, self.hi - self.lo, 1.0)
        h = ((self.layer.weight.detach() - self.lo) / width).clamp(0, 1)
        return torch.logit((h + 0.1) / 1.2)

    def soft_weight(self, alpha: Tensor) -> Tensor:
        return self.lo + (torch.sigmoid(alpha) * 1.2 - 0.1).clamp(0, 1) * (self.hi - self.lo)

    def losses(
        self, alpha: Tensor, rows: Tensor, channel_weight: Tensor, reg: float, beta: float
    ) -> tuple[Tensor, Tensor]:
        h = (torch.sigmoid(alpha) * 1.2 - 0.1).clamp(0, 1)
        weight = self.lo + h * (self.hi - self.lo)
        outputs = self._through([torch.func.functional_call(self.layer, {"weight": weight}, x) for x in self.inputs])
        data = ((outputs[rows] - self.targets[rows]).square() * channel_weight).sum() / rows.numel()
        return data, reg * (1 - (2 * h - 1).abs().pow(beta)).sum()


def build(case: Any, make_problem: Any, *, affine: bool, activation: Any) -> tuple[nn.Module, Any]:
    layer, inputs = case
    layer.requires_grad_(False)
    floats = [x + 0.2 * torch.randn_like(x) for x in inputs]
    scale, shift = (torch.randn(2, layer(inputs[0]).shape[1], dtype=torch.float64) * 2) if affine else (None, None)
    problem = make_problem(layer, inputs, float_inputs=floats, transform=OutputTransform(scale, shift, activation))
    return layer, problem


def as_solved(problem: Any) -> OutputTransform:
    """What the solver applies to the outputs of `CalibrationRows`: without an activation they are differences."""
    return problem.transform.linear_part() if problem.transform.activation == "identity" else problem.transform


def soft_rounding(problem: Any) -> SoftRounding:
    low, high = problem.grid.neighbours(problem.weight)
    weights = (problem.weight, problem.grid.dequantize(low), problem.grid.dequantize(high))
    return SoftRounding(*(to_patch_layout(weight, problem.geometry) for weight in weights))


@pytest.mark.parametrize(
    ("world_size", "affine", "activation"),
    [
        (1, False, "identity"),
        (3, True, "identity"),
        (5, False, "identity"),
        (5, True, "relu"),
        (3, True, "relu6"),
    ],
)
def test_bucket_is_the_gradient_of_the_loss(
    world_size: int, affine: bool, activation: str, case: Any, make_problem: Any, share: Any, run_ranks: Any
) -> None:
    layer, problem = build(case, make_problem, affine=affine, activation=activation)
    geometry = problem.geometry
    reference = Reference(layer, problem)
    channel_weight = torch.rand(geometry.out_channels, dtype=torch.float64) + 0.5
    alpha = (torch.randn(geometry.weight_shape, dtype=torch.float64) * 2).requires_grad_()
    # On one rank the rows of a batch have the numbers of the reference.
    drawn, count = BatchPlan(problem, CalibrationRows(problem).sample_rows, SoloComm(), 5, "rows").batch(3)
    assert count == drawn.numel() == 5
    data, regularizer = reference.losses(alpha, drawn, channel_weight, 0.3, 5.5)
    (expected,) = torch.autograd.grad(data + regularizer, alpha)

    def work(comm: Any) -> tuple[Tensor, Tensor]:
        local = share(problem, comm.rank, world_size)
        rows = CalibrationRows(local)
        plan = BatchPlan(local, rows.sample_rows, comm, 5, "rows")
        soft = soft_rounding(local)
        soft.alpha.copy_(to_patch_layout(geometry.to_channels(alpha.detach()), geometry))
        soft.refresh()
        bucket = torch.full((alpha.numel() + 3,), 123.0, dtype=torch.float64)  # whatever the last step left
        ids, total = plan.batch(3)
        fill_bucket(bucket, soft, *rows.gather(ids), as_solved(local), channel_weight / total)
        if not ids.numel():
            assert not bucket.any(), "a rank without rows adds nothing"
        add_regularizer(bucket, soft, 0.3, 5.5, comm.rank, comm.world_size)
        comm.all_reduce(bucket)
        gradient = bucket[:-3].view_as(soft.alpha)
        rounding._to_gradient_by_alpha(gradient, soft.sigmoid)
        return geometry.from_channels(from_patch_layout(gradient, geometry)), bucket[-3:]

    results = run_ranks(world_size, work)
    for gradient, tail in results:
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(tail[0], data.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(tail[1], regularizer.detach(), rtol=1e-9, atol=0)
        assert tail[2] == 0


def test_bucket_without_regularizer_during_the_warm_up() -> None:
    soft = SoftRounding(torch.full((1, 2, 3), 0.4), torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    bucket = torch.zeros(9)
    add_regularizer(bucket, soft, 0.0, 20.0, 0, 1)
    assert not bucket.any()


def test_a_loss_that_is_not_finite_is_flagged() -> None:
    soft = SoftRounding(torch.full((1, 2, 3), 0.4), torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    soft.alpha.fill_(1.0)  # at the start the difference is 0, and a large input makes no loss
    soft.refresh()
    bucket = torch.zeros(9)
    for value, flag in ((1.0, 0), (torch.inf, 1), (torch.nan, 1), (1e30, 1)):
        inputs, finite, filled = torch.ones(1, 4, 3), torch.zeros(4, 2), torch.full((4, 2), value)
        for given in (
            (inputs * value, None, finite),
            (inputs * value, finite, finite),
            (inputs, filled, finite),
            (inputs, None, filled),
        ):
            fill_bucket(bucket, soft, *given, OutputTransform(), torch.ones(2))
            assert bucket[-1] == flag


@pytest.mark.parametrize("normalization", ["sum", "mean", "nearest"])
def test_channel_weights(normalization: Any) -> None:
    nearest = torch.tensor([0.2, 0.0, 0.5], dtype=torch.float64)
    expected = {"sum": [1.0, 1, 1], "mean": [1 / 3] * 3, "nearest": [8 / 0.2, 0, 8 / 0.5]}[normalization]
    assert channel_weights(nearest, normalization, 24).tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("normalization", ["sum", "mean", "nearest"])
@pytest.mark.parametrize("unit", ["rows", "samples"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_whole_solver_is_plain_adam_on_the_loss(
    world_size: int,
    unit: Any,
    normalization: Any,
    activation: Any,
    make_problem: Any,
    share: Any,
    run_ranks: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounding, "_PIECE", 19)  # of 108 weights
    layer = nn.Conv2d(4, 6, 3, stride=2, groups=2).double()
    inputs = [torch.randn(n, 4, s, s).double() for n, s in ((2, 5), (1, 7), (3, 5), (2, 6))]
    layer, problem = build((layer, inputs), make_problem, affine=True, activation=activation)
    num_steps = 40
    changes = {"batch_size": 5, "batch_unit": unit, "normalization": normalization}
    solver = minibatch(num_steps, lr=0.05, reg_param=0.02, **changes)
    nearest = output_errors(problem, [problem.grid.dequantize(problem.grid.quantize(problem.weight))], SoloComm())

    reference = Reference(layer, problem)
    per_row = nearest.error[0] / nearest.num_rows
    relative = torch.where(per_row > 0, 18 / per_row, 0.0)  # the ReLU may silence a whole channel
    weights = {"sum": torch.ones(6), "mean": torch.ones(6) / 6, "nearest": relative}[normalization].double()
    plan = BatchPlan(problem, CalibrationRows(problem).sample_rows, SoloComm(), 5, unit)
    alpha = reference.initial_alpha().requires_grad_()
    eps = 1e-2 if normalization == "nearest" else 1e-8
    adam = torch.optim.Adam([alpha], lr=0.05, betas=(0.9, 0.999), eps=eps, foreach=False)
    for step in range(num_steps):
        progress = max(0.0, step - 8) / (num_steps - 1 - 8)
        beta = 2 + 9 * (1 + math.cos(math.pi * progress))
        data, reg = reference.losses(alpha, plan.batch(step)[0], weights, 0.02 if step >= 8 else 0.0, beta)
        loss = data + reg
        adam.zero_grad()
        loss.backward()
        adam.step()

    seen = []

    def work(comm: Any) -> Any:
        local = share(problem, comm.rank, world_size)
        watching = Monitor(lambda step, loss: seen.append((step, loss)))
        return solver.solve(local, comm, watching)

    solutions = run_ranks(world_size, work)
    expected = problem.geometry.to_channels(reference.soft_weight(alpha.detach()))
    for solution in solutions:
        torch.testing.assert_close(solution.soft_weight, expected, rtol=1e-6, atol=1e-8)
        assert torch.equal(solution.codes, solutions[0].codes)
    up = problem.geometry.to_channels(torch.sigmoid(alpha.detach()) >= 0.5)
    low, high = problem.grid.neighbours(problem.weight)
    assert torch.equal(solutions[0].codes, torch.where(up, high, low))
    assert (solutions[0].codes != problem.grid.quantize(problem.weight)).any(), "the problem is too easy to test much"
    assert [step for step, _ in seen] == [num_steps] * world_size
    assert seen[0][1] == pytest.approx(loss.item(), rel=1e-6)


torch.manual_seed(0)  # layers made while modules load come before the fixture that seeds each test
EQUAL_INPUTS = {
    "linear": (nn.Linear(96, 80), (50, 96)),
    "conv": (nn.Conv2d(24, 40, 3, padding=1), (24, 9, 11)),
    "conv-strided": (nn.Conv2d(24, 40, (3, 5), stride=2, padding=(1, 2)), (24, 14, 14)),
    "conv-grouped": (nn.Conv2d(24, 48, 3, padding=1, groups=4, bias=False), (24, 9, 9)),
    "depthwise": (nn.Conv2d(24, 24, 3, padding=1, groups=24), (24, 10, 10)),
    "conv1d-dilated": (nn.Conv1d(24, 16, 3, padding=2, dilation=2), (24, 30)),
    "transposed": (nn.ConvTranspose2d(24, 20, 4, stride=2, padding=1, groups=2), (24, 6, 6)),
}


def first_layer(kind: str, make_problem: Any, *, clips: bool) -> Any:
    """In float32, float and quantized inputs the same tensors: unless the grid clips, learning starts without error."""
    layer, size = EQUAL_INPUTS[kind]
    inputs = [F.avg_pool1d(torch.randn(n, *size).flatten(1), 3, 1, 1).view(n, *size) for n in (2, 1, 3, 2)]
    problem = make_problem(layer, inputs)
    ends = problem.weight.abs().amax(dim=2, keepdim=True)
    assert (problem.grid.scale * 3 < ends).any(), "the grid that is chosen does clip"
    return problem if clips else replace(problem, grid=Grid(ends / 2.9, torch.zeros_like(ends), -4, 3, FLOAT32))


@pytest.mark.parametrize("transform", ["nothing", "batch norm", "batch norm and relu"])
@pytest.mark.parametrize("kind", EQUAL_INPUTS)
def test_the_first_gradient_of_equal_inputs_is_exactly_zero(kind: str, transform: str, make_problem: Any) -> None:
    problem = first_layer(kind, make_problem, clips=False)
    channels = problem.geometry.out_channels
    if transform != "nothing":
        activation: Any = "relu" if "relu" in transform else "identity"
        # A positive shift, for no channel to be silent.
        problem = replace(problem, transform=OutputTransform(torch.randn(channels), torch.rand(channels), activation))
    rows = CalibrationRows(problem)
    soft = soft_rounding(problem)
    bucket = torch.full((soft.alpha.numel() + 3,), 123.0)
    everything = rows.gather(torch.arange(rows.num_rows))
    fill_bucket(bucket, soft, *everything, as_solved(problem), torch.rand(channels) + 0.5)
    assert not bucket.any(), f"{int(bucket.count_nonzero())} values, up to {float(bucket.abs().max())}"
    # It is the start that makes no error, not the data.
    soft.alpha.add_(0.1)
    soft.refresh()
    fill_bucket(bucket, soft, *everything, as_solved(problem), torch.rand(channels) + 0.5)
    assert bucket[:-3].count_nonzero() > 0.8 * (bucket.numel() - 3)


@pytest.mark.parametrize(
    ("kind", "clips", "normalization", "reg_param"),
    [
        ("linear", True, "sum", 0.05),
        ("linear", False, "nearest", 3.0),
        ("conv-grouped", False, "sum", 0.05),
        ("conv-grouped", True, "mean", 0.05),
        ("depthwise", False, "mean", 0.05),
        ("depthwise", True, "nearest", 3.0),
    ],
)
def test_equal_inputs_on_any_number_of_ranks(
    kind: str, clips: bool, normalization: Any, reg_param: float, make_problem: Any, share: Any, run_ranks: Any
) -> None:
    problem = first_layer(kind, make_problem, clips=clips)
    # Few rows a batch: products of other sizes on each number of ranks, so another rounding noise.
    solver = minibatch(60, batch_size=16, lr=0.05, normalization=normalization, reg_param=reg_param)
    alone = rounded(problem, solver)
    assert alone.flipped > 0, "as nearest rounding: nothing was learned"
    assert not alone.kept_nearest
    for world_size in (3, 5):  # 4 microbatches: one of five ranks is empty
        results = run_ranks(
            world_size,
            lambda comm: rounded(share(problem, comm.rank, comm.world_size), solver, comm),
        )
        for result in results:
            assert torch.equal(result.codes, results[0].codes)
            assert result.nearest_error == alone.nearest_error
            assert result.soft_error == pytest.approx(alone.soft_error, rel=1e-4)
            assert result.hard_error == pytest.approx(alone.hard_error, rel=1e-4)


def correlated_problem(make_problem: Any, dtype: torch.dtype, size: float = 1.0) -> Any:
    """Inputs with few directions: nearest rounding is far from the best here."""
    mixing = torch.randn(4, 24) * size
    inputs = [torch.randn(64, 4) @ mixing + 0.1 * size * torch.randn(64, 24) for _ in range(6)]
    layer = nn.Linear(24, 10).to(dtype)
    return make_problem(layer, [x.to(dtype) for x in inputs])


@pytest.mark.parametrize(("normalization", "reg_param"), [("sum", 0.03), ("mean", 0.01), ("nearest", 3.0)])
def test_clearly_better_than_nearest_on_correlated_inputs(
    normalization: Any, reg_param: float, make_problem: Any
) -> None:
    problem = correlated_problem(make_problem, torch.float32)
    grid = problem.grid
    nearest = output_errors(problem, [grid.dequantize(grid.quantize(problem.weight))], SoloComm())
    solution = solve(minibatch(600, normalization=normalization, lr=2e-2, reg_param=reg_param), problem)
    hard = output_errors(problem, [grid.dequantize(solution.codes)], SoloComm())
    assert hard.relative(0) < 0.4 * nearest.relative(0)
    assert solution.unsettled < 0.1
    low, high = grid.neighbours(problem.weight)
    assert ((solution.codes == low) | (solution.codes == high)).all()


def test_same_codes_in_float64_on_any_number_of_ranks(make_problem: Any, share: Any, run_ranks: Any) -> None:
    problem = correlated_problem(make_problem, torch.float64)
    solver = minibatch(150, batch_size=16)
    alone = solve(solver, problem)
    for world_size in (2, 3, 8):  # 6 microbatches: two of eight ranks are empty
        solutions = run_ranks(world_size, lambda comm: solve(solver, share(problem, comm.rank, comm.world_size), comm))
        for solution in solutions:
            assert torch.equal(solution.codes, alone.codes)
            assert solution.unsettled == alone.unsettled
            torch.testing.assert_close(solution.soft_weight, alone.soft_weight, rtol=1e-7, atol=1e-9)


def test_progress_every_hundred_steps_and_at_the_end(make_problem: Any) -> None:
    problem = correlated_problem(make_problem, torch.float32)
    seen: list[int] = []
    solve(minibatch(250), problem, monitor=Monitor(lambda step, loss: seen.append(step)))
    assert seen == [100, 200, 250]


def test_all_ranks_stop_at_a_loss_that_is_not_finite(
    make_problem: Any, share: Any, run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured on all data is finite; then a row of one rank is not."""
    problem = correlated_problem(make_problem, torch.float32)
    gather = CalibrationRows.gather

    def spoiled(rows: CalibrationRows, ids: Tensor) -> Any:
        inputs, *others = gather(rows, ids)
        if any(batch.index == 4 for batch in rows._problem.batches):
            inputs[:, :1] = torch.nan
        return inputs, *others

    monkeypatch.setattr(CalibrationRows, "gather", spoiled)

    def work(comm: Any) -> str:
        local = share(problem, comm.rank, comm.world_size)
        with pytest.raises(InputError) as caught:
            solve(minibatch(300, batch_size=200), local, comm)
        return str(caught.value)

    messages = run_ranks(3, work)
    assert set(messages) == {
        "layer block.layer: the loss is not finite by step 100; lower rounding.lr (now 0.01) or check the calibration "
        "data"
    }


@pytest.mark.parametrize("size", [1e-21, 1e-12, 1e12])
def test_activations_of_any_size(size: float, make_problem: Any) -> None:
    problem = correlated_problem(make_problem, torch.float32, size)
    problem = replace(problem, bias=None)
    problem = with_outputs(problem, [batch.x_hat @ problem.weight[0].T for batch in problem.batches])
    solution = solve(minibatch(100, normalization="nearest"), problem)
    assert torch.isfinite(solution.soft_weight).all()
    assert torch.isfinite(solution.codes).all()


def test_batches_of_padding_only_change_nothing_but_the_regularizer(make_problem: Any) -> None:
    layer = nn.Linear(3, 2).double()
    masks = [torch.tensor([[0, 0], [0, 0], [0, 1]])]
    problem = make_problem(layer, [torch.randn(3, 2, 3).double()], masks=masks)
    solution = solve(minibatch(20, batch_size=1, batch_unit="samples", reg_param=0.0), problem)
    assert torch.isfinite(solution.soft_weight).all()
