"""The digits job under launch/torchrun.sh or in a cluster: start, watch, disturb, and compare results."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from distributed_adaround.examples.digits import __main__ as digits

SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun.sh"
DEADLINE = 600
# Long enough to be disturbed between two layers, short enough for a test; the same bytes on any number of ranks.
SHORT = ("--set", "rounding.max_iter=200", "--set", "rounding.reproducible=true")


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def prepare(folder: Path) -> Path:
    """A folder with the digits job; returns the job file."""
    digits.prepare(folder)
    return folder / "job.yaml"


def start(job: Path, *options: str, **variables: str) -> "subprocess.Popen[str]":
    """torchrun.sh on two ranks, in the folder of the job."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NPROC": "2", **variables}
    return subprocess.Popen(
        [str(SCRIPT), job.name, *options],
        cwd=job.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def killed_at_the_end(process: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    """Nothing of the process tree survives a failed test."""
    try:
        yield process
    finally:
        for pid in reversed(tree(process.pid)):
            _kill(pid)
        process.communicate()


def finish(process: "subprocess.Popen[str]") -> Ended:
    stdout, stderr = process.communicate(timeout=DEADLINE)
    return Ended(process.returncode, stdout, stderr)


def results(output: Path) -> dict[str, str]:
    """SHA-256 of the files that a job of the same settings writes alike every time."""
    names = ("quantized.safetensors", "quantized.json", "dequantized.safetensors")
    return {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in names}


def committed(output: Path) -> int:
    """Layers that are finished."""
    try:
        return len(json.loads((output / "commits" / "manifest.json").read_text(encoding="utf-8"))["layers"])
    except FileNotFoundError:
        return 0


def until(condition: Callable[[], object], what: str, seconds: float = DEADLINE, pause: float = 0.02) -> None:
    """Wait for something that another process does. what: for the message when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"in {seconds} s there was no {what}"
        time.sleep(pause)


def tree(pid: int) -> list[int]:
    """The process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except (FileNotFoundError, ProcessLookupError):
        return [pid]
    return [pid, *(below for child in children for below in tree(int(child)))]


def rank_processes(pid: int) -> dict[int, int]:
    """Process ids of the ranks below a process, by rank."""
    found = {}
    for below in tree(pid):
        try:
            variables = Path(f"/proc/{below}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        found |= {int(text[5:]): below for text in variables if text.startswith(b"RANK=")}
    return found


def kill_rank(pid: int, rank: int) -> None:
    """kill -9 of one rank below a process."""
    os.kill(rank_processes(pid)[rank], signal.SIGKILL)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
