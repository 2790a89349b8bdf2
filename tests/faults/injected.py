"""The program with a fault in one rank: `-m tests.faults.injected ACTION:POINT:FILE:COUNT:RANK job.yaml`.

The fault strikes the given rank when it comes to the point for the COUNT-th time (from 1):

    empty     the temporary file of FILE was opened, nothing was written
    half      half of it was written
    unsynced  all of it was written, nothing was synced
    unrenamed it was synced, but has not its name yet
    renamed   it has its name, the folder was not synced
    talk      before ranks talk to each other; FILE is "-". On one rank there is nothing to strike

FILE is how the path of the file ends. Actions: `kill` (SIGKILL), `freeze` (SIGSTOP), `term` (SIGTERM),
`usr2` (SIGUSR2), to the rank itself. It works on what the program uses of the system (os.fsync, os.replace) and of
torch (the collectives of torch.distributed), so the program holds no hooks for it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distributed_adaround.cli import main

ACTIONS = {
    "kill": signal.SIGKILL,
    "freeze": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr2": signal.SIGUSR2,
}
SAVE_POINTS = ("empty", "half", "unsynced", "unrenamed", "renamed")
POINTS = (*SAVE_POINTS, "talk")
_COLLECTIVES = ("all_reduce", "broadcast", "all_gather_object", "broadcast_object_list")


@dataclass
class Fault:
    """What strikes, where, and when."""

    action: str
    point: str
    file: str
    count: int
    rank: int

    @classmethod
    def parse(cls, text: str) -> Fault:
        action, point, file, count, rank = text.split(":")
        if action not in ACTIONS or point not in POINTS:
            raise SystemExit(f"{text}: the action is one of {', '.join(ACTIONS)}, the point of {', '.join(POINTS)}")
        if point in ("empty", "half") and action != "kill":
            raise SystemExit(f"{text}: a rank that goes on writes the whole file; the point {point} takes kill only")
        return cls(action, point, file, int(count), int(rank))

    def __str__(self) -> str:
        return ":".join(map(str, (self.action, self.point, self.file, self.count, self.rank)))

    def reached(self) -> bool:
        """Whether this is the time. Counts down."""
        self.count -= 1
        return self.count == 0

    def strike(self) -> None:
        os.kill(os.getpid(), ACTIONS[self.action])


def arm(fault: Fault) -> None:
    """Put the fault into this process."""
    sync, rename = os.fsync, os.replace

    def watched_sync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        # A temporary file is named after its target.
        if fault.point in ("empty", "half", "unsynced") and _target(path).endswith(fault.file) and fault.reached():
            _cut(path, fault.point)
            fault.strike()
        sync(descriptor)

    def watched_rename(source: Any, target: Any) -> None:
        here = fault.point in ("unrenamed", "renamed") and str(target).endswith(fault.file) and fault.reached()
        if here and fault.point == "unrenamed":
            fault.strike()
        rename(source, target)
        if here and fault.point == "renamed":
            fault.strike()

    os.fsync, os.replace = watched_sync, watched_rename
    if fault.point == "talk":
        for name in _COLLECTIVES:
            setattr(dist, name, _before(fault, getattr(dist, name)))


def _before(fault: Fault, function: Callable[..., Any]) -> Callable[..., Any]:
    def struck(*args: Any, **kwargs: Any) -> Any:
        if fault.reached():
            fault.strike()
        return function(*args, **kwargs)

    return struck


def _target(temporary: Path) -> str:
    """The file that a temporary file is to become; of any other file its own path."""
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]{32}\.tmp", temporary.name)
    return str(temporary.with_name(found[1])) if found else str(temporary)


def _cut(path: Path, point: str) -> None:
    """Leave of a file what had been written by then. A process that dies there leaves just this."""
    size = path.stat().st_size
    if point != "unsynced":
        os.truncate(path, 0 if point == "empty" else size // 2)


if __name__ == "__main__":
    chosen = Fault.parse(sys.argv[1])
    if int(os.environ.get("RANK", "0")) == chosen.rank:
        arm(chosen)
    sys.exit(main(sys.argv[2:]))
