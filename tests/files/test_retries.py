"""Stores that fail for a while, or for good: what is tried again, how often, and what the user is told."""

from __future__ import annotations

import errno
import http.client
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import tenacity
from flaky_server import Fault, FlakyServer, flaky_server
from fsspec.implementations.memory import MemoryFileSystem

from distributed_adaround.errors import InputError, OutputError, UnreachableError
from distributed_adaround.files import retries, storage

URI = "memory://retries/run/x"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been slept."""
    slept: list[float] = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", slept.append)
    return slept


@pytest.fixture(autouse=True)
def _empty_store() -> Iterator[None]:
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def named(name: str, *bases: type[BaseException], **attributes: object) -> BaseException:
    """An error as a library that is not installed would raise it."""
    error: BaseException = type(name, bases or (Exception,), {})("text")
    for key, value in attributes.items():
        setattr(error, key, value)
    return error


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def while_handling(error: BaseException, earlier: BaseException) -> BaseException:
    error.__context__ = earlier
    return error


PASSING = [
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError("no answer"),
    OSError(errno.EBUSY, "Please reduce your request rate."),
    OSError(errno.ENETUNREACH, "unreachable"),
    socket.gaierror(socket.EAI_AGAIN, "name server"),
    http.client.IncompleteRead(b""),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError(),
    named("ClientResponseError", status=503),
    named("HttpError", code="429"),
    named("HttpResponseError", status_code=500),
    named("ClientError", response={"ResponseMetadata": {"HTTPStatusCode": 502}}),
    caused(OSError(errno.EIO, "text"), named("ClientError", response={"ResponseMetadata": {"HTTPStatusCode": 504}})),
    caused(FileNotFoundError("http://host/x"), ConnectionRefusedError(errno.ECONNREFUSED, "refused")),
    while_handling(named("EndpointConnectionError"), ConnectionRefusedError(errno.ECONNREFUSED, "refused")),
]
LASTING = [
    FileNotFoundError(errno.ENOENT, "gone"),
    PermissionError("Access Denied"),
    IsADirectoryError("folder"),
    OSError(errno.ENOSPC, "full"),
    ValueError("Protocol not known"),
    named("NoCredentialsError"),
    named("ClientResponseError", status=403),
    named("ClientError", response={"ResponseMetadata": {"HTTPStatusCode": 400}}),
    named("ClientError", response={}),
    caused(FileNotFoundError("http://host/x"), named("ClientResponseError", status=404)),
    caused(aiohttp.ClientConnectionError(), ssl.SSLCertVerificationError("self-signed certificate")),
    named("AuthenticationException", type("SSHException", (Exception,), {})),
    while_handling(FileNotFoundError("gone"), caused(UnreachableError("busy"), ConnectionResetError("reset"))),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_errors_that_pass(error: BaseException) -> None:
    assert retries.is_passing(error)


@pytest.mark.parametrize("error", LASTING, ids=lambda error: type(error).__name__)
def test_errors_that_last(error: BaseException) -> None:
    assert not retries.is_passing(error)


def test_an_endless_chain_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not retries.is_passing(first)


def failing(times: int, error: BaseException, real: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    """A method that raises `times` times before it works."""

    def call(*args: Any, **options: Any) -> Any:
        calls.append(real.__name__)
        if len(calls) <= times:
            raise error
        return real(*args, **options)

    return call


BUSY = named("ClientResponseError", status=503)
OPERATIONS: list[tuple[str, Callable[[], Any], Any]] = [
    ("cat_file", lambda: storage.read_bytes(URI), b"old"),
    ("info", lambda: storage.exists(URI), True),
    ("info", lambda: storage.exists(URI + "/none"), False),
    ("get_file", lambda: _copied(URI), b"old"),
    ("info", lambda: storage.list_files(URI), [URI]),
    ("ls", lambda: storage.list_files("memory://retries"), [URI]),
    ("ls", lambda: storage.list_files("memory://retries/*/x"), [URI]),
    ("pipe_file", lambda: storage.write_bytes(URI, b"new"), None),
    ("put_file", lambda: storage.write_file(URI, lambda path: path.write_bytes(b"new")), None),
    ("rm", lambda: storage.remove_tree(URI), None),
]


def _copied(uri: str) -> bytes:
    with storage.local_file(uri) as path:
        return path.read_bytes()


@pytest.mark.parametrize(
    ("method", "call", "expected"), OPERATIONS, ids=[f"{o[0]}-{i}" for i, o in enumerate(OPERATIONS)]
)
def test_a_busy_store_is_asked_again(
    method: str, call: Callable[[], Any], expected: Any, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    storage.write_bytes(URI, b"old")
    calls: list[str] = []
    monkeypatch.setattr(
        MemoryFileSystem, method, failing(retries.MAX_TRIES - 1, BUSY, getattr(MemoryFileSystem, method), calls)
    )
    assert call() == expected
    assert len(waits) == retries.MAX_TRIES - 1
    assert len(calls) > len(waits)


@pytest.mark.parametrize(
    ("method", "call", "expected"), OPERATIONS, ids=[f"{o[0]}-{i}" for i, o in enumerate(OPERATIONS)]
)
def test_a_store_that_stays_away_is_no_missing_file(
    method: str,
    call: Callable[[], Any],
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
) -> None:
    storage.write_bytes(URI, b"old")
    calls: list[str] = []
    away = caused(FileNotFoundError(URI), ConnectionRefusedError(errno.ECONNREFUSED, "refused for k:secret@host"))
    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, method, failing(99, away, getattr(MemoryFileSystem, method), calls))
        with pytest.raises(UnreachableError, match=r"cannot be \w+: .*refused.*; the store does not answer") as caught:
            call()
    assert caught.value.exit_code == 75
    assert len(calls) == retries.MAX_TRIES == len(waits) + 1
    assert storage.read_bytes(URI) == b"old"


def test_waits_grow_and_are_drawn_at_random(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing(10**6, BUSY, MemoryFileSystem.cat_file, []))
    for _ in range(50):
        with pytest.raises(UnreachableError):
            storage.read_bytes(URI)
    rounds = [waits[start : start + 2] for start in range(0, len(waits), 2)]
    by_try = list(zip(*rounds, strict=True))
    bounds = [2, 4]
    for drawn, bound in zip(by_try, bounds, strict=True):
        assert 0 <= min(drawn) < bound / 4
        assert bound * 3 / 4 < max(drawn) <= bound


@pytest.mark.parametrize("error", [PermissionError("Access Denied"), FileNotFoundError("gone"), ValueError("what?")])
def test_what_lasts_is_not_tried_again(error: Exception, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    calls: list[str] = []
    for method, call, expected in (
        ("cat_file", lambda: storage.read_bytes(URI), InputError),
        ("pipe_file", lambda: storage.write_bytes(URI, b"new"), OutputError),
    ):
        monkeypatch.setattr(MemoryFileSystem, method, failing(99, error, getattr(MemoryFileSystem, method), calls))
        with pytest.raises(expected):
            call()
    # A missing folder is made once.
    assert len(calls) == (3 if isinstance(error, FileNotFoundError) else 2)
    assert waits == []


def test_local_files_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "replace", busy)
    for target in (str(tmp_path / "x"), f"file://{tmp_path}/x"):
        with pytest.raises(OutputError, match="busy"):
            storage.write_bytes(target, b"x")
    assert waits == []
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_for_downloads_is_an_error_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(URI, b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    with pytest.raises(OutputError, match=r"no room for a copy of memory://retries/run/x; set TMPDIR"):
        _copied(URI)


def test_a_failed_listing_is_not_a_shorter_one(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """fsspec's find and glob leave out folders that raise OSError: samples would be missing without a word."""
    for name in ("a/1.npy", "b/2.npy", "b/c/3.npy"):
        storage.write_bytes(f"memory://retries/{name}", b"")
    real = MemoryFileSystem.ls

    def partly(self: MemoryFileSystem, path: str, **options: Any) -> Any:
        if path.endswith("/b"):
            raise OSError(errno.EBUSY, "SlowDown")
        return real(self, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "ls", partly)
        for uri in ("memory://retries", "memory://retries/*", "memory://retries/*/*.npy", "memory://retries/**/*.npy"):
            with pytest.raises(UnreachableError, match="slowdown"):
                storage.list_files(uri)
    assert len(storage.list_files("memory://retries")) == 3
    assert len(storage.list_files("memory://retries/**/*.npy")) == 3
    assert len(storage.list_files("memory://retries/*/*.npy")) == 2
    assert len(storage.list_files("memory://retries/?/[2-9].npy")) == 1


