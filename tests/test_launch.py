"""Jobs under the real torchrun: a whole one, one that loses a rank, and its restart on 2 ranks and on 1."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rank_pool import RankPool
from sample_jobs import images, job, write_job

from distributed_adaround.job import run_job
from distributed_adaround.spec.job import JobSpec

# --standalone takes a free port; torchrun's usual one may be in use by another job of this machine.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PROGRAM = ["-m", "distributed_adaround"]
ROUNDING = {"max_iter": 40, "compute_dtype": "float64"}
DEADLINE = 600
LAYERS = ["conv", "depthwise", "up", "head"]
# The same network as nets:cnn, in a job that cannot end: rank 1 waits in a step of the second layer to be killed.
STUCK = """

def stuck():
    import os
    import threading
    from pathlib import Path
    from distributed_adaround.solve.rows import BatchPlan

    batch, calls = BatchPlan.batch, []

    def waiting_batch(plan, step):
        calls.append(step)
        if len(calls) == 60:
            Path(__file__).with_name("waiting").touch()
            threading.Event().wait()
        return batch(plan, step)

    if os.environ["RANK"] == "1":
        BatchPlan.batch = waiting_batch
    return cnn()
"""


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Launched(NamedTuple):
    """A job of 2 ranks in its folder, and how it ended."""

    folder: Path
    ended: Ended


def start(path: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, *PROGRAM, str(path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> Ended:
    try:
        stdout, stderr = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    return Ended(process.returncode, stdout, stderr)


def results(folder: Path) -> dict[str, str]:
    names = ("quantized.safetensors", "quantized.json", "dequantized.safetensors")
    return {name: hashlib.sha256((folder / "out" / name).read_bytes()).hexdigest() for name in names}


def committed(folder: Path) -> list[str]:
    manifest = folder / "out" / "commits" / "manifest.json"
    if not manifest.exists():
        return []
    return [layer["name"] for layer in json.loads(manifest.read_text(encoding="utf-8"))["layers"]]


def events(folder: Path, rank: int) -> list[dict[str, Any]]:
    lines = (folder / "out" / "events" / f"rank-{rank}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def worker(launcher: int, rank: int) -> int:
    """Process id of a rank, among the children of torchrun."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="ascii").split()
    return next(int(pid) for pid in children if f"RANK={rank}\0".encode() in _environment(pid))


def _environment(pid: str) -> bytes:
    return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()


def kill_where_it_waits(process: "subprocess.Popen[str]", folder: Path, rank: int) -> None:
    """kill -9 of one rank of a stuck job. The others can be no further than the step in which it waits, nor a layer
    behind: they took part in the step before."""
    deadline = time.monotonic() + DEADLINE
    while not (folder / "waiting").exists():
        assert time.monotonic() < deadline, "rank 1 did not come to its place in time"
        try:
            process.wait(timeout=0.01)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the job ended before it could be killed: {process.communicate()}")
    os.kill(worker(process.pid, rank), signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """A job that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    return Launched(folder, finish(start(write_job(folder, "cnn", rounding=ROUNDING))))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The same job, whose rank 1 is killed in the second layer."""
    folder = tmp_path_factory.mktemp("killed")
    path = write_job(folder, "stuck", rounding=ROUNDING)
    images(folder / "data.npz")
    with (folder / "nets.py").open("a", encoding="utf-8") as file:
        file.write(STUCK)
    process = start(path)
    try:
        kill_where_it_waits(process, folder, rank=1)
    except BaseException:
        process.kill()
        raise
    return Launched(folder, finish(process))


def test_torchrun_runs_a_job(whole: Launched) -> None:
    assert whole.ended.returncode == 0, whole.ended.stderr
    report = json.loads((whole.folder / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["world_size"] == 2
    assert [layer["name"] for layer in report["layers"]] == LAYERS
    assert [events(whole.folder, rank)[0]["owned"] for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert whole.ended.stdout.count("SQNR dB") == 1
    assert whole.ended.stdout.count(f"Results are in {whole.folder}/out") == 1
    for index, name in enumerate(LAYERS, start=1):
        assert len(re.findall(rf"rank 0/2 INFO layer {index} of 4 {name}: in ", whole.ended.stderr)) == 1
    assert "Traceback" not in whole.ended.stderr
    assert "Warning" not in whole.ended.stderr


def test_a_killed_rank_ends_the_job_and_leaves_only_whole_commits(killed: Launched) -> None:
    assert killed.ended.returncode == 1
    assert "Signal 9 (SIGKILL)" in killed.ended.stderr
    assert committed(killed.folder) == ["conv"]
    names = {path.name for path in (killed.folder / "out").iterdir()}
    assert names == {"commits", "events", "job.yaml", "status.json"}
    # The other rank lost its peer, and says which one and where.
    errors = [line for line in killed.ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: rank 0: layer depthwise: rank 1 failed or does not answer (")
    assert "internal error" not in killed.ended.stderr


def run_again(content: dict[str, Any], folder: str) -> None:
    run_job(JobSpec(**content), Path(folder))


def test_a_restart_on_two_ranks_gives_the_bytes_of_an_undisturbed_run(
    whole: Launched, killed: Launched, pool: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / "restarted"
    shutil.copytree(killed.folder, folder)
    pool.run(run_again, 2, job(folder, "cnn", rounding=ROUNDING), str(folder))
    assert results(folder) == results(whole.folder)
    resumed = [event["name"] for event in events(folder, 1) if event["event"] == "layer" and event["resumed"]]
    assert resumed == ["conv"]


def test_a_restart_on_one_rank_gives_them_too(whole: Launched, killed: Launched, tmp_path: Path) -> None:
    shutil.copytree(killed.folder / "out", tmp_path / "out")
    spec = JobSpec(**(job(killed.folder, "cnn", rounding=ROUNDING) | {"output": {"uri": str(tmp_path / "out")}}))
    table = run_job(spec, killed.folder)
    assert [row.name for row in table if row.resumed] == ["conv"]
    assert results(tmp_path) == results(whole.folder)


def test_a_job_that_fails_on_all_ranks_says_so_once(tmp_path: Path) -> None:
    path = write_job(tmp_path, "cnn", rounding={"max_iter": -1})
    ended = finish(start(path))
    assert ended.returncode == 1
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: rank 0: rounding.max_iter: -1 ")
    # torchrun's own summary repeats the line as the root cause, and shows no traceback of ours.
    root_cause = ended.stderr.partition("Root Cause")[2]
    assert errors[0].removeprefix("error: ") in root_cause
    assert "exitcode  : 64" in root_cause
    assert "distributed_adaround/" not in ended.stderr
    assert not (tmp_path / "out").exists()
