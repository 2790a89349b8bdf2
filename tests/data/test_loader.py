"""Microbatches as tensors: every sample once, in order, padded and masked; nothing left behind."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file
from sample_data import build, loader

from distributed_adaround.data import encoder as encoder_module
from distributed_adaround.data.loader import SampleLoader
from distributed_adaround.data.manifest import Manifest
from distributed_adaround.errors import InputError
from distributed_adaround.files import storage
from distributed_adaround.files.local_files import LocalFiles


def num_threads() -> int:
    """Reading threads that are still alive."""
    return sum("_populate_queue" in thread.name for thread in threading.enumerate())


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """11 samples of 4 file types; sample i has x = [i, -i] and label = 100 + i."""
    x = torch.stack([torch.arange(11.0), -torch.arange(11.0)], 1)
    label = 100 + torch.arange(11)
    np.savez(tmp_path / "a.npz", x=x[:4].numpy(), label=label[:4].numpy())
    save_file({"x": x[4:5].contiguous(), "label": label[4:5]}, tmp_path / "b.safetensors")
    torch.save({"x": x[5:8].clone(), "label": label[5:8].clone()}, tmp_path / "c.pt")
    lines = [{"x": x[i].tolist(), "label": int(label[i])} for i in range(8, 11)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.fixture
def tokens(tmp_path: Path) -> Manifest:
    """Five texts of 3, 1, 2, 2, 4 tokens in microbatches of 2."""
    rows = [[1, 2, 3], [4], [5, 6], [7, 8], [9, 9, 9, 9]]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return build(str(tmp_path))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 9])
def test_all_ranks_together_load_every_sample_once(mixed: Path, world_size: int, prefetch: int) -> None:
    manifest = build(str(mixed))
    seen: dict[int, int] = {}
    for rank in range(world_size):
        with loader(manifest, manifest.owned(rank, world_size), prefetch=prefetch) as mine:
            assert mine.total == 6
            order = []
            for index, batch in mine:
                order.append(index)
                assert list(batch) == ["x", "label"]
                ids = manifest.microbatches[index].samples
                for row, i in enumerate(ids):
                    assert batch["x"][row].tolist() == [i, -i]
                    assert batch["label"][row].item() == 100 + i
                    seen[i] = seen.get(i, 0) + 1
                assert len(batch["x"]) == len(batch["label"]) == len(ids)
            assert tuple(order) == mine.owned == manifest.owned(rank, world_size)
    assert seen == dict.fromkeys(range(11), 1)
    assert num_threads() == 0


def test_evenly_spaced_samples(mixed: Path) -> None:
    manifest = build(str(mixed), num_samples=5, microbatch_size=3)
    with loader(manifest) as mine:
        assert [batch["label"].tolist() for _, batch in mine] == [[100, 102, 104], [106, 108]]


def test_load_takes_any_microbatch_in_any_order(mixed: Path) -> None:
    manifest = build(str(mixed))
    with loader(manifest, [1]) as mine:
        for index in (5, 0, 3, 0):
            expected = [100 + i for i in manifest.microbatches[index].samples]
            assert mine.load(index)["label"].tolist() == expected


def test_owned_is_walked_in_ascending_order(mixed: Path) -> None:
    with loader(build(str(mixed)), [4, 0, 2]) as mine:
        assert mine.owned == (0, 2, 4)
        assert [index for index, _ in mine] == [0, 2, 4]
        assert [index for index, _ in mine] == [0, 2, 4]  # and again


def test_renamed_fields_and_one_sample_per_file(tmp_path: Path) -> None:
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", image=np.full((2, 2), i, np.float32), other=np.zeros(i))
    section: dict[str, Any] = {"fields": {"pixel_values": "image"}, "one_sample_per_file": True}
    manifest = build(str(tmp_path), **section)
    with loader(manifest, section=section) as mine:
        batches = [batch["pixel_values"] for _, batch in mine]
    assert [batch.shape for batch in batches] == [(2, 2, 2), (1, 2, 2)]
    assert torch.cat(batches)[:, 0, 0].tolist() == [0, 1, 2]


def test_padding_and_mask(tokens: Manifest) -> None:
    with loader(tokens, pad_value=-1) as mine:
        batches = [batch for _, batch in mine]
    assert [batch["input_ids"].tolist() for batch in batches] == [
        [[1, 2, 3], [4, -1, -1]],
        [[5, 6], [7, 8]],
        [[9, 9, 9, 9]],
    ]
    # The mask is there in every microbatch, padded or not: a model is always called in the same way.
    assert [batch["attention_mask"].tolist() for batch in batches] == [
        [[1, 1, 1], [1, 0, 0]],
        [[1, 1], [1, 1]],
        [[1, 1, 1, 1]],
    ]
    for batch in batches:
        assert batch["attention_mask"].dtype == batch["input_ids"].dtype == torch.int64


def test_a_mask_in_the_data_is_padded_with_zeros(tmp_path: Path) -> None:
    lines = [{"ids": [5, 6, 7], "keep": [1, 1, 0]}, {"ids": [8], "keep": [1]}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with loader(build(str(tmp_path)), pad_value=9, mask_field="keep") as mine:
        batch = mine.load(0)
    assert batch["ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["keep"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert list(batch) == ["ids", "keep"]


def test_padding_of_several_dimensions_and_fields(tmp_path: Path) -> None:
    shapes = [(3, 2, 4), (3, 5, 1)]
    torch.save([{"image": torch.ones(s), "size": torch.tensor(s)} for s in shapes], tmp_path / "a.pt")
    with loader(build(str(tmp_path)), pad_value=0.5, mask_field="mask") as mine:
        batch = mine.load(0)
    assert batch["image"].shape == (2, 3, 5, 4)
    for row, (channels, height, width) in enumerate(shapes):
        expected = torch.full((3, 5, 4), 0.5)
        expected[:channels, :height, :width] = 1
        assert torch.equal(batch["image"][row], expected)
    # From the first dimension that varies: the height.
    assert batch["mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_no_mask_where_nothing_varies(mixed: Path) -> None:
    with loader(build(str(mixed)), pad_value=0.5) as mine:
        assert list(mine.load(0)) == ["x", "label"]


@pytest.mark.parametrize("pad_value", [0.5, 2**70])
def test_a_pad_value_that_does_not_fit(tokens: Manifest, pad_value: float) -> None:
    with pytest.raises(InputError, match=r"pad_value \S+ does not fit the field 'input_ids' of dtype int64"):
        loader(tokens, pad_value=pad_value)


def test_a_negative_pad_value_for_bytes(tmp_path: Path) -> None:
    torch.save([torch.ones(n, dtype=torch.uint8) for n in (1, 2)], tmp_path / "a.pt")
    with pytest.raises(InputError, match="pad_value -1 does not fit the field 'input' of dtype uint8"):
        loader(build(str(tmp_path)), pad_value=-1)


@pytest.mark.parametrize("change", ["content", "size", "gone"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_file_that_changed_is_named(mixed: Path, change: str, prefetch: int) -> None:
    manifest = build(str(mixed))
    path = mixed / "c.pt"
    if change == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content) + b"x" * (change == "size"))
    message = "cannot be read: no such file" if change == "gone" else "the file is not the one in the manifest"
    with loader(manifest, prefetch=prefetch) as mine:
        walk = iter(mine)
        assert [next(walk)[0], next(walk)[0]] == [0, 1]
        # The one error itself, not torchdata's text around it.
        with pytest.raises(InputError, match=rf"^\S+c\.pt: {message}") as caught:
            next(walk)
        assert "\n" not in str(caught.value)
        assert mine.load(5)["label"].tolist() == [110]
    assert num_threads() == 0  # although the error and its frames are still there


def test_each_file_is_verified_once_and_only_when_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(12):
        np.save(tmp_path / f"{i:02}.npy", np.full((1, 2), i, np.float32))
    manifest = build(str(tmp_path), microbatch_size=1)
    hashed: list[str] = []
    real = storage.sha256_file
    monkeypatch.setattr(storage, "sha256_file", lambda path: (hashed.append(path.name), real(path))[1])
    with loader(manifest, range(0, 12, 2)) as mine:
        assert hashed == []
        for _ in range(3):  # more files than are kept open
            assert [batch["input"][0, 0].item() for _, batch in mine] == [0, 2, 4, 6, 8, 10]
        assert hashed == [f"{i:02}.npy" for i in range(0, 12, 2)]


def test_the_thread_ends_when_the_walk_is_abandoned(mixed: Path) -> None:
    manifest = build(str(mixed), microbatch_size=1)
    with loader(manifest, prefetch=2) as mine:
        for _ in mine:
            assert num_threads() == 1
            break
        assert num_threads() == 0
        walk = iter(mine)
        next(walk)
        other = iter(mine)  # two at a time do not disturb each other
        assert [index for index, _ in other] == list(range(11))
        assert [index for index, _ in walk] == list(range(1, 11))
        walk = iter(mine)
        next(walk)
        walk.close()  # type: ignore[attr-defined]
        assert num_threads() == 0
    gc.collect()
    assert num_threads() == 0


def test_no_more_than_prefetch_microbatches_are_read_ahead(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = build(str(mixed), microbatch_size=1)
    loaded: list[int] = []
    third = threading.Event()
    real = SampleLoader.load

    def spy(self: SampleLoader, index: int) -> Any:
        loaded.append(index)
        if len(loaded) == 3:
            third.set()
        return real(self, index)

    monkeypatch.setattr(SampleLoader, "load", spy)
    with loader(manifest, prefetch=2) as mine:
        walk = iter(mine)
        assert next(walk)[0] == 0
        assert third.wait(60)  # the one taken and two ahead; without a thread this never comes
        assert loaded == [0, 1, 2]
        del walk
        assert loaded == [0, 1, 2]
    loaded.clear()
    with loader(manifest, prefetch=0) as mine:
        next(iter(mine))
        assert loaded == [0]


def test_reading_leaves_torchs_number_of_threads_alone(mixed: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with loader(build(str(mixed))) as mine:
            assert len(list(mine)) == 6
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (torch.get_num_threads(), found) == (3, [3])
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def remote(mixed: Path) -> Iterator[str]:
    """The mixed files behind memory://."""
    for path in mixed.iterdir():
        storage.write_bytes(f"memory://calib/{path.name}", path.read_bytes())
    yield "memory://calib"
    MemoryFileSystem.store.clear()


