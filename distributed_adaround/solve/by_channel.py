"""Out channels of a layer do not depend on each other: each rank solves some of them, and the codes are gathered once.

Channels are cut into blocks whose size does not depend on the number of ranks, so a channel's result does not either.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.moments import Quadratic
from distributed_adaround.runtime.comm import Comm, phase
from distributed_adaround.solve.problem import LayerProblem, Monitor

# Out channels of a block: enough for the matrix products, few enough to keep several ranks busy.
_BLOCK_CHANNELS = {"cpu": 256, "cuda": 1024}


@dataclass(frozen=True)
class ChannelProblem:
    """What one block of channels is solved from. levels: `(G, R, J)` to start from, or None.
    place: its conv groups, and its channels of each. done: share of this rank's work before it; size: its own share."""

    quadratic: Quadratic
    grid: Grid
    levels: Tensor | None
    place: tuple[slice, slice]
    done: float
    size: float


@dataclass(frozen=True)
class ChannelSolution:
    """codes `(G, R, J)`; scale `(G, R, n)`, as in Grid; unsettled: how many soft values had not settled."""

    codes: Tensor
    scale: Tensor
    unsettled: Tensor | float = 0.0


def channel_blocks(groups: int, channels: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of (conv groups, out channels of each group), of about `size` out channels."""
    parts = -(-channels // size)
    cuts = [slice(channels * part // parts, channels * (part + 1) // parts) for part in range(parts)]
    together = max(1, size // channels)
    for first in range(0, groups, together):
        for cut in cuts:
            yield slice(first, min(first + together, groups)), cut


def _kept(monitor: Monitor, key: str, work: Callable[[], ChannelSolution], device: torch.device) -> ChannelSolution:
    """The solution of a block, from before a restart if it was kept; kept when it took long."""
    saved = monitor.load(key)
    if saved is not None:
        return ChannelSolution(**{name: tensor.to(device) for name, tensor in saved.items()})
    found = work()
    if monitor.save_due:
        monitor.save(key, {name: torch.as_tensor(value) for name, value in vars(found).items()})
    return found


def solve_by_channel(
    problem: LayerProblem,
    comm: Comm,
    grid: Grid,
    work: Callable[[ChannelProblem], ChannelSolution],
    monitor: Monitor,
    stage: str,
    start: Tensor | None = None,
) -> tuple[Tensor, Grid, float]:
    """Codes `(G, R, J)`, the grid with the scales that were found, and the number of soft values that had not settled.
    A collective; raises PeerError where `work` raised on another rank.

    Args:
        problem: with its quadratic.
        comm, grid: all ranks; the grid to begin with.
        work: solves one block.
        monitor, stage: keeps finished blocks of a long stage, under its name.
        start: codes `(G, R, J)` of `grid` to begin from, or None.
    """
    whole, device, shape = problem.quadratic, problem.device, problem.weight.shape
    assert whole is not None, "the layer's quadratic is taken before"
    levels = None if start is None else grid.levels(start)
    # Filled by one rank each, zeros elsewhere: the sums are exact.
    codes = torch.zeros(shape, dtype=torch.uint8 if grid.qmax - grid.qmin < 256 else torch.int32, device=device)
    scale = torch.zeros_like(grid.scale) if grid.per_channel else None
    unsettled = torch.zeros(1, dtype=torch.float64, device=device)
    with phase(comm, f"round layer {problem.name}"):
        blocks = list(enumerate(channel_blocks(shape[0], shape[1], _BLOCK_CHANNELS.get(device.type, 1024))))
        own = blocks[comm.rank :: comm.world_size]
        for number, (index, place) in enumerate(own):
            before = None if levels is None else levels[place]
            done, size = number / len(own), 1 / len(own)
            part = ChannelProblem(whole.part(place), grid.part(place), before, place, done, size)
            found = _kept(monitor, f"{stage}-{index}", partial(work, part), device)
            codes[place] = (found.codes - grid.qmin).to(codes.dtype)
            unsettled += found.unsettled
            if scale is not None:
                scale[place] = found.scale
    comm.all_reduce(codes)
    comm.all_reduce(unsettled)
    if scale is not None:
        comm.all_reduce(scale)
        grid = replace(grid, scale=scale)
    return codes.to(problem.dtype).add_(grid.qmin), grid, float(unsettled)
