"""A full disk, a disk without inodes, one that turns read-only, and a limit on file sizes, in the middle of a job.

The first three mount small file systems in memory and need root.
"""

from __future__ import annotations

import os
import subprocess
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

from tests.faults import jobs, launch
from tests.faults.jobs import Job
from tests.faults.trial import Bench, Record, Verdict, exit_code

KINDS = ("full", "read-only", "inodes", "file size")
CANNOT_WRITE = 73


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """options.count: cases, of all kinds in turn."""
    for number in range(options.count):
        kind = KINDS[number % len(KINDS)]
        yield one_case(bench, bench.job(bench.draw.choice(bench.names)), kind, bench.draw.choice((1, 2, 3)))


def one_case(bench: Bench, job: Job, kind: str, ranks: int) -> Record:
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    if kind == "file size":
        # In KiB: below the size of a result or of the manifest when it is long, above that of the log.
        limit = bench.draw.choice((11, 14, 17))
        prefix = ("bash", "-c", f'ulimit -f {limit}; exec "$@"', "limited")
        attempt = launch.start(job, output, ranks, prefix=prefix)
        figures = _watch_failure(attempt, output, reference, verdict)
        bench.finish(job, output, repeat(ranks), verdict)
        verdict.same_bytes(output, reference)
        return verdict.record("disk", job, f"files of at most {limit} KiB, {ranks} ranks", **figures)
    pages, inodes = bench.draw.randint(6, 28), bench.draw.randint(6, 14)
    size = {"full": f"size={4 * pages}k", "inodes": f"size=1m,nr_inodes={inodes}", "read-only": "size=1m"}[kind]
    with _file_system(output, size):
        attempt = launch.start(job, output, ranks)
        if kind == "read-only":
            layers = bench.draw.randrange(1, jobs.committed(reference) - 1)
            verdict.expect(attempt.wait_until(lambda: jobs.committed(output) >= layers), "it ended before the fault")
            _remount(output, "ro", verdict)
        figures = _watch_failure(attempt, output, reference, verdict)
        _remount(output, "rw,size=10m,nr_inodes=0", verdict)
        bench.finish(job, output, repeat(bench.draw.choice((1, 2, 3))), verdict)
        verdict.same_bytes(output, reference)
        return verdict.record("disk", job, f"{kind} ({size}), {ranks} ranks", **figures)


def _watch_failure(attempt: launch.Attempt, output: Path, reference: Path, verdict: Verdict) -> Record:
    """All ranks end soon with the code for it, one line says why, and what was there before is whole."""
    attempt.wait_until(lambda: "error: " in attempt.text())
    told = time.monotonic()
    code = exit_code(attempt, attempt.wait())
    attempt.wait_for_ranks()
    seconds = round(time.monotonic() - told, 1)
    verdict.ended(attempt)
    verdict.expect(code == CANNOT_WRITE, f"the job ended with {code}, not with {CANNOT_WRITE}")
    errors = [line for line in attempt.text().splitlines() if line.startswith("error: ")]
    # Besides, ranks that lost this one may say so, and each rank writes events of its own.
    verdict.expect(any("cannot be" in line for line in errors), f"the errors do not say what cannot be done: {errors}")
    verdict.expect("Traceback" not in attempt.text_of_ranks(), "a traceback was shown")
    verdict.whole(output, reference)
    left = [path.name for path in output.rglob("*.tmp")]
    verdict.expect(not left, f"temporary files left: {', '.join(left)}")
    return {"end_seconds": seconds}


@contextmanager
def _file_system(folder: Path, options: str) -> Iterator[None]:
    if os.geteuid() != 0:
        raise SystemExit("this trial mounts file systems; run it as root")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _remount(folder: Path, options: str, verdict: Verdict) -> None:
    """The kernel refuses while a file is open for writing, so it is asked until none is."""
    deadline = time.monotonic() + 10
    command = ["mount", "-o", f"remount,{options}", str(folder)]
    while subprocess.run(command, capture_output=True, check=False).returncode != 0:
        if time.monotonic() > deadline:
            verdict.problems.append(f"cannot remount with {options}")
            return
