"""The clock jumps between two starts of a job, or in the middle of one. Needs the program faketime."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Iterator
from itertools import repeat

from tests.faults import jobs, launch
from tests.faults.injected import Fault
from tests.faults.jobs import Job
from tests.faults.trial import Bench, Record, Verdict, exit_code, finish

SHIFTS = ("+400d", "-1d")
# Real machines have a clock that no date can move, for durations.
_ENVIRONMENT = {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """options.count: rounds of both shifts, between starts and in mid-job."""
    if shutil.which("faketime") is None:
        raise SystemExit("this trial needs the program faketime (apt-get install faketime)")
    for _ in range(options.count):
        for shift in SHIFTS:
            yield between_starts(bench, bench.job(bench.draw.choice(bench.names)), shift)
            yield in_mid_job(bench, bench.job(bench.draw.choice(bench.names)), shift)


def between_starts(bench: Bench, job: Job, shift: str) -> Record:
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    layer = bench.draw.randrange(1, jobs.committed(reference))
    attempt = launch.start(job, output, 2, fault=str(Fault("kill", "renamed", "commits/manifest.json", layer, 0)))
    attempt.wait()
    verdict.ended(attempt)
    finish(job, output, repeat(2), verdict, prefix=("faketime", "-f", shift), extra_environment=_ENVIRONMENT)
    verdict.same_bytes(output, reference)
    return verdict.record("clock", job, f"{shift} between two starts")


def in_mid_job(bench: Bench, job: Job, shift: str) -> Record:
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    setting = bench.root / f"clock-{output.name}"
    setting.write_text("+0d\n", encoding="ascii")
    attempt = launch.start(
        job,
        output,
        2,
        prefix=("faketime", "-f", "+0d"),
        extra_environment=_ENVIRONMENT | {"FAKETIME_TIMESTAMP_FILE": str(setting), "FAKETIME_NO_CACHE": "1"},
    )
    layers = bench.draw.randrange(1, jobs.committed(reference) - 1)
    verdict.expect(attempt.wait_until(lambda: jobs.committed(output) >= layers), "it ended before the fault")
    setting.write_text(f"{shift}\n", encoding="ascii")
    code = exit_code(attempt, attempt.wait())
    verdict.ended(attempt)
    verdict.expect(code == 0, f"ended with {code}: {attempt.text()[-300:]}")
    verdict.same_bytes(output, reference)
    events = (output / "events" / "rank-0.jsonl").read_text(encoding="utf-8").splitlines()
    days = {line[:21] for line in events}
    verdict.expect(len(days) > 1, "the clock did not jump")
    return verdict.record("clock", job, f"{shift} in mid-job")
