"""Jobs that are stopped by a signal, under the real torchrun: they save, say so, and go on to the same bytes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from held import hold
from sample_jobs import write_job

from distributed_adaround import cli

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PROGRAM = ["-m", "distributed_adaround"]
# The first layer alone would take hours.
ENDLESS = {"max_iter": 2_000_000, "reproducible": True, "batch_size": 24, "lr": 0.02}
DEADLINE = 600
# Ends, so that what it publishes can be compared; solvers look every 100 steps whether to save or to stop.
SHORT = {**ENDLESS, "max_iter": 250}


@pytest.fixture
def status_file(tmp_path: Path) -> Path:
    return tmp_path / "status"


def start(command: list[str], status: Path, **variables: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ADAROUND_STATUS_FILE": str(status), **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: "subprocess.Popen[str]", path: Path) -> None:
    """Until a file is there."""
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} was not written in time"
        try:
            process.wait(timeout=0.01)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the job ended before it could be stopped: {process.communicate()}")


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    try:
        _, stderr = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    return process.returncode, stderr


def results(folder: Path) -> list[str]:
    names = ("quantized.safetensors", "quantized.json", "dequantized.safetensors")
    return [hashlib.sha256((folder / "out" / name).read_bytes()).hexdigest() for name in names]


def status(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "out" / "status.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def errors(stderr: str) -> Iterator[str]:
    return (line for line in stderr.splitlines() if line.startswith("error: "))


@pytest.mark.slow
def test_one_rank_saves_its_layer_and_says_how_to_go_on(
    tmp_path: Path, status_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_job(tmp_path, "cnn", rounding=ENDLESS)
    process = start([sys.executable, *PROGRAM, str(path)], status_file)
    wait_for(process, tmp_path / "out" / "status.json")
    process.send_signal(signal.SIGUSR2)  # the ranks below get SIGTERM
    code, stderr = finish(process)
    assert code == 75
    assert list(errors(stderr)) == ["error: stopped by a signal; start the job again to go on"] or list(
        errors(stderr)
    ) == ["error: layer conv: stopped by a signal; start the job again to go on"]
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("stopped", 75)
    assert json.loads(status_file.read_text())["exit_code"] == 75
    assert cli.main(["status", str(path)]) == 75
    assert capsys.readouterr().out.startswith("stopped, 0 of 4 layers")


def test_ranks_stop_together_and_go_on_alone_to_the_same_bytes(
    tmp_path: Path, status_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = write_job(tmp_path / "undisturbed", "cnn", rounding=SHORT)
    assert cli.main([str(undisturbed)]) == 0
    # Saves its state whenever it looks, waits behind the first time, and stops at the next.
    path = write_job(tmp_path / "stopped", "cnn", rounding=SHORT, runtime={"save_minutes": 1e-9})
    mark, variables = hold(tmp_path / "hold", "commits/state/")
    process = start([*TORCHRUN, *PROGRAM, str(path)], status_file, **variables)
    wait_for(process, mark)
    process.send_signal(signal.SIGTERM)  # torchrun hands it to its ranks
    _, stderr = finish(process)
    found = list(errors(stderr))
    assert len(found) == 1, stderr
    assert "stopped by a signal" in found[0]
    assert (status(tmp_path / "stopped")["state"], status(tmp_path / "stopped")["exit_code"]) == ("stopped", 75)
    assert json.loads(status_file.read_text())["exit_code"] == 75
    capsys.readouterr()
    assert cli.main(["status", str(path)]) == 75
    assert capsys.readouterr().out.startswith("stopped, 0 of 4 layers")
    assert (tmp_path / "stopped" / "out" / "commits" / "state").exists()
    assert cli.main([str(path)]) == 0
    assert results(tmp_path / "stopped") == results(tmp_path / "undisturbed")
    assert status(tmp_path / "stopped")["state"] == "done"
    assert not (tmp_path / "stopped" / "out" / "commits" / "state").exists()
    capsys.readouterr()
    assert cli.main(["status", str(path)]) == 0
    assert capsys.readouterr().out == "done, 4 of 4 layers\n"


def test_the_status_of_a_job_that_never_started_or_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_job(tmp_path, "mlp", rounding={"solver": "nearest"})
    assert cli.main(["status", str(path)]) == 75
    assert cli.main([str(path)]) == 0
    capsys.readouterr()
    assert cli.main(["status", str(path)]) == 0
    assert cli.main(["status", str(path), "--set", "quantize.dtype=int4"]) == 75
    assert cli.main(["status", str(path), "--set", "runtime.timeout_minutes=5"]) == 0
    other = f"not started: no status of this job in {tmp_path}/out"
    assert capsys.readouterr().out.splitlines() == ["done, 2 of 2 layers", other, "done, 2 of 2 layers"]


def test_the_status_of_a_job_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_job(tmp_path, "mlp", data={"uri": str(tmp_path / "gone.npz")})
    assert cli.main([str(path)]) == 65
    capsys.readouterr()
    assert cli.main(["status", str(path)]) == 65
    assert capsys.readouterr().out.startswith("failed, exit code 65: ")
