"""The image, really built and run without rights. What it needs to be installed: tests/support/image_store.py.

pytest -m image
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_store import ImageStore
from launched import SHORT, committed, finish, killed_at_the_end, prepare, results, until

from distributed_adaround import __version__

pytestmark = pytest.mark.image
USER = 10001
TWO_RANKS = ("--env", "NPROC=2", "--env", "OMP_NUM_THREADS=1")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageStore]:
    store = ImageStore(tmp_path_factory.mktemp("images"))
    try:
        store.build()
        yield store
    finally:
        store.remove()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The digits job, in a folder that the image's user may write to."""
    job = tmp_path / "job"
    prepare(job)
    for path in (job, *job.iterdir()):
        os.chown(path, USER, USER)
    return job


def mounted(folder: Path) -> tuple[str, ...]:
    return ("--volume", f"{folder}:/data", *TWO_RANKS)


def test_it_says_what_it_is(store: ImageStore) -> None:
    labels = json.loads(store.inspect("{{json .Config.Labels}}"))
    assert labels["org.opencontainers.image.title"] == "distributed_adaround"
    assert labels["org.opencontainers.image.version"] == __version__
    assert store.inspect("{{.Config.User}}") == "10001:10001"
    assert store.run("--version").stdout == f"distributed_adaround {__version__}\n"


def test_it_is_small(store: ImageStore) -> None:
    """torch for CPUs is three quarters of it."""
    assert int(store.inspect("{{.Size}}")) < 1.15e9


def test_it_has_no_rights(store: ImageStore) -> None:
    script = "id -u; grep -E 'CapEff|NoNewPrivs' /proc/self/status; touch /opt/x /home/x; touch /tmp/x && echo tmp"
    shown = store.run("-c", script, options=("--entrypoint", "/bin/sh")).stdout.split()
    assert shown == ["10001", "CapEff:", "0000000000000000", "NoNewPrivs:", "1", "tmp"]


def test_it_knows_its_memory_limit(store: ImageStore) -> None:
    script = "from distributed_adaround.runtime.memory import free_bytes; print(free_bytes())"
    ended = store.run("-c", script, options=("--memory", "256m", "--entrypoint", "python"))
    assert 0 < int(ended.stdout) < 256 * 2**20, ended.stderr


def test_two_ranks_give_the_bytes_of_a_run_outside(store: ImageStore, folder: Path, reference: dict[str, str]) -> None:
    ended = store.run("job.yaml", *SHORT, options=mounted(folder))
    assert ended.returncode == 0, ended.stderr
    assert results(folder / "adaround") == reference
    assert store.run("status", "job.yaml", *SHORT, options=mounted(folder)).stdout == "done, 8 of 8 layers\n"


def test_sigterm_reaches_the_ranks(store: ImageStore, folder: Path) -> None:
    options = (*mounted(folder), "--name", "stopped")
    with killed_at_the_end(store.start("run", "job.yaml", *SHORT, options=options)) as process:
        until(lambda: committed(folder / "adaround") >= 2, "second layer")
        store.podman("stop", "--time", "60", "stopped")
        ended = finish(process)
    assert ended.returncode == 75, ended.stderr
    assert json.loads((folder / "adaround" / "status.json").read_text(encoding="utf-8"))["state"] == "stopped"
    assert committed(folder / "adaround") < 8


def test_a_bad_job_file_is_refused(store: ImageStore, folder: Path) -> None:
    ended = store.run("job.yaml", "--set", "rounding.max_iter=-1", options=mounted(folder))
    assert ended.returncode == 64
    assert ended.stderr.startswith("error: rounding.max_iter: -1 ")
