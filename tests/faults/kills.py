"""SIGKILL at random moments: of a rank, of torchrun, or of all processes at once; then a restart on other ranks."""

from __future__ import annotations

import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import repeat
from statistics import median

from tests.faults import jobs, launch
from tests.faults.jobs import Job
from tests.faults.trial import Bench, Record, Verdict, seconds_to_next_layer

SIZES = (1, 2, 3)
VICTIMS = ("rank", "rank", "launcher", "all")
_KILLS_PER_JOB = 9


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """One record per job: up to 9 kills, then it is left to finish. options.count: kills in all."""
    left, number = options.count, 0
    while left > 0:
        job = bench.job(bench.names[number % len(bench.names)])
        record = one_job(bench, job, min(left, bench.draw.randint(1, _KILLS_PER_JOB)))
        left -= len(record["kills"])
        number += 1
        yield record


def one_job(bench: Bench, job: Job, num_kills: int) -> Record:
    """Kill a job so many times (less often if it finishes before), then let it finish."""
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    kills: list[Record] = []
    done = False
    while len(kills) < num_kills and not done:
        ranks, victim = bench.draw.choice(SIZES), bench.draw.choice(VICTIMS)
        attempt, reached = bench.start(job, output, ranks)
        done = not attempt.wait_until(reached)
        if not done:
            kill = {"victim": victim, "ranks": ranks, "after": round(attempt.seconds, 1)}
            struck = time.monotonic()
            strike(attempt, victim, bench)
            attempt.thaw()
            attempt.wait()
            attempt.wait_for_ranks()
            kills.append({**kill, "end": round(time.monotonic() - struck, 1), "commits": jobs.committed(output)})
            verdict.whole(output, reference)
        verdict.ended(attempt)
    ranks = bench.draw.choice(SIZES)
    before = time.time()
    bench.finish(job, output, repeat(ranks), verdict)
    verdict.same_bytes(output, reference)
    ends = [kill["end"] for kill in kills] or [0.0]
    return verdict.record("kills", job, f"{len(kills)} kills, finished on {ranks} ranks", kills=kills,
                          end_seconds=median(ends), recovery_seconds=seconds_to_next_layer(output, before))  # fmt: skip


def strike(attempt: launch.Attempt, victim: str, bench: Bench) -> None:
    ranks = sorted(attempt.ranks().values())
    if victim == "rank" and ranks:
        launch.kill(bench.draw.choice(ranks), signal.SIGKILL)
    elif victim == "launcher":
        attempt.process.kill()
    else:
        # No rank has started yet, or all are meant.
        attempt.kill_all()
