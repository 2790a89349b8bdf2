"""All collectives of the program, as methods of one small object that is handed to whoever needs it.

Ranks agree at phase boundaries only: inside a loop a rank that fails raises and exits, it never skips a collective,
because its peers would pair with the wrong one.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_adaround.errors import AdaRoundError, PeerError

if TYPE_CHECKING:
    # torch.distributed has it, but no type checker may know.
    from torch._C._distributed_c10d import Store

# How long survivors of a failed collective wait for each other to sign in.
_ROLL_CALL_SECONDS = 1.0

_Error = TypeVar("_Error", bound=AdaRoundError)


class Comm:
    """What ranks say to each other. This class is the twin for one rank, where every collective is the identity."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place where the tensor lies on the collective's device; returns the sum."""
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, in place likewise. Shape and dtype must be the same on all ranks."""
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        """Small picklable values of all ranks, in rank order. For control only, never in a loop over steps."""
        return [value]

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's small picklable value."""
        return value


class SoloComm(Comm):
    """One rank alone."""


class GroupComm(Comm):
    """The default process group of torch.distributed, which must be initialised.

    device: of this rank. Collectives run there by NCCL, else on the CPU; tensors elsewhere are copied there and back.
    roll_call: `missing_ranks`, asked when a collective fails.
    """

    def __init__(self, device: torch.device, roll_call: Callable[[], list[int] | None] | None = None) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device if "nccl" in str(dist.get_backend()) else torch.device("cpu")
        self._roll_call = roll_call

    def _run(self, tensor: Tensor, collective: Any) -> Tensor:
        local = tensor.detach().to(self.device).contiguous()
        with self._reaching_peers():
            collective(local)
        if local.data_ptr() != tensor.data_ptr():
            tensor.copy_(local)
        return tensor

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self._run(tensor, dist.all_reduce)

    def broadcast(self, tensor: Tensor) -> Tensor:
        return self._run(tensor, lambda local: dist.broadcast(local, src=0))

    def all_gather_object(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        with self._reaching_peers():
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        box = [value]
        with self._reaching_peers():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def _reaching_peers(self) -> Iterator[None]:
        """A peer that is gone or silent is no bug of this rank."""
        try:
            yield
        except RuntimeError as error:
            # Gloo has no error type of its own; its messages name its source file.
            if not isinstance(error, dist.DistError) and "gloo/" not in str(error):
                raise
            reason = str(error).strip().partition("\n")[0][:300]
            missing = None if self._roll_call is None else self._roll_call()
            who = "another rank" if not missing else f"rank {', '.join(map(str, missing))}"
            lost = PeerError(f"{who} failed or does not answer ({reason}); see its own error")
            # The first survivor tells the user, and where nobody knows who that is, every rank does.
            lost.reported_by = self.rank if missing is None else min({*range(self.world_size)} - {*missing})
            raise lost from error


def missing_ranks(store: Store, session: str) -> list[int] | None:
    """Ranks that do not sign in, in the store of the group, within a second; None where the store does not answer.

    Called when a collective has failed, on all ranks at about the same moment, since they waited for the same one.
    session: another one for every start, since a store may outlive the ranks of a restart.
    """
    keys = [f"alive/{session}/{rank}" for rank in range(dist.get_world_size())]
    found: list[list[int]] = []

    def call() -> None:
        with suppress(RuntimeError):
            store.set(keys[dist.get_rank()], "1")
            # Not store.wait: it logs warnings of its own.
            until = time.monotonic() + _ROLL_CALL_SECONDS
            while not store.check(keys) and time.monotonic() < until:
                time.sleep(_ROLL_CALL_SECONDS / 20)
            found.append([rank for rank, key in enumerate(keys) if not store.check([key])])

    # In a thread: a store whose host hangs, hangs too.
    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(2 * _ROLL_CALL_SECONDS)
    return found[0] if found else None


def agreed(error: _Error) -> _Error:
    """Of an error that all ranks raise at the same place, only rank 0 tells the user."""
    error.reported_by = 0
    return error


@contextmanager
def phase(comm: Comm, what: str) -> Iterator[None]:
    """Local work that all ranks finish, or all give up on. No collective may run inside.

    The rank that failed raises its own error; the others raise PeerError, which names it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    described = None if error is None else f"{type(error).__name__}: {error}"
    failures = [(rank, text) for rank, text in enumerate(comm.all_gather_object(described)) if text is not None]
    if error is not None:
        # Where several ranks fail, the first one tells the user.
        error.reported_by = failures[0][0]  # type: ignore[attr-defined]
        raise error
    if failures:
        rank, text = failures[0]
        raise PeerError(f"rank {rank} failed to {what}: {text}")


def same_everywhere(comm: Comm, tensors: Sequence[Tensor], what: str) -> None:
    """Raises: AdaRoundError when ranks do not hold the same bytes; it names those that are not like rank 0."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digests = comm.all_gather_object(digest.hexdigest())
    odd = [rank for rank, value in enumerate(digests) if value != digests[0]]
    if odd:
        text = f"{what} differs between ranks: ranks {odd} do not hold what rank 0 holds; this is a bug"
        raise agreed(AdaRoundError(text))
