"""Starts jobs as a launcher does, ends their processes by force, and looks for what they leave behind.

Every process of an attempt inherits a mark in its environment, by which it is found again: torchrun gives each rank a
session of its own, so process groups would not do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.jobs import Job

ROOT = Path(__file__).parents[2]
MARK = "ADAROUND_FAULT_TRIAL"
# Longer than any attempt takes on a busy machine: an attempt that needs it hangs.
DEADLINE = 600.0
_POLL = 0.05


class HungError(Exception):
    """An attempt did not end in time."""


@dataclass
class Attempt:
    """One start of a job: the launcher's process, and where its text goes."""

    process: subprocess.Popen[bytes]
    mark: str
    log: Path
    scratch: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def text_of_ranks(self) -> str:
        """The part before the lines of torchrun, which shows a traceback of its own when a rank fails."""
        return self.text().partition("torch/distributed/elastic")[0]

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that run now, by rank."""
        found = {}
        for pid in marked(self.mark):
            rank = environment(pid).get("RANK")
            if rank is not None:
                found[int(rank)] = pid
        return found

    def frozen(self) -> list[int]:
        """Process ids of the ranks that SIGSTOP stopped."""
        return [pid for pid in self.ranks().values() if state(pid) == "T"]

    def thaw(self) -> None:
        """Let them go on. What they were sent meanwhile reaches them now."""
        for pid in self.frozen():
            kill(pid, signal.SIGCONT)

    def wait(self, seconds: float = DEADLINE) -> int:
        """The launcher's exit code. Raises HungError; then everything is killed."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise HungError(f"still running after {seconds:.0f} s") from None

    def wait_until(self, condition: Callable[[], bool], seconds: float = DEADLINE) -> bool:
        """Wait for the condition, or for the end of the launcher: False then. Raises HungError."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.kill_all()
                raise HungError(f"nothing happened in {seconds:.0f} s")
            try:
                self.process.wait(timeout=_POLL)
            except subprocess.TimeoutExpired:
                continue
            return condition()
        return True

    def kill_all(self) -> None:
        """SIGKILL of every process at once, as when a host loses power."""
        for pid in marked(self.mark):
            kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait_for_ranks(self, seconds: float = 60.0) -> None:
        """Wait until no process of the attempt lives, but no longer than that."""
        deadline = time.monotonic() + seconds
        while marked(self.mark) and time.monotonic() < deadline:
            time.sleep(_POLL)

    def leftovers(self, grace: float = 60.0) -> list[str]:
        """Processes that outlive the launcher by more than the grace (they are killed then), and spilled or downloaded
        files in the temporary folder. No process holds no port."""
        self.wait_for_ranks(grace)
        pids = marked(self.mark)
        for pid in pids:
            kill(pid, signal.SIGKILL)
        found = [f"process {pid} was left running" for pid in pids]
        return found + [f"{path.name} was left in TMPDIR" for path in self.scratch.glob("adaround-*")]


_started: list[Attempt] = []


def start(
    job: Job,
    output: str | Path,
    ranks: int,
    *,
    fault: str | None = None,
    settings: Sequence[str] = (),
    torchrun: Sequence[str] = ("--standalone", "--max-restarts=0"),
    prefix: Sequence[str] = (),
    extra_environment: Mapping[str, str] | None = None,
    scratch: Path | None = None,
) -> Attempt:
    """Start a job under torchrun. fault: see injected.py. prefix: a command that runs the command."""
    mark = uuid.uuid4().hex
    scratch = (scratch or job.folder.parent) / f"attempt-{mark[:8]}"
    scratch.mkdir(parents=True)
    program = ["distributed_adaround"] if fault is None else ["tests.faults.injected", fault]
    overrides = [f"output.uri={output}", *settings]
    command = [
        *prefix,
        *(sys.executable, "-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={ranks}", "-m"),
        *program,
        job.path.name,
        *(part for override in overrides for part in ("--set", override)),
    ]
    log = scratch / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=job.folder,
            env=_environment(mark, scratch) | dict(extra_environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _started.append(Attempt(process, mark, log, scratch))
    return _started[-1]


def end_all() -> None:
    """Kill what is left of all attempts of this process, for a harness that is interrupted."""
    for attempt in _started:
        if attempt.process.poll() is None:
            attempt.kill_all()


def _environment(mark: str, scratch: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        # Ranks of a second attempt could read addresses of the first from a store that lives on.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "ADAROUND_STATUS_FILE": str(scratch / "status.json"),
        "TMPDIR": str(scratch),
        MARK: mark,
    }


def marked(mark: str) -> list[int]:
    """Living processes of an attempt. Zombies do not count: somebody else has to collect them."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and entry.name != str(os.getpid()):
            try:
                if wanted in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def environment(pid: int) -> dict[str, str]:
    """Environment of a process; empty when it is gone."""
    try:
        parts = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(part.decode(errors="replace").split("=", 1) for part in parts if b"=" in part)


def kill(pid: int, number: signal.Signals) -> None:
    """A signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def state(pid: int) -> str:
    """The letter of /proc/PID/stat: R, S, T (stopped), Z ...; X for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def alive(pid: int) -> bool:
    return state(pid) not in "XZ"
