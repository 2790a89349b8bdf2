"""SIGTERM and SIGUSR2 at seeded moments: the job saves, says so, ends with 75, and goes on to the same bytes."""

from __future__ import annotations

import json
import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

from tests.faults import jobs, launch
from tests.faults.injected import Fault
from tests.faults.jobs import Job
from tests.faults.trial import TRY_AGAIN, Bench, Record, Verdict, exit_code

# Who gets the signal: torchrun, as from a scheduler, which hands SIGTERM on; all ranks; one of them; one of them, when
# it is about to rename a file or to talk.
KINDS = ("torchrun", "ranks", "one rank", "in a save", "in a collective", "twice")
# On a machine with more to do than cores: a step, a save, the end of a process. A second signal needs none of these.
_LIMIT, _LIMIT_TWICE = 30.0, 5.0


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """options.count: cases, of all kinds in turn."""
    for number in range(options.count):
        job = bench.job(bench.draw.choice(bench.names))
        yield one_stop(bench, job, KINDS[number % len(KINDS)], bench.draw.choice((1, 2, 3)))


def one_stop(bench: Bench, job: Job, kind: str, ranks: int) -> Record:
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    fault = _fault(bench, kind, ranks) if kind.startswith("in ") else None
    number = signal.SIGTERM
    seconds = None
    if fault is not None:
        attempt = launch.start(job, output, ranks, fault=str(fault))
    else:
        attempt, reached = bench.start(job, output, ranks)
        begun = attempt.wait_until(reached)
        number = (
            signal.SIGTERM if kind in ("torchrun", "twice") else bench.draw.choice((signal.SIGTERM, signal.SIGUSR2))
        )
        struck = time.monotonic()
        if begun:
            _send(attempt, kind, number, bench)
            attempt.thaw()
        attempt.wait_until(lambda: not attempt.ranks())
        seconds = round(time.monotonic() - struck, 1)
        limit = _LIMIT_TWICE if kind == "twice" else _LIMIT
        verdict.expect(
            bench.in_time(seconds, limit), f"the ranks ended {seconds} s after the signal, the limit is {limit:.0f} s"
        )
    code = exit_code(attempt, attempt.wait())
    verdict.ended(attempt)
    # A signal at the very end may come too late.
    done = (output / "quantized.json").exists()
    verdict.expect(code == TRY_AGAIN or (code == 0 and done), f"the job ended with {code}, not with {TRY_AGAIN}")
    verdict.expect("Traceback" not in attempt.text_of_ranks(), "a traceback was shown")
    _check_status(output, verdict, code, kind)
    verdict.whole(output, reference)
    layers = jobs.committed(output)
    bench.finish(job, output, repeat(bench.draw.choice((1, 2, 3))), verdict)
    verdict.same_bytes(output, reference)
    what = f"{number.name} to {kind}" if fault is None else str(fault)
    return verdict.record("stop", job, f"{what}, {ranks} ranks, behind layer {layers}", end_seconds=seconds)


def _fault(bench: Bench, kind: str, ranks: int) -> Fault:
    action = bench.draw.choice(("term", "usr2"))
    if kind == "in a collective" and ranks > 1:
        return Fault(action, "talk", "-", bench.draw.randint(20, 90), bench.draw.randrange(ranks))
    point = bench.draw.choice(("unsynced", "unrenamed", "renamed"))
    return Fault(action, point, "commits/manifest.json", bench.draw.randint(1, 7), 0)


def _send(attempt: launch.Attempt, kind: str, number: signal.Signals, bench: Bench) -> None:
    pids = sorted(attempt.ranks().values())
    if kind == "torchrun" or not pids:
        launch.kill(attempt.process.pid, signal.SIGTERM)
        return
    for _ in range(2 if kind == "twice" else 1):
        for pid in [bench.draw.choice(pids)] if kind == "one rank" else pids:
            launch.kill(pid, number)


def _check_status(output: Path, verdict: Verdict, code: int, kind: str) -> None:
    path = output / "status.json"
    if not path.exists():
        return
    status = json.loads(path.read_bytes())
    found = (status["state"], status["exit_code"])
    # A process that has done its work can still be asked to end; torchrun then ends with 1.
    if code == 0 or found[0] == "done":
        verdict.expect(found == ("done", 0), f"the status of a job that is done is {found}")
        verdict.expect((output / "quantized.json").exists(), "the status is done, but nothing was published")
    elif kind == "twice":
        verdict.expect(found[0] in ("running", "stopped"), f"the status is {found}")
    else:
        # Signals that come before a rank listens end it as they always did, and the others lose a peer.
        verdict.expect(found in (("stopped", 75), ("running", None), ("failed", 75)), f"the status is {found}")
