"""SIGKILL inside a save: with an empty temporary file, a half one, before sync, before and after the rename."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from itertools import repeat
from shutil import copytree

from tests.faults import launch
from tests.faults.injected import SAVE_POINTS, Fault
from tests.faults.jobs import PUBLISHED, Job
from tests.faults.trial import Bench, Record, Verdict

# (file, for which time it is written, by which rank): commits early and late, events of both ranks, the results.
SAVES = (
    ("commits/manifest.json", 1, 0),
    ("commits/manifest.json", 6, 0),
    (".safetensors", 1, 0),
    (".safetensors", 5, 0),
    ("events/rank-0.jsonl", 2, 0),
    ("events/rank-1.jsonl", 3, 1),
    *((name, 1, 0) for name in (*PUBLISHED, "report.json", "status.json")),
)


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """options.count: how many of the cases; they come in a seeded order, with jobs and numbers of ranks drawn."""
    cases = [Fault("kill", point, *save) for save in SAVES for point in SAVE_POINTS]
    bench.draw.shuffle(cases)
    for fault in cases[: options.count]:
        yield one_save(bench, bench.job(bench.draw.choice(bench.names)), fault)


def one_save(bench: Bench, job: Job, fault: Fault) -> Record:
    """Half of the jobs that die while they write results do so when they run again, over results that must stay."""
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    again = fault.file in PUBLISHED and bench.draw.random() < 0.5
    if again:
        copytree(reference, output)
    ranks = max(fault.rank + 1, bench.draw.choice((1, 2)))
    attempt = launch.start(job, output, ranks, fault=str(fault))
    code = attempt.wait()
    verdict.expect(code != 0, "the fault did not strike")
    verdict.ended(attempt)
    verdict.whole(output, reference)
    later = bench.draw.choice((1, 2, 3))
    bench.finish(job, output, repeat(later), verdict)
    verdict.same_bytes(output, reference)
    return verdict.record("saves", job, f"{fault} on {ranks}{', second run' if again else ''}, finished on {later}")
