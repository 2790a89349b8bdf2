"""Where activations live: on the device, then on the host, then in files, each within its budget.

A kept tensor stays usable as it is: one that went to disk is backed by a memory-mapped file whose name is removed at
once, so the disk is free again when the tensor is, and a killed job leaves nothing behind. The store counts bytes by
storage, so views of one tensor count once, and forgets them when the last reader lets go.
"""

import math
import os
import tempfile
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_adaround.errors import OutputError


@dataclass
class _Kept:
    """A storage that the store counts, and how many kept tensors read it."""

    tier: str
    size: int
    readers: int = 0


class ActivationStore:
    """Budgeted memory for one rank's activations. On the CPU device and host are one, and only host_budget counts."""

    def __init__(
        self, device: torch.device, *, device_budget: int, host_budget: int, spill_dir: str | None = None
    ) -> None:
        self.device = device
        self._budget = {"device": device_budget if device.type != "cpu" else 0, "host": host_budget}
        self._used = {"device": 0, "host": 0, "disk": 0}
        self._kept: dict[int, _Kept] = {}
        self._spill_dir = spill_dir
        self.peak = dict(self._used)

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself if it fits where it is, else a copy on the host or in a file."""
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        tier = "device" if tensor.device.type != "cpu" else "host"
        if key in self._kept or self._used[tier] + size <= self._budget[tier]:
            self._count(tensor, tier)
            return tensor
        return self.empty(tuple(tensor.shape), tensor.dtype, on_device=False).copy_(tensor)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, on_device: bool = True) -> Tensor:
        """An uninitialised tensor in the first tier that has room; raises OutputError when the disk has none either."""
        size = math.prod(shape) * dtype.itemsize
        if on_device and self._used["device"] + size <= self._budget["device"]:
            tensor, tier = torch.empty(shape, dtype=dtype, device=self.device), "device"
        elif self._used["host"] + size <= self._budget["host"] or size == 0:
            tensor, tier = torch.empty(shape, dtype=dtype), "host"
        else:
            tensor, tier = self._file_backed(shape, dtype, size), "disk"
        self._count(tensor, tier)
        return tensor

    def _file_backed(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        try:
            descriptor, path = tempfile.mkstemp(prefix="adaround-", suffix=".spill", dir=self._spill_dir)
            try:
                # Reserve the blocks now: a full disk is an error here, not a bus error at the first write.
                os.posix_fallocate(descriptor, 0, size)
                return torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
            finally:
                os.close(descriptor)
                os.unlink(path)
        except (OSError, RuntimeError) as error:
            # torch.from_file raises RuntimeError where the map fails (too many maps, no address space).
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OutputError(
                f"runtime.spill_dir: no room for {size} bytes of activations in "
                f"{self._spill_dir or tempfile.gettempdir()}: {reason}; free the disk, raise "
                "runtime.activation_memory or lower data.num_samples"
            ) from error

    def _count(self, tensor: Tensor, tier: str) -> None:
        """One more reader of the tensor's storage; tier: where it lies, unless the store knows it already."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._kept:
            self._kept[key] = _Kept(tier, storage.nbytes())
            self._used[tier] += storage.nbytes()
            self.peak[tier] = max(self.peak[tier], self._used[tier])
        self._kept[key].readers += 1
        weakref.finalize(tensor, self._forget, key)

    def _forget(self, key: int) -> None:
        kept = self._kept[key]
        kept.readers -= 1
        if not kept.readers:
            del self._kept[key]
            self._used[kept.tier] -= kept.size
