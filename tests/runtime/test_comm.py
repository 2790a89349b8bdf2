"""What ranks say to each other, on real gloo groups of 1, 2, 3 and 5 processes."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from torch import Tensor

from distributed_adaround.errors import AdaRoundError, InputError, PeerError, SpecError
from distributed_adaround.runtime.comm import Comm, GroupComm, SoloComm, agreed, missing_ranks, phase, same_everywhere

WORLD_SIZES = [1, 2, 3, 5]


def group() -> GroupComm:
    return GroupComm(torch.device("cpu"))


def mine(rank: int) -> Tensor:
    return torch.arange(12, dtype=torch.float64).view(3, 4) * 10**rank


def all_reduce(dtype: torch.dtype) -> tuple[Tensor, bool]:
    comm = group()
    tensor = mine(comm.rank).to(dtype)
    return tensor, comm.all_reduce(tensor) is tensor


def broadcast() -> Tensor:
    comm = group()
    return comm.broadcast(mine(comm.rank))


def non_contiguous() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of a transposed view and of every other column; what lies between the columns; a broadcast into a view."""
    comm = group()
    turned = mine(comm.rank).t()
    comm.all_reduce(turned)
    whole = mine(comm.rank)
    comm.all_reduce(whole[:, ::2])
    received = mine(comm.rank)
    comm.broadcast(received.t()[1:])
    return turned, whole[:, ::2], whole[:, 1::2], received


def odd_tensors() -> tuple[Tensor, Tensor, bool]:
    comm = group()
    alone = comm.all_reduce(torch.tensor(float(comm.rank + 1)))
    parameter = torch.nn.Parameter(torch.full((2,), 1.0))
    comm.all_reduce(parameter)
    return alone, parameter.detach(), comm.all_reduce(torch.empty(0, 3)).shape == (0, 3)


def objects() -> tuple[list[object], object]:
    comm = group()
    return comm.all_gather_object({"rank": comm.rank, "owned": [comm.rank] * comm.rank}), comm.broadcast_object(
        {"from": comm.rank}
    )


def facts() -> tuple[int, int]:
    comm = group()
    return comm.rank, comm.world_size


def fails_on(ranks: list[int], kind: type[Exception]) -> tuple[str, str, object]:
    """Class, message and reported_by of what this rank raised, then a collective that must pair on all ranks."""
    comm = group()
    caught: Exception | None = None
    try:
        with phase(comm, "eat breakfast"):
            if comm.rank in ranks:
                raise kind(f"rank {comm.rank} is not hungry")
    except Exception as error:
        caught = error
    assert comm.all_gather_object(comm.rank) == list(range(comm.world_size))
    return type(caught).__name__, str(caught), getattr(caught, "reported_by", None)


def differs_on(ranks: list[int]) -> tuple[str, int | None] | None:
    comm = group()
    a, b = torch.zeros(2, 3, dtype=torch.int8), torch.ones(4).view(2, 2).t()
    if comm.rank in ranks:
        b[1, 0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    try:
        same_everywhere(comm, [a, b], "layer conv1: the rounding")
    except AdaRoundError as error:
        return str(error), error.reported_by
    return None


def peer_is_gone(gone: int, port: int | None) -> tuple[str, int | None]:
    """A rank leaves the group; the others say so instead of blaming themselves. port: of a store for a roll call."""
    store = None if port is None else dist.TCPStore("127.0.0.1", port, is_master=False)
    roll_call = None if store is None else partial(missing_ranks, store, "now")
    comm = GroupComm(torch.device("cpu"), roll_call)
    if comm.rank == gone:
        return "", None
    try:
        comm.all_reduce(torch.ones(3))
    except PeerError as error:
        return str(error), error.reported_by
    return f"the collective worked without rank {gone}", None


def bad_collective() -> str:
    try:
        group().all_reduce(torch.ones(3, dtype=torch.int16))
    except RuntimeError as error:
        return type(error).__name__
    return "worked"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64], ids=str)
def test_all_reduce_sums_in_place_on_every_rank(pool: RankPool, world_size: int, dtype: torch.dtype) -> None:
    expected = sum(mine(rank) for rank in range(world_size))
    for tensor, in_place in pool.run(all_reduce, world_size, dtype):
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected.to(dtype))
        assert in_place


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_broadcast_gives_all_ranks_the_tensor_of_rank_0(pool: RankPool, world_size: int) -> None:
    assert all(torch.equal(tensor, mine(0)) for tensor in pool.run(broadcast, world_size))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_views_that_are_not_contiguous_receive_the_result(pool: RankPool, world_size: int) -> None:
    total = sum(mine(rank) for rank in range(world_size))
    for rank, (turned, columns, between, received) in enumerate(pool.run(non_contiguous, world_size)):
        assert torch.equal(turned, total.t())
        assert torch.equal(columns, total[:, ::2])
        assert torch.equal(between, mine(rank)[:, 1::2])
        assert torch.equal(received, torch.cat([mine(rank)[:, :1], mine(0)[:, 1:]], dim=1))


