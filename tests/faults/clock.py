"""The clock is another one when a job starts again: 400 days ahead, or a day behind. Needs the program faketime.

A jump in mid-job is not tried: faketime also moves the clock by which torch and Python wait, which no date can move on
a real machine. Told to leave that one alone, it breaks Python's sleep.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Iterator
from itertools import repeat

from tests.faults import jobs, launch
from tests.faults.injected import Fault
from tests.faults.jobs import Job
from tests.faults.trial import Bench, Record, Verdict, events

SHIFTS = ("+400d", "-1d")


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """options.count: rounds of both shifts."""
    if shutil.which("faketime") is None:
        raise SystemExit("this trial needs the program faketime (apt-get install faketime)")
    for _ in range(options.count):
        for shift in SHIFTS:
            yield between_starts(bench, bench.job(bench.draw.choice(bench.names)), shift)


def between_starts(bench: Bench, job: Job, shift: str) -> Record:
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    layer = bench.draw.randrange(1, jobs.committed(reference))
    attempt = launch.start(job, output, 2, fault=str(Fault("kill", "renamed", "commits/manifest.json", layer, 0)))
    attempt.wait()
    verdict.ended(attempt)
    bench.finish(job, output, repeat(2), verdict, prefix=("faketime", "-f", shift))
    verdict.same_bytes(output, reference)
    found = events(output)
    verdict.expect(found[0]["time"][:10] != found[-1]["time"][:10], "the clock was not another one")
    return verdict.record("clock", job, f"{shift} between two starts")
