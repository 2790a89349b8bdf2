"""Four jobs of one user on one machine at once: no port, file or folder in each other's way."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from tests.faults import launch
from tests.faults.trial import Bench, Record, Verdict, exit_code


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """options.count: crowds of four."""
    for _ in range(options.count):
        chosen = [bench.job(bench.names[number % len(bench.names)]) for number in range(4)]
        references = [bench.reference(job) for job in chosen]
        outputs, verdicts = [bench.output() for _ in chosen], [Verdict() for _ in chosen]
        attempts = [launch.start(job, output, 2) for job, output in zip(chosen, outputs, strict=True)]
        # All of them have to end before the first is judged.
        codes = [exit_code(attempt, attempt.wait()) for attempt in attempts]
        for job, verdict, attempt, code, output, reference in zip(
            chosen, verdicts, attempts, codes, outputs, references, strict=True
        ):
            verdict.expect(code == 0, f"ended with {code}: {attempt.text()[-300:]}")
            verdict.ended(attempt)
            verdict.same_bytes(output, reference)
            yield verdict.record("crowd", job, "one of four at once, 2 ranks each")
