"""A real S3 client and a server of its protocol on loopback, with faults in between: storage, and whole jobs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import toy_models
from flaky_server import Fault, FlakyServer, flaky_server
from rank_pool import RankPool
from sample_jobs import write_job

from distributed_adaround import cli
from distributed_adaround.errors import InputError, OutputError, UnreachableError
from distributed_adaround.files import retries, storage

s3fs = pytest.importorskip("s3fs", reason="pip install 'distributed_adaround[faults]'")
moto_server = pytest.importorskip("moto.server", reason="pip install 'distributed_adaround[faults]'")

BUCKET = "s3://bucket"
SECRET = "kanarie-secret-key"
RESULTS = ("quantized.safetensors", "quantized.json", "dequantized.safetensors")


@pytest.fixture(scope="module")
def upstream() -> Iterator[tuple[str, int]]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def store(upstream: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    """An empty bucket, reached through a server that fails when told to."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "kanarie-key-id",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # the client's own patience is not what is tested
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    # A machine with more to do than cores is no fault of the store.
    for limit in ("connect_timeout", "read_timeout"):
        monkeypatch.setattr(s3fs.S3FileSystem, limit, 120)
    monkeypatch.setattr(retries, "_WAIT", lambda state: 0)
    with flaky_server(tmp_path, upstream) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem()
        if fs.exists("bucket"):
            fs.rm("bucket", recursive=True)
        fs.mkdir("bucket")
        yield server
        server.faults, server.then = [], "ok"
        fs.rm("bucket", recursive=True)


def test_write_read_list_remove(store: FlakyServer) -> None:
    names = ["a.npy", "b.txt", "deep/d.npy", "deep/er/c.npy"]
    for name in names:
        storage.write_bytes(f"{BUCKET}/run/{name}", name.encode())
    assert storage.list_files(f"{BUCKET}/run") == [f"{BUCKET}/run/{name}" for name in names]
    assert storage.list_files(BUCKET) == [f"{BUCKET}/run/{name}" for name in names]
    assert storage.list_files(f"{BUCKET}/run/*.npy") == [f"{BUCKET}/run/a.npy"]
    assert storage.list_files(f"{BUCKET}/r*/**/*.npy") == [f"{BUCKET}/run/{name}" for name in (names[0], *names[2:])]
    assert storage.list_files(f"{BUCKET}/run/d*") == [f"{BUCKET}/run/{name}" for name in names[2:]]
    assert storage.list_files(f"{BUCKET}/run/a.npy") == [f"{BUCKET}/run/a.npy"]
    assert storage.list_files(f"{BUCKET}/ru") == []
    assert storage.read_bytes(f"{BUCKET}/run/a.npy") == b"a.npy"
    assert len(storage.read_bytes(f"{BUCKET}/run/a.npy")) == 5
    storage.write_file(f"{BUCKET}/run/a.npy", lambda path: path.write_bytes(b"new"))
    with storage.local_file(f"{BUCKET}/run/a.npy") as path:
        assert path.read_bytes() == b"new"
    assert storage.exists(f"{BUCKET}/run/deep")
    storage.remove_tree(f"{BUCKET}/run/deep")
    storage.remove_tree(f"{BUCKET}/run/deep")
    assert not storage.exists(f"{BUCKET}/run/deep")
    with pytest.raises(InputError, match="no such file or folder"):
        storage.read_bytes(f"{BUCKET}/run/gone")


@pytest.mark.parametrize("fault", ["503", "500", "reset"])
def test_a_store_that_fails_and_recovers(fault: Fault, store: FlakyServer) -> None:
    storage.write_bytes(f"{BUCKET}/x", b"old")
    for call, expected in (
        (lambda: storage.read_bytes(f"{BUCKET}/x"), b"old"),
        (lambda: storage.list_files(BUCKET), [f"{BUCKET}/x"]),
        (lambda: storage.exists(f"{BUCKET}/gone"), False),
        (lambda: storage.write_bytes(f"{BUCKET}/x", b"new"), None),
        (lambda: storage.read_bytes(f"{BUCKET}/x"), b"new"),
        (lambda: storage.remove_tree(f"{BUCKET}/x"), None),
    ):
        store.faults = [fault] * (retries.MAX_TRIES - 1)
        assert call() == expected
        assert store.faults == []


