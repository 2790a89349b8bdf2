"""Files behind URIs: what is found, what a failed write leaves, what a message shows."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from distributed_adaround.errors import InputError, OutputError, redact
from distributed_adaround.files import storage, uris


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder URI in fsspec's memory file system, empty again afterwards."""
    yield "memory://bucket/run"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["path", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": memory}[request.param]


def test_write_read_list_remove(folder: str) -> None:
    names = ["a.npy", "b.txt", "deep/er/c.npy"]
    for name in names:
        storage.write_bytes(uris.join(folder, name), name.encode())
    assert storage.list_files(folder) == [uris.join(folder, name) for name in names]
    assert storage.list_files(folder + "/") == storage.list_files(folder)
    assert storage.list_files(uris.join(folder, "*.npy")) == [uris.join(folder, "a.npy")]
    assert storage.list_files(uris.join(folder, "**/*.npy")) == [uris.join(folder, n) for n in (names[0], names[2])]
    assert storage.list_files(uris.join(folder, "d*")) == [uris.join(folder, names[2])]
    assert storage.list_files(uris.join(folder, "b.txt")) == [uris.join(folder, "b.txt")]
    for uri, name in zip(storage.list_files(folder), names, strict=True):
        assert storage.read_bytes(uri) == name.encode()
        with storage.local_file(uri) as path:
            assert path.read_bytes() == name.encode()
            assert path.name == name.rsplit("/")[-1]
            assert storage.sha256_file(path) == hashlib.sha256(name.encode()).hexdigest()
    assert storage.exists(folder)
    storage.remove_tree(uris.join(folder, "deep"))
    assert not storage.exists(uris.join(folder, names[2]))
    storage.remove_tree(uris.join(folder, "a.npy"))
    assert storage.list_files(folder) == [uris.join(folder, "b.txt")]
    storage.remove_tree(uris.join(folder, "never-there"))


def test_nothing_found_is_an_empty_list(folder: str) -> None:
    assert storage.list_files(uris.join(folder, "none")) == []
    assert storage.list_files(uris.join(folder, "none-*.npy")) == []
    assert not storage.exists(uris.join(folder, "none"))


def test_hidden_files_and_folders_are_left_out(folder: str) -> None:
    for name in (".hidden.npy", ".git/x.npy", "seen.npy", ".abc.tmp"):
        storage.write_bytes(uris.join(folder, name), b"1")
    assert storage.list_files(folder) == [uris.join(folder, "seen.npy")]
    assert storage.list_files(uris.join(folder, "*")) == [uris.join(folder, "seen.npy")]
    # A hidden folder that the user names is not hidden.
    assert storage.list_files(uris.join(folder, ".git")) == [uris.join(folder, ".git/x.npy")]


def test_a_folder_that_may_not_be_read_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{tmp_path}/open/a.npy", b"1")
    storage.write_bytes(f"{tmp_path}/closed/b.npy", b"1")
    real = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot be read: permission denied$"):
        storage.list_files(str(tmp_path))


def test_links_to_folders_are_followed_and_circles_refused(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/elsewhere/a.npy", b"1")
    data = tmp_path / "data"
    data.mkdir()
    (data / "class").symlink_to(tmp_path / "elsewhere")
    for uri in (f"{data}", f"{data}/*", f"{data}/*/*.npy", f"{data}/**/*.npy"):
        assert storage.list_files(uri) == [f"{data}/class/a.npy"]
    (tmp_path / "elsewhere" / "back").symlink_to(data)
    with pytest.raises(InputError, match=r"cannot be read: too many levels of symbolic links$"):
        storage.list_files(str(data))


def test_listings_kept_by_a_store_are_dropped(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs and others keep listings; another rank may have written since."""
    listing: dict[str, Any] = {}
    real = MemoryFileSystem.info

    def kept(self: MemoryFileSystem, path: str, **options: Any) -> Any:
        if path not in listing:
            try:
                listing[path] = real(self, path, **options)
            except FileNotFoundError as error:
                listing[path] = error
        if isinstance(listing[path], FileNotFoundError):
            raise listing[path]
        return listing[path]

    monkeypatch.setattr(MemoryFileSystem, "info", kept)
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda self, path=None: listing.clear())
    assert not storage.exists(f"{memory}/x")
    MemoryFileSystem.store.update({"/bucket/run/x": MemoryFile(None, "/bucket/run/x", b"12")})
    assert storage.exists(f"{memory}/x")
    assert storage.list_files(f"{memory}/x") == [f"{memory}/x"]
    assert len(storage.read_bytes(f"{memory}/x")) == 2


def test_a_literal_name_with_wildcards_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a[1].npy").write_bytes(b"1")
    (tmp_path / "a1.npy").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    assert storage.list_files("a[1].npy") == ["a[1].npy"]
    assert storage.list_files("a?.npy") == ["a1.npy"]
    assert storage.list_files(".") == ["./a1.npy", "./a[1].npy"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.npy").write_bytes(b"1")
    assert storage.list_files("sub") == ["sub/b.npy"]
    assert storage.list_files("sub/*") == ["sub/b.npy"]


def test_chains_keep_their_links(memory: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{memory}/x.npy", b"xyz")
    assert storage.list_files(f"simplecache::{memory}/*.npy") == [f"simplecache::{memory}/x.npy"]
    assert storage.list_files(f"simplecache::{memory}") == [f"simplecache::{memory}/x.npy"]
    assert storage.read_bytes(f"simplecache::{memory}/x.npy") == b"xyz"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/y.npy", b"y")
    chain = f"zip://in/*.npy::file://{tmp_path}/a.zip"
    assert storage.list_files(chain) == [f"zip://in/y.npy::file://{tmp_path}/a.zip"]
    assert storage.read_bytes(storage.list_files(chain)[0]) == b"y"


@pytest.mark.parametrize(
    ("uri", "parts", "joined"),
    [
        ("a", ("b", "c.npy"), "a/b/c.npy"),
        ("a/", ("b",), "a/b"),
        ("/", ("b",), "/b"),
        ("", ("b",), "b"),
        ("memory://", ("b",), "memory://b"),
        ("s3://k/", ("/b",), "s3://k/b"),
        ("s3://k", (), "s3://k"),
    ],
)
def test_join(uri: str, parts: tuple[str, ...], joined: str) -> None:
    assert uris.join(uri, *parts) == joined


@pytest.mark.parametrize(
    ("uri", "shown", "name"),
    [
        ("data/a.npy", "data/a.npy", "a.npy"),
        ("s3://bucket/x.npy", "s3://bucket/x.npy", "x.npy"),
        ("s3://AKIA:secret@bucket/x.npy", "s3://bucket/x.npy", "x.npy"),
        ("s3://AKIA:sec/re@t@bucket/x.npy", "s3://bucket/x.npy", "x.npy"),
        ("https://token@host/x.npy", "https://host/x.npy", "x.npy"),
        ("https://host:8080/v@1/x.npy", "https://host:8080/v@1/x.npy", "x.npy"),
        ("https://host/x.npy?X-Amz-Signature=abc/d&b=c", "https://host/x.npy", "x.npy"),
        ("https://host/x.npy?token", "https://host/x.npy", "x.npy"),
        ("https://host/x.npy#token", "https://host/x.npy", "x.npy"),
        ("abfs://container/x.npy?sig=abc", "abfs://container/x.npy", "x.npy"),
        ("s3://bucket/img-??.npy", "s3://bucket/img-??.npy", "img-??.npy"),
        ("simplecache::s3://key:secret@bucket/x.npy", "simplecache::s3://bucket/x.npy", "x.npy"),
        ("zip://a.npy::s3://key:secret@bucket/x.zip?v=1", "zip://a.npy::s3://bucket/x.zip", "a.npy"),
        ("got 403 from https://u:p@h/a?sig=1 today", "got 403 from https://h/a today", None),
    ],
)
def test_redact_and_file_name(uri: str, shown: str, name: str | None) -> None:
    assert redact(uri) == shown
    if name is not None:
        assert uris.file_name(uri) == name


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.bin"
    storage.write_bytes(str(target), b"old")
    if step == "write":

        def write(path: Path) -> None:
            path.write_bytes(b"half")
            _full_disk()

        with pytest.raises(OutputError, match=r"out.bin: cannot be written: no space left on device$"):
            storage.write_file(str(target), write)
    else:
        monkeypatch.setattr(os, step, _full_disk)
        with pytest.raises(OutputError, match=r"out.bin: cannot be written: no space left on device$"):
            storage.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.bin"]


def test_a_device_that_really_is_full(tmp_path: Path) -> None:
    """/dev/full takes no byte: the error of the kernel itself."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")

    def write(path: Path) -> None:
        path.symlink_to("/dev/full")
        path.write_bytes(b"x" * 100)

    with pytest.raises(OutputError, match="no space left on device"):
        storage.write_file(str(tmp_path / "full.bin"), write)
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        assert path.name.startswith(".")
        assert path.name.endswith(".tmp")
        assert path.parent == tmp_path
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_file(str(tmp_path / "x"), write)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "import os, signal; from distributed_adaround.files import storage\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"storage.write_bytes({str(tmp_path / 'a.json')!r}, b'new')"
    )
    (tmp_path / "a.json").write_bytes(b"old")
    others = [".mine.tmp", "x.tmp", f".{'0' * 32}.tmp", "below/.b.0123456789abcdef0123456789abcdef.tmp"]
    for name in others:
        storage.write_bytes(f"{tmp_path}/{name}", b"1")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".a.json.*.tmp")
    assert left.read_bytes() == b"new"
    storage.remove_leftovers(str(tmp_path))
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a.json", *others}
    assert (tmp_path / "a.json").read_bytes() == b"old"


