"""SIGKILL at random moments: of a rank, of torchrun, or of all processes at once; then a restart on other ranks."""

from __future__ import annotations

import json
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import repeat
from pathlib import Path
from statistics import median

from tests.faults import jobs, launch
from tests.faults.jobs import Job
from tests.faults.trial import Bench, Record, Verdict, finish

SIZES = (1, 2, 3)
VICTIMS = ("rank", "rank", "launcher", "all")
_KILLS_PER_JOB = 4


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """One record per job: up to 4 kills, then it is left to finish. options.count: kills in all."""
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
        attempt = launch.start(job, output, ranks)
        moment = _moment(bench, job, output, ranks, attempt)
        done = not attempt.wait_until(moment)
        if not done:
            kill = {"victim": victim, "ranks": ranks, "after": round(attempt.seconds, 1)}
            struck = time.monotonic()
            strike(attempt, victim, bench)
            attempt.wait()
            attempt.wait_for_ranks()
            kills.append({**kill, "end": round(time.monotonic() - struck, 1), "commits": jobs.committed(output)})
            verdict.whole(output, reference)
        verdict.ended(attempt)
    ranks = bench.draw.choice(SIZES)
    back = _Recovery(output)
    finish(job, output, repeat(ranks), verdict)
    verdict.same_bytes(output, reference)
    ends = [kill["end"] for kill in kills] or [0.0]
    return verdict.record("kills", job, f"{len(kills)} kills, finished on {ranks} ranks", kills=kills,
                          end_seconds=median(ends), recovery_seconds=back.seconds())  # fmt: skip


def _moment(bench: Bench, job: Job, output: Path, ranks: int, attempt: launch.Attempt) -> Callable[[], bool]:
    """When to strike: in one of four cases at any time from the start, else while layers are solved."""
    # Two cores: several ranks take longer than one.
    slower = 1.6 if ranks > 1 else 1.0
    if bench.draw.random() < 0.25:
        after = bench.draw.uniform(0.2, slower * bench.seconds(job))
        return lambda: attempt.seconds > after
    started, after = _starts(output), bench.draw.uniform(0, slower * bench.solving_seconds(job))
    begun: list[float] = []

    def reached() -> bool:
        if not begun and _starts(output) > started:
            begun.append(attempt.seconds)
        return bool(begun) and attempt.seconds > begun[0] + after

    return reached


def _starts(output: Path) -> int:
    """How many attempts came as far as the first layer."""
    path = output / "events" / "rank-0.jsonl"
    return path.read_text(encoding="utf-8").count('"event": "start"') if path.exists() else 0


def strike(attempt: launch.Attempt, victim: str, bench: Bench) -> None:
    ranks = sorted(attempt.ranks().values())
    if victim == "rank" and ranks:
        launch.kill(bench.draw.choice(ranks), signal.SIGKILL)
    elif victim == "launcher":
        attempt.process.kill()
    else:
        # No rank has started yet, or all are meant.
        attempt.kill_all()


class _Recovery:
    """Seconds from now to the moment at which the job is behind its commits again, by the events of rank 0."""

    def __init__(self, output: Path) -> None:
        self._path = output / "events" / "rank-0.jsonl"
        self._now = time.time()

    def seconds(self) -> float | None:
        events = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
        times = [datetime.fromisoformat(event["time"]).timestamp() for event in events
                 if event["event"] == "done" or (event["event"] == "layer" and not event["resumed"])]  # fmt: skip
        later = [time for time in times if time > self._now]
        return round(later[0] - self._now, 1) if later else None
