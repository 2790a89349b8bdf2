"""Channels in blocks: each one once, the same blocks on any number of ranks, codes and scales back in their places."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_formats import layer_format
from toy_solving import with_quadratic

from distributed_adaround import formats
from distributed_adaround.numerics.ranges import choose_grid
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve import by_channel
from distributed_adaround.solve.by_channel import (
    ChannelProblem,
    ChannelSolution,
    channel_blocks,
    solve_by_channel,
)
from distributed_adaround.solve.problem import LayerProblem, Monitor
from distributed_adaround.solve.record import LayerFigures, LayerRecord

SIZES = [(1, 1), (1, 255), (1, 256), (1, 257), (1, 1000), (3, 100), (7, 256), (2, 513), (300, 1), (1000, 2), (5, 3)]


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize(("groups", "channels"), SIZES)
def test_blocks_cover_every_channel_once_and_are_of_one_size(groups: int, channels: int, device_type: str) -> None:
    size = {"cpu": 256}.get(device_type, 1024)
    blocks = list(channel_blocks(groups, channels, by_channel._BLOCK_CHANNELS.get(device_type, 1024)))
    count = torch.zeros(groups, channels)
    for some, cut in blocks:
        count[some, cut] += 1
        assert count[some, cut].numel() <= size
    assert (count == 1).all()
    # No more blocks than needed, up to what groups and channels leave over.
    assert len(blocks) <= 2 * -(-groups * channels // size) + (groups if channels > size / 2 else 0)


# Layer, strategy and size of the groups of inputs that share a scale.
CASES: dict[str, tuple[nn.Module, str, int | None]] = {
    "linear": (nn.Linear(6, 7), "channel", None),
    "linear per group": (nn.Linear(6, 7), "group", 2),
    "linear per tensor": (nn.Linear(6, 7), "tensor", None),
    "conv in groups": (nn.Conv1d(6, 9, 2, groups=3), "channel", None),
    "conv in groups, per group": (nn.Conv1d(6, 9, 2, groups=3), "group", 2),
    "depthwise": (nn.Conv1d(6, 6, 3, groups=6), "channel", None),
    "transposed in groups": (nn.ConvTranspose1d(6, 8, 2, groups=2), "group", 3),
}


@pytest.fixture(params=CASES)
def problem(request: pytest.FixtureRequest, make_problem: Any, monkeypatch: pytest.MonkeyPatch) -> LayerProblem:
    """Blocks of 2 channels, codes -3 .. 4, and a weight that tells the place of each of its entries."""
    layer, strategy, group_size = CASES[request.param]
    monkeypatch.setattr(by_channel, "_BLOCK_CHANNELS", {"cpu": 2})
    shape = (2, 6) if isinstance(layer, nn.Linear) else (2, 6, 5)
    problem = make_problem(layer, [torch.randn(shape) for _ in range(3)])
    fmt = layer_format(
        "int4", quant_min=-3, quant_max=4, symmetric=False, strategy=strategy, group_size=group_size, observer="minmax"
    )
    grid = choose_grid(problem.weight, fmt)
    places = torch.arange(problem.weight.numel(), dtype=torch.float32).view_as(problem.weight)
    return with_quadratic(replace(problem, weight=places, grid=grid))


def codes_of(places: Tensor) -> Tensor:
    return places % 8 - 3


def check_part(problem: LayerProblem, part: ChannelProblem, start: Tensor | None) -> None:
    """What a block gets is the part of the whole with its channels."""
    geometry, weight = problem.geometry, part.quadratic.weight
    channels = weight[:, :, 0].flatten().long() // geometry.inputs_per_output
    assert weight.shape[2] == geometry.inputs_per_output
    assert channels.numel() <= 2
    assert torch.equal(weight, problem.weight[part.place])
    assert problem.quadratic is not None
    assert torch.equal(part.quadratic.second, problem.quadratic.second[part.place[0]])
    scale, zero_point = problem.grid.scale, problem.grid.zero_point
    assert part.grid.per_channel == problem.grid.per_channel == (scale.numel() > 1)
    if scale.numel() > 1:
        assert torch.equal(part.grid.scale.flatten(0, 1), scale.flatten(0, 1)[channels])
        assert torch.equal(part.grid.zero_point.flatten(0, 1), zero_point.flatten(0, 1)[channels])
    else:
        assert torch.equal(part.grid.scale, scale)
    if start is None:
        assert part.levels is None
    else:
        assert part.levels is not None
        runs = scale.repeat_interleave(geometry.inputs_per_output // scale.shape[2], dim=2)
        levels = (problem.grid.dequantize(start) / runs).flatten(0, 1)[channels]
        torch.testing.assert_close(part.levels.flatten(0, 1), levels)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("with_start", [False, True])
def test_codes_and_scales_are_gathered_into_their_places(
    with_start: bool, world_size: int, problem: LayerProblem, share: Any, run_ranks: Any
) -> None:
    start = codes_of(problem.weight + 5) if with_start else None
    solved: list[tuple[slice, slice]] = []
    lock = threading.Lock()

    def work(part: ChannelProblem) -> ChannelSolution:
        check_part(problem, part, start)
        with lock:
            solved.append(part.place)
        return ChannelSolution(codes_of(part.quadratic.weight), part.grid.scale * 3, 1.5)

    def on_rank(comm: Any) -> Any:
        mine = share(problem, comm.rank, world_size)
        return solve_by_channel(mine, comm, problem.grid, work, Monitor(), "test", start)

    results = run_ranks(world_size, on_rank)
    blocks = list(channel_blocks(*problem.weight.shape[:2], by_channel._BLOCK_CHANNELS["cpu"]))
    num_blocks = len(blocks)
    assert len(solved) == num_blocks
    assert all(block in solved for block in blocks)
    assert num_blocks >= 3
    scale = problem.grid.scale * (3 if problem.grid.scale.numel() > 1 else 1)
    for codes, grid, unsettled in results:
        assert torch.equal(codes, codes_of(problem.weight))
        assert codes.dtype == problem.weight.dtype
        assert torch.equal(grid.scale, scale)
        assert torch.equal(grid.zero_point, problem.grid.zero_point)
        assert unsettled == 1.5 * num_blocks


@pytest.mark.parametrize(("qmin", "qmax"), [(-128, 127), (0, 255), (-2, 1), (-2048, 2047), (0, 4095), (-1, 255)])
def test_codes_of_all_ranges_come_back(qmin: int, qmax: int, make_problem: Any) -> None:
    problem = with_quadratic(make_problem(nn.Linear(4, 64), [torch.randn(5, 4)]))
    grid = replace(problem.grid, qmin=qmin, qmax=qmax)
    wanted = torch.linspace(qmin, qmax, 256).round().view(1, 64, 4)

    def work(part: ChannelProblem) -> ChannelSolution:
        return ChannelSolution(wanted, part.grid.scale)

    codes, _, _ = solve_by_channel(problem, SoloComm(), grid, work, Monitor(), "test")
    assert torch.equal(codes, wanted)


@pytest.mark.parametrize(("signed", "dtype"), [(True, torch.int16), (False, torch.int32)])
def test_codes_of_more_than_8_bits_reach_the_record(
    signed: bool, dtype: torch.dtype, make_problem: Any, share: Any, run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new integer format is one line of the table."""
    monkeypatch.setattr(by_channel, "_BLOCK_CHANNELS", {"cpu": 3})
    name = "int12" if signed else "uint12"
    monkeypatch.setitem(formats.FORMATS, name, formats.NumberFormat(name, 12, signed=signed))
    fmt = layer_format(name, observer="mse", symmetric=signed)
    layer = nn.Conv1d(4, 10, 3, groups=2)
    problem = make_problem(layer, [torch.randn(3, 4, 9) for _ in range(3)])
    problem = with_quadratic(replace(problem, grid=choose_grid(problem.weight, fmt)))
    nearest = problem.grid.quantize(problem.weight)
    assert (nearest.max() - nearest.min()) > 2000

    def work(part: ChannelProblem) -> ChannelSolution:
        return ChannelSolution(nearest[part.place], part.grid.scale)

    def on_rank(comm: Any) -> Any:
        return solve_by_channel(share(problem, comm.rank, 3), comm, problem.grid, work, Monitor(), "test")

    for codes, grid, _ in run_ranks(3, on_rank):
        assert torch.equal(codes, nearest)
        figures = LayerFigures("layer", "Conv1d", tuple(layer.weight.shape), str(fmt), "x", 0, 0, 0, 0, 0, False, 0)
        record = LayerRecord.of(figures, problem.geometry, fmt, codes, grid, None)
        assert record.codes.dtype == dtype
        assert torch.equal(problem.geometry.to_channels(record.codes).float(), nearest)
        weight = record.dequantize(torch.float32)
        assert torch.equal(weight, problem.geometry.from_channels(problem.grid.dequantize(nearest)))
        # Half a step of 12 bits; the ends of the range may be cut off by a little more.
        assert (weight - layer.weight).abs().max() < 2.0 * float(grid.scale.max())


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_block_that_fails_on_one_rank_ends_all(
    failing: int, make_problem: Any, share: Any, run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that failed raises its own error, the others name it: nobody waits for a peer that is gone."""
    monkeypatch.setattr(by_channel, "_BLOCK_CHANNELS", {"cpu": 2})
    problem = with_quadratic(make_problem(nn.Linear(4, 6), [torch.randn(5, 4) for _ in range(3)]))

    def work(part: ChannelProblem) -> ChannelSolution:
        if part.place[1] == slice(2 * failing, 2 * failing + 2):
            raise ValueError("no luck")
        return ChannelSolution(torch.zeros_like(part.quadratic.weight), part.grid.scale)

    def on_rank(comm: Any) -> tuple[str, str, int | None]:
        mine = share(problem, comm.rank, 3)
        try:
            solve_by_channel(mine, comm, problem.grid, work, Monitor(), "test")
        except Exception as error:
            return type(error).__name__, str(error), getattr(error, "reported_by", None)
        return "", "", None

    peer = ("PeerError", f"rank {failing} failed to round layer block.layer: ValueError: no luck", None)
    own = ("ValueError", "no luck", failing)
    assert run_ranks(3, on_rank) == [own if rank == failing else peer for rank in range(3)]
