"""Who reads which sample: exhaustive over world sizes, and what makes the digest change."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from sample_data import build

from distributed_adaround.data.manifest import DataFile, FieldInfo, Manifest, cut, owner, prove_coverage, take
from distributed_adaround.errors import InputError
from distributed_adaround.files import storage, uris


def indexed(
    counts: list[int], *, microbatch_size: int, virtual_shards: int, num_samples: int | None = None
) -> Manifest:
    """A manifest of files that do not exist."""
    field = (FieldInfo("input", "float32", (1,)),)
    files = tuple(DataFile(f"f{i}.npy", 10, "0" * 64, count, field) for i, count in enumerate(counts))
    total = sum(counts)
    return Manifest(files, total, cut(take(total, num_samples), microbatch_size, virtual_shards), virtual_shards)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight samples in two files: sample i holds the value i."""
    np.save(tmp_path / "b.npy", np.arange(5, 8, dtype=np.float32).reshape(3, 1))
    np.save(tmp_path / "a.npy", np.arange(5, dtype=np.float32).reshape(5, 1))
    return tmp_path


@pytest.mark.parametrize("world_size", range(1, 10))
@pytest.mark.parametrize("virtual_shards", [1, 3, 8, 64])
def test_every_sample_has_exactly_one_rank(world_size: int, virtual_shards: int) -> None:
    for count in range(1, 26):
        for microbatch_size in (1, 2, 3, 7):
            manifest = indexed([count], microbatch_size=microbatch_size, virtual_shards=virtual_shards)
            owned = [manifest.owned(rank, world_size) for rank in range(world_size)]
            prove_coverage(len(manifest.microbatches), owned)
            samples = [s for indices in owned for i in indices for s in manifest.microbatches[i].samples]
            assert sorted(samples) == list(range(count))
            assert all(list(indices) == sorted(indices) for indices in owned)
            # Whole shards, never a part of one.
            for shard in range(virtual_shards):
                indices = [m.index for m in manifest.microbatches if m.shard == shard]
                assert set(indices) <= set(owned[shard % world_size])


def test_microbatches_do_not_depend_on_ranks_and_keep_the_remainder() -> None:
    manifest = indexed([5, 3, 1], microbatch_size=2, virtual_shards=3)
    assert [m.samples for m in manifest.microbatches] == [(0, 1), (2, 3), (4, 5), (6, 7), (8,)]
    assert [m.index for m in manifest.microbatches] == [0, 1, 2, 3, 4]
    assert [m.shard for m in manifest.microbatches] == [0, 1, 2, 0, 1]
    assert manifest.num_samples == 9
    assert [manifest.owned(rank, 2) for rank in range(2)] == [(0, 2, 3), (1, 4)]
    # Five ranks, three shards: two ranks own nothing.
    assert [manifest.owned(rank, 5) for rank in range(5)] == [(0, 3), (1, 4), (2,), (), ()]
    assert owner(7, 5) == 2


def test_locate_counts_through_the_files() -> None:
    counts = [5, 1, 3, 2]
    manifest = indexed(counts, microbatch_size=2, virtual_shards=3)
    expected = [(file, row) for file, count in enumerate(counts) for row in range(count)]
    assert [manifest.locate(i) for i in range(11)] == expected


def test_fewer_samples_are_evenly_spaced() -> None:
    assert take(10, 4) == [0, 2, 5, 7]
    assert take(10, None) == list(range(10))
    for available in range(1, 40):
        for wanted in range(1, available + 1):
            taken = take(available, wanted)
            assert len(set(taken)) == wanted
            assert taken == sorted(taken)
            assert taken[0] == 0
            assert taken[-1] < available
            gaps = {b - a for a, b in pairwise(taken)}
            assert len(gaps) <= 2


@pytest.mark.parametrize("wanted", [0, -1, 11])
def test_too_many_or_too_few_samples(wanted: int) -> None:
    with pytest.raises(InputError, match=rf"num_samples is {wanted}, but the files hold 10 samples"):
        take(10, wanted)


@pytest.mark.parametrize(("size", "shards", "name"), [(0, 1, "microbatch_size"), (1, 0, "virtual_shards")])
def test_sizes_must_be_positive(size: int, shards: int, name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} is 0: it must be at least 1$"):
        cut([1, 2], size, shards)


