"""How a job stands: `<output>/status.json`, for whoever watches it and for launchers, which torchrun tells only "1".

    {"state": "running" | "done" | "failed" | "stopped", "exit_code": null | 0 | 64 ..., "message": ...,
     "layers_done": 3, "layers": 22, "job": digest of the job file, "version": ..., "time": ...}

Rank 0 writes it while the job runs; at an error the rank that tells the user does. A job that was killed leaves
"running". The variable ADAROUND_STATUS_FILE names a local file for the exit code, for launchers without the store.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from distributed_adaround import __version__
from distributed_adaround.errors import AdaRoundError, InputError, PeerError, SpecError, StoppedError, redact
from distributed_adaround.files import jsontext, storage, uris

LOCAL_FILE = "ADAROUND_STATUS_FILE"
_TRY_AGAIN = PeerError.exit_code

State = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Status:
    """One state of a job. job: digest of the job file: an output may hold the status of another job."""

    job: str
    state: State
    exit_code: int | None = None
    message: str = ""
    layers_done: int = 0
    layers: int = 0

    @property
    def launch_code(self) -> int:
        """What a launcher is to do: 0 nothing, 75 start the job (again), any other code tell the user."""
        return _TRY_AGAIN if self.exit_code is None else self.exit_code

    def __str__(self) -> str:
        layers = f", {self.layers_done} of {self.layers} layers" if self.layers else ""
        code = f", exit code {self.exit_code}" if self.exit_code else ""
        return f"{self.state}{layers}{code}{': ' if self.message else ''}{self.message}"


def write_status(uri: str, status: Status) -> None:
    """Replace the status of a job. uri: its output folder. Raises OutputError."""
    fields = asdict(status) | {"version": __version__, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    text = jsontext.dumps(fields, indent=1) + "\n"
    storage.write_bytes(uris.join(uri, "status.json"), text.encode())


class JobStatus:
    """The status that rank 0 keeps while the job runs; the other ranks write nothing. Its methods raise OutputError."""

    def __init__(self, uri: str, job: str, layers: int, rank: int) -> None:
        self._uri, self._writes = uri, rank == 0
        self._now = Status(job, "running", layers=layers)

    def running(self, layers_done: int) -> None:
        if self._writes:
            write_status(self._uri, replace(self._now, layers_done=layers_done))

    def done(self) -> None:
        if self._writes:
            write_status(self._uri, replace(self._now, state="done", exit_code=0, layers_done=self._now.layers))


def read_status(uri: str) -> Status | None:
    """The status in an output folder, None when there is none. Raises InputError when it cannot be read."""
    path = uris.join(uri, "status.json")
    if not storage.exists(path):
        return None
    try:
        found: Any = json.loads(storage.read_bytes(path))
        return Status(**{name: found[name] for name in Status.__dataclass_fields__})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{redact(path)} is damaged: it is no status of a job; remove it") from error


def record_failure(uri: str | None, job: str, error: BaseException, exit_code: int, message: str) -> None:
    """Write down how a job ended, for this machine and, where the output is known and is this job's, there. A wrong job
    file leaves no trace there; an output that cannot be written is an error that was reported before.

    Args:
        uri: The output folder; None where the job file could not be read.
        job: Digest of the job file.
        error: What ended the job.
        exit_code: Of this process.
        message: The line that the user got.
    """
    _write_local(exit_code, message)
    if uri is None or isinstance(error, SpecError):
        return
    with suppress(AdaRoundError):
        last = read_status(uri)
        if last is not None and last.job != job:
            return  # the output of another job, which this one was refused
        if exit_code == _TRY_AGAIN and last is not None and last.state == "failed" and last.exit_code != _TRY_AGAIN:
            return  # the rank that all others have lost told why
        state: State = "stopped" if isinstance(error, StoppedError) else "failed"
        done, layers = (last.layers_done, last.layers) if last else (0, 0)
        write_status(uri, Status(job, state, exit_code, redact(message), done, layers))


def _write_local(exit_code: int, message: str) -> None:
    """Of all ranks of this machine, one with an error of its own wins over those that only lost a peer."""
    path = os.environ.get(LOCAL_FILE)
    text = json.dumps({"exit_code": exit_code, "message": redact(message)}) + "\n"
    with suppress(OSError):
        if path and exit_code != _TRY_AGAIN:
            storage.write_bytes(path, text.encode())
        elif path:
            with Path(path).open("x", encoding="utf-8") as file:
                file.write(text)
