"""Canaries: whatever stands in a URI to open a door is nowhere in what the program says or writes, in good times and
bad, also in tracebacks of libraries that know nothing of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import toy_models
from flaky_server import FlakyServer, flaky_server
from fsspec.implementations.memory import MemoryFileSystem
from sample_jobs import write_job

from distributed_adaround import cli

pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")

# Parts of every secret here; none is a word of this program.
CANARY = "kanarie"
USER, PASSWORD, TOKEN = f"{CANARY}user", f"{CANARY}pass%2Fword", f"{CANARY}token"
OUTPUT = f"memory://{USER}:{PASSWORD}@bucket/out"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("distributed_adaround.files.retries._WAIT", lambda state: 0)
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small job whose weights, data and job file a web server has too."""
    write_job(tmp_path, "mlp", rounding={"solver": "nearest"})
    safetensors.torch.save_file(
        {name: tensor.clone() for name, tensor in toy_models.mlp().state_dict().items()}, tmp_path / "w.safetensors"
    )
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[FlakyServer]:
    with flaky_server(folder) as server:
        yield server


def door(server: FlakyServer, name: str) -> str:
    """The URI of a file of the server with a user, a password and a token."""
    return f"{server.url.replace('://', f'://{USER}:{PASSWORD}@')}/{name}?sig={TOKEN}&other=1"


def written_in_memory() -> dict[str, bytes]:
    door = f"{USER}:{PASSWORD}@"
    return {path.replace(door, ""): bytes(file.getvalue()) for path, file in MemoryFileSystem.store.items()}


def found_in(files: dict[str, bytes]) -> list[str]:
    return [name for name, content in files.items() if CANARY.encode() in content or CANARY in name]


def test_a_job_that_succeeds(folder: Path, server: FlakyServer, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        f"data.uri={door(server, 'data.npz')}",
        f"model.weights={door(server, 'w.safetensors')}",
        f"output.uri={OUTPUT}",
    ]
    flags = [part for override in overrides for part in ("--set", override)]
    server.faults = ["503", "reset"]
    for command in (["validate"], ["plan"], ["run", "--debug"], ["run"], ["status"]):
        path = str(folder / "job.yaml")
        assert cli.main([*command, path, *flags]) == 0, capsys.readouterr().err
        out, err = capsys.readouterr()
        assert CANARY not in out + err
    files = written_in_memory()
    assert {"/bucket/out/report.json", "/bucket/out/status.json", "/bucket/out/commits/manifest.json"} <= files.keys()
    assert any("events" in name for name in files)
    assert found_in(files) == []


def _missing(server: FlakyServer) -> list[str]:
    return [f"data.uri={door(server, 'gone.npz')}"]


def _missing_weights(server: FlakyServer) -> list[str]:
    return [f"model.weights={door(server, 'gone.pt')}"]


def _not_a_file_of_weights(server: FlakyServer) -> list[str]:
    (server.folder / "bad.pt").write_bytes(b"nonsense")
    return [f"model.weights={door(server, 'bad.pt')}"]


def _damaged(server: FlakyServer) -> list[str]:
    content = (server.folder / "data.npz").read_bytes()
    (server.folder / "bad.npz").write_bytes(content[:-300])
    return [f"data.uri={door(server, 'bad.npz')}"]


def _busy(server: FlakyServer) -> list[str]:
    server.then = "503"
    return [f"data.uri={door(server, 'data.npz')}"]


def _gone(server: FlakyServer) -> list[str]:
    server.then = "reset"
    return [f"model.weights={door(server, 'w.safetensors')}"]


def _forbidden(server: FlakyServer) -> list[str]:
    server.then = "403"
    return [f"data.uri={door(server, 'data.npz')}"]


def _unlisted(server: FlakyServer) -> list[str]:
    (server.folder / "SUMS").write_text("", encoding="utf-8")
    return [f"data.uri={door(server, 'data.npz')}", f"data.checksums={door(server, 'SUMS')}"]


def _read_only(server: FlakyServer) -> list[str]:
    return [f"output.uri={door(server, 'out')}"]