@pytest.mark.parametrize("fault", ["503", "500", "reset"])
def test_a_store_that_stays_away(fault: Fault, store: FlakyServer) -> None:
    storage.write_bytes(f"{BUCKET}/x", b"old")
    store.then = fault
    for call in (
        lambda: storage.read_bytes(f"{BUCKET}/x"),
        lambda: storage.list_files(BUCKET),
        lambda: storage.list_files(f"{BUCKET}/*"),
        lambda: storage.exists(f"{BUCKET}/gone"),
        lambda: storage.write_bytes(f"{BUCKET}/x", b"new"),
        lambda: storage.remove_tree(f"{BUCKET}/x"),
    ):
        with pytest.raises(UnreachableError, match=rf"^{BUCKET}.*: cannot be \w+: .*; the store does not answer"):
            call()
    store.then = "ok"
    assert storage.read_bytes(f"{BUCKET}/x") == b"old"


def test_a_store_that_refuses(store: FlakyServer) -> None:
    store.then = "403"
    before = store.num_requests
    with pytest.raises(InputError, match=r"^s3://bucket/x: cannot be read: "):
        storage.read_bytes(f"{BUCKET}/x")
    with pytest.raises(OutputError, match=r"^s3://bucket/x: cannot be written: "):
        storage.write_bytes(f"{BUCKET}/x", b"new")
    assert store.num_requests == before + 2


def test_nothing_listens_there(store: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that was free a moment ago."""
    with flaky_server(store.folder) as other:
        address = other.url
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(
        UnreachableError, match=r"^s3://bucket/x: cannot be read: connect call failed .*; the store does not"
    ):
        storage.read_bytes(f"{BUCKET}/x")


def test_a_page_of_a_listing_that_fails_is_an_error(store: FlakyServer) -> None:
    for name in ("a/1.npy", "b/2.npy"):
        storage.write_bytes(f"{BUCKET}/{name}", b"")
    store.only = lambda method, path: "prefix=b" in path
    store.then = "503"
    for uri in (BUCKET, f"{BUCKET}/*/*.npy", f"{BUCKET}/**/*.npy", f"{BUCKET}/*"):
        with pytest.raises(UnreachableError):
            storage.list_files(uri)


def test_an_upload_in_parts_that_breaks_off(store: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old object stays, and no parts lie about that somebody pays for."""
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize=None: 5 << 20)
    storage.write_bytes(f"{BUCKET}/x", b"old")
    store.only = lambda method, path: "partNumber=2" in path
    store.then = "503"
    content = bytes(range(256)) * (11 << 12)
    with pytest.raises(UnreachableError):
        storage.write_file(f"{BUCKET}/x", lambda path: path.write_bytes(content))
    assert sum("partNumber=2" in request for request in store.seen) == retries.MAX_TRIES
    assert storage.read_bytes(f"{BUCKET}/x") == b"old"
    assert s3fs.S3FileSystem().list_multipart_uploads("bucket") == []
    store.then = "ok"
    storage.write_file(f"{BUCKET}/x", lambda path: path.write_bytes(content))
    assert storage.read_bytes(f"{BUCKET}/x") == content


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a job with local files that has run; its results are in `out`."""
    folder = tmp_path_factory.mktemp("local")
    path = write_job(folder, "mlp", rounding={"solver": "gram", "sweeps": 5})
    state = {name: tensor.clone() for name, tensor in toy_models.mlp().state_dict().items()}
    safetensors.torch.save_file(state, folder / "w.safetensors")
    assert cli.main([str(path), "--set", f"model.weights={folder}/w.safetensors"]) == 0
    return folder


@pytest.fixture
def job(local: Path, store: FlakyServer) -> list[str]:
    """Arguments of the same job with data, weights, checksums and output in the bucket."""
    for name in ("data.npz", "w.safetensors"):
        storage.write_bytes(f"{BUCKET}/in/{name}", (local / name).read_bytes())
    sums = subprocess.run(["sha256sum", "data.npz"], cwd=local, capture_output=True, check=True).stdout
    storage.write_bytes(f"{BUCKET}/in/SHA256SUMS", sums)
    fields = {
        "data.uri": f"{BUCKET}/in/*.npz",
        "data.checksums": f"{BUCKET}/in/SHA256SUMS",
        "model.weights": f"{BUCKET}/in/w.safetensors",
        "output.uri": f"{BUCKET}/out",
    }
    return [str(local / "job.yaml"), *(part for name, uri in fields.items() for part in ("--set", f"{name}={uri}"))]


def assert_same_results(folder: Path) -> None:
    for name in RESULTS:
        assert storage.read_bytes(f"{BUCKET}/out/{name}") == (folder / "out" / name).read_bytes(), name


def test_a_job_through_a_store_that_fails_all_the_time(
    job: list[str], store: FlakyServer, local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Whichever request is the first of a call, its third try meets no fault: no call makes more than 6.
    quiet: list[Fault] = ["ok"] * 6
    store.faults = ["503", *quiet, "reset", *quiet, "500", "503", *quiet] * 12
    assert cli.main(job) == 0, capsys.readouterr().err
    assert len(store.faults) < 224  # of 264
    store.faults = []
    assert_same_results(local)
    assert cli.main(["status", *job]) == 0
    out, err = capsys.readouterr()
    assert "kanarie" not in out + err


@pytest.mark.parametrize("after", ["manifest.json", "quantized.safetensors"])
def test_a_store_that_goes_away_in_the_middle(
    after: str, job: list[str], store: FlakyServer, local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything fails from the first upload of a file on; later the store is back."""
    gone: list[str] = []

    def only(method: str, path: str) -> bool:
        if method == "PUT" and after in path:
            gone.append(path)
        return bool(gone)

    store.only, store.then = only, "503"
    assert cli.main(job) == 75
    err = capsys.readouterr().err
    assert "the store does not answer" in err
    assert "kanarie" not in err
    store.then = "ok"
    assert cli.main(["status", *job]) == 75
    assert cli.main(job) == 0
    assert_same_results(local)
    assert cli.main(["status", *job]) == 0