@pytest.mark.parametrize(
    ("total", "owned", "message"),
    [
        (3, [[0, 1], [1, 2]], r"microbatch 1 is owned by ranks 0, 1 at once"),
        (3, [[0, 0], [1, 2]], r"microbatch 0 is owned by ranks 0, 0 at once"),
        (4, [[0], [], [1]], r"2 of 4 microbatches, the first of them 2, are owned by none of the ranks 0 to 2"),
        (2, [[0, 1], [2]], r"rank 1 owns microbatch 2, but there are only 2"),
        (2, [[0, 1], [-1]], r"rank 1 owns microbatch -1, but there are only 2"),
    ],
)
def test_prove_coverage_names_the_ranks(total: int, owned: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prove_coverage(total, owned)


def test_build(folder: Path) -> None:
    manifest = build(str(folder))
    assert [uris.file_name(file.uri) for file in manifest.files] == ["a.npy", "b.npy"]
    assert [file.num_samples for file in manifest.files] == [5, 3]
    assert manifest.num_available == manifest.num_samples == 8
    assert manifest.fields == (FieldInfo("input", "float32", (1,)),)
    assert manifest.files[0].size == (folder / "a.npy").stat().st_size
    assert manifest.files[0].sha256 == storage.sha256_file(folder / "a.npy")
    assert build(str(folder), num_samples=3).microbatches[0].samples == (0, 2)
    # The same set of files, however it is named; a file named twice counts once.
    assert build(str(folder / "*.npy")) == manifest
    assert build([str(folder / "b.npy"), str(folder), str(folder / "a.npy")]) == manifest


def test_json_round_trip(folder: Path) -> None:
    manifest = build(str(folder), fields={"x": "input"}, num_samples=5)
    (folder / "README.md").write_text("about")
    for original in (manifest, build(str(folder)), build(str(folder), one_sample_per_file=True)):
        again = Manifest.from_json(original.to_json())
        assert again == original
        assert hash(again) == hash(original)
        assert again.digest() == original.digest()
    assert manifest.files[0].fields == (FieldInfo("x", "float32", (1,), source="input"),)


def test_digest_ignores_the_folder_and_nothing_else(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    digest = build(str(folder)).digest()
    assert len(digest) == 64
    moved = tmp_path_factory.mktemp("moved")
    for name in ("a.npy", "b.npy"):
        (moved / name).write_bytes((folder / name).read_bytes())
    (moved / "README.md").write_text("about")
    assert build(str(moved)).digest() == digest
    assert build(f"file://{moved}").digest() == digest
    changed = [
        build(str(folder), num_samples=7).digest(),
        build(str(folder), microbatch_size=3).digest(),
        build(str(folder), virtual_shards=5).digest(),
        build(str(folder), fields={"x": "input"}).digest(),
        build(str(folder), one_sample_per_file=True).digest(),
        build(str(folder / "a.npy")).digest(),
    ]
    (moved / "b.npy").rename(moved / "c.npy")
    changed.append(build(str(moved)).digest())
    np.save(folder / "b.npy", np.arange(6, 9, dtype=np.float32).reshape(3, 1))
    changed.append(build(str(folder)).digest())
    assert len({digest, *changed}) == 1 + len(changed)


def test_digest_ignores_credentials(folder: Path) -> None:
    """A signed URL is another one every hour."""
    manifest = build(str(folder))
    content = json.loads(manifest.to_json())
    for file in content["files"]:
        file["uri"] = f"https://u:p@host/x/{uris.file_name(file['uri'])}?sig=abc"
    assert Manifest.from_json(json.dumps(content)).digest() == manifest.digest()


def test_shapes_that_differ_are_unknown(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((1, 3, 5), np.float32))
    np.save(tmp_path / "c.npy", np.zeros((1, 3, 4), np.float32))
    assert build(str(tmp_path)).fields == (FieldInfo("input", "float32", (3, None)),)
    assert build(str(tmp_path), one_sample_per_file=True).fields == (FieldInfo("input", "float32", (None, 3, None)),)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            np.zeros((1, 3), np.float64),
            r"b.npy and \S+a.npy differ in the field 'input': float64 \(3\) and float32 \(3\)",
        ),
        (np.zeros((1, 3, 3), np.float32), r"float32 \(3, 3\) and float32 \(3\)"),
    ],
)
def test_files_must_agree(tmp_path: Path, other: np.ndarray[Any, Any], message: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 3), np.float32))
    np.save(tmp_path / "b.npy", other)
    with pytest.raises(InputError, match=message):
        build(str(tmp_path))


def test_files_must_have_the_same_fields(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 3)), y=np.zeros((1,)))
    np.savez(tmp_path / "b.npz", x=np.zeros((1, 3)), z=np.zeros((1,)))
    with pytest.raises(InputError, match=r"b.npz and \S+a.npz have different fields: x, z and x, y; choose common"):
        build(str(tmp_path))
    assert [info.name for info in build(str(tmp_path), fields={"x": "x"}).fields] == ["x"]


def test_field_order_is_the_first_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", y=np.zeros((1, 2)), x=np.zeros((1, 3)))
    np.savez(tmp_path / "b.npz", x=np.zeros((1, 3)), y=np.zeros((1, 2)))
    assert [info.name for info in build(str(tmp_path)).fields] == ["y", "x"]
    assert [info.name for info in build(str(tmp_path), fields={"q": "x", "p": "y"}).fields] == ["q", "p"]


def test_files_of_unknown_type_are_reported(folder: Path) -> None:
    (folder / "README.md").write_text("about")
    (folder / "sub").mkdir()
    (folder / "sub" / "LICENSE").write_text("free")
    manifest = build(str(folder))
    assert manifest.skipped == (str(folder / "README.md"), str(folder / "sub" / "LICENSE"))
    assert manifest.num_samples == 8


def test_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(
        InputError, match=r": 1 files of unknown type, for example \S+README.md; supported are .npy, .npz"
    ):
        build(str(tmp_path))
    with pytest.raises(InputError, match=r"README.md: unknown file type; supported are .npy"):
        build(str(tmp_path / "README.md"))


def test_nothing_there(tmp_path: Path, folder: Path) -> None:
    for uri in (f"{tmp_path}/none", f"{tmp_path}/none-*.npy", "memory://key:secret@none/x"):
        with pytest.raises(InputError, match=r"none.*: no file matches; check the path") as caught:
            build([str(folder), uri])
        assert "secret" not in str(caught.value)


def test_remote_files_and_suffixes_in_capitals(folder: Path) -> None:
    try:
        storage.write_bytes("memory://calib/A.NPY", (folder / "a.npy").read_bytes())
        manifest = build("memory://calib")
        assert manifest.num_samples == 5
        assert manifest.files[0].sha256 == storage.sha256_file(folder / "a.npy")
    finally:
        MemoryFileSystem.store.clear()


def test_the_index_arithmetic_needs_no_torch() -> None:
    code = "import sys, distributed_adaround.data.manifest; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