def test_leftovers_of_other_stores_and_of_no_folder(memory: str, tmp_path: Path) -> None:
    """A store uploads in one piece and has none."""
    name = ".a.0123456789abcdef0123456789abcdef.tmp"
    storage.write_bytes(f"{memory}/{name}", b"1")
    storage.remove_leftovers(memory)
    assert storage.exists(f"{memory}/{name}")
    storage.remove_leftovers(f"{tmp_path}/never-there")


def test_write_file_publishes_only_what_is_whole(folder: str) -> None:
    uri = uris.join(folder, "new/deep", "x" * 200)
    storage.write_file(uri, lambda path: path.write_bytes(b"good"))
    assert storage.read_bytes(uri) == b"good"

    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed")

    with pytest.raises(OutputError, match="cannot be written: PytorchStreamWriter failed"):
        storage.write_file(uri, write)
    assert storage.read_bytes(uri) == b"good"
    assert storage.list_files(folder) == [uri]


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    storage.write_bytes(str(tmp_path / "ours"), b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_local_file_downloads_and_cleans_up(memory: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{memory}/x.npy", b"xyz")
    with storage.local_file(f"{memory}/x.npy") as path:
        assert path.read_bytes() == b"xyz"
    assert not path.parent.exists()
    (tmp_path / "y").write_bytes(b"y")
    with storage.local_file(f"file://{tmp_path}/y") as path:
        assert path == tmp_path / "y"
    assert path.exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: storage.read_bytes(f"{t}/none"), r"none: cannot be read: no such file or folder$"),
        (lambda t: storage.local_file(f"{t}/none").__enter__(), r"none: cannot be read: no such file or folder$"),
        (lambda t: storage.local_file("memory://none").__enter__(), r"none: cannot be read: no such file or folder$"),
        (lambda t: storage.sha256_file(Path(t, "none")), r"none: cannot be read: no such file or folder$"),
        (
            lambda t: storage.list_files("nosuch://k:s@b/x"),
            r"^nosuch://b/x: cannot be read: Protocol not known: nosuch",
        ),
    ],
)
def test_reading_errors(call: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        call(str(tmp_path))


def test_writing_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for write in (
        partial(storage.write_bytes, data=b"x"),
        partial(storage.write_file, write=lambda path: path.write_bytes(b"x")),
    ):
        with pytest.raises(OutputError, match=r"file/below: cannot be written: (file exists|not a directory)$"):
            write(f"{tmp_path}/file/below")
        with pytest.raises(OutputError, match=r"^nosuch://b/x: cannot be written: Protocol not known"):
            write("nosuch://key:secret@b/x")
    with pytest.raises(OutputError, match=r"file/below: cannot be removed: not a directory$"):
        storage.remove_tree(f"{tmp_path}/file/below")
    # A folder stands where the file should go.
    (tmp_path / "taken" / "x").mkdir(parents=True)
    with pytest.raises(OutputError, match="taken: cannot be written: is a directory"):
        storage.write_bytes(f"{tmp_path}/taken", b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "taken"]


def test_errors_of_a_store_are_translated_without_secrets(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoreError(Exception):
        """Like botocore's: no OSError."""

    def refuse(*_: object, **__: object) -> None:
        raise StoreError("403 for https://k:s@host/x?sig=secret\nsecond line")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    expected = r"^memory://bucket/run: cannot be \w+: 403 for https://host/x$"
    with pytest.raises(InputError, match=expected):
        storage.read_bytes(memory)
    with pytest.raises(OutputError, match=expected):
        storage.write_bytes(memory, b"")
    # "I could not find out" is not "no".
    with pytest.raises(InputError, match=expected):
        storage.exists(memory)


def test_file_servers_get_their_folders_made(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    pipe = MemoryFileSystem.pipe_file

    def strict(self: MemoryFileSystem, path: str, value: bytes, **kwargs: object) -> None:
        if not made:
            raise FileNotFoundError(path)
        pipe(self, path, value, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "makedirs", lambda self, path, exist_ok: made.append(path))
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", strict)
    storage.write_bytes(f"{memory}/x", b"x")
    assert made == ["/bucket/run"]
    assert storage.read_bytes(f"{memory}/x") == b"x"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_http(tmp_path: Path) -> None:
    """A real server: signed URLs are read, and never shown."""
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")
    (tmp_path / "x.npy").write_bytes(b"xyz")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    thread = Thread(target=server.serve_forever, args=(0.01,))  # shutdown waits as long
    thread.start()
    try:
        root = f"http://127.0.0.1:{server.server_address[1]}"
        signed = f"{root}/x.npy?sig=secret"
        assert storage.list_files(signed) == [signed]
        assert storage.list_files(f"{root}/") == [f"{root}/x.npy"]
        assert len(storage.read_bytes(signed)) == 3
        assert storage.read_bytes(signed) == b"xyz"
        with storage.local_file(signed) as path:
            assert path.name == "x.npy"
            assert path.read_bytes() == b"xyz"
        with pytest.raises(InputError, match=rf"^{root}/none: cannot be read: no such file or folder$"):
            storage.read_bytes(f"{root}/none?sig=secret")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
