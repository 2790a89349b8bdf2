"""The same bytes on any number of ranks, and when a job goes on with another number than it began with."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import repeat

from tests.faults import jobs, launch
from tests.faults.injected import Fault
from tests.faults.jobs import Job
from tests.faults.trial import Bench, Record, Verdict

SIZES = (1, 2, 3, 4, 8)


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """options.count: restarts with another number of ranks, for each job."""
    for name in bench.names:
        job = bench.job(name)
        yield from (one_size(bench, job, ranks) for ranks in SIZES)
        pairs = [(a, b) for a in SIZES[:4] for b in SIZES[:4] if a != b]
        bench.draw.shuffle(pairs)
        yield from (one_pair(bench, job, pair) for pair in pairs[: options.count])


def one_size(bench: Bench, job: Job, ranks: int) -> Record:
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    bench.finish(job, output, [ranks], verdict)
    verdict.same_bytes(output, reference)
    return verdict.record("worlds", job, f"{ranks} ranks")


def one_pair(bench: Bench, job: Job, pair: Sequence[int]) -> Record:
    """Killed behind a layer that is drawn, finished on another number of ranks."""
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    layer = bench.draw.randrange(1, jobs.committed(reference))
    fault = Fault("kill", "renamed", "commits/manifest.json", layer, 0)
    attempt = launch.start(job, output, pair[0], fault=str(fault))
    attempt.wait()
    verdict.ended(attempt)
    verdict.expect(jobs.committed(output) == layer, f"{jobs.committed(output)} layers committed, not {layer}")
    bench.finish(job, output, repeat(pair[1]), verdict)
    verdict.same_bytes(output, reference)
    return verdict.record("worlds", job, f"{pair[0]} ranks to layer {layer}, then {pair[1]}")
