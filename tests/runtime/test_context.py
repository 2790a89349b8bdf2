"""Facts of a rank from its environment, and the life of its process group."""

import os

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool

from distributed_adaround.errors import PeerError, SpecError
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.runtime.context import RankContext, process_group

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def set_ranks(monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, world: int, local_world: int) -> None:
    for name, value in zip(VARIABLES, (rank, local_rank, world, local_world), strict=False):
        monkeypatch.setenv(name, str(value))


def have_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


Seen = tuple[str, int, int, bool]


def own_group(port: int) -> tuple[Seen, bool]:
    """In place of the pool's group, one that this program makes from the variables that torchrun sets."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    variables = dict(zip(VARIABLES, map(str, (rank, rank, world_size, world_size, "127.0.0.1", port)), strict=True))
    os.environ |= variables | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        with process_group(RankContext.from_environment("cpu"), 1.0) as comm:
            assert comm.all_gather_object(comm.rank) == list(range(world_size))
            seen = type(comm).__name__, comm.rank, comm.world_size, dist.is_initialized()
    finally:
        for name in (*VARIABLES, "TORCHELASTIC_USE_AGENT_STORE"):
            os.environ.pop(name, None)
    return seen, dist.is_initialized()


def callers_group() -> Seen:
    with process_group(RankContext.from_environment("cpu"), 1.0) as comm:
        kind = type(comm).__name__
    return kind, comm.rank, comm.world_size, dist.is_initialized()


def test_without_torchrun_one_rank_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 0)
    assert RankContext.from_environment() == RankContext(0, 0, 1, 1, torch.device("cpu"), "gloo")


def test_torchruns_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ranks(monkeypatch, rank=5, local_rank=1, world=8, local_world=4)
    have_gpus(monkeypatch, 4)
    assert RankContext.from_environment() == RankContext(5, 1, 8, 4, torch.device("cuda", 1), "nccl")
    assert RankContext.from_environment("cpu") == RankContext(5, 1, 8, 4, torch.device("cpu"), "gloo")
    assert RankContext.from_environment("cuda:3").device == torch.device("cuda", 3)
    assert RankContext.from_environment("cuda", "gloo").backend == "gloo"


@pytest.mark.parametrize(
    ("device", "gpus", "local_rank", "local_world", "message"),
    [
        ("cuda", 0, 0, 1, "runtime.device: cuda for 1 ranks needs 1 CUDA devices, this machine has 0"),
        ("cuda:2", 2, 0, 1, "runtime.device: cuda:2 for 1 ranks needs 3 CUDA devices, this machine has 2"),
        ("auto", 2, 0, 3, "runtime.device: cuda for 3 ranks needs 3 CUDA devices, this machine has 2"),
        # Slurm's own launcher sets no LOCAL_WORLD_SIZE.
        ("cuda", 2, 2, 1, "needs 3 CUDA devices, this machine has 2"),
    ],
)
def test_a_device_that_does_not_exist_is_refused_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, local_rank: int, local_world: int, message: str
) -> None:
    set_ranks(monkeypatch, rank=local_rank, local_rank=local_rank, world=4, local_world=local_world)
    have_gpus(monkeypatch, gpus)
    with pytest.raises(SpecError, match=message) as caught:
        RankContext.from_environment(device)
    assert "set runtime.device=cpu" in str(caught.value)


def test_nccl_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 0)
    with pytest.raises(SpecError, match=r"runtime.backend: nccl needs a CUDA device.*set runtime.backend=gloo"):
        RankContext.from_environment("auto", "nccl")


@pytest.mark.parametrize("join_only", [False, True])
def test_one_rank_needs_no_group(join_only: bool) -> None:
    with process_group(RankContext.from_environment("cpu"), 1.0, join_only=join_only) as comm:
        assert isinstance(comm, SoloComm)
        assert not dist.is_initialized()


def test_a_caller_who_only_joins_starts_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ranks(monkeypatch, rank=0, local_rank=0, world=4, local_world=4)
    with process_group(RankContext.from_environment("cpu"), 1.0, join_only=True) as comm:
        assert isinstance(comm, SoloComm)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_group_of_the_caller_is_used_and_left_alone(pool: RankPool, world_size: int) -> None:
    assert pool.run(callers_group, world_size) == [("GroupComm", rank, world_size, True) for rank in range(world_size)]


def test_a_group_is_made_from_the_environment_and_taken_down(pool: RankPool) -> None:
    server = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    expected = [(("GroupComm", rank, 2, True), False) for rank in range(2)]
    assert pool.run(own_group, 2, server.port) == expected


def test_ranks_that_cannot_meet_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ranks(monkeypatch, rank=1, local_rank=1, world=2, local_world=2)
    with pytest.raises(PeerError, match=r"the 2 ranks did not find each other: .*MASTER_ADDR") as caught:
        process_group(RankContext.from_environment("cpu"), 1.0).__enter__()
    assert caught.value.reported_by == 1
