"""Learner of `minibatch` that gives the same bytes on any number of ranks: by out channels instead of samples.

A sum over ranks depends on their number. Here nothing is summed: out channels do not depend on each other once all
ranks see the whole batch, so ranks exchange the batch's rows and each one learns some of the channels. Channels are cut
into blocks whose size does not depend on the number of ranks, and rows keep their place in the batch. The rows of many
steps travel in one collective; of a large layer they are less than its gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_adaround.numerics.soft_rounding import OutputTransform, SoftRounding
from distributed_adaround.runtime.comm import Comm
from distributed_adaround.solve.by_channel import channel_blocks
from distributed_adaround.solve.learner import Learner, add_regularizer, fill_bucket, rounded, soft_start
from distributed_adaround.solve.problem import Solution

# Bytes of rows in one exchange, and most steps: enough to make latency small, few enough to stay in a cache's reach.
_EXCHANGE, _MOST_STEPS = 1 << 24, 64
# Out channels of a block: enough blocks for some ranks, large enough that their products outweigh the Python between.
_FEWEST, _MOST, _BLOCKS = 64, 256, 4


@dataclass(frozen=True)
class _Block:
    """Some conv groups and out channels of each. channels: their places among all out channels."""

    place: tuple[slice, slice]
    soft: SoftRounding
    bucket: Tensor
    channels: slice | Tensor
    channel_weight: Tensor
    transform: OutputTransform


class ChannelLearner(Learner):
    """Each rank learns some of the out channels, from the rows of all ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._batches = _Batches(self)
        start = soft_start(self.problem)
        self._shape = start[0].shape
        groups, channels, _ = self._shape
        size = min(_MOST, max(_FEWEST, -(-channels * groups // _BLOCKS)))
        places = list(channel_blocks(groups, channels, size))[self.comm.rank :: self.comm.world_size]
        self._blocks = [self._block(place, start) for place in places]

    def step(self, step: int, with_value: bool = False) -> None:
        inputs, base, targets = self._batches.take(step)
        weight, beta = self._schedule.weight(step), self._schedule.beta(step)
        for block in self._blocks:
            soft, bucket = block.soft, block.bucket
            own_inputs, own_targets = inputs[block.place[0]], targets[:, block.channels]
            own_base = None if base is None else base[:, block.channels]
            share = block.channel_weight / max(1, targets.shape[0])
            fill_bucket(bucket, soft, own_inputs, own_base, own_targets, block.transform, share)
            add_regularizer(bucket, soft, weight, beta, 0, 1, with_value=with_value)
            self._descend(soft, bucket)

    def step_and_report(self, step: int, requests: tuple[bool, bool]) -> tuple[float, bool, bool, bool]:
        self.step(step, with_value=True)
        sums = torch.zeros(5, dtype=torch.float64, device=self._bad.device)
        sums[1:3] = torch.tensor(requests)
        sums[0] = self._bad
        for block in self._blocks:
            sums[3:] += block.bucket[-3:-1]
        bad, stop, save, data, regularizer = self.comm.all_reduce(sums).tolist()
        return data + regularizer, bool(bad), bool(stop), bool(save)

    def state(self) -> dict[str, Tensor]:
        states = [block.soft.state() for block in self._blocks]
        return {name: self._gather([state[name] for state in states]) for name in ("alpha", "first", "second")}

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        for block in self._blocks:
            block.soft.restore({name: whole[block.place].contiguous() for name, whole in state.items()}, step)

    def solution(self) -> Solution:
        rounds_up = self._gather([block.soft.rounds_up for block in self._blocks], torch.uint8)
        difference = self._gather([block.soft.refresh() for block in self._blocks])
        unsettled = torch.zeros(1, dtype=torch.int64, device=rounds_up.device)
        for block in self._blocks:
            unsettled += block.soft.unsettled.sum()
        return rounded(self.problem, rounds_up.bool(), difference, int(self.comm.all_reduce(unsettled)))

    def _gather(self, parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """A part of each block, from all ranks in their places, `(G, R, J)`. dtype: that of the weight, if None."""
        whole = torch.zeros(self._shape, dtype=dtype or self.problem.dtype, device=self.problem.device)
        for block, part in zip(self._blocks, parts, strict=True):
            whole[block.place] = part
        return _sum_disjoint(whole, self.comm)

    def _block(self, place: tuple[slice, slice], start: tuple[Tensor, Tensor, Tensor]) -> _Block:
        soft, transform = SoftRounding(*(part[place].contiguous() for part in start)), self.rows.transform
        groups, channels, _ = self._shape
        every = torch.arange(groups * channels, device=self.channel_weight.device).view(groups, channels)
        # Without conv groups they lie side by side, and need no copy.
        own = place[1] if groups == 1 else every[place].reshape(-1)
        scale, shift = (None if values is None else values[own] for values in (transform.scale, transform.shift))
        transform = OutputTransform(scale, shift, transform.activation)
        bucket = soft.alpha.new_zeros(soft.alpha.numel() + 3)
        return _Block(place, soft, bucket, own, self.channel_weight[own], transform)


class _Batches:
    """The whole batch of each step on every rank, fetched for many steps at once."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        geometry = learner.problem.geometry
        self._widths = [geometry.groups * geometry.inputs_per_output, geometry.out_channels]
        self._widths += [geometry.out_channels] if learner.rows.has_base else []
        self._first, self._ends = 0, [0]
        self._parts: list[Tensor] = []

    def take(self, step: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Inputs `(G, R, J)`, base `(R, O)` or None, targets `(R, O)`: all rows of the batch, in its order."""
        if not self._first <= step < self._first + len(self._ends) - 1:
            self._fetch(step)
        rows = slice(self._ends[step - self._first], self._ends[step - self._first + 1])
        inputs, targets, *base = (part[rows] for part in self._parts)
        groups = self._learner.problem.geometry.groups
        by_group = inputs.reshape(-1, groups, self._widths[0] // groups).transpose(0, 1)
        return by_group, base[0] if base else None, targets

    def _fetch(self, first: int) -> None:
        """Rows of the steps from `first` on; the number of steps depends on the layer only."""
        learner, like = self._learner, self._learner.problem.weight
        self._parts = []  # frees the old ones first
        local, slots, self._first, self._ends = [], [], first, [0]
        room = _EXCHANGE // like.itemsize
        for step in range(first, min(first + _MOST_STEPS, learner.settings.max_iter)):
            held, places, num_rows = learner.plan.placed_batch(step)
            if step > first and (self._ends[-1] + num_rows) * sum(self._widths) > room:
                break
            local.append(held)
            slots.append(places + self._ends[-1])
            self._ends.append(self._ends[-1] + num_rows)
        flat = like.new_zeros(self._ends[-1] * sum(self._widths))
        sizes = [self._ends[-1] * width for width in self._widths]
        self._parts = [part.view(-1, w) for part, w in zip(torch.split(flat, sizes), self._widths, strict=True)]
        inputs, base, targets = learner.rows.gather(torch.cat(local))
        own = [inputs.transpose(0, 1).reshape(-1, self._widths[0]), targets, *([] if base is None else [base])]
        places = torch.cat(slots).to(flat.device)
        for part, values in zip(self._parts, own, strict=True):
            part.index_copy_(0, places, values)
        _sum_disjoint(flat, learner.comm)


def _sum_disjoint(values: Tensor, comm: Comm) -> Tensor:
    """Sum over ranks, in place, where only one rank's is not 0 at each place. As whole numbers, so that -0 survives."""
    as_bits = {1: torch.uint8, 4: torch.int32, 8: torch.int64}[values.element_size()]
    comm.all_reduce(values.view(as_bits))
    return values