FAILURES: list[tuple[Callable[[FlakyServer], list[str]], int]] = [
    (_missing, 65),
    (_missing_weights, 65),
    (_not_a_file_of_weights, 65),
    (_damaged, 65),
    (_busy, 75),
    (_gone, 75),
    (_forbidden, 65),
    (_unlisted, 65),
    (_read_only, 73),
    (lambda _: [f"data.uri=nosuch://{USER}:{PASSWORD}@host/x.npz"], 65),
    (lambda _: [f"data.uri=memory://{USER}:{PASSWORD}@bucket/*.npz"], 65),
    (lambda _: [f"data.uri=zip://in.npz::memory://{USER}:{PASSWORD}@bucket/x.zip"], 65),
    (lambda _: [f"model.weights=memory://{USER}:{PASSWORD}@bucket/x.bin"], 64),
    (lambda _: [f"data.uri.3=memory://{USER}:{PASSWORD}@bucket/x.npz"], 64),
    (lambda _: [f"data={{uri: ['memory://{USER}:{PASSWORD}@bucket/x.npz', 3]}}"], 64),
    (lambda _: [f"output.url=memory://{USER}:{PASSWORD}@bucket/x"], 64),
    (lambda _: [f"memory://{USER}:{PASSWORD}@bucket/x=1"], 64),
    (lambda _: [f"data.uri={{'memory://{USER}:{PASSWORD}@bucket': [}}"], 64),
]


@pytest.mark.parametrize(("prepare", "code"), FAILURES, ids=[str(number) for number in range(len(FAILURES))])
def test_jobs_that_fail(
    prepare: Callable[[FlakyServer], list[str]],
    code: int,
    folder: Path,
    server: FlakyServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ADAROUND_STATUS_FILE", str(folder / "status-here"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "torch-error"))
    overrides = [f"output.uri={OUTPUT}", *prepare(server)]
    flags = [part for override in overrides for part in ("--set", override)]
    # With --debug all is said that is said without, and more.
    ended = cli.main([str(folder / "job.yaml"), *flags, "--debug"])
    out, err = capsys.readouterr()
    assert CANARY not in out + err, err
    assert ended == code, err
    assert "Traceback" in err
    assert (folder / "torch-error").exists()
    beside = {name: (folder / name).read_bytes() for name in ("status-here", "torch-error") if (folder / name).exists()}
    assert found_in(beside | written_in_memory()) == []


@pytest.mark.parametrize("command", ["run", "validate", "status"])
@pytest.mark.parametrize("then", ["ok", "503", "403"])
def test_a_job_file_behind_a_door(
    command: str, then: Any, folder: Path, server: FlakyServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.yaml").write_text(f"data: {{uri: 'memory://{USER}:{PASSWORD}@b/x', nonsense: 1}}", encoding="utf-8")
    server.then = then
    uri = door(server, "bad.yaml").partition("?")[0]
    assert cli.main([command, uri, "--debug"]) == {"ok": 64, "503": 75, "403": 64}[then]
    out, err = capsys.readouterr()
    assert err
    assert CANARY not in out + err, err


def test_two_real_ranks(folder: Path, server: FlakyServer) -> None:
    """Log lines of libraries and of torchrun count too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["distributed_adaround", str(folder / "job.yaml"), "--debug", "--set", f"output.uri={folder}/out"]
    command += ["--set", f"data.uri={door(server, 'data.npz')}", "--set", f"model.weights={door(server, 'gone.pt')}"]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert ended.returncode == 1, ended.stderr[-3000:]
    assert "gone.pt: cannot be read: no such file" in ended.stderr
    assert CANARY not in ended.stdout + ended.stderr
    assert found_in({str(path): path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}) == []


def test_the_canary_would_be_seen(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing redacted the same error shows it."""
    monkeypatch.setattr("distributed_adaround.errors.without_credentials", lambda text: text)
    monkeypatch.setattr("distributed_adaround.files.storage.remember_secrets", lambda uri: None)
    assert cli.main([str(folder / "job.yaml"), "--set", f"data.uri=memory://{USER}:{PASSWORD}@bucket/*.npz"]) == 65
    assert CANARY in capsys.readouterr().err