def test_remote_files_are_fetched_and_hashed_once_by_all_ranks_of_a_machine(
    remote: str, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    real = MemoryFileSystem.get_file

    def spy(self: MemoryFileSystem, source: str, target: str, **options: Any) -> None:
        fetched.append(source)
        real(self, source, target, **options)

    hashed: list[str] = []
    real_hash = storage.sha256_file
    monkeypatch.setattr(storage, "sha256_file", lambda path: (hashed.append(path.name), real_hash(path))[1])
    monkeypatch.setattr(MemoryFileSystem, "get_file", spy)
    names = ["a.npz", "b.safetensors", "c.pt", "d.jsonl"]
    with LocalFiles.temporary() as files:
        manifest = build(remote, files)
        with loader(manifest, manifest.owned(0, 2), files) as first, loader(manifest, None, files) as second:
            for mine, expected in ((first, [100, 101, 104, 105, 108, 109]), (second, [*range(100, 111)])):
                assert [label for _, batch in mine for label in batch["label"].tolist()] == expected
        assert sorted(fetched) == [f"/calib/{name}" for name in names]
        assert sorted(hashed) == names
    assert not files.folder.exists()
    assert build(str(mixed / "*.*")).digest() == manifest.digest()


def test_another_machine_sees_that_a_file_has_changed(remote: str) -> None:
    manifest = build(remote)
    storage.write_bytes(f"{remote}/c.pt", b"other")
    with loader(manifest) as mine, pytest.raises(InputError, match=r"^memory://calib/c.pt: the file is not the one"):
        list(mine)


def test_close_waits_for_the_read_in_progress(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download folder must not vanish below a reader, and no file may be opened after it."""
    manifest = build(remote, microbatch_size=1)
    inside, leave = threading.Event(), threading.Event()
    real = encoder_module.open_samples

    def slow(path: Path, **options: Any) -> Any:
        inside.set()
        assert leave.wait(60)
        assert path.exists()
        return real(path, **options)

    monkeypatch.setattr(encoder_module, "open_samples", slow)
    mine = loader(manifest)
    result: list[Any] = []
    reader = threading.Thread(target=lambda: result.append(mine.load(0)))
    reader.start()
    assert inside.wait(60)
    closer = threading.Thread(target=mine.close)
    closer.start()
    leave.set()
    reader.join()
    closer.join()
    assert result[0]["label"].tolist() == [100]
    with pytest.raises(AssertionError, match="closed"):
        mine.load(0)


def test_local_files_are_read_in_place(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a copy of a local file")

    monkeypatch.setattr(LocalFileSystem, "get_file", refuse)
    with loader(build(f"file://{mixed}")) as mine:
        assert len(list(mine)) == 6


def test_an_empty_rank(mixed: Path) -> None:
    with loader(build(str(mixed)), []) as mine:
        assert list(mine) == []
        assert mine.total == 6
