"""Budgets of activations: which tier a tensor goes to, what is counted, and what is given back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.errors import OutputError

KB = 1024


def make_store(host_budget: int, folder: Path) -> ActivationStore:
    return ActivationStore(torch.device("cpu"), device_budget=10**9, host_budget=host_budget, spill_dir=str(folder))


def kilobytes(count: int) -> Tensor:
    return torch.randn(count, KB // 4)


def used(store: ActivationStore) -> tuple[int, int]:
    """Kilobytes on the host and on disk."""
    assert store._used["device"] == 0, "on the CPU there is no device memory to count"
    return store._used["host"] // KB, store._used["disk"] // KB


def mapped_files(folder: Path) -> list[str]:
    """Lines of this process's memory map that belong to files of `folder`, removed ones too."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def test_what_fits_is_kept_as_it_is(tmp_path: Path) -> None:
    store = make_store(10 * KB, tmp_path)
    tensor = kilobytes(10)
    assert store.keep(tensor) is tensor
    assert used(store) == (10, 0)
    assert store.peak["host"] == 10 * KB


def test_what_does_not_fit_goes_to_a_file_without_a_name(tmp_path: Path) -> None:
    store = make_store(10 * KB, tmp_path)
    first, second = store.keep(kilobytes(8)), kilobytes(4)
    kept = store.keep(second)
    assert used(store) == (8, 4)
    assert kept is not second
    assert torch.equal(kept, second)
    assert list(tmp_path.iterdir()) == []
    assert len(mapped_files(tmp_path)) == 1
    # A smaller one still fits on the host.
    third = store.keep(kilobytes(2))
    assert used(store) == (10, 4)
    # Usable like any tensor: written, viewed, multiplied.
    kept[0] = 7
    assert (kept.view(-1)[: KB // 4] == 7).all()
    torch.testing.assert_close(kept @ kept.T, kept.clone() @ kept.clone().T)
    del first, third, kept
    assert used(store) == (0, 0)
    assert mapped_files(tmp_path) == []
    assert store.peak == {"device": 0, "host": 10 * KB, "disk": 4 * KB}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3), (4, 1, 5)])
def test_any_dtype_and_shape_survives_the_disk(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    store = make_store(0, tmp_path)
    tensor = (torch.randn(shape) * 10).to(dtype)
    kept = store.keep(tensor)
    assert kept.dtype == dtype
    assert torch.equal(kept, tensor)
    assert store._used["host"] == 0
    assert store._used["disk"] == tensor.nbytes


def test_strided_and_expanded_tensors_are_copied_whole(tmp_path: Path) -> None:
    store = make_store(0, tmp_path)
    base = torch.randn(6, 4)
    for tensor in (base.T, base[::2], base[:1].expand(5, 4)):
        assert torch.equal(store.keep(tensor), tensor)


def test_views_of_one_tensor_count_once(tmp_path: Path) -> None:
    store = make_store(10 * KB, tmp_path)
    base = kilobytes(6)
    views = [store.keep(view) for view in (base, base[:2], base.view(-1), base[3:])]
    del base
    assert used(store) == (6, 0)
    # The storage lives as long as any view of it, whichever goes first.
    del views[0], views[0]
    assert used(store) == (6, 0)
    views.clear()
    assert used(store) == (0, 0)


def test_the_same_tensor_kept_twice_counts_once(tmp_path: Path) -> None:
    store = make_store(10 * KB, tmp_path)
    tensor = kilobytes(6)
    again = store.keep(store.keep(tensor))
    assert used(store) == (6, 0)
    del tensor
    assert used(store) == (6, 0)
    del again
    assert used(store) == (0, 0)


@pytest.mark.parametrize("view_dies_first", [True, False])
def test_a_view_of_a_spilled_tensor_stays_on_disk(view_dies_first: bool, tmp_path: Path) -> None:
    store = make_store(5 * KB, tmp_path)
    kept = [store.keep(kilobytes(8))]
    assert used(store) == (0, 8)
    kept.append(store.keep(kept[0][2:4]))
    assert used(store) == (0, 8), "the view's bytes lie in the file already"
    del kept[1 if view_dies_first else 0]
    assert used(store) == (0, 8)
    kept.clear()
    assert used(store) == (0, 0)
    # The budget is whole again: neither too small nor too large.
    fits = store.keep(kilobytes(5))
    assert used(store) == (5, 0)
    assert store.keep(kilobytes(1)) is not None
    del fits
    assert used(store) == (0, 0)


def test_a_view_of_a_big_tensor_over_budget_is_copied_alone(tmp_path: Path) -> None:
    store = make_store(4 * KB, tmp_path)
    base = kilobytes(100)
    kept = store.keep(base[:2])
    assert used(store) == (2, 0), "keeping the view would have kept 100 kB alive"
    assert torch.equal(kept, base[:2])


def test_empty_counts_like_keep(tmp_path: Path) -> None:
    store = make_store(4 * KB, tmp_path)
    first = store.empty((3, KB // 4), torch.float32)
    second = store.empty((2, KB // 8), torch.float64)
    assert first.shape == (3, 256)
    assert second.dtype == torch.float64
    assert used(store) == (3, 2)
    second.fill_(1.5)
    assert store.keep(second) is second
    del first
    assert used(store) == (0, 2)
    del second
    assert used(store) == (0, 0)


def test_many_rounds_leak_nothing(tmp_path: Path) -> None:
    store = make_store(3 * KB, tmp_path)
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        layer = [store.keep(kilobytes(2)) for _ in range(4)]
        assert store._used["host"] + store._used["disk"] == 8 * KB
        del layer
    assert used(store) == (0, 0)
    assert store.peak["disk"] == 6 * KB
    assert store._kept == {}
    assert mapped_files(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = make_store(0, tmp_path)
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OutputError, match=r"runtime\.spill_dir: no room for 2048 bytes .*No space left on device"):
        store.keep(kilobytes(2))
    assert list(tmp_path.iterdir()) == []
    assert used(store) == (0, 0)
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_map_that_fails_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many(*args: object, **kwargs: object) -> Tensor:
        raise RuntimeError("unable to mmap 2048 bytes from file: Cannot allocate memory (12)\nframe #0")

    monkeypatch.setattr(torch, "from_file", too_many)
    with pytest.raises(OutputError, match=r"Cannot allocate memory \(12\); free the disk") as caught:
        make_store(0, tmp_path).keep(kilobytes(2))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_spill_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        make_store(0, tmp_path / "missing").keep(kilobytes(2))


@pytest.mark.gpu
def test_device_then_host_then_disk(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    store = ActivationStore(device, device_budget=4 * KB, host_budget=4 * KB, spill_dir=str(tmp_path))
    kept = [store.keep(torch.randn(3 * KB // 4, device=device)) for _ in range(3)]
    assert [tensor.device.type for tensor in kept] == ["cuda", "cpu", "cpu"]
    assert store._used == {"device": 3 * KB, "host": 3 * KB, "disk": 3 * KB}
    assert store.empty((KB // 4,), torch.float32).device == device
    kept.clear()
    assert store._used == {"device": 0, "host": 0, "disk": 0}
