"""Where activations live: on the device, then on the host, then in files, each within its budget.

A kept tensor stays usable as it is: one that went to disk is backed by a memory-mapped file whose name is removed at
once, so the disk is free again when the tensor is, and a killed job leaves nothing behind. The store counts bytes by
storage, so views of one tensor count once, and forgets them when the last reader lets go.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref

import torch
from torch import Tensor

from distributed_adaround.errors import OutputError


class ActivationStore:
    """Budgeted memory for one rank's activations.

    device_budget, host_budget: bytes. On the CPU device and host are one, and only host_budget counts.
    spill_dir: folder for files (default: the system's temporary folder).
    """

    def __init__(
        self, device: torch.device, *, device_budget: int, host_budget: int, spill_dir: str | None = None
    ) -> None:
        self.device = device
        self._budget = {"device": device_budget if device.type != "cpu" else 0, "host": host_budget}
        self._used = {"device": 0, "host": 0, "disk": 0}
        self._kept: dict[int, int] = {}
        self._spill_dir = spill_dir
        self.peak = dict(self._used)

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself if it fits where it is, else a copy on the host or in a file."""
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        tier = "device" if tensor.device.type != "cpu" else "host"
        if key in self._kept:
            self._count(tensor, key, tier, 0)
            return tensor
        if self._used[tier] + size <= self._budget[tier]:
            self._count(tensor, key, tier, size)
            return tensor
        return self.empty(tuple(tensor.shape), tensor.dtype, on_device=False).copy_(tensor)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, on_device: bool = True) -> Tensor:
        """An uninitialised tensor in the first tier that has room for it.

        Raises:
            OutputError: the disk has no room either.
        """
        size = math.prod(shape) * dtype.itemsize
        if on_device and self._used["device"] + size <= self._budget["device"]:
            tensor, tier = torch.empty(shape, dtype=dtype, device=self.device), "device"
        elif self._used["host"] + size <= self._budget["host"] or size == 0:
            tensor, tier = torch.empty(shape, dtype=dtype), "host"
        else:
            tensor, tier = self._file_backed(shape, dtype, size), "disk"
        self._count(tensor, tensor.untyped_storage().data_ptr(), tier, size)
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
        except OSError as error:
            raise OutputError(
                f"runtime.spill_dir: no room for {size} bytes of activations in "
                f"{self._spill_dir or tempfile.gettempdir()}: {error.strerror}; free the disk, raise "
                "runtime.activation_memory or lower data.num_samples"
            ) from error

    def _count(self, tensor: Tensor, key: int, tier: str, size: int) -> None:
        self._kept[key] = self._kept.get(key, 0) + 1
        self._used[tier] += size
        self.peak[tier] = max(self.peak[tier], self._used[tier])
        weakref.finalize(tensor, self._forget, key, tier, tensor.untyped_storage().nbytes())

    def _forget(self, key: int, tier: str, size: int) -> None:
        self._kept[key] -= 1
        if not self._kept[key]:
            del self._kept[key]
            self._used[tier] -= size
