"""Faults of all kinds in random order for a long time."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults import disk, elastic, hang, kills, saves
from tests.faults.injected import SAVE_POINTS, Fault
from tests.faults.jobs import Job
from tests.faults.trial import Bench, Record

KINDS: tuple[Callable[[Bench, Job], Record], ...] = (
    lambda bench, job: kills.one_job(bench, job, bench.draw.randint(1, 3)),
    lambda bench, job: saves.one_save(
        bench, job, Fault("kill", bench.draw.choice(SAVE_POINTS), *bench.draw.choice(saves.SAVES))
    ),
    lambda bench, job: disk.one_case(bench, job, bench.draw.choice(disk.KINDS), bench.draw.choice((1, 2, 3))),
    lambda bench, job: hang.one_hang(bench, job, bench.draw.choice(hang.KINDS), 2, bench.draw.randrange(2)),
    lambda bench, job: elastic.one_restart(bench, job, 2),
)


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """options.count: minutes."""
    end = time.monotonic() + 60 * options.count
    while time.monotonic() < end:
        record = bench.draw.choice(KINDS)(bench, bench.job(bench.draw.choice(bench.names)))
        yield {**record, "trial": "soak", "case": f"{record['trial']}: {record['case']}", "harness_kib": _resident()}


def _resident() -> int:
    """Memory of the harness in KiB, which must not grow with the trials."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0])
