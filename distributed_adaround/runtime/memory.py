"""Host memory that is free for this process: in a container that is less than what the machine has."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes free on this machine and within the limits of this process' control groups. root: of /proc and /sys."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([free, *_within_limits(root)]))


def _within_limits(root: Path) -> Iterator[int]:
    """What each limited control group leaves, of version 1 and 2, from that of this process up to the topmost."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # A container may see its own group at the top, and not the folders of its path.
        for folder in (PurePosixPath(path), *PurePosixPath(path).parents):
            group = root / top / str(folder).strip("/")
            try:
                most, used = int((group / limit).read_text()), int((group / usage).read_text())
                statistics = (group / "memory.stat").read_text().split()
            except (OSError, ValueError):
                continue  # no such group, or "max": no limit
            # Pages of files that nobody needs now are given back when memory is short.
            counts = dict(zip(statistics[::2], statistics[1::2], strict=True))
            yield most - used + int(counts.get(cache, "0"))
