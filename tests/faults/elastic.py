"""torchrun restarts the ranks itself: `--max-restarts=3`, a rank killed in mid-job, no restart from outside."""

from __future__ import annotations

import signal
import time
from argparse import Namespace
from collections.abc import Iterator

from tests.faults import jobs, launch
from tests.faults.jobs import Job
from tests.faults.trial import Bench, Record, Verdict


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """options.count: kills, one for each job."""
    for number in range(options.count):
        yield one_restart(bench, bench.job(bench.names[number % len(bench.names)]), bench.draw.choice((2, 3)))


def one_restart(bench: Bench, job: Job, ranks: int) -> Record:
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    layers = bench.draw.randrange(1, jobs.committed(reference) - 1)
    attempt = launch.start(job, output, ranks, torchrun=("--standalone", "--max-restarts=3"))
    verdict.expect(attempt.wait_until(lambda: jobs.committed(output) >= layers), "it ended before the fault")
    victims = attempt.ranks()
    rank = bench.draw.choice(sorted(victims))
    launch.kill(victims[rank], signal.SIGKILL)
    struck, before = time.monotonic(), jobs.committed(output)
    attempt.wait_until(lambda: jobs.committed(output) > before)
    seconds = round(time.monotonic() - struck, 1)
    code = attempt.wait()
    verdict.ended(attempt)
    verdict.expect(code == 0, f"torchrun ended with {code}: {attempt.text()[-300:]}")
    verdict.same_bytes(output, reference)
    return verdict.record("elastic", job, f"rank {rank} of {ranks} behind layer {before}", recovery_seconds=seconds)
