"""The sbatch script on a real Slurm of two nodes. What it needs to be installed: tests/support/slurm_cluster.py.

pytest -m slurm
"""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from launched import (
    SHORT,
    committed,
    kill_rank,
    prepare,
    rank_processes,
    results,
    until,
)
from slurm_cluster import SlurmCluster

from distributed_adaround import cli

pytestmark = pytest.mark.slurm
HOST = socket.gethostname().partition(".")[0]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")).running() as cluster:
        yield cluster


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The digits job and its sbatch script, in one folder."""
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["job.yaml", *SHORT, "--nodes", "2", "--cpus", "1", "--time", "10", "--grace", "30", "--name", "digits"]
    assert cli.main(["launch", "slurm", *arguments, "--out", "digits.sbatch"]) == 0
    return tmp_path / "digits.sbatch"


def logs(script: Path, job: str) -> str:
    """What the script and the nodes said, for messages of failed tests."""
    return "\n".join(
        f"--- {path.name}\n{path.read_text()}" for path in sorted(script.parent.glob(f"digits-{job}*.log"))
    )


def steps(cluster: SlurmCluster) -> list[int]:
    """Process ids of slurmstepd of the nodes' tasks, below which the ranks are."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes()
            variables = (entry / "environ").read_bytes() if command.startswith(b"slurmstepd: [") else b""
        except (OSError, ValueError):
            continue
        if command.startswith(b"slurmstepd: [") and str(cluster.folder).encode() in variables:
            found.append(int(entry.name))
    return found


def status(script: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((script.parent / "adaround" / "status.json").read_text(encoding="utf-8"))
    return found


def running(cluster: SlurmCluster, script: Path) -> str:
    """A job that has finished two layers."""
    job = cluster.submit(script)
    until(lambda: committed(script.parent / "adaround") >= 2, "second layer")
    return job


def test_two_nodes_do_the_job(cluster: SlurmCluster, script: Path, reference: dict[str, str]) -> None:
    job = cluster.submit(script)
    assert cluster.ended(job) == "COMPLETED", logs(script, job)
    assert results(script.parent / "adaround") == reference
    report = json.loads((script.parent / "adaround" / "report.json").read_text(encoding="utf-8"))
    assert report["world_size"] == 2
    # One log of each node, and that of the script itself.
    found = {path.name for path in script.parent.glob("*.log")}
    # Both nodes are this host.
    assert found == {f"digits-{job}.log", *(f"digits-{job}-{node}-{HOST}.log" for node in (0, 1))}


def test_a_killed_rank_is_made_up_for(cluster: SlurmCluster, script: Path, reference: dict[str, str]) -> None:
    job = running(cluster, script)
    (with_rank_1,) = [pid for pid in steps(cluster) if 1 in rank_processes(pid)]
    kill_rank(with_rank_1, rank=1)
    assert cluster.ended(job) == "COMPLETED", logs(script, job)
    assert cluster.field(job, "Restarts") == "0"
    assert logs(script, job).count("it starts again in 1 s") == 2
    assert results(script.parent / "adaround") == reference


def test_a_requeued_job_goes_on(cluster: SlurmCluster, script: Path, reference: dict[str, str]) -> None:
    job = running(cluster, script)
    assert cluster.call("scontrol", "requeue", job).returncode == 0
    assert cluster.ended(job) == "COMPLETED", logs(script, job)
    assert cluster.field(job, "Restarts") == "1"
    assert results(script.parent / "adaround") == reference
    resumed = json.loads((script.parent / "adaround" / "report.json").read_text(encoding="utf-8"))["layers"]
    assert sum(layer["resumed"] for layer in resumed) >= 2


def test_a_lost_node_is_waited_for(cluster: SlurmCluster, script: Path, reference: dict[str, str]) -> None:
    job = running(cluster, script)
    (of_second_node,) = [pid for pid in steps(cluster) if 1 in rank_processes(pid)]
    cluster.cut_off("n2", [of_second_node])
    until(lambda: cluster.field(job, "Restarts") == "1", "requeue by Slurm", pause=0.2)
    cluster.bring_back("n2")
    assert cluster.ended(job) == "COMPLETED", logs(script, job)
    assert results(script.parent / "adaround") == reference


def test_before_the_time_is_up_it_saves_and_queues_itself(
    cluster: SlurmCluster, script: Path, reference: dict[str, str]
) -> None:
    job = running(cluster, script)
    # What Slurm does by itself when the time limit is near.
    assert cluster.call("scancel", "--batch", "--signal=USR2", job).returncode == 0
    until(lambda: cluster.field(job, "Restarts") == "1", "requeue")
    assert status(script)["state"] == "stopped", logs(script, job)
    assert cluster.ended(job) == "COMPLETED", logs(script, job)
    assert results(script.parent / "adaround") == reference


def test_scancel_saves_and_is_final(cluster: SlurmCluster, script: Path) -> None:
    job = running(cluster, script)
    assert cluster.call("scancel", job).returncode == 0
    assert cluster.ended(job) == "CANCELLED"
    until(lambda: not steps(cluster), "end of all steps")
    assert status(script)["state"] == "stopped", logs(script, job)
    assert committed(script.parent / "adaround") < 8


def test_missing_weights_fail_the_job_with_their_code(cluster: SlurmCluster, script: Path) -> None:
    os.unlink(script.parent / "digits.safetensors")
    job = cluster.submit(script)
    assert cluster.ended(job) == "FAILED"
    assert cluster.field(job, "ExitCode") == "65:0", logs(script, job)
    assert "starts again" not in logs(script, job)
