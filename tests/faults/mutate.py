"""Odd job files, damaged files and odd numbers by the thousand: `python -m tests.faults.mutate --count 10000`.

Every trial is a hypothesis strategy and a check. The normal test run takes a few fixed examples of each
(test_mutate.py). Here each trial runs in a process of its own, so that a crash, a hang or a bomb is seen and counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tests.faults import damaged_files, job_checks, job_files, properties
from tests.faults.byte_changes import changes

Check = Callable[[Any], None]
# One example may take this long.
_EXAMPLE_SECONDS = 30
# A trial of so many examples that takes longer hangs.
_SECONDS_FOR = 0.5


class HangError(BaseException):
    """An example did not end. No Exception, which the readers would take for a damaged file."""


@dataclass(frozen=True)
class Trial:
    """What is drawn, and the check, for which a folder is given. share: of --count."""

    strategy: Callable[[], st.SearchStrategy[Any]]
    check: Callable[[Path], Check]
    share: float = 0.2


def _job_texts() -> st.SearchStrategy[Any]:
    return st.tuples(job_files.job_texts(), job_files.overrides())


TRIALS: dict[str, Trial] = {
    "job files": Trial(_job_texts, job_checks.check_text, 1),
    "jobs": Trial(job_files.likely_jobs, lambda _: job_checks.check_value, 0.3),
    "spoiled jobs": Trial(job_files.spoiled_jobs, lambda _: job_checks.check_value, 0.7),
    **{name: Trial(changes, partial(damaged_files.check_of, kind)) for name, kind in damaged_files.KINDS.items()},
    **{
        f"forged {name}": Trial(
            lambda: st.tuples(st.integers(0, 50), changes()),
            partial(damaged_files.forged_check_of, damaged_files.KINDS[name]),
        )
        for name in ("npz", "pt", "weights.pt", "program.pt2")
    },
    **{
        f"commits, {name}": Trial(changes, partial(damaged_files.commits_check, name)) for name in damaged_files.COMMITS
    },
    "solver states": Trial(changes, damaged_files.states_check),
    "status": Trial(changes, damaged_files.status_check),
    **{
        f"changed after listing, {name}": Trial(changes, partial(damaged_files.shards_check, name), 0.05)
        for name in ("npy", "pt")
    },
    **{
        name: Trial(strategy, lambda _, check=check: check, 0.1)
        for name, (strategy, check) in properties.PROPERTIES.items()
    },
}


def hunt(trial: Trial, folder: Path, examples: int, seed: int | None) -> int:
    """Run the check on so many examples; the smallest one that fails is raised. seed: None for the same ones always.

    Returns the number of examples.
    """
    check, num_run = trial.check(folder), 0

    @settings(
        max_examples=examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(trial.strategy())
    def run(example: Any) -> None:
        nonlocal num_run
        num_run += 1
        check(example)

    (run if seed is None else hypothesis.seed(seed)(run))()
    return num_run


def _work(name: str, folder: str, examples: int, seed: int, pipe: Any) -> None:
    """A trial in its own process. Sends what came of it."""

    def hang(*_: object) -> None:
        raise HangError(f"an example took more than {_EXAMPLE_SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    logging.disable()
    warnings.simplefilter("ignore")
    trial = TRIALS[name]
    build = trial.check

    def timed(place: Path) -> Check:
        check = build(place)

        def run(example: Any) -> None:
            signal.alarm(_EXAMPLE_SECONDS)
            try:
                check(example)
            finally:
                signal.alarm(0)

        return run

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem = ""
    num_run = 0
    try:
        num_run = hunt(Trial(trial.strategy, timed, trial.share), Path(folder), examples, seed)
    except BaseException:
        problem = traceback.format_exc()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pipe.send((num_run, problem[-6000:], grown / 1024))


def run(_: object, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All trials, one record each. options: count and seed; only, if given: names of trials."""
    context = multiprocessing.get_context("spawn")
    for name, trial in TRIALS.items():
        if getattr(options, "only", None) and name not in options.only:
            continue
        examples = max(1, round(options.count * trial.share))
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="adaround-mutate-") as folder:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(name, folder, examples, options.seed, theirs))
            worker.start()
            theirs.close()
            num_run, problem, grown = _outcome(worker, ours, 60 + examples * _SECONDS_FOR)
        yield {
            "trial": "mutate",
            "job": name,
            "case": f"{num_run} examples",
            "ok": not problem,
            "problems": [problem] if problem else [],
            "examples": num_run,
            "seconds": round(time.monotonic() - started, 1),
            "grown_mib": round(grown),
        }


def _outcome(worker: Any, pipe: Any, seconds: float) -> tuple[int, str, float]:
    try:
        if pipe.poll(seconds):
            outcome: tuple[int, str, float] = pipe.recv()
            return outcome
        return 0, f"did not end in {seconds:.0f} s", 0.0
    except EOFError:
        worker.join()
        return 0, f"died with exit code {worker.exitcode}", 0.0
    finally:
        worker.kill()
        worker.join()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutate", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="job files; a fifth of it for each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=tuple(TRIALS), metavar="TRIAL")
    bad = 0
    for record in run(None, parser.parse_args(arguments)):
        print(json.dumps(record | {"problems": []}), flush=True)
        for problem in record["problems"]:
            print(problem, flush=True)
        bad += not record["ok"]
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
