"""What the ranks of a machine share: made once, whole or not at all, and never outside its folder."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distributed_adaround.errors import InputError, OutputError
from distributed_adaround.files import storage
from distributed_adaround.files.local_files import LocalFiles

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    return LocalFiles(tmp_path / "shared")


@pytest.fixture
def store() -> Iterator[MemoryFileSystem]:
    """memory://"""
    store = MemoryFileSystem()
    store.store.clear()
    yield store
    store.store.clear()


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """First arguments of all calls of a function of storage from now on."""
    calls: list[Any] = []
    function = getattr(storage, name)
    monkeypatch.setattr(storage, name, lambda *given: (calls.append(given[0]), function(*given))[1])
    return calls


def everything(folder: Path) -> dict[str, bytes]:
    """Contents of all files but locks, by their names."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_temporary_folder_is_gone_afterwards() -> None:
    with LocalFiles.temporary() as files:
        made = files.derived("a", lambda to: to.write_text("x"))
        assert made.is_relative_to(files.folder)
    assert not files.folder.exists()


def test_local_files_are_used_where_they_lie(files: LocalFiles, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(b"x")
    assert files.path(str(path)) == files.path(f"file://{path}") == path
    assert not files.folder.exists()


def test_files_of_a_store_are_fetched_once(
    files: LocalFiles, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.pipe({"/a/x.npy": b"first", "/b/x.npy": b"second"})
    fetched = counted(monkeypatch, "download")
    paths = [files.path(f"memory://{folder}/x.npy") for folder in "abab"]
    assert [path.read_bytes() for path in paths] == [b"first", b"second"] * 2
    assert {path.name for path in paths} == {"x.npy"}
    # So do others that share the folder.
    assert LocalFiles(files.folder).path("memory://a/x.npy") == paths[0]
    assert fetched == ["memory://a/x.npy", "memory://b/x.npy"]
    with pytest.raises(InputError, match=r"^memory://none: cannot be read: no such file"):
        files.path("memory://none")


def test_a_checksum_is_read_again_when_the_file_changes(
    files: LocalFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    hashed = counted(monkeypatch, "sha256_file")
    assert [files.sha256(path) for _ in range(3)] == [hashlib.sha256(b"one").hexdigest()] * 3
    assert len(hashed) == 1
    before = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert files.sha256(path) == hashlib.sha256(b"two").hexdigest()
    # Another file in its place, as old and as long.
    other = tmp_path / "b"
    other.write_bytes(b"six")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    other.replace(path)
    assert files.sha256(path) == hashlib.sha256(b"six").hexdigest()
    assert len(hashed) == 3


def test_what_fails_leaves_nothing_and_is_made_by_the_next(files: LocalFiles) -> None:
    def fail(to: Path) -> None:
        to.write_text("half of")
        raise InputError("no more")

    with pytest.raises(InputError, match=r"^no more$"):
        files.derived("key", fail)
    made = files.derived("key", lambda to: to.write_text("all"))
    assert made.read_text() == "all"
    assert files.derived("key", fail) == made
    assert files.derived("other", lambda to: to.write_text("x")) != made
    assert sorted(everything(files.folder).values()) == [b"all", b"x"]


def test_a_full_disk_is_told(files: LocalFiles) -> None:
    def fill(to: Path) -> None:
        to.write_text("half of")
        raise OSError(28, os.strerror(28))

    with pytest.raises(OutputError, match=r"no room .*; set TMPDIR to another disk$"):
        files.derived("key", fill)


def one_of_many(folder: str, log: str, start: Any) -> None:
    def make(to: Path) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        to.write_text("whole " * 1000)

    start.wait()
    assert LocalFiles(Path(folder)).derived("key", make).read_text() == "whole " * 1000


def dies(folder: str) -> None:
    def make(to: Path) -> None:
        to.write_text("half of " * 10000)
        os.kill(os.getpid(), signal.SIGKILL)

    LocalFiles(Path(folder)).derived("key", make)


def test_several_processes_make_a_thing_once_after_one_that_died(files: LocalFiles, tmp_path: Path) -> None:
    first = SPAWN.Process(target=dies, args=(str(files.folder),))
    first.start()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    start = SPAWN.Barrier(3)
    log = tmp_path / "log"
    others = [SPAWN.Process(target=one_of_many, args=(str(files.folder), str(log), start)) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0] * 3
    assert len(log.read_text().split()) == 1
    assert [*everything(files.folder).values()] == [b"whole " * 1000]


def test_several_threads_make_a_thing_once(files: LocalFiles) -> None:
    start, calls = threading.Barrier(8), []

    def make(to: Path) -> None:
        calls.append(to)
        to.write_text("x")

    def ask() -> None:
        start.wait()
        files.derived("key", make)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def named(*suffixes: str) -> Callable[[str], bool]:
    return lambda name: name.endswith(suffixes)


def test_a_local_directory_is_used_where_it_lies(files: LocalFiles, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "a.json").write_text("{}")
    for uri in (str(folder), f"{folder}/", f"file://{folder}"):
        assert files.directory(uri, named(".json")) == folder
    with pytest.raises(InputError, match="no such folder, or it is empty"):
        files.directory(str(tmp_path / "none"), named(".json"))
    with pytest.raises(InputError, match="no such folder, or it is empty"):
        files.directory(str(folder / "part" / "a.json"), named(".json"))


def test_a_directory_of_a_store_keeps_its_folders_and_grows(
    files: LocalFiles, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.pipe({"/m/config.json": b"1", "/m/pool/config.json": b"2", "/m/w.safetensors": b"3", "/m/.git/x.json": b"4"})
    fetched = counted(monkeypatch, "download")
    folder = files.directory("memory://m", named(".json"))
    assert everything(folder) == {"config.json": b"1", "pool/config.json": b"2"}
    assert files.directory("memory://m", named(".json", ".safetensors")) == folder
    assert everything(folder) == {"config.json": b"1", "pool/config.json": b"2", "w.safetensors": b"3"}
    assert sorted(fetched) == ["memory://m/config.json", "memory://m/pool/config.json", "memory://m/w.safetensors"]


def test_names_in_a_store_do_not_leave_the_folder(files: LocalFiles, store: MemoryFileSystem) -> None:
    """Keys of an object store may be anything."""
    store.pipe("/m/config.json", b"1")
    store.store["/m/a/../../../../evil.json"] = store.store["/m/config.json"]
    assert "/m/a/../../../../evil.json" in store.find("/m")
    assert everything(files.directory("memory://m", named(".json"))) == {"config.json": b"1"}
    assert not [*files.folder.parent.rglob("evil*")]
