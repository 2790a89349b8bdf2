"""The Kubernetes manifest played by hand, its pods in network namespaces. What it needs: tests/support/pods.py.

pytest -m netns
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from launched import SHORT, committed, prepare, results, until
from pods import Network, PlayedJob

from distributed_adaround import cli

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(f"adaround-{os.getpid()}").up() as network:
        yield network


@pytest.fixture
def job(network: Network, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> PlayedJob:
    """The digits job on two pods of one rank, its files in the volume of the claim."""
    data = tmp_path / "data"
    path = prepare(data)
    options = ["--nodes", "2", "--cpus", "1", "--name", "digits", "--image", "a", "--claim", "digits", "--grace", "30"]
    assert cli.main(["launch", "kubernetes", str(path), *SHORT, *options]) == 0
    manifest = {found["kind"]: found for found in yaml.safe_load_all(capsys.readouterr().out)}
    path.unlink()  # pods have it from the ConfigMap
    return PlayedJob(network, manifest, tmp_path, data)


def test_two_pods_do_the_job(job: PlayedJob, tmp_path: Path, reference: dict[str, str]) -> None:
    with job.running():
        assert job.result() == "Complete", job.log()
    assert results(tmp_path / "data" / "adaround") == reference
    report = json.loads((tmp_path / "data" / "adaround" / "report.json").read_text(encoding="utf-8"))
    assert report["world_size"] == 2


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_pod_is_made_up_for(job: PlayedJob, tmp_path: Path, reference: dict[str, str], lost: int) -> None:
    """Pod 0 holds the rendezvous; the other one waits for its successor."""
    with job.running():
        until(lambda: committed(tmp_path / "data" / "adaround") >= 2, "second layer")
        job.cut_off(lost)
        assert job.result() == "Complete", job.log()
    assert [index for index, code in job.exits if code != 0] == [lost]
    assert results(tmp_path / "data" / "adaround") == reference


def test_a_drained_pod_saves_and_its_successor_goes_on(
    job: PlayedJob, tmp_path: Path, reference: dict[str, str]
) -> None:
    with job.running():
        until(lambda: committed(tmp_path / "data" / "adaround") >= 2, "second layer")
        job.drain(0)
        assert job.result() == "Complete", job.log()
    assert [(index, code) for index, code in job.exits if code != 0] == [(0, 75)], job.log()
    assert "stopped by a signal" in job.log()
    assert results(tmp_path / "data" / "adaround") == reference


def test_missing_weights_fail_the_job_at_once(job: PlayedJob, tmp_path: Path) -> None:
    (tmp_path / "data" / "digits.safetensors").unlink()
    with job.running():
        assert job.result() == "PodFailurePolicy 65", job.log()
    assert "starts again" not in job.log()
