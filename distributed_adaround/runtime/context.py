"""Facts of this process (rank, world size, device), read from the environment once, and the process group."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from distributed_adaround.errors import PeerError, SpecError
from distributed_adaround.runtime.comm import Comm, GroupComm, SoloComm, missing_ranks


@dataclass(frozen=True)
class RankContext:
    """Who this process is. local_world_size: ranks on this machine, which share its memory."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    backend: str

    @classmethod
    def from_environment(cls, device: str = "auto", backend: str = "auto") -> "RankContext":
        """Read torchrun's variables; without them this is one rank alone. Raises SpecError."""
        rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        world_size, local_world_size = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        chosen = _choose_device(device, local_rank, local_world_size)
        if backend == "auto":
            backend = "nccl" if chosen.type == "cuda" else "gloo"
        if backend == "nccl" and chosen.type == "cpu":
            raise SpecError("runtime.backend: nccl needs a CUDA device, the device is cpu; set runtime.backend=gloo")
        return cls(rank, local_rank, world_size, local_world_size, chosen, backend)


def _choose_device(device: str, local_rank: int, local_world_size: int) -> torch.device:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if available else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    index = torch.device(device).index
    # Counted for all ranks of the machine, so that all of them find the same and none waits for another.
    needed = max(local_rank + 1, local_world_size) if index is None else index + 1
    if needed > available:
        what = f"{device} for {local_world_size} ranks needs {needed} CUDA devices, this machine has {available}"
        raise SpecError(f"runtime.device: {what}; start fewer ranks per machine or set runtime.device=cpu")
    return torch.device("cuda", local_rank if index is None else index)


@contextmanager
def alone() -> Iterator[None]:
    """Libraries see no process group in here: some start collectives of their own where there is one, as
    compressed-tensors does when a model is loaded, and the other ranks do something else."""
    group = dist.GroupMember.WORLD
    dist.GroupMember.WORLD = None
    try:
        yield
    finally:
        dist.GroupMember.WORLD = group


@contextmanager
def process_group(context: RankContext, timeout_minutes: float, *, join_only: bool = False) -> Iterator[Comm]:
    """The Comm of this job: a new process group when torchrun started several ranks, else a SoloComm.

    A group that already exists (a notebook, a training script) is used and left alone; join_only: that one or none.
    """
    if dist.is_initialized():
        yield GroupComm(context.device)
        return
    if context.world_size == 1 or join_only:
        yield SoloComm()
        return
    if context.device.type == "cuda":
        torch.cuda.set_device(context.device)
    # Control messages go over gloo even where tensors go over NCCL: they are host objects.
    backend = "cpu:gloo,cuda:nccl" if context.backend == "nccl" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        alone = PeerError(f"the {context.world_size} ranks did not find each other: {reason}")
        # Nobody knows which ranks are there to tell.
        alone.reported_by = context.rank
        raise alone from error
    try:
        session = GroupComm(context.device).broadcast_object(uuid.uuid4().hex)
        yield GroupComm(context.device, partial(missing_ranks, store, session))
    finally:
        dist.destroy_process_group()
