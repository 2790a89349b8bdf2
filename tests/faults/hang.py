"""A rank that is alive but does nothing: stopped by SIGSTOP before ranks talk, in a save, or while it starts."""

from __future__ import annotations

import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import repeat

from tests.faults import launch
from tests.faults.injected import Fault
from tests.faults.jobs import Job
from tests.faults.trial import Bench, Record, Verdict, exit_code

KINDS = ("talk", "save", "start")
TIMEOUT = 12.0
# So much later than the timeout the others may be gone: torch looks now and then, the ranks ask each other who is
# missing, let one of them speak, and end, on a machine with more to do than cores.
_GRACE = 30.0
# torchrun leaves a rank that does not answer SIGTERM that long before it is killed.
_SHUTDOWN = 4


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """options.count: cases."""
    for number in range(options.count):
        job = bench.job(bench.draw.choice(bench.names))
        ranks = bench.draw.choice((2, 3))
        rank = bench.draw.randrange(ranks)
        kind = KINDS[number % len(KINDS)]
        yield one_hang(bench, job, kind, ranks, rank)


def one_hang(bench: Bench, job: Job, kind: str, ranks: int, rank: int, timeout: float = TIMEOUT) -> Record:
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    fault = {
        "talk": Fault("freeze", "talk", "-", bench.draw.randint(1, 90), rank),
        "save": Fault("freeze", "unrenamed", "commits/manifest.json", bench.draw.randint(1, 6), 0),
        "start": None,
    }[kind]
    attempt = launch.start(
        job,
        output,
        ranks,
        fault=None if fault is None else str(fault),
        settings=[f"runtime.timeout_minutes={timeout / 60}"],
        torchrun=("--standalone", "--max-restarts=0", f"--shutdown-timeout={_SHUTDOWN}"),
    )
    if fault is None:
        attempt.wait_until(lambda: rank in attempt.ranks())
        launch.kill(attempt.ranks()[rank], signal.SIGSTOP)
    verdict.expect(attempt.wait_until(lambda: bool(attempt.frozen())), "the fault did not strike")
    frozen = attempt.frozen()
    since = time.monotonic()
    others = [pid for pid in attempt.ranks().values() if pid not in frozen]
    attempt.wait_until(lambda: not any(launch.alive(pid) for pid in others))
    seconds = round(time.monotonic() - since, 1)
    code = exit_code(attempt, attempt.wait())
    verdict.ended(attempt)
    # Joining has no limit that a rank which is starting could be late by: the others may still be importing torch.
    limit = timeout + _GRACE + (bench.seconds(job) if kind == "start" else 0)
    verdict.expect(bench.in_time(seconds, limit), f"the other ranks waited {seconds} s, the limit is {limit:.0f} s")
    verdict.expect(code == 75, f"the job ended with {code}, not with 75")
    errors = [line for line in attempt.text().splitlines() if line.startswith("error: ")]
    verdict.expect(bool(errors), "nobody said why")
    verdict.whole(output, reference)
    bench.finish(job, output, repeat(bench.draw.choice((1, 2, 3))), verdict)
    verdict.same_bytes(output, reference)
    where = str(fault) if fault else f"rank {rank} while it starts"
    return verdict.record("hang", job, f"{where}, {ranks} ranks, timeout {timeout:.0f} s", end_seconds=seconds,
                          said=errors[:1])  # fmt: skip