def test_scalars_parameters_and_empty_tensors(pool: RankPool) -> None:
    for alone, parameter, empty in pool.run(odd_tensors, 3):
        assert alone.item() == 6.0
        assert torch.equal(parameter, torch.full((2,), 3.0))
        assert empty


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_objects_come_in_rank_order_and_from_rank_0(pool: RankPool, world_size: int) -> None:
    expected = [{"rank": rank, "owned": [rank] * rank} for rank in range(world_size)]
    assert pool.run(objects, world_size) == [(expected, {"from": 0})] * world_size
    assert pool.run(facts, world_size) == [(rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("kind", [InputError, ZeroDivisionError])
def test_phase_raises_the_own_error_and_names_the_rank_to_the_others(pool: RankPool, kind: type[Exception]) -> None:
    text = f"rank 1 failed to eat breakfast: {kind.__name__}: rank 1 is not hungry"
    other = ("PeerError", text, None)
    assert pool.run(fails_on, 3, [1], kind) == [other, (kind.__name__, "rank 1 is not hungry", 1), other]


def test_phase_with_several_failures_lets_the_first_rank_tell(pool: RankPool) -> None:
    results = pool.run(fails_on, 3, [0, 1, 2], SpecError)
    assert results == [("SpecError", f"rank {rank} is not hungry", 0) for rank in range(3)]
    assert pool.run(fails_on, 3, [1, 2], SpecError) == [
        ("PeerError", "rank 1 failed to eat breakfast: SpecError: rank 1 is not hungry", None),
        ("SpecError", "rank 1 is not hungry", 1),
        ("SpecError", "rank 2 is not hungry", 1),
    ]


def test_phase_without_failure_passes(pool: RankPool) -> None:
    assert pool.run(fails_on, 2, [], SpecError) == [("NoneType", "None", None)] * 2


@pytest.mark.parametrize(
    ("ranks", "named"), [([2], "ranks [2]"), ([1, 4], "ranks [1, 4]"), ([0], "ranks [1, 2, 3, 4]")]
)
def test_a_difference_of_one_bit_is_found_and_the_ranks_are_named(pool: RankPool, ranks: list[int], named: str) -> None:
    for message, reported_by in pool.run(differs_on, 5, ranks):
        assert reported_by == 0
        assert message.startswith(f"layer conv1: the rounding differs between ranks: {named} do not hold")


@pytest.mark.parametrize("ranks", [[], [0, 1, 2]])
def test_equal_tensors_are_the_same_everywhere(pool: RankPool, ranks: list[int]) -> None:
    assert pool.run(differs_on, 3, ranks) == [None] * 3


@pytest.mark.parametrize("gone", [0, 1])
def test_a_lost_peer_is_named_by_the_one_that_is_left(pool: RankPool, gone: int) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    message, reported_by = pool.run(peer_is_gone, 2, gone, server.port)[1 - gone]
    assert reported_by == 1 - gone
    assert message.startswith(f"rank {gone} failed or does not answer (")
    assert "\n" not in message


def test_where_nobody_knows_who_is_gone_every_rank_tells(pool: RankPool) -> None:
    message, reported_by = pool.run(peer_is_gone, 2, 0, None)[1]
    assert reported_by == 1
    assert message.startswith("another rank failed or does not answer (")


def test_a_collective_that_this_rank_got_wrong_is_no_peer_error(pool: RankPool) -> None:
    assert "PeerError" not in pool.run(bad_collective, 1)
    assert "worked" not in pool.run(bad_collective, 1)


@pytest.mark.parametrize(
    ("collective", "value"),
    [
        (lambda comm: comm.all_reduce(mine(0)), mine(0)),
        (lambda comm: comm.broadcast(mine(0)), mine(0)),
    ],
)
def test_one_rank_alone_hears_itself(collective: Callable[[Comm], Tensor], value: Tensor) -> None:
    assert torch.equal(collective(SoloComm()), value)


def test_one_rank_alone_keeps_its_objects_and_errors() -> None:
    comm = SoloComm()
    marker = object()
    assert comm.all_gather_object(marker) == [marker]
    assert comm.broadcast_object(marker) is marker
    assert (comm.rank, comm.world_size) == (0, 1)
    same_everywhere(comm, [torch.ones(2)], "it")
    with pytest.raises(KeyError, match="lost") as caught, phase(comm, "look"):
        raise KeyError("lost")
    assert caught.value.reported_by == 0


def test_an_agreed_error_is_reported_by_rank_0() -> None:
    assert InputError("x").reported_by is None
    assert agreed(InputError("x")).reported_by == 0
    assert not dist.is_initialized()
