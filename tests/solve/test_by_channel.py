"""Rows in blocks: every row once, the same blocks on any number of ranks, and codes and scales back in their places."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_adaround.numerics.ranges import choose_grid
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve import by_channel as by_rows
from distributed_adaround.solve.by_channel import RowProblem, RowSolution, block_rows, row_blocks, solve_by_rows
from distributed_adaround.solve.problem import LayerProblem, Monitor

SIZES = [(1, 1), (1, 255), (1, 256), (1, 257), (1, 1000), (3, 100), (7, 256), (2, 513), (300, 1), (1000, 2), (5, 3)]


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize(("groups", "rows"), SIZES)
def test_blocks_cover_every_row_once_and_are_of_one_size(groups: int, rows: int, device_type: str) -> None:
    size = {"cpu": 256}.get(device_type, 1024)
    blocks = list(row_blocks(groups, rows, block_rows(device_type)))
    count = torch.zeros(groups, rows)
    for some, cut in blocks:
        count[some, cut] += 1
        assert count[some, cut].numel() <= size
    assert (count == 1).all()
    # No more blocks than needed, up to what groups and rows leave over.
    assert len(blocks) <= 2 * -(-groups * rows // size) + (groups if rows > size / 2 else 0)


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
    """Blocks of 2 rows, codes -3 .. 4, and a weight that tells the place of each of its entries."""
    layer, strategy, group_size = CASES[request.param]
    monkeypatch.setattr(by_rows, "_BLOCK_ROWS", {"cpu": 2})
    shape = (2, 6) if isinstance(layer, nn.Linear) else (2, 6, 5)
    problem = make_problem(layer, [torch.randn(shape) for _ in range(3)])
    grid = choose_grid(
        problem.weight, qmin=-3, qmax=4, symmetric=False, zero_point=0, strategy=strategy, group_size=group_size,
        observer="minmax",
    )  # fmt: skip
    places = torch.arange(problem.weight.numel(), dtype=torch.float32).view_as(problem.weight)
    return replace(problem, weight=places, grid=grid)


def codes_of(places: Tensor) -> Tensor:
    return places % 8 - 3


def check_part(problem: LayerProblem, part: RowProblem, start: Tensor | None) -> None:
    """What a block gets is the part of the whole with its rows."""
    geometry = problem.geometry
    rows = part.quadratic.weight[:, :, 0].flatten().long() // geometry.inputs_per_output
    assert part.quadratic.weight.shape[2] == geometry.inputs_per_output
    assert rows.numel() <= 2
    scale, zero_point = problem.grid.scale, problem.grid.zero_point
    if scale.numel() > 1:
        assert torch.equal(part.lattice.scale.transpose(1, 2).flatten(0, 1), scale[rows])
        assert torch.equal(part.lattice.zero_point.transpose(1, 2).flatten(0, 1), zero_point[rows])
    else:
        assert part.lattice.scale.tolist() == [[scale.tolist()[0]]]
    if start is None:
        assert part.levels is None
    else:
        assert part.levels is not None
        levels = (problem.grid.dequantize(start) / problem.grid.scale_like(start))[rows]
        torch.testing.assert_close(part.levels.flatten(0, 1), levels)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("with_start", [False, True])
def test_codes_and_scales_are_gathered_into_their_places(
    with_start: bool, world_size: int, problem: LayerProblem, share: Any, run_ranks: Any
) -> None:
    start = codes_of(problem.weight + 5) if with_start else None
    solved: list[tuple[slice, slice]] = []
    lock = threading.Lock()

    def work(part: RowProblem) -> RowSolution:
        check_part(problem, part, start)
        with lock:
            solved.append(part.place)
        return RowSolution(codes_of(part.quadratic.weight), part.lattice.scale * 3, 1.5)

    def on_rank(comm: Any) -> Any:
        mine = share(problem, comm.rank, world_size)
        return solve_by_rows(mine, comm, problem.grid, work, Monitor(), "test", start)

    results = run_ranks(world_size, on_rank)
    rows = problem.weight.shape[0] // problem.geometry.groups
    blocks = list(row_blocks(problem.geometry.groups, rows, block_rows("cpu")))
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


@pytest.mark.parametrize(("qmin", "qmax"), [(-128, 127), (0, 255), (-2, 1)])
def test_codes_of_all_ranges_come_back(qmin: int, qmax: int, make_problem: Any) -> None:
    problem = make_problem(nn.Linear(4, 64), [torch.randn(5, 4)])
    grid = replace(problem.grid, qmin=qmin, qmax=qmax)
    wanted = torch.linspace(qmin, qmax, 256).round().view(64, 4)

    def work(part: RowProblem) -> RowSolution:
        return RowSolution(wanted.view(1, 64, 4), part.lattice.scale)

    codes, _, _ = solve_by_rows(problem, SoloComm(), grid, work, Monitor(), "test")
    assert torch.equal(codes, wanted)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_block_that_fails_on_one_rank_ends_all(
    failing: int, make_problem: Any, share: Any, run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that failed raises its own error, the others name it: nobody waits for a peer that is gone."""
    monkeypatch.setattr(by_rows, "_BLOCK_ROWS", {"cpu": 2})
    problem = make_problem(nn.Linear(4, 6), [torch.randn(5, 4) for _ in range(3)])

    def work(part: RowProblem) -> RowSolution:
        if part.place[1] == slice(2 * failing, 2 * failing + 2):
            raise ValueError("no luck")
        return RowSolution(torch.zeros_like(part.quadratic.weight), part.lattice.scale)

    def on_rank(comm: Any) -> tuple[str, str, int | None]:
        mine = share(problem, comm.rank, 3)
        try:
            solve_by_rows(mine, comm, problem.grid, work, Monitor(), "test")
        except Exception as error:
            return type(error).__name__, str(error), getattr(error, "reported_by", None)
        return "", "", None

    peer = ("PeerError", f"rank {failing} failed to round layer block.layer: ValueError: no luck", None)
    own = ("ValueError", "no luck", failing)
    assert run_ranks(3, on_rank) == [own if rank == failing else peer for rank in range(3)]