@pytest.mark.slow
def test_a_job_that_is_killed_in_the_middle(job: list[str], store: FlakyServer, local: Path, tmp_path: Path) -> None:
    """SIGKILL while the second layer is being committed; then the job goes on."""
    running = subprocess.Popen(
        [sys.executable, "-m", "distributed_adaround", *job],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    uploads: list[str] = []

    def only(method: str, path: str) -> bool:
        if method == "PUT" and "manifest.json" in path:
            uploads.append(path)
            if len(uploads) == 2:
                running.kill()
        return False

    store.only = only
    try:
        _, err = running.communicate(timeout=600)
    finally:
        running.kill()
    assert len(uploads) == 2, err.decode()[-3000:]
    assert running.returncode == -signal.SIGKILL
    store.only = lambda method, path: True
    assert cli.main(["status", *job]) == 75
    before = store.num_requests
    assert cli.main(job) == 0
    assert any("00000-first" in request for request in store.seen[before:] if request.startswith("GET"))
    assert_same_results(local)


def run_here(arguments: list[str], environment: dict[str, str]) -> int:
    with mock.patch.dict(os.environ, environment):
        return cli.main(arguments)


def test_two_ranks_read_and_write_in_the_bucket(
    job: list[str], store: FlakyServer, pool: RankPool, local: Path
) -> None:
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    assert pool.run(run_here, 2, job, keys) == [0, 0]
    for rank in range(2):
        assert storage.exists(f"{BUCKET}/out/events/rank-{rank}.jsonl")
    assert_same_results(local)


def test_errors_of_the_client_show_no_keys(
    store: FlakyServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """botocore repeats what it takes for the name of a bucket."""
    path = write_job(tmp_path / "job", "mlp", rounding={"solver": "nearest"})
    for field, code in (("data.uri", 65), ("output.uri", 65), ("model.weights", 65)):
        uri = f"s3://kanarie-user:{SECRET}@bucket/x.pt"
        assert cli.main([str(path), "--debug", "--set", f"{field}={uri}"]) == code
        out, err = capsys.readouterr()
        assert "Traceback" in err
        assert "kanarie" not in out + err
    shutil.rmtree(tmp_path / "job")


def test_the_proxy_counts(store: FlakyServer) -> None:
    """The faults of this file do happen."""
    before = store.num_requests
    storage.write_bytes(f"{BUCKET}/x", b"1")
    assert store.seen[before:] == ["PUT /bucket/x"]
    store.faults = ["503"]
    storage.write_bytes(f"{BUCKET}/x", b"1")
    assert store.seen[before:] == ["PUT /bucket/x"] * 3
