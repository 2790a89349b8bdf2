"""The pool itself: if it did not report failures, no test that uses it would mean anything."""

import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool, WorkerError


def who_am_i(offset: int) -> tuple[int, int, int]:
    return dist.get_rank() + offset, dist.get_world_size(), os.getpid()


def sum_of_ranks() -> float:
    value = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(value)
    return value.item()


def one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    threading.Event().wait()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_are_processes_in_a_group_of_their_own(pool: RankPool, world_size: int) -> None:
    results = pool.run(who_am_i, world_size, 100)
    assert [result[:2] for result in results] == [(100 + rank, world_size) for rank in range(world_size)]
    assert len({os.getpid(), *(result[2] for result in results)}) == world_size + 1
    assert pool.run(sum_of_ranks, world_size) == [sum(range(world_size))] * world_size


def test_a_failed_rank_is_named_and_the_next_call_gets_new_workers() -> None:
    pool = RankPool()
    try:
        with pytest.raises(WorkerError, match=r"rank 1 of 2: raised\n[\s\S]*ValueError: rank one is unwell"):
            pool.run(one_raises, 2)
        with pytest.raises(WorkerError, match=r"^rank 0 of 1: died with exit code -9$"):
            pool.run(dies, 1)
        before = pool.run(who_am_i, 1, 0)
        # Nothing here can be too slow: the one rank of this group waits for ever.
        with pytest.raises(WorkerError, match=r"^rank 0 of 1: did not finish in time$"):
            pool.run(hangs, 1, timeout=1)
        after = pool.run(who_am_i, 1, 0)
        assert {pid for _, _, pid in before}.isdisjoint(pid for _, _, pid in after)
    finally:
        pool.kill()