def test_file_servers_write_beside_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """sftp writes into the file itself: what breaks off there must not be under the old name."""
    storage.write_bytes(URI, b"old")
    monkeypatch.setattr(MemoryFileSystem, "protocol", "sftp")
    pipe = MemoryFileSystem.pipe_file

    def broken(self: MemoryFileSystem, path: str, value: bytes, **options: Any) -> None:
        pipe(self, path, value[:1], **options)
        raise PermissionError("quota")

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "pipe_file", broken)
        with pytest.raises(OutputError, match="quota"):
            storage.write_bytes(URI, b"new")
    assert storage.read_bytes(URI) == b"old"
    assert list(MemoryFileSystem.store) == ["/retries/run/x"]
    storage.write_bytes(URI, b"new")
    assert storage.read_bytes(URI) == b"new"
    assert list(MemoryFileSystem.store) == ["/retries/run/x"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FlakyServer]:
    (tmp_path / "x.npy").write_bytes(b"xyz")
    with flaky_server(tmp_path) as server:
        yield server


@pytest.mark.parametrize("fault", ["503", "500", "reset", "cut"])
def test_a_real_server_that_fails_and_recovers(fault: Fault, server: FlakyServer, waits: list[float]) -> None:
    server.faults = [fault] * 2
    assert storage.read_bytes(f"{server.url}/x.npy") == b"xyz"
    # aiohttp itself repeats a request once when a connection breaks before any answer.
    assert len(waits) == (1 if fault == "reset" else 2)
    assert _copied(f"{server.url}/x.npy") == b"xyz"


@pytest.mark.parametrize("fault", ["503", "reset", "cut"])
def test_a_real_server_that_stays_away(fault: Fault, server: FlakyServer, waits: list[float]) -> None:
    server.then = fault
    uri = f"{server.url}/x.npy?sig=secret"
    with pytest.raises(UnreachableError, match=rf"^{server.url}/x.npy: cannot be read: .*start the job again later$"):
        storage.read_bytes(uri)
    assert len(waits) == retries.MAX_TRIES - 1
    if fault != "cut":  # to know that it exists takes no content
        with pytest.raises(UnreachableError) as caught:
            storage.exists(uri)
        assert "secret" not in str(caught.value)


def test_a_server_that_refuses_is_not_asked_again(server: FlakyServer, waits: list[float]) -> None:
    server.then = "403"
    with pytest.raises(InputError, match="403"):
        storage.read_bytes(f"{server.url}/x.npy")
    assert (server.num_requests, waits) == (1, [])
